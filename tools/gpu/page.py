"""The page of a first day on a GPU, in Markdown, from what its sections measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def page(day: Row) -> str:
    """The page of ``results.json``: what ran, then a table for each kind of result."""
    rehearsal = "Rehearsal without a GPU of the first" if day["rehearsal"] else "First"
    parts = [
        f"# {rehearsal} day on a GPU, {day['date']}, commit {day['commit']}",
        *([_not_rehearsed(day["transformer_engine"])] if day["rehearsal"] else []),
        _table(
            "Sections",
            ("section", "ended", "seconds", "limit"),
            ((s["name"], _ended(s["exit"]), f"{s['seconds']:.0f}", f"{s['limit_s']:.0f}")
             for s in day["sections"]),
        ),
    ]  # fmt: skip
    for part, (title, columns, cells) in TABLES.items():
        rows = [result for result in day["results"] if result["part"] == part]
        if rows:
            parts.append(_table(title, columns, (cells(row) for row in rows)))
    return "\n\n".join(parts) + "\n"


def _not_rehearsed(transformer_engine: bool) -> str:
    """What a rehearsal does not show."""
    layers = (
        "its Python was real in the sections that compute; the others ran with local layers"
        if transformer_engine
        else "its sections ran with local layers (MPROG_TRANSFORMER_ENGINE named no folder with it)"
    )
    return (
        "Not rehearsed, since nothing here is a GPU: kernels and their numerics, cuDNN's "
        "attention, compiled code (Triton's, torch's), CUDA's and NCCL's own memory, speed. Times, "
        f"MFU, shares and the losses of measurements say nothing. Transformer Engine: {layers}."
    )


def _ended(code: int | None) -> str:
    if code is None:
        return "left out, no time"
    return {0: "well", 124: "past its limit"}.get(code, f"exit {code}")


def _table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(columns)
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _run(row: Row) -> str:
    local = any(word.endswith("transformer_engine=false") for word in row.get("words", ()))
    return Path(row["config"]).stem.removesuffix("_fixed").removesuffix("_progressive") + (
        ", local layers" if local else ""
    )


def _milliseconds(row: Row) -> str:
    return f"{1e3 * row['step_s']:.1f}"


def _planned(row: Row) -> str:
    """The plan is of Transformer Engine's layers: those of local ones have none."""
    return "none" if row["planned_gib"] is None else f"{row['planned_gib']:.2f}"


def _throughput(row: Row) -> tuple[str, ...]:
    return (
        f"{Path(row['config']).parent.name} {_run(row)}", str(row["layers"]),
        str(row["micro_batch"]), _milliseconds(row), f"{row['tokens_per_s']:,.0f}",
        "not known" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
        f"{row['peak_gib']:.2f}", _planned(row), f"{row['left_gib']:.3f}",
        " → ".join(f"{loss:.4f}" for loss in row["losses"]),
    )  # fmt: skip


def _speedup(row: Row) -> tuple[str, ...]:
    numbers = (f"{row['wall']:.2f}", f"{row['flops']:.2f}", f"{100 * row['share']:.0f} %")
    return (f"{Path(row['config']).parent.name} {_run(row)}", *numbers)


def _pause(row: Row) -> tuple[str, ...]:
    parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["parts"].items())
    memory = (f"{row[key]:.2f}" for key in ("before_gib", "peak_gib", "after_gib", "left_gib"))
    return (
        f"{Path(row['config']).parent.name} {_run(row)}, {row['init']}",
        f"{row['from_layers']} → {row['to_layers']}", f"{row['seconds']:.2f}", parts, *memory,
        " → ".join(f"{loss:.4f}" for loss in row["loss"]),
    )  # fmt: skip


def _newton_schulz(row: Row) -> tuple[str, ...]:
    shape, kernel = " x ".join(map(str, row["shape"])), "ours" if row["symmetric"] else "cuBLAS"
    if "error" in row:
        return shape, row["dtype"], kernel, row["error"], "", ""
    numbers = (f"{row['ms']:.2f}", f"{row['tflops']:.0f}", f"{row['relative_error']:.1e}")
    return (shape, row["dtype"], kernel, *numbers)


def _setting(row: Row) -> tuple[str, ...]:
    run = f"{Path(row['config']).parent.name} {_run(row)}"
    return run, row["setting"], row["error"] if "error" in row else _milliseconds(row)


TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[Row], tuple[str, ...]]]] = {
    "smoke": (
        "Transformer Engine's kernels against plain torch",
        ("kernel", "largest difference over largest value"),
        lambda row: (row["what"], f"{row['relative_error']:.1e}"),
    ),
    "throughput": (
        "Throughput and memory",
        ("run", "layers", "micro-batch", "step, ms", "tokens/s", "MFU", "peak GiB", "planned GiB",
         "GiB left after closing", "loss"),
        _throughput,
    ),
    "speedup": (
        "Zero-layer phase against fixed-size",
        ("run", "wall-clock", "FLOPs", "share realised"),
        _speedup,
    ),
    "pause": (
        "Pause at an expansion",
        ("run", "layers", "seconds", "of which", "GiB before", "at the peak", "after",
         "after closing", "loss"),
        _pause,
    ),
    "newton_schulz": (
        "Newton-Schulz, five steps",
        ("matrices", "type", "kernel", "ms", "TFLOP/s", "error against fp64"),
        _newton_schulz,
    ),
    "setting": (
        "Kernel settings, each turned the other way",
        ("run", "setting", "step, ms"),
        _setting,
    ),
}  # fmt: skip
"""By the kind of result: title, columns, and how a result fills them."""
