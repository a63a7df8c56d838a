"""How far the CUDA path is from the CPU's: a table over families, layers, precisions, optimizers,
layouts and engines, in which every two values meet in some case.

    python tools/gpu/agreement.py OUT [--ranks 2] [--only WORD …] [--most N]

Each case is a tiny model that trains, expands into another engine and another layout, trains,
expands back into Megatron's with a third layout, and trains: once over gloo with the host's local
layers, once over NCCL on the stand-in device (``megatron_progressive/standin``), whose arithmetic
the host does too. Compared are all losses and gradient norms; of the state bit equality: before the
first step with the CPU's, and after each expansion with what a page of plain code makes of the
state before it (``tests/engines/reference.py``).

A case is a line of ``OUT/cases.jsonl``, written when it is done: the same command goes on where it
was stopped, and ``OUT/page.md`` is made again after each. Transformer Engine's layers are the real
ones where MPROG_TRANSFORMER_ENGINE names a folder with its wheels unpacked; without it their cases
are left out, and the page says so. Exit code 1 where a case failed or is beyond the tolerances.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS), str(ROOT)]

from agreement_page import page  # noqa: E402
from covering import Case, covering  # noqa: E402

from megatron_progressive import config as configuration  # noqa: E402
from megatron_progressive.config import ConfigError, RunConfig  # noqa: E402
from megatron_progressive.plan.preflight import check_run  # noqa: E402
from megatron_progressive.runtime.progress import short_time  # noqa: E402
from tests.engines import on_ranks  # noqa: E402

LAYOUTS: dict[str, dict[str, int]] = {
    "DP, ZeRO 0": {"zero_stage": 0},
    "DP, ZeRO 1": {},
    "TP": {"tensor": 2},
    "PP": {"pipeline": 2},
    "PP, VPP": {"pipeline": 2, "virtual_pipeline": 2},
    "EP": {"expert": 2},
    "TP, PP": {"tensor": 2, "pipeline": 2},
    "TP, EP": {"tensor": 2, "expert": 2, "expert_tensor": 1},
}
"""Megatron's, by name; those that need more ranks than there are fit no case."""
PLAIN = {
    "engine": "megatron", "tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "expert": 1,
    "expert_tensor": None, "zero_stage": 1, "uneven": True,
}  # fmt: skip
GROWTHS: dict[str, tuple[tuple[int, int, int], dict[str, str], dict[str, str]]] = {
    "0 → 2 → 4": ((0, 2, 4), {"init": "random", "optimizer_state": "inherit"},
                  {"init": "copying", "optimizer_state": "copy"}),
    "2 → 4 → 6": ((2, 4, 6), {"init": "copying", "optimizer_state": "copy"},
                  {"init": "zero", "optimizer_state": "inherit"}),
}  # fmt: skip
"""Depths, and how each expansion fills what is new."""
LAYERS = {
    "Transformer Engine, bf16": ["train.precision=bf16"],
    "local, bf16": ["train.precision=bf16", "kernels.transformer_engine=false"],
    "local, fp32": ["train.precision=fp32"],
}
"""In fp32 layers are local ones: Transformer Engine's fp32 products are TF32."""
FACTORS = {
    "family": list(on_ranks.SMALL_FAMILIES),
    "layers": list(LAYERS),
    "optimizer": ["muon_nsgd", "adamw"],
    "first": list(LAYOUTS),
    "DeepSpeed": ["ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"],
    "last": list(LAYOUTS),
    "growth": list(GROWTHS),
}


def config_of(case: Case) -> RunConfig:
    """The run of a case.

    Raises:
        ConfigError: there is none.
    """
    depths, *fills = GROWTHS[case["growth"]]
    first, last = (PLAIN | LAYOUTS[case[name]] for name in ("first", "last"))
    deepspeed = PLAIN | {"engine": "deepspeed", "zero_stage": int(case["DeepSpeed"][-1])}
    if case["family"] in ("mixtral", "deepseek_v3"):
        deepspeed["expert_tensor"] = 1
    model = {
        **on_ranks.SMALL["model"], "family": case["family"], "ffn_hidden_size": 48,
        **on_ranks.SMALL_FAMILIES[case["family"]], "num_layers": depths[0],
    }  # fmt: skip
    expansions = [
        {"at": at, "to_layers": depth, "parallel": parallel, **fill}
        for at, depth, parallel, fill in zip(
            (4, 8), depths[1:], (deepspeed, last), fills, strict=True
        )
    ]
    values = {**on_ranks.SMALL, "model": model, "expansion": expansions, "parallel": first}
    words = [f"optim.name={case['optimizer']}", *LAYERS[case["layers"]]]
    return configuration.from_dict(values, words)


@cache
def _accepts(ranks: int, family: str, growth: str, name: str, value: str) -> bool:
    """Whether a phase of such a run can have this layout, with plain ones in its other phases."""
    plain = {factor: values[0] for factor, values in FACTORS.items()}
    plain |= {"first": "DP, ZeRO 1", "last": "DP, ZeRO 1"}
    try:
        check_run(config_of({**plain, "family": family, "growth": growth, name: value}), ranks)
    except ConfigError:
        return False
    return True


def is_possible(case: Case, ranks: int) -> bool:
    """Whether a run of this kind is accepted on these ranks: each of its phases is."""
    return all(
        _accepts(ranks, case["family"], case["growth"], name, case[name])
        for name in ("first", "DeepSpeed", "last")
    )


def cases_of(ranks: int) -> tuple[list[Case], list[str]]:
    """The cases on so many ranks, and in words the pairs of values that no case can have."""
    cases, impossible = covering(FACTORS, lambda case: is_possible(case, ranks))
    words = [f"{a} {x} with {b} {y}" for (a, x), (b, y) in impossible]
    return cases, sorted(words)


def name_of(case: Case) -> str:
    return "; ".join(case.values())


def _relative(here: Iterable[float], there: Iterable[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(here, there, strict=True))


class Both:
    """Ranks over gloo and ranks on the device, for one case after the other."""

    def __init__(self, ranks: int, folder: str) -> None:
        from tests.cuda.serve import PoolOnDevice, variables
        from tests.pool import Pool

        self._ranks = ranks
        there = variables("computing")
        if folder:
            there["PYTHONPATH"] = f"{there['PYTHONPATH']}:{folder}"
        self._pools = Pool(ranks), PoolOnDevice(ranks, there)

    def compare(self, case: Case) -> dict[str, Any]:
        """One line of the results."""
        from tests.cuda.agreement import run

        config, began = config_of(case), time.perf_counter()
        try:
            there, here = (pool.run(self._ranks, run, config)[0] for pool in self._pools)
        except AssertionError as error:
            return {"error": str(error).strip().splitlines()[-1], "trace": str(error)[-4000:]}
        expected = "Transformer Engine" if "Transformer" in case["layers"] else "local"
        if set(here.layers) != {expected}:
            return {"error": f"layers are {here.layers}, not {expected}"}
        return {
            "loss": _relative(here.losses, there.losses),
            "norm": _relative(here.norms, there.norms),
            "across": _relative(here.across, there.across),
            "initial_equal": here.initial == there.initial,
            "unequal": here.unequal,
            "unequal_on_cpu": there.unequal,
            "tensors": here.tensors,
            "losses": [here.losses, there.losses],
            "norms": [here.norms, there.norms],
            "seconds": time.perf_counter() - began,
        }

    def close(self) -> None:
        for pool in self._pools:
            pool.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the results, made if it is not there")
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4), help="of each run (2)")
    parser.add_argument("--only", nargs="*", default=[], help="cases whose names contain all these")
    parser.add_argument("--most", type=int, help="stop after so many new cases")
    args = parser.parse_args()
    from megatron_progressive import standin

    if reason := standin.available():
        print(reason, file=sys.stderr)
        return 2
    folder = os.environ.get("MPROG_TRANSFORMER_ENGINE", "")
    if folder and not (Path(folder) / "transformer_engine").is_dir():
        print(f"MPROG_TRANSFORMER_ENGINE: got {folder}; accepted: a folder with "
              "transformer_engine in it", file=sys.stderr)  # fmt: skip
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "cases.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {line["name"]: line for line in lines}
    cases, impossible = cases_of(args.ranks)
    left_out = [case for case in cases if not folder and "Transformer" in case["layers"]]
    wanted = [
        case for case in cases
        if case not in left_out and all(word in name_of(case) for word in args.only)
    ]  # fmt: skip
    todo = [case for case in wanted if name_of(case) not in found][: args.most]
    others = len(cases) - len(wanted)
    print(f"{len(cases)} cases, {others} left out, {len(todo)} to run", flush=True)
    both, began = Both(args.ranks, folder), time.monotonic()
    try:
        for number, case in enumerate(todo):
            line = {"name": name_of(case), "case": case, "ranks": args.ranks, **both.compare(case)}
            with file.open("a") as out:
                out.write(json.dumps(line) + "\n")
            found[line["name"]] = line
            _write(args.out / "page.md", page(list(found.values()), impossible, len(left_out)))
            left = (time.monotonic() - began) / (number + 1) * (len(todo) - number - 1)
            said = line.get("error") or f"losses {line['loss']:.1e}, norms {line['norm']:.1e}"
            print(f"{number + 1} of {len(todo)}, {short_time(left)} left: {line['name']}: {said}",
                  flush=True)  # fmt: skip
    finally:
        both.close()
    _write(args.out / "page.md", page(list(found.values()), impossible, len(left_out)))
    from agreement_page import beyond

    return int(any(beyond(line) for line in found.values()))


def _write(path: Path, text: str) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


if __name__ == "__main__":
    sys.exit(main())
