"""Muon-NSGD with one owner of each matrix against other optimizers, on the same model and ranks.

All arms live in one job and take turns, a few steps each and each turn another one first, so that
they share the machine's moods. Printed are of the whole step, and of the optimizer's part of it
(update and gathering of weights, without the reduction of gradients), the median over all steps
and what the quickest tenth stays below, which other work on the machine disturbs less; and ratios
to our step, taken within a turn, of which the median is shown. That the arms have one model is
checked: their first losses are equal. Arms:

- ``ours``: Muon-NSGD, ZeRO stage 1, Newton-Schulz in fp32 (the default on a CPU) or bf16;
- ``replicated``: Muon-NSGD with its state on every rank (``parallel.zero_stage=0``);
- ``torch``, ``megatron``, ``megatron, older``, ``deepspeed``: other Muons, each described in
  ``muon_peers.py``, with what differs;
- ``adamw``: AdamW in Megatron-core's distributed optimizer.

Muon is on all matrices (the demo's setting), or on those of the layers and AdamW on the embeddings
(``optim.embeddings=adamw``), the only way that DeepSpeed has. An arm is to be read against ours of
the same part of the table. On a CPU without bf16 products, bf16 is the slower one.

Then Newton-Schulz alone, of the model's matrices: batched by shape against one at a time.

    python tools/bench/muon.py --ranks 2 --layers 6

The arms ``megatron`` need ``pip install emerging-optimizers`` and are left out without it.
``TORCHDYNAMO_DISABLE=0`` turns the compiler on, for all arms (minutes to start).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_progressive import config as configuration
from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.distributed import place_from_environment, world_group
from megatron_progressive.runtime.launch import run_workers

ALL, LAYERS = "all matrices", "the layers' only"
EMBEDDINGS = {ALL: "muon", LAYERS: "adamw"}


@dataclass(frozen=True)
class Arm:
    name: str
    under_muon: str = ""
    """Which matrices are under Muon: :data:`ALL`, :data:`LAYERS`, or none where it is empty."""
    precision: str = ""
    """The type that Newton-Schulz computes in."""
    words: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str]:
        return self.name, self.under_muon, self.precision


REPLICATED = ("parallel.zero_stage=0",)
ARMS = [
    Arm("ours", ALL, "fp32"),
    Arm("ours", ALL, "bf16", ("optim.ns_dtype=bf16",)),
    Arm("replicated", ALL, "fp32", REPLICATED),
    Arm("torch", ALL, "fp32", REPLICATED),
    Arm("torch", ALL, "bf16", REPLICATED),
    Arm("megatron", ALL, "fp32"),
    Arm("megatron", ALL, "bf16"),
    Arm("ours", LAYERS, "fp32"),
    Arm("ours", LAYERS, "bf16", ("optim.ns_dtype=bf16",)),
    Arm("torch", LAYERS, "fp32", REPLICATED),
    Arm("torch", LAYERS, "bf16", REPLICATED),
    Arm("megatron", LAYERS, "fp32"),
    Arm("megatron", LAYERS, "bf16"),
    Arm("megatron, older", LAYERS, "fp32", REPLICATED),
    Arm("deepspeed", LAYERS, "gram", ("parallel.engine=deepspeed",)),
    Arm("deepspeed", LAYERS, "bf16", ("parallel.engine=deepspeed",)),
    Arm("adamw", words=("optim.name=adamw",)),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of an arm in a turn")
    parser.add_argument("--arms", nargs="+", help="names of those to run, beside ours")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def bench_config(args: argparse.Namespace, arm: Arm) -> RunConfig:
    words = list(arm.words)
    if arm.under_muon:
        words.append(f"optim.embeddings={EMBEDDINGS[arm.under_muon]}")
    return configuration.from_dict(
        {
            "model": {"family": "gpt2", "preset": args.preset, "num_layers": args.layers},
            "data": {"vocab_size": 2048, "sequence_length": 128},
            "train": {"steps": 1500, "global_batch": 16, "micro_batch": 16 // args.ranks},
        },
        words,
    )


class Contestant:
    """One engine, and the seconds that its steps and their optimizer's part took."""

    def __init__(self, args: argparse.Namespace, arm: Arm) -> None:
        import muon_peers as peers

        self.engine: Any = peers.make_engine(bench_config(args, arm), arm.name, arm.precision)
        self.losses: list[float] = []
        self.turns: list[list[float]] = []
        self.optimizer: list[float] = []
        self._part = 0.0
        for owner, method in peers.optimizer_parts(self.engine):
            setattr(owner, method, peers.timed(getattr(owner, method), self._add))

    def _add(self, seconds: float) -> None:
        self._part += seconds

    def turn(self, first: int, steps: int) -> None:
        import torch
        import torch.distributed as dist

        from megatron_progressive.engines.base import GlobalBatch

        def read(first: int, count: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(first)
            return torch.randint(0, 2048, (count, 129), generator=generator)

        self.engine.activate()
        self.turns.append([])
        for number in range(first, first + steps):
            self._part = 0.0
            dist.barrier()
            started = time.perf_counter()
            metrics = self.engine.train_step(GlobalBatch(read, 16 * number, 16), 0.01)
            self.turns[-1].append(time.perf_counter() - started)
            self.optimizer.append(self._part)
            self.losses.append(metrics.loss)

    def forget_times(self) -> None:
        self.turns.clear()
        self.optimizer.clear()

    def steps(self) -> list[float]:
        return [time for turn in self.turns for time in turn]

    def ratio(self, other: Contestant) -> float:
        pairs = zip(self.turns, other.turns, strict=True)
        return statistics.median(statistics.median(a) / statistics.median(b) for a, b in pairs)


def newton_schulz(args: argparse.Namespace) -> Any:
    """Time Newton-Schulz batched by shape against one matrix at a time, for this rank's model, on
    its device and in the type that the run computes in."""
    import torch
    from rich.table import Table

    from megatron_progressive.models import tensor_table
    from megatron_progressive.optim.muon import matrices_of
    from megatron_progressive.optim.newton_schulz import DTYPES, compute_dtype, newton_schulz

    config = bench_config(args, ARMS[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype(config.optim, device)
    name = next(name for name, value in DTYPES.items() if value == dtype)

    def now() -> float:
        """When all that was launched is done, s."""
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    shapes: Counter[tuple[int, ...]] = Counter()
    for spec in tensor_table(model_shape(config)).values():
        if len(spec.shape) > 1:
            whole = torch.empty(spec.shape)
            shapes.update(tuple(m.shape) for m in matrices_of(whole, spec.row_blocks))
    table = Table("shape", title=f"Newton-Schulz in {name} on {device}, ms", title_justify="left")
    for column in ("matrices", "batched", "one at a time", "ratio"):
        table.add_column(column, justify="right")
    for shape, count in shapes.items():
        batch = torch.randn(count, *shape, device=device)
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(25):
            for batched, found in times.items():
                started = now()
                for part in [batch] if batched else batch:
                    newton_schulz(part, dtype=dtype)
                found.append(1e3 * (now() - started))
        batched, looped = (statistics.median(times[key]) for key in (True, False))
        numbers = (f"{batched:.2f}", f"{looped:.2f}", f"{looped / batched:.2f}")
        table.add_row("{} x {}".format(*shape), str(count), *numbers)
    return table


def milliseconds(times: list[float]) -> tuple[str, str]:
    """The median and the first tenth of some seconds, in milliseconds."""
    tenth = sorted(times)[len(times) // 10]
    return f"{1e3 * statistics.median(times):.1f}", f"{1e3 * tenth:.1f}"


def steps_table(found: dict[Arm, Contestant]) -> Any:
    from rich.table import Table

    of_key = {arm.key: contestant for arm, contestant in found.items()}
    adamw = of_key.get(ARMS[-1].key)
    title = "step and the optimizer's part, ms: median, first tenth; median ratio within turns"
    table = Table("arm", "Newton-Schulz", title=title, title_justify="left")
    for column in ("step", "tenth", "optimizer", "tenth", "/ ours", "/ adamw"):
        table.add_column(column, justify="right")
    part = ""
    for arm, one in found.items():
        if arm.under_muon and arm.under_muon != part:
            part = arm.under_muon
            table.add_section()
            table.add_row(f"Muon on {part}", style="bold")
        # AdamW stands against the demo's setting
        ours = of_key["ours", arm.under_muon or ALL, "fp32"]
        if not arm.under_muon:
            table.add_section()
        table.add_row(
            arm.name,
            arm.precision,
            *milliseconds(one.steps()),
            *milliseconds(one.optimizer),
            f"{one.ratio(ours):.2f}",
            f"{one.ratio(adamw):.2f}" if adamw is not None else "",
        )
    return table


def arms_here(args: argparse.Namespace) -> tuple[list[Arm], list[str]]:
    """The arms to run, and notes on them."""
    import muon_peers as peers

    arms, notes = ARMS, []
    if args.arms is not None:
        arms = [arm for arm in arms if arm.name in ("ours", *args.arms)]
    here = importlib.util.find_spec("emerging_optimizers") is not None
    if not here and any(arm.name.startswith("megatron") for arm in arms):
        arms = [arm for arm in arms if not arm.name.startswith("megatron")]
        notes.append("megatron: left out, emerging-optimizers is not installed")
    names = {arm.name for arm in arms}
    if "megatron, older" in names:
        notes.append("megatron, older, over gloo: a broadcast from each rank for its all-gather")
    if "torch" in names:
        notes.append("torch in fp32: its cast to bf16 is taken away")
    if "deepspeed" in names:
        notes.append(f"deepspeed, gram: in {peers.gram_precision()}")
    return arms, notes


def work(args: argparse.Namespace) -> None:
    import torch.distributed as dist
    from rich.console import Console

    arms, notes = arms_here(args)
    found = {arm: Contestant(args, arm) for arm in arms}
    names, load = list(found.values()), os.getloadavg()[0]
    for number in range(args.turns + 1):
        first = number % len(names)
        for contestant in names[first:] + names[:first]:
            contestant.turn(number * args.steps, args.steps)
        if not number:  # the first turn loads and allocates
            losses = {arm.key: contestant.losses[0] for arm, contestant in found.items()}
            assert max(losses.values()) - min(losses.values()) < 1e-4, f"not one model: {losses}"
            for contestant in names:
                contestant.forget_times()
    if dist.get_rank() == 0:
        console = Console(width=100)
        for package in ("torch", "megatron-core", "deepspeed"):
            console.print(package, importlib.metadata.version(package), end=", ")
        threads, after = os.environ["OMP_NUM_THREADS"], os.getloadavg()[0]
        console.print(f"{args.ranks} ranks of {threads} threads, load {load:.1f} to {after:.1f}")
        for note in notes:
            console.print(note)
        console.print(steps_table(found))
        console.print(newton_schulz(args))
    dist.barrier()
    for contestant in names:
        contestant.engine.activate()
        contestant.engine.close()


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
