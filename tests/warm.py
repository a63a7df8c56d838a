"""Imports what ranks need, once, in a process that then forks them.

Importing Megatron-core and DeepSpeed takes each fresh interpreter some ten seconds.
"""

from __future__ import annotations

import gc
import os

os.environ.update(OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")


def _import_everything() -> None:
    import torch

    from megatron_progressive.runtime import cpu
    from megatron_progressive.runtime.distributed import prepare_imports

    torch.set_num_threads(1)
    prepare_imports()
    cpu.install()
    import megatron_progressive.engines.deepspeed
    import megatron_progressive.engines.megatron
    import megatron_progressive.train.loop  # noqa: F401

    gc.collect()
    gc.freeze()


_import_everything()
