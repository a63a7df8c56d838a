"""What the backward pass computes anew: FLOPs, and which layers and parts they are of."""

from __future__ import annotations

from functools import lru_cache

from megatron_progressive.cost.flops import attention_flops, linear_flops
from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import TransformerShape, layer_number
from megatron_progressive.runtime.layout import Layout


def whole_layers(layout: Layout, numbers: range) -> list[tuple[int, bool]]:
    """The numbers of a model chunk's layers, each with whether all of it is computed anew."""
    some = layout.recompute_layers
    count = 0 if layout.recompute != "full" else len(numbers) if some is None else some
    return [(number, place < count) for place, number in enumerate(numbers)]


def _part_of(name: str) -> str | None:
    """The recomputable part (``parallel.recompute_modules``) whose products a layer's tensor has;
    the joined ones of experts are their parts' together."""
    if ".linear_q_up_proj." in name or ".linear_kv_up_proj." in name:
        return "mla_up_proj"
    if ".shared_experts." in name:
        return "shared_experts"
    if ".mlp.experts." in name or ".mlp.router." in name:
        return "moe"
    return "mlp" if ".mlp." in name else None


@lru_cache(maxsize=64)
def _part_flops(shape: TransformerShape) -> dict[str, tuple[int, dict[str, int]]]:
    """Of each kind of layer the FLOPs of one token's forward pass, and those of its parts. Norms
    and activations count nothing, as everywhere."""
    kinds = shape.layer_kinds()
    first = {kinds.index(kind) for kind in set(kinds)}
    totals = {kind: attention_flops(shape) for kind in set(kinds)}
    parts = {kind: {"core_attn": attention_flops(shape)} for kind in set(kinds)}
    for name, spec in tensor_table(shape).items():
        number, part = layer_number(name), _part_of(name)
        if number is None or number not in first:
            continue
        found = linear_flops(spec, shape)
        totals[kinds[number]] += found
        if part is not None:
            members = parts[kinds[number]]
            members[part] = members.get(part, 0) + found
    return {kind: (totals[kind], parts[kind]) for kind in totals}


def recomputed_flops(shape: TransformerShape, layout: Layout, chunks: list[range]) -> int:
    """The FLOPs of one token that a pipeline stage with these model chunks computes anew."""
    if layout.recompute == "none":
        return 0
    kinds, known = shape.layer_kinds(), _part_flops(shape)
    again, total = set(layout.recompute_modules), 0
    if "moe" in again:
        again.add("shared_experts")
    for numbers in chunks:
        for number, whole in whole_layers(layout, numbers):
            layer, parts = known[kinds[number]]
            total += layer if whole else sum(parts.get(part, 0) for part in again)
    return total
