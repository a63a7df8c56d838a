"""The GPUs that a plan is for.

Every number of the table is from a data sheet; none was measured here. The memory is what the
driver reports as total, rounded down; the data sheets' decimal "80 GB" and "141 GB" are names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_progressive.config import ConfigError

MFU = 0.40
"""Model FLOPs utilisation of the compute alone, which is AN ASSUMPTION. Llama 3 reports 38 to 43 %
on 8,192 to 16,384 H100 with all communication and bubbles in it (arXiv 2407.21783, table 4). The
estimate adds communication and bubbles to this number, so that it is on the slow side for large
models on good networks; small models, and anything that was not tuned, may well be slower."""

RESERVE = 0.10
"""The share of the memory that a plan leaves alone, for the CUDA context, NCCL's buffers,
fragmentation of the allocator and workspaces of kernels. This is an assumption."""


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes."""

    gpu: str
    memory_gib: float
    peak_tflops: float
    """Peak rate of dense bf16 products, in 1e12 FLOPs per second."""
    nvlink_gb_per_s: float
    """Rate of NVLink for one GPU, each way, in 1e9 bytes per second."""
    network_gb_per_s: float
    """Rate of the network from one GPU to other nodes, each way, in 1e9 bytes per second."""
    gpus_per_node: int = 8
    cores: int = 14
    """Processor cores for each GPU."""
    mfu: float = MFU

    @property
    def usable_bytes(self) -> float:
        """The memory of a GPU without the reserve, in bytes."""
        return self.memory_gib * 2**30 * (1 - RESERVE)

    @property
    def flops_per_s(self) -> float:
        """The FLOPs per second that a GPU is expected to reach while it computes."""
        return self.peak_tflops * 1e12 * self.mfu

    def bytes_per_s(self, span: int) -> float:
        """The bytes per second of one GPU in a group of ``span`` neighbouring ranks, over the
        slowest link in it."""
        inside = span <= self.gpus_per_node
        return 1e9 * (self.nvlink_gb_per_s if inside else self.network_gb_per_s)


GPUS = {
    # NVIDIA A100 data sheet (SXM, 80 GB): 312 TFLOP/s dense bf16, NVLink 600 GB/s both ways
    # together; DGX A100: 8 GPUs, a 200 Gbit/s adapter each, 128 cores
    "a100": Cluster("a100", 79.0, 312.0, 300.0, 25.0, cores=16),
    # NVIDIA H100 data sheet (SXM, 80 GB): 1,979 TFLOP/s bf16 with sparsity, so 989 dense; NVLink
    # 900 GB/s both ways together; DGX H100: 8 GPUs, a 400 Gbit/s adapter each, 112 cores
    "h100": Cluster("h100", 79.0, 989.0, 450.0, 50.0),
    # H800 (SXM, 80 GB), on which DeepSeek-V3 was trained: an H100 whose NVLink has 400 GB/s both
    # ways together; 8 GPUs a node, InfiniBand of 50 GB/s each (arXiv 2412.19437, section 3)
    "h800": Cluster("h800", 79.0, 989.0, 200.0, 50.0),
    # NVIDIA H200 data sheet (SXM, 141 GB): compute, links and cores of the H100
    "h200": Cluster("h200", 139.0, 989.0, 450.0, 50.0),
}


def make_cluster(gpu: str | None, numbers: dict[str, float | None]) -> Cluster | None:
    """A GPU of the table, some of whose numbers may be replaced; None where no GPU is named.

    Args:
        numbers: ``gpu_memory_gib``, ``peak_tflops``, ``mfu`` and ``link_gb_per_s``, the options of
            ``mprog plan``; None keeps the table's.

    Raises:
        ConfigError: the GPU is not in the table, a number is out of range, or a number is given
            without a GPU.
    """
    given = {name: value for name, value in numbers.items() if value is not None}
    if gpu is None:
        for name in given:
            if name != "link_gb_per_s":  # which plans without a cluster have as well
                raise ConfigError(f"{_option(name)}: got no --gpu; accepted: with --gpu")
        return None
    if gpu not in GPUS:
        raise ConfigError(f"--gpu: got {gpu!r}; accepted: {', '.join(GPUS)}")
    for name, value in given.items():
        most = 1.0 if name == "mfu" else 1e9
        if not 0 < value <= most:  # NaN fails too
            bound = "above 0, up to 1" if name == "mfu" else "above 0"
            raise ConfigError(f"{_option(name)}: got {value:g}; accepted: a number {bound}")
    return replace(GPUS[gpu], **{_FIELDS[name]: value for name, value in given.items()})  # type: ignore[arg-type]


_FIELDS = {
    "gpu_memory_gib": "memory_gib",
    "peak_tflops": "peak_tflops",
    "mfu": "mfu",
    "link_gb_per_s": "network_gb_per_s",
}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
