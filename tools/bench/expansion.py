"""The pause at τ: expanding in memory against saving, starting fresh processes and loading.

Both ways start from the same source (``--from-layers``, data parallel, a step done) and end with
the same deeper model in another layout, ready to train, on the same ranks. The tool prints:

- the pause of each, and their ratio;
- bytes sent between ranks, against the least that any reshard must send (for each rank, the source
  elements that it needs and does not hold), counted in plain code;
- the growth of each rank's peak memory over the expansion, against the size of the new engine
  (weights, gradient sums, optimizer state).

The other way: the shallow state is saved, expanded on disk (``mprog checkpoint expand``), and fresh
ranks build the deeper model and load it. Ending the old processes is not counted, and the time of
the expansion on disk is shown apart.

    python tools/bench/expansion.py --ranks 4 --hidden 1024 --layers 24
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_progressive import config as configuration
from megatron_progressive.config import RunConfig
from megatron_progressive.models import model_shape
from megatron_progressive.runtime.launch import run_workers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--from-layers", type=int, default=1)
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon_nsgd"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--pipeline", type=int, default=2)
    parser.add_argument("--staging-mib", type=int, default=64)
    parser.add_argument("--rehearse", action="store_true", help="build and drop a deeper model "
                        "first: a virtual machine then has the memory from its host")  # fmt: skip
    parser.add_argument("--worker", choices=["memory", "relaunch"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def bench_config(args: argparse.Namespace) -> RunConfig:
    return configuration.from_dict(
        {
            "model": {"family": "gpt2", "hidden_size": args.hidden, "num_attention_heads": 16,
                      "num_layers": args.from_layers},
            "data": {"vocab_size": 2048, "sequence_length": 64},
            "train": {"steps": 10, "global_batch": args.ranks, "micro_batch": 1,
                      "precision": args.precision},
            "optim": {"name": args.optimizer},
            "expansion": [{"at": 5, "to_layers": args.layers,
                           "init": "copying" if args.from_layers else "random",
                           "optimizer_state": "copy" if args.from_layers else "inherit",
                           "parallel": {"tensor": args.tensor, "pipeline": args.pipeline,
                                        "staging_mib": args.staging_mib}}],
        }
    )  # fmt: skip


def batch(ranks: int) -> Any:
    import torch

    from megatron_progressive.engines.base import GlobalBatch

    def read(first: int, count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(first)
        return torch.randint(0, 2048, (count, 65), generator=generator)

    return GlobalBatch(read, 0, ranks)


def build(config: RunConfig, expansions: int, memory: Any = None) -> Any:
    import torch.distributed as dist

    from megatron_progressive.engines import make_engine
    from megatron_progressive.runtime.layout import make_layout

    layers = config.expansion[0].to_layers if expansions else None
    layout = make_layout(config.parallel_after(expansions), dist.get_world_size())
    return make_engine(config, model_shape(config, layers), layout, memory)


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def engine_bytes(engine: Any) -> int:
    """Bytes of the weights, fp32 gradient sums and optimizer state of this rank."""
    pieces = engine.state().pieces
    return sum(p.nbytes + (4 * p.box.numel if p.slot == "param" else 0) for p in pieces)


def least_bytes(shape: Any, held: list[Any], new: Any, config: RunConfig) -> int:
    """The bytes of the source that this rank needs from others, whoever sends them. They are
    counted by masks of whole tensors, so that what several layers copy counts once.

    Args:
        shape: the old model's.
        held: the key, box and global shape of each piece that this rank had of the old state.
    """
    import numpy as np

    from megatron_progressive.expansion.depth_map import COPY, rules_of
    from megatron_progressive.reshard.boxes import Box, whole

    def inside(box: Box, shape: tuple[int, ...]) -> tuple[slice, ...]:
        return box.slices_within(whole(shape))

    rules = rules_of(config.expansion[0], shape, new.shape)
    needed: dict[Any, Any] = {}
    itemsize: dict[Any, int] = {}
    for piece in new.state().pieces:
        rule = rules[piece.name]
        if rule.action(piece.slot) == COPY:
            key = rule.source, piece.slot
            mask = needed.setdefault(key, np.zeros(piece.global_shape, bool))
            mask[inside(piece.box, mask.shape)] = True
            itemsize[key] = piece.data.element_size()
    for key, box, global_shape in held:
        if key in needed:
            needed[key][inside(box, global_shape)] = False
    return sum(int(mask.sum()) * itemsize[key] for key, mask in needed.items())


def in_memory(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megatron_progressive.checkpoints import checkpoint
    from megatron_progressive.checkpoints.record import record_of_run
    from megatron_progressive.expansion import hook
    from megatron_progressive.models import tensor_table
    from megatron_progressive.reshard.initial_values import initialise_all

    config, rank = bench_config(args), dist.get_rank()
    engine = build(config, 0)
    initialise_all(engine.state(), tensor_table(engine.shape), 1)
    engine.loaded()
    engine.train_step(batch(args.ranks), 1e-4)
    dist.barrier()
    started = time.time()
    position = checkpoint.TrainingPosition(5, 0, args.from_layers, 5 * args.ranks, 0.0, 0.0, 0.0)
    model = record_of_run(config, engine.shape, engine.layout, ((0, args.from_layers),))
    checkpoint.save(engine.state(), args.folder, position, model, 0)
    saved = time.time()
    old, least, sizes = engine, [0], [0]
    close = old.close

    def measure_and_close() -> None:  # both engines are there
        least[0] = least_bytes(old.shape, held, new_engine[0], config)
        sizes[0] = engine_bytes(new_engine[0])
        close()

    new_engine: list[Any] = []
    held: list[Any] = []  # of the old state, which is gone afterwards

    def build_new(memory: Any) -> Any:
        held.extend((piece.key, piece.box, piece.global_shape) for piece in old.state().pieces)
        new_engine.append(build(config, 1, memory))
        return new_engine[0]

    if args.rehearse:
        rehearsed = build(config, 1)
        for piece in rehearsed.state().pieces:
            piece.data.fill_(1)
        rehearsed.close()
        old.activate()
        del rehearsed, piece
    gc.collect()
    reset_peak()
    before = peak_bytes()
    old.close = measure_and_close
    engine, event = hook.expand(
        old, config.expansion[0], build_new, batch(args.ranks), 1, 1, args.staging_mib << 20
    )
    extra = peak_bytes() - before
    device = "cuda" if torch.cuda.is_available() else "cpu"
    totals = torch.tensor([least[0]], dtype=torch.int64, device=device)
    dist.all_reduce(totals)
    ratios: list[Any] = [None] * args.ranks
    dist.all_gather_object(ratios, (extra, sizes[0]))
    if rank == 0:
        result = {
            "save_s": saved - started,
            "pause_s": event.seconds,
            "bytes_moved": event.bytes_moved,
            "bytes_least": int(totals[0]),
            "extra_bytes": [extra for extra, _ in ratios],
            "engine_bytes": [size for _, size in ratios],
            "loss_before": event.loss_before,
            "loss_after": event.loss_after,
        }
        (args.folder / "memory.json").write_text(json.dumps(result))
    engine.close()


def relaunch(args: argparse.Namespace) -> None:
    """Build the deeper model in its layout on fresh ranks, and load what was expanded on disk."""
    import torch.distributed as dist

    from megatron_progressive.checkpoints import checkpoint

    engine = build(bench_config(args), 1)
    checkpoint.load(engine.state(), args.folder / "deeper")
    engine.loaded()
    dist.barrier()
    if dist.get_rank() == 0:
        (args.folder / "relaunch.json").write_text(json.dumps({"ready": time.time()}))
    engine.close()


def expand_on_disk(config: RunConfig, folder: Path) -> float:
    """Do what ``mprog checkpoint expand`` does; returns the seconds that it takes."""
    from megatron_progressive.checkpoints.checkpoint import checkpoint_path
    from megatron_progressive.expansion.offline import expand_checkpoint, plan_expansion

    started = time.perf_counter()
    plan = plan_expansion(checkpoint_path(folder, 5), folder / "deeper", config.expansion[0])
    expand_checkpoint(plan)
    return time.perf_counter() - started


def worker(args: argparse.Namespace) -> None:
    from megatron_progressive.runtime.distributed import place_from_environment, world_group

    place = place_from_environment()
    assert place is not None
    with world_group(place):
        (in_memory if args.worker == "memory" else relaunch)(args)


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args)
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megatron_progressive.models import parameter_count

    config = bench_config(args)
    shape = model_shape(config, args.layers)
    print(f"{parameter_count(shape) / 1e6:.0f}M parameters, {args.from_layers} → {args.layers} "
          f"layers, {args.ranks} ranks, DP={args.ranks} → TP={args.tensor} x PP={args.pipeline}, "
          f"{args.optimizer}, {args.precision}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--worker"]
        if run_workers([*words, "memory"], args.ranks):
            return 1
        memory = json.loads((Path(folder) / "memory.json").read_text())
        on_disk = expand_on_disk(config, Path(folder))
        started = time.time()
        if run_workers([*words, "relaunch"], args.ranks):
            return 1
        fresh = json.loads((Path(folder) / "relaunch.json").read_text())["ready"] - started
    pause, other = memory["pause_s"], memory["save_s"] + fresh
    print(f"in memory                      {pause:8.2f} s")
    print(f"save + fresh processes + load  {other:8.2f} s = {memory['save_s']:.2f} + {fresh:.2f}: "
          f"{other / pause:.1f} times as long")  # fmt: skip
    print(f"with the expansion on disk     {other + on_disk:8.2f} s (+ {on_disk:.2f}): "
          f"{(other + on_disk) / pause:.1f} times as long")  # fmt: skip
    print(f"bytes moved: {memory['bytes_moved'] / 2**20:.1f} MiB, least possible "
          f"{memory['bytes_least'] / 2**20:.1f} MiB: ratio "
          f"{memory['bytes_moved'] / max(1, memory['bytes_least']):.3f}")  # fmt: skip
    for rank, (extra, size) in enumerate(
        zip(memory["extra_bytes"], memory["engine_bytes"], strict=True)
    ):
        print(f"rank {rank}: peak memory grew by {extra / 2**20:.0f} MiB, the new engine has "
              f"{size / 2**20:.0f} MiB: ratio {extra / size:.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
