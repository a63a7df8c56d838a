"""One rank of a job, alone on the stand-in device: it builds, steps, expands, steps and closes.

``python -m megatron_progressive.plan.dry_rank``, started by :mod:`.dry_run` with the pickled
(configuration, number of ranks, rank) on its input; writes JSON, a line for each thing done.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed.distributed_c10d as c10d

from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import ModelShape, TransformerShape
from megatron_progressive.models.families.resnet import CHANNELS, ResNetShape
from megatron_progressive.runtime.distributed import Place, prepare_imports, world_group
from megatron_progressive.runtime.layout import Layout, make_layout

_DEVICES_OF_A_NODE = 8


class _Rank:
    """What a rank does, and what it reports of it."""

    def __init__(self, config: RunConfig, world: int) -> None:
        self.config, self.world = config, world
        self.phase = 0

    def shape(self, phase: int) -> ModelShape:
        layers = self.config.expansion[phase - 1].to_layers if phase else None
        return model_shape(self.config, layers)

    def layout(self, phase: int) -> Layout:
        return make_layout(self.config.parallel_after(phase), self.world)

    def build(self, phase: int, memory: Any = None) -> Any:
        from megatron_progressive.engines import make_engine

        return make_engine(self.config, self.shape(phase), self.layout(phase), memory)

    def layers(self) -> str:
        """What the model is made of."""
        from megatron_progressive.engines.megatron.kernels import kernels_here

        shape = self.shape(0)
        if not isinstance(shape, TransformerShape):
            return "torch"
        kernels = kernels_here(self.config, shape, self.layout(0))
        return "Transformer Engine" if kernels.transformer_engine else "local"

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Times a part of the work and reports the memory and the communicators after it."""
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        numbers = _counts()["numbers"]
        line = {
            "what": what,
            "phase": self.phase,
            "layers": self.layers(),
            "seconds": time.perf_counter() - started,
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "communicators": numbers.get("communicators_live", 0),
            "groups": len(c10d._world.pg_map),
        }
        print(json.dumps(line), flush=True)

    def samples(self, first: int, count: int) -> Any:
        """Samples of zeros: nothing is computed from them."""
        shape = self.shape(0)
        if isinstance(shape, TransformerShape):
            return torch.zeros(count, shape.sequence_length + 1, dtype=torch.int64)
        from megatron_progressive.data.images import LabelledImages

        assert isinstance(shape, ResNetShape)
        images = torch.zeros(count, CHANNELS, shape.image_size, shape.image_size)
        return LabelledImages(images, torch.zeros(count, dtype=torch.int64))

    def step(self, engine: Any) -> None:
        """A step of as many micro-batches as a pipeline has in flight at most."""
        from megatron_progressive.engines.base import GlobalBatch

        layout, micro = engine.layout, self.config.train.micro_batch
        number = self.config.train.global_batch // (micro * layout.data)
        number = max(1, min(number, layout.pipeline * layout.virtual_pipeline))
        batch = GlobalBatch(self.samples, 0, micro * layout.data * number)
        with self.doing("step"):
            engine.train_step(batch, 0.01)

    def run(self) -> None:
        """All phases of the configuration."""
        from megatron_progressive.engines.base import GlobalBatch
        from megatron_progressive.expansion import hook

        with self.doing("build"):
            engine = self.build(0)
        self.step(engine)
        staging = self.config.parallel.staging_mib << 20
        for phase, expansion in enumerate(self.config.expansion, start=1):
            data = max(engine.layout.data, self.layout(phase).data)
            probe = GlobalBatch(self.samples, 0, self.config.train.micro_batch * data)
            self.phase = phase
            with self.doing("expand"), self.without_peers(phase):
                build = partial(self.build, phase)
                engine, _ = hook.expand(engine, expansion, build, probe, 1, phase, staging)
            self.step(engine)
        with self.doing("close"):
            engine.close()
            del engine

    @contextlib.contextmanager
    def without_peers(self, phase: int) -> Iterator[None]:
        """An expansion in which what the others hold is taken from the plan of their engines, and
        nothing is drawn for new layers."""
        from megatron_progressive.engines.partitions import held_pieces
        from megatron_progressive.expansion import hook
        from megatron_progressive.reshard import transfer
        from megatron_progressive.reshard.metadata import PieceTable

        optim, precision = self.config.optim, self.config.train.precision

        def held(states: Any) -> Any:
            return [
                [
                    (PieceTable.of(pieces), list(ranks))
                    for pieces, ranks in held_pieces(
                        self.shape(n), optim, precision, self.layout(n)
                    )
                ]
                for n in (phase - 1, phase)
            ]

        with (
            mock.patch.object(transfer, "gather_metadata", held),
            mock.patch.object(hook, "initialise"),
        ):
            yield


def _counts() -> dict[str, dict[str, int]]:
    import mprog_standin.native

    counts: dict[str, dict[str, int]] = mprog_standin.native.report()
    return counts


def main() -> int:
    """Reads the task; 3 where the device's memory is too small, with what was being done."""
    from megatron_progressive.standin.absent_peers import AbsentPeers

    config, world, rank = pickle.load(sys.stdin.buffer)
    prepare_imports()
    try:
        with world_group(Place(rank, rank % _DEVICES_OF_A_NODE, world), AbsentPeers()):
            _Rank(config, world).run()
    except torch.cuda.OutOfMemoryError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
