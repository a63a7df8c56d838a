"""``mprog plan --dry-run`` of every shipped configuration of a cluster and of every preset, as one
table: seconds, peaks by torch's allocator and by the plan, communicators, process groups.

    python tools/gpu/dry_runs.py OUT [--only WORD …]

Of each the first, a middle and the last rank build, step, expand, step and close, each alone on the
stand-in device. A preset that no file uses grows from a zero-layer source in the layouts that
``--search`` finds for H100. A configuration is a line of ``OUT/dry_runs.jsonl``, written when it is
done: the same command goes on where it was stopped. ``OUT/dry_runs.md`` is the table. Layers are
Transformer Engine's where it is installed or MPROG_TRANSFORMER_ENGINE names a folder with its
wheels unpacked, otherwise local ones; the table says which. Exit code 1 where a rank failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from megatron_progressive import config as configuration  # noqa: E402
from megatron_progressive import standin  # noqa: E402
from megatron_progressive.config import RunConfig  # noqa: E402
from megatron_progressive.models import FAMILIES, model_shape  # noqa: E402

GIB = 2**30
FILES = {
    "gpt2/124m_progressive": 8, "gpt2/124m_fixed": 8, "gpt2/7b_progressive": 32,
    "gpt2/7b_fixed": 32, "llama3/0.25b_progressive": 8, "llama3/0.5b_progressive": 8,
    "llama3/1b_progressive": 8, "llama3/2b_progressive": 64, "deepseek_v3/0.2b_progressive": 8,
    "deepseek_v3/0.5b_progressive": 8, "deepseek_v3/671b_progressive": 1024,
    "deepseek_v3/671b_published": 2048, "llama3/8b_progressive": 1024,
    "llama3/70b_progressive": 2048, "qwen3/8b_progressive": 1024, "qwen3/32b_progressive": 2048,
    "mixtral/8x7b_progressive": 512, "resnet/50_progressive": 8,
}  # fmt: skip
"""The configurations of clusters, each with its number of GPUs."""
PRESETS = {"qwen3/14b": 64}
"""Numbers of GPUs of presets that no file uses; others have eight."""
BATCH = 512


@dataclass(frozen=True)
class Case:
    """One job."""

    name: str
    config: RunConfig
    world: int


def cases() -> Iterator[Case]:
    """The files, and then the presets that are in none of them."""
    used = set()
    for name, world in FILES.items():
        config = configuration.load(str(ROOT / "configs" / f"{name}.yaml"), [])
        used.add((config.model.family, config.model.preset))
        yield Case(name, config, world)
    for family, description in FAMILIES.items():
        for preset in description.presets:
            if (family, preset) not in used:
                yield _of_preset(family, preset)


def _of_preset(family: str, preset: str) -> Case:
    name = f"{family}/{preset}"
    world = PRESETS.get(name, 8)
    if family == "resnet":
        values = {
            "model": {"family": family, "preset": preset},
            "train": {"steps": 100, "global_batch": BATCH, "micro_batch": 8, "precision": "bf16"},
        }
        depth = model_shape(configuration.from_dict(values, [])).num_layers
        growth = f"expansion=[{{at: 0.8, to_layers: {depth}, init: random}}]"
        config = configuration.from_dict(values, ["model.num_layers=0", growth])
        return Case(name, config, world)
    from megatron_progressive.cost.cluster import GPUS
    from megatron_progressive.plan.layout_search import search

    model = {"family": family, "preset": preset}
    depth = model_shape(configuration.from_dict({"model": model}, [])).num_layers
    values = {
        "model": {**model, "num_layers": 0},
        "train": {"steps": 100, "global_batch": BATCH, "micro_batch": 1, "precision": "bf16"},
        "expansion": [{"at": 0.8, "to_layers": depth, "init": "random"}],
    }
    found = search(configuration.from_dict(values, []), world, GPUS["h100"])
    config = configuration.from_dict(values, [])
    return Case(name, configuration.from_dict(values, found.words(config)), world)


def measured(case: Case) -> dict[str, Any]:
    """One line of the results."""
    from megatron_progressive.plan.dry_run import dry_run

    began = time.perf_counter()
    try:
        ranks = dry_run(case.config, case.world)
    except (RuntimeError, ValueError) as error:
        return {"error": " ".join(str(error).split())[-400:]}
    lines = []
    for one in ranks:
        for index, phase in enumerate(one.phases):
            at = one.expansions[index - 1] if index else None
            lines.append(
                {**asdict(phase), "layout": str(phase.layout), "rank": one.rank, "phase": index,
                 "peak_at_tau": at.peak if at else None, "left": one.left}
            )  # fmt: skip
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "layers": ranks[0].layers, "phases": lines}


def table(lines: list[dict[str, Any]]) -> str:
    """All results in Markdown."""
    columns = ("configuration", "GPUs", "of", "seconds", "rank", "layers", "layout", "peak GiB",
               "plan GiB", "by plan", "at τ", "communicators", "groups")  # fmt: skip
    out = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for line in lines:
        head = [line["name"], str(line["world"])]
        if "error" in line:
            out.append("| " + " | ".join([*head, line["error"]]) + " |")
            continue
        head += [line["layers"], f"{line['seconds']:.0f}"]
        for phase in line["phases"]:
            planned, at = phase["predicted"], phase["peak_at_tau"]
            cells = [
                *head, str(phase["rank"]), str(phase["num_layers"]), phase["layout"],
                f"{phase['peak'] / GIB:.2f}", "-" if planned is None else f"{planned / GIB:.2f}",
                "-" if planned is None else f"{100 * (phase['peak'] / planned - 1):+.0f} %",
                "-" if at is None else f"{at / GIB:.2f}", str(phase["communicators"]),
                str(phase["groups"]),
            ]  # fmt: skip
            out.append("| " + " | ".join(cells) + " |")
            head = [""] * len(head)
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the results, made if it is not there")
    parser.add_argument("--only", nargs="*", default=[], help="those whose names contain all these")
    args = parser.parse_args()
    if reason := standin.available():
        print(reason, file=sys.stderr)
        return 2
    if folder := os.environ.get("MPROG_TRANSFORMER_ENGINE"):
        os.environ["PYTHONPATH"] = f"{folder}:{os.environ.get('PYTHONPATH', '')}"  # of the ranks
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "dry_runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {line["name"] for line in lines}
    for case in cases():
        if case.name in done or not all(word in case.name for word in args.only):
            continue
        line = {"name": case.name, "world": case.world, **measured(case)}
        lines.append(line)
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        (args.out / "dry_runs.md").write_text(table(lines))
        print(f"{case.name}: {line.get('error') or format(line['seconds'], '.0f') + ' s'}",
              flush=True)  # fmt: skip
    return int(any("error" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
