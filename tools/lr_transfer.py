"""Learning-rate transfer: does one learning rate serve all widths and depths?

Trains tiny GPT-2s of several widths (at one depth) and depths (at one width), or of all pairs of
them with ``--product``, at learning rates a factor of 2 apart, with muP and without, and draws the
final validation loss against the learning rate. It writes no checkpoints. Each finished cell has a
line in ``results.jsonl`` and is not run again, so the same command goes on where it was
interrupted.

    python tools/lr_transfer.py OUT [--steps N] [--product] [--workers N] [key=value …]

``key=value`` words change the base configuration (``data.prepared=FOLDER`` skips preparing the
corpus). Each of ``--workers`` processes trains cells of its own, in ``OMP_NUM_THREADS`` threads.
``--draw`` trains nothing, and shows the shapes that are complete. OUT gets ``results.jsonl``,
``lr_transfer.png`` and ``lr_transfer.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_progressive import data
from megatron_progressive.config import RunConfig, from_dict
from megatron_progressive.cost.flops import total_flops
from megatron_progressive.runtime.distributed import Place, prepare_imports, world_group
from megatron_progressive.runtime.launch import run_workers
from megatron_progressive.runtime.progress import short_time

ARMS: dict[str, dict[str, bool]] = {"mup": {"mup": True}, "standard": {"mup": False}}
TITLES = {"mup": "with muP", "standard": "without"}
HEAD_DIM = 16
SPECIAL = 8.0
"""The loss that stands for a diverged run."""

Cell = dict[str, Any]


def base(out: Path, words: list[str]) -> RunConfig:
    return from_dict(
        {
            "run": {"name": "lr_transfer", "dir": str(out)},
            "model": {"family": "gpt2", "preset": "tiny"},
            "data": {"vocab_size": 2048, "sequence_length": 128, "max_bytes": 6_000_000},
            "train": {"global_batch": 8, "micro_batch": 8, "steps": 200, "eval_samples": 64},
            "schedule": {"warmup": 0.05, "decay": 0.2},
        },
        words,
    )


def configured(out: Path, words: list[str], cell: Cell) -> RunConfig:
    width = cell["width"]
    model = [
        f"model.hidden_size={width}",
        f"model.num_attention_heads={width // HEAD_DIM}",
        f"model.num_layers={cell['depth']}",
        *(f"model.{key}={str(value).lower()}" for key, value in ARMS[cell["arm"]].items()),
    ]
    return base(out, [*words, *model, f"optim.lr={cell['lr']}", f"train.steps={cell['steps']}"])


def final_loss(config: RunConfig) -> float:
    """The validation loss after training, in nats per token; :data:`SPECIAL` if the run
    diverged."""
    import torch.distributed as dist

    from megatron_progressive.engines import make_engine
    from megatron_progressive.engines.base import GlobalBatch, in_batches
    from megatron_progressive.models import model_shape, tensor_table
    from megatron_progressive.optim.schedule import learning_rate
    from megatron_progressive.reshard.initial_values import initialise_all
    from megatron_progressive.runtime.layout import make_layout

    shape, size = model_shape(config), config.train.global_batch
    engine = make_engine(config, shape, make_layout(config.parallel, dist.get_world_size()))
    samples = data.open_data(config)
    try:
        initialise_all(engine.state(), tensor_table(shape), config.run.seed)
        engine.loaded()
        for step in range(1, config.train.steps + 1):
            batch = GlobalBatch(samples.train_batch, (step - 1) * size, size)
            loss = engine.train_step(batch, learning_rate(config, step)).loss
            if not math.isfinite(loss) or loss > 2 * SPECIAL:
                return SPECIAL
        count = min(data.wanted_samples(config), samples.validation_samples)
        validation = in_batches(samples.validation_batch, count, size)
        return min(SPECIAL, engine.evaluate(validation))
    finally:
        engine.close()


def cells(args: argparse.Namespace) -> list[Cell]:
    """The cells of one arm after the other, its cheapest shapes first, so that an interrupted study
    is a complete smaller one."""
    if args.product:
        shapes = [(w, d) for w in args.widths for d in args.depths]
    else:
        shapes = [(args.widths[0], d) for d in args.depths]
        shapes += [(w, args.depth) for w in args.widths]
    words = [word for word in args.words if not word.startswith("data.prepared=")]
    unique = sorted(dict.fromkeys(shapes), key=lambda s: (12 * s[1] * s[0] + 2048) * s[0])
    return [
        dict(arm=arm, width=w, depth=d, lr=lr, steps=args.steps, words=words)
        for arm in args.arms
        for w, d in unique
        for lr in args.lrs
    ]


def read(path: Path) -> list[Cell]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def key(cell: Cell) -> tuple[Any, ...]:
    names = ("arm", "width", "depth", "lr", "steps")
    return (*(cell[name] for name in names), *cell.get("words", ()))


def whole_shapes(results: list[Cell], todo: list[Cell]) -> list[Cell]:
    """The results among ``todo`` of the shapes that have a result at every learning rate there; for
    other shapes the best rate is not known yet."""
    wanted, done = {key(cell) for cell in todo}, {key(cell) for cell in results}
    parts = {key(cell)[:3] for cell in todo if key(cell) not in done}
    return [cell for cell in results if key(cell) in wanted and key(cell)[:3] not in parts]


def best(results: list[Cell]) -> dict[tuple[str, int, int], tuple[float, float, bool]]:
    """The best learning rate, its loss, and whether it is inside of the grid, for each arm, width
    and depth."""
    found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for cell in results:
        place = (cell["arm"], cell["width"], cell["depth"])
        found.setdefault(place, []).append((cell["loss"], cell["lr"]))
    out = {}
    for place, values in found.items():
        loss, lr = min(values)
        rates = sorted(lr for _, lr in values)
        out[place] = (lr, loss, rates[0] < lr < rates[-1])
    return out


def interpolated(points: list[tuple[float, float]]) -> float | None:
    """The least point of the parabola through the best (learning rate, loss) and its neighbours, in
    log2 of the learning rate; None at the edge of the grid or beside a diverged run."""
    points = sorted(points)
    at = min(range(len(points)), key=lambda i: points[i][1])
    if not 0 < at < len(points) - 1 or points[at + 1][1] >= SPECIAL:
        return None
    (x0, y0), (x1, y1), (x2, y2) = ((math.log2(lr), loss) for lr, loss in points[at - 1 : at + 2])
    slopes = ((y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1))
    curvature = (slopes[1] - slopes[0]) / (x2 - x0)
    return 2 ** ((x0 + x1) / 2 - slopes[0] / (2 * curvature)) if curvature > 0 else None


def table(results: list[Cell]) -> str:
    """A table in Markdown with a row for each shape and arm: the loss at each learning rate, the
    best one in bold."""
    rates = sorted({cell["lr"] for cell in results})
    losses = {key(cell)[:4]: cell["loss"] for cell in results}
    lines = [
        "| arm | width | depth | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | best |",
        "|---|---|---|" + "---|" * (len(rates) + 1),
    ]
    for place, (lr, _, _) in sorted(best(results).items()):
        row = [losses.get((*place, rate)) for rate in rates]
        shown = [
            "" if loss is None else f"**{loss:.3f}**" if rate == lr else f"{loss:.3f}"
            for rate, loss in zip(rates, row, strict=True)
        ]
        found = [(rate, loss) for rate, loss in zip(rates, row, strict=True) if loss is not None]
        least = interpolated(found)
        shown.append("at the edge" if least is None else f"{least:.3f}")
        lines.append(f"| {place[0]} | {place[1]} | {place[2]} | " + " | ".join(shown) + " |")
    return "\n".join([*lines, "", *verdict(results)]) + "\n"


def verdict(results: list[Cell]) -> list[str]:
    lines = []
    for arm in sorted({cell["arm"] for cell in results}):
        found = {place[1:]: value for place, value in best(results).items() if place[0] == arm}
        rates = [lr for lr, _, _ in found.values()]
        edge = [f"{w}x{d}" for (w, d), (_, _, inside) in found.items() if not inside]
        steps = math.log2(max(rates) / min(rates))
        lines.append(
            f"{arm}: the best learning rate moves by a factor of {max(rates) / min(rates):g} "
            f"({steps:.0f} grid steps) over {len(found)} shapes"
            + (f"; at the edge of the grid for {', '.join(edge)}" if edge else "")
        )
    return lines


def draw(results: list[Cell], path: Path) -> None:
    """Draw a column for each arm, a row for each width and a line for each depth. The best rates of
    all shapes of an arm lie in the shaded range, and a run that diverged is a cross at the upper
    edge."""
    from matplotlib import colormaps

    from megatron_progressive.compare.drawing import FAINT, INK, dress, new_figure, save

    arms = [arm for arm in ARMS if any(cell["arm"] == arm for cell in results)]
    widths = sorted({cell["width"] for cell in results})
    depths = sorted({cell["depth"] for cell in results})
    finite = [cell["loss"] for cell in results if cell["loss"] < SPECIAL] or [SPECIAL]
    # without muP the highest rates are far above: the part that decides fills the picture
    low = min(finite)
    room = min(max(finite) - low, 1.2) or 1.0
    top = low + 1.06 * room
    found, moves = best(results), []
    for arm in arms:
        rates = [lr for (of, _, _), (lr, _, _) in found.items() if of == arm]
        moves.append((min(rates), max(rates)))
    title = "The best learning rate over widths and depths: " + ", ".join(
        f"{TITLES[arm]} it "
        + ("stays" if most == least else f"moves by a factor of {most / least:g}")
        for arm, (least, most) in zip(arms, moves, strict=True)
    )
    label = "learning rate (star: the best; shaded: the best ones of all shapes)"
    shown: dict[str, Any] = {}
    figure = new_figure(title, 1.2 + 3.4 * len(widths), w_pad=0.12, h_pad=0.1)
    grid = figure.subplots(len(widths), len(arms), squeeze=False, sharex=True, sharey=True)
    for row, width in zip(grid, widths, strict=True):
        for axes, arm, (least, most) in zip(row, arms, moves, strict=True):
            axes.axvspan(least / 2**0.25, most * 2**0.25, color=FAINT, alpha=0.5, linewidth=0)
            for number, depth in enumerate(depths):
                colour = colormaps["viridis_r"](0.12 + 0.8 * number / max(1, len(depths) - 1))
                mine = sorted(
                    (cell["lr"], cell["loss"])
                    for cell in results
                    if (cell["arm"], cell["width"], cell["depth"]) == (arm, width, depth)
                )
                if not mine:
                    continue
                away = [lr for lr, loss in mine if loss >= top]
                axes.plot(*zip(*mine, strict=True), marker="o", markersize=3.5, color=colour)
                if away:
                    axes.plot(away, [top] * len(away), "x", color=colour, clip_on=False)
                lr, loss = min(mine, key=lambda point: point[1])
                (star,) = axes.plot(lr, loss, "*", markersize=14, color=colour, zorder=3,
                                    markeredgecolor="white", markeredgewidth=0.6)  # fmt: skip
                shown.setdefault(f"depth {depth}", star)
            rates = sorted({cell["lr"] for cell in results})
            dress(axes, f"width {width}, {TITLES[arm]}", label if width == widths[-1] else "")
            axes.set_xscale("log", base=2)
            axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
            axes.set_ylim(low - 0.06 * room, top)
        row[0].set_ylabel("final validation loss, nats per token", fontsize=10, color=INK)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center",
                  ncols=len(shown), frameon=False, fontsize=11)  # fmt: skip
    save(figure, path)


def train(args: argparse.Namespace, todo: list[Cell], label: str) -> None:
    """Train the cells for which OUT has no line."""
    path = args.out / "results.jsonl"
    done = {key(cell) for cell in read(path)}
    left = [cell for cell in todo if key(cell) not in done]
    costs = [total_flops(configured(args.out, args.words, cell)) for cell in left]
    spent = 0.0
    with world_group(Place(0, 0, 1)), open(path, "a") as file:
        for number, cell in enumerate(left):
            started = time.monotonic()
            loss = final_loss(configured(args.out, args.words, cell))
            seconds = time.monotonic() - started
            spent += seconds
            file.write(json.dumps({**cell, "loss": loss, "seconds": round(seconds, 1)}) + "\n")
            file.flush()
            rest = spent / sum(costs[: number + 1]) * sum(costs[number + 1 :])
            what = " ".join(f"{name} {cell[name]}" for name in ("arm", "width", "depth", "lr"))
            print(
                f"{label}{number + 1}/{len(left)} {what}: loss {loss:.4f} in {seconds:.0f} s, "
                f"left {short_time(rest)}",
                file=sys.stderr,
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description="Learning-rate transfer over widths and depths.")
    parser.add_argument("out", type=Path, help="folder of results, figure and table")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 4, 8])
    parser.add_argument("--depth", type=int, default=2, help="at which widths are compared")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.005, 0.01, 0.02, 0.04, 0.08])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--product", action="store_true", help="all pairs of widths and depths")
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--draw", action="store_true", help="train nothing: figure and table of "
                        "the shapes that are complete")  # fmt: skip
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    todo = cells(args)
    if args.worker:
        rank = int(os.environ["RANK"])
        del os.environ["MASTER_ADDR"]  # each trains alone
        train(args, todo[rank :: args.workers], f"worker {rank}: ")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.draw:
        prepare_imports()
        data.prepare(base(args.out, args.words))
        if args.workers == 1:
            train(args, todo, "")
        elif code := run_workers([sys.executable, *sys.argv, "--worker"], args.workers):
            return code
    results = whole_shapes(read(args.out / "results.jsonl"), todo)
    if not results:
        print(f"{args.out}: no shape has all its learning rates yet", file=sys.stderr)
        return 1
    draw(results, args.out / "lr_transfer.png")
    (args.out / "lr_transfer.md").write_text(table(results))
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
