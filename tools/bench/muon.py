"""Muon-NSGD with one owner of each matrix against other optimizers, on the same model and ranks.

All arms live in one job and take turns, a few steps each, so that they share the machine's
moods. Printed are medians over the turns: the whole step, the optimizer's part of it (for our
engine with the gathering of weights, without the reduction of gradients), and the ratio to our
step. Arms:

- ``ours``: Muon-NSGD, ZeRO stage 1;
- ``replicated``: Muon-NSGD with its state on every rank (``parallel.zero_stage=0``);
- ``torch``: gradients all-reduced by DDP; ``torch.optim.Muon`` as it comes (Newton-Schulz in bf16,
  a matrix at a time, QKV as one) on tensors of two axes, ``torch.optim.AdamW`` on the others;
- ``adamw``: AdamW in Megatron-core's distributed optimizer.

Then Newton-Schulz alone, of the model's matrices: batched by shape against one at a time.

    python tools/bench/muon.py --ranks 2 --layers 6
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from typing import Any

from megatron_progressive import config as configuration
from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.distributed import place_from_environment, world_group
from megatron_progressive.runtime.launch import run_workers

ARMS: dict[str, list[str]] = {
    "ours": [],
    "replicated": ["parallel.zero_stage=0"],
    "torch": ["parallel.zero_stage=0"],
    "adamw": ["optim.name=adamw"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of an arm in a turn")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def bench_config(args: argparse.Namespace, arm: str) -> RunConfig:
    return configuration.from_dict(
        {
            "model": {"family": "gpt2", "preset": args.preset, "num_layers": args.layers},
            "data": {"vocab_size": 2048, "sequence_length": 128},
            "train": {"steps": 1500, "global_batch": 16, "micro_batch": 16 // args.ranks},
        },
        ARMS[arm],
    )


class Arm:
    """One engine, and how long its steps and their optimizer's part took."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        import torch
        import torch.distributed as dist

        from megatron_progressive.engines import make_engine
        from megatron_progressive.models import tensor_table
        from megatron_progressive.runtime.layout import make_layout
        from megatron_progressive.state.init import initialise_all

        config = bench_config(args, name)
        shape = model_shape(config)
        layout = make_layout(config.parallel, dist.get_world_size())
        self.engine: Any = make_engine(config, shape, layout)
        initialise_all(self.engine.state(), tensor_table(shape), 1)
        self.engine.loaded()
        self.steps: list[float] = []
        self.optimizer: list[float] = []
        step = self.engine.optimizer.step_with_ready_grads
        if name == "torch":
            weights = self.engine.optimizer.get_parameters()
            matrices = [w for w in weights if w.dim() == 2]
            both = [
                torch.optim.Muon(matrices, lr=0.01),
                torch.optim.AdamW([w for w in weights if w.dim() != 2], lr=0.01),
            ]

            def step() -> None:
                for optimizer in both:
                    optimizer.step()

        def timed() -> None:
            started = time.perf_counter()
            step()
            self.optimizer.append(time.perf_counter() - started)

        self.engine.optimizer.step_with_ready_grads = timed

    def turn(self, first: int, steps: int) -> None:
        import torch
        import torch.distributed as dist

        from megatron_progressive.engines.base import GlobalBatch

        def read(first: int, count: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(first)
            return torch.randint(0, 2048, (count, 129), generator=generator)

        self.engine.activate()
        for number in range(first, first + steps):
            dist.barrier()
            started = time.perf_counter()
            self.engine.train_step(GlobalBatch(read, 16 * number, 16), 0.01)
            self.steps.append(time.perf_counter() - started)


def newton_schulz(args: argparse.Namespace) -> None:
    """Batched by shape against one at a time, of this rank's model."""
    import torch

    from megatron_progressive.models import tensor_table
    from megatron_progressive.optim.muon_nsgd import matrices_of
    from megatron_progressive.optim.newton_schulz import orthogonalise

    shapes: Counter[tuple[int, ...]] = Counter()
    for spec in tensor_table(model_shape(bench_config(args, "ours"))).values():
        if len(spec.shape) > 1:
            whole = torch.empty(spec.shape)
            shapes.update(tuple(m.shape) for m in matrices_of(whole, spec.row_blocks))
    print("Newton-Schulz, ms: shape, matrices, batched, one at a time, ratio")
    for shape, count in shapes.items():
        batch = torch.randn(count, *shape)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(9):
            for batched, found in times.items():
                started = time.perf_counter()
                for part in [batch] if batched else batch:
                    orthogonalise(part)
                found.append(1e3 * (time.perf_counter() - started))
        batched, looped = (statistics.median(times[key]) for key in (True, False))
        print(f"  {shape!s:14} {count:3}  {batched:8.2f}  {looped:8.2f}  {looped / batched:.2f}")


def work(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    arms = {name: Arm(args, name) for name in ARMS}
    for number in range(args.turns + 1):
        for arm in arms.values():
            arm.turn(number * args.steps, args.steps)
        if not number:  # the first turn loads and allocates
            for arm in arms.values():
                arm.steps.clear()
                arm.optimizer.clear()
    if dist.get_rank() == 0:
        ours = statistics.median(arms["ours"].steps)
        print("step, ms: arm, whole, optimizer, whole / ours")
        for name, arm in arms.items():
            whole, part = (statistics.median(t) for t in (arm.steps, arm.optimizer))
            print(f"  {name:11} {1e3 * whole:8.1f}  {1e3 * part:8.1f}  {whole / ours:.2f}")
        newton_schulz(args)
    dist.barrier()
    for arm in arms.values():
        arm.engine.activate()
        arm.engine.close()


def main() -> int:
    args = arguments()
    if not args.worker:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return run_workers([sys.executable, *sys.argv, "--worker"], args.ranks)
    place = place_from_environment()
    assert place is not None
    with world_group(place):
        work(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
