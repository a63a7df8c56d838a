"""What ``mprog checkpoint inspect`` says of a checkpoint: its run, tensors and slots. Needs no
torch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_progressive.checkpoints.checkpoint import read_whole
from megatron_progressive.checkpoints.contents import PROGRESS_FILE
from megatron_progressive.checkpoints.index import stored_tensors
from megatron_progressive.checkpoints.record import ModelRecord
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.models.description import input_words, size_words
from megatron_progressive.reshard.boxes import PARAM

_SHORT_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def inspect_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Everything about a checkpoint, as values that JSON can hold.

    Returns: ``checkpoint``, ``progress``, ``model``, ``tensors`` (the name, the shape of the
    weight, and the shape, type and bytes of each slot) and ``totals`` (parameters, tensors, bytes
    by slot, bytes, files and their bytes on disk).

    Raises:
        ConfigError: there is no whole checkpoint.
    """
    progress, model = read_whole(checkpoint)
    tensors, by_slot = [], dict[str, int]()
    params = 0
    for name, slots in stored_tensors(checkpoint).items():
        described = {
            slot: {"shape": list(tensor.shape), "dtype": tensor.dtype, "bytes": tensor.nbytes}
            for slot, tensor in slots.items()
        }
        for slot, tensor in slots.items():
            by_slot[slot] = by_slot.get(slot, 0) + tensor.nbytes
        weight = slots.get(PARAM)
        params += weight.numel if weight else 0
        shape = list(weight.shape) if weight else None
        tensors.append({"name": name, "shape": shape, "slots": described})
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != PROGRESS_FILE]
    return {
        "checkpoint": str(checkpoint),
        "progress": asdict(progress),
        "model": model.to_values(),
        "tensors": tensors,
        "totals": {
            "params": params,
            "tensors": len(tensors),
            "bytes_by_slot": by_slot,
            "bytes": sum(by_slot.values()),
            "files": len(files),
            "file_bytes": sum(path.stat().st_size for path in files),
        },
    }


def render(found: dict[str, Any]) -> str:
    """The answer of :func:`inspect_checkpoint` as text, without a last newline."""
    progress, model, totals = found["progress"], found["model"], found["totals"]
    depths = ", ".join(
        f"{layers} {f'after step {step:,}' if step else 'at the start'}"
        for step, layers in model["depth_history"]
    )
    shape = ModelRecord.from_values(model).shape
    label, sizes = input_words(shape)
    moe = shape.moe if isinstance(shape, TransformerShape) else None
    experts = f", {moe.num_experts} experts, {moe.top_k} a token" if moe else ""
    embeddings = model["embeddings"] if model["optimizer"] == "muon_nsgd" else ""
    facts = [
        ("step", f"{progress['step']:,} ({progress['samples']:,} samples, "
                 f"{progress['flops']:.3g} FLOPs)"),
        ("layers", f"{progress['num_layers']}: {depths}"),
        ("model", f"{shape.family}, {', '.join(size_words(shape))}, {label} {sizes}{experts}"),
        ("optimizer", model["optimizer"] + (f" (embeddings: {embeddings})" if embeddings else "")
                      + f", {model['precision']}, seed {model['seed']}"),
        *([("trained on", _data_words(model["data"]))] if model.get("data") else []),
        *([("imported", _import_words(model["imported"]))] if model.get("imported") else []),
        ("saved by", model["layout"]),
        ("files", f"{totals['files']} ({_size(totals['file_bytes'])})"),
    ]  # fmt: skip
    lines = [f"Checkpoint {found['checkpoint']}"]
    lines += [f"  {label:<12}{text}" for label, text in facts]
    return "\n".join([*lines, "", *_table(found)])


def _import_words(imported: dict[str, Any]) -> str:
    allowed = ", ".join(imported.get("allowed", {}))
    return f"{imported['from']}, without {allowed}" if allowed else str(imported["from"])


def _data_words(data: dict[str, Any]) -> str:
    where = f", prepared as {data['prepared']}" if data["prepared"] else ""
    return f"{data['corpus']} ({data['fingerprint'][:12]}{where})"


def _table(found: dict[str, Any]) -> list[str]:
    totals = found["totals"]
    names = list(totals["bytes_by_slot"])
    rows = [["Tensor", "shape", *names]]
    for tensor in found["tensors"]:
        shape = tensor["shape"]
        cells = [tensor["name"], " x ".join(map(str, shape)) if shape else "-"]
        for name in names:
            slot = tensor["slots"].get(name)
            dtype = _SHORT_TYPES.get(slot["dtype"], slot["dtype"]) if slot else ""
            cells.append(f"{dtype} {_size(slot['bytes'])}" if slot else "-")
        rows.append(cells)
    sizes = [_size(size) for size in totals["bytes_by_slot"].values()]
    count = f"{totals['tensors']} tensors, {_size(totals['bytes'])}"
    rows.append([count, f"{totals['params']:,}", *sizes])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "   ".join([row[0].ljust(widths[0]),
                           *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]  # fmt: skip


def _size(nbytes: int) -> str:
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes} B"
