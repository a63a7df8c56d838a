"""Zero/one-layer progressive training on Megatron-core: expand depth late, in the running job."""

__version__ = "0.1.0"
