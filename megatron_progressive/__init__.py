"""Progressive training on Megatron-core: start with zero layers or one, and expand the depth late
in the running job."""

__version__ = "0.1.0"
