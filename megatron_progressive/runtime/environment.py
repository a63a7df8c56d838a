"""What ``mprog env`` shows: versions, devices, and what the fast path lacks, with how to get it;
and how many cores a rank has."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTIONS = (
    "torch", "megatron-core", "deepspeed", "transformer-engine", "emerging-optimizers", "triton",
)  # fmt: skip
"""The distributions whose versions are listed; Python and apex are listed beside them."""

BUILT_FOR_THIS_TORCH = "install one that was built for this torch, or none"


@dataclass(frozen=True)
class Environment:
    """What :func:`environment` finds."""

    versions: dict[str, str | None]
    """The version of each distribution, by its name; None where it is not installed."""
    devices: list[str]
    """The names of the CUDA devices."""
    missing: list[str]
    """What the fast path lacks and how to get it, one line for each."""


def version_of(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def apex_version(find: Callable[[str], object] = importlib.util.find_spec) -> str | None:
    """The version of NVIDIA's apex. PyPI has another distribution of that name; only NVIDIA's has
    the kernels."""
    if find("fused_weight_gradient_mlp_cuda") is None:
        return None
    return version_of("apex") or "of NVIDIA's image"


def unusable_transformer_engine() -> str | None:
    """What an installed Transformer Engine says when it cannot be imported, for example because it
    was built for another torch; Megatron-core cannot be imported then either. None where all is
    well."""
    version = version_of("transformer-engine")
    if version is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # of the linker, of CUDA or its own
        cause = " ".join(str(error).split())
        return f"{version}, which cannot be imported ({type(error).__name__}: {cause})"
    return None


def missing_lines(versions: dict[str, str | None], devices: list[str]) -> list[str]:
    """What the fast path lacks, one line for each thing; no lines where nothing is missing."""
    how = {
        "transformer-engine": "fused layers, attention and grouped GEMM: use NVIDIA's PyTorch "
        "image (nvcr.io/nvidia/pytorch), or `pip install transformer-engine[pytorch,core_cu13]` "
        "where there is CUDA (not elsewhere)",
        "triton": "the symmetric kernel of Newton-Schulz: `pip install triton` (Linux)",
        "deepspeed": "`parallel.engine: deepspeed`: `DS_BUILD_OPS=0 pip install deepspeed==0.19.8`",
        "megatron-core": "training at all: `pip install megatron-core==0.19.2`",
    }
    lines = [f"{name}: {text}" for name, text in how.items() if versions.get(name) is None]
    if not devices:
        lines.insert(0, "a CUDA device: without one everything runs on the CPU over gloo")
    return lines


def cuda_memory_gib() -> list[float]:
    """The memory of each CUDA device, in GiB. Loads torch."""
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(number) for number in range(devices)]
    return [properties.total_memory / 2**30 for properties in found]


def environment() -> Environment:
    """What this machine has. Loads torch, and Transformer Engine where that is installed."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions |= {name: version_of(name) for name in DISTRIBUTIONS}
    versions["torch"] = torch.__version__  # with its build: +cpu, +cu130
    versions["apex"] = apex_version()
    devices = []
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(number)
            devices.append(f"{found.name}, {found.total_memory / 2**30:.0f} GiB")
    missing = missing_lines(versions, devices)
    unusable = unusable_transformer_engine()
    if unusable is not None:
        missing.append(f"transformer-engine: {unusable}: {BUILT_FOR_THIS_TORCH}")
    return Environment(versions, devices, missing)


def render(found: Environment) -> str:
    """The lines that the command prints."""
    lines = [f"{name:<20} {version or 'not installed'}" for name, version in found.versions.items()]
    lines.append(f"{'devices':<20} {'; '.join(found.devices) or 'CPU only'}")
    if found.missing:
        lines += ["", "missing for the fast path:", *(f"- {line}" for line in found.missing)]
    return "\n".join(lines)


def cores_of_this_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Processor cores that this process may compute on without taking those of other ranks.

    A process that was bound to some of the machine's cores has these; else the machine's are
    divided over its ranks, whose number is torchrun's ``LOCAL_WORLD_SIZE`` (which ``--nproc`` sets
    as well) or Slurm's tasks on a node.
    """
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if mine < (os.cpu_count() or 1):
        return mine
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_NTASKS", "1"))
    ranks = environment.get("LOCAL_WORLD_SIZE", tasks)
    number = re.match(r"\d+", ranks)  # Slurm has "8(x2)" for 8 tasks on each of two nodes
    return max(1, mine // max(1, int(number[0]) if number else 1))
