"""A CUDA device without a GPU: torch's own CUDA build runs on it.

The libraries that torch's CUDA build calls (runtime, driver, cuBLAS, cuDNN, NCCL) are replaced by
one that is built here with g++ from ``native/`` and preloaded. Device memory is lazily mapped host
memory, so torch's caching allocator, its peaks and its out-of-memory errors are real; NCCL moves
bytes between processes; kernels are counted by name and not run. What is done about arithmetic
depends on the mode:

=========== =======================================================================================
counting    Nothing is computed: memory, communicators, kernel launches. One process can be one
            rank of thousands, without peers (:func:`environment`, ``alone``).
computing   Each aten operation is computed on the host: numbers are right.
checking    As computing, and refuses what a GPU would not forgive: a CPU tensor handed to NCCL,
            tensors of two devices in one operation, collectives that differ between ranks,
            point-to-point operations that deadlock in issue order, memory used after it was
            freed, and a stream that reads what another has not finished writing.
=========== =======================================================================================

It lives in the package, and not among its tools, because ``mprog plan --dry-run`` needs it
wherever the package is installed. Nothing here knows the rest of the package.
"""

from megatron_progressive.standin.build import available
from megatron_progressive.standin.environment import MODES, environment, forget

__all__ = ["MODES", "available", "environment", "forget"]
