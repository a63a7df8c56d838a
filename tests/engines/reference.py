"""Expand on a dict of whole tensors, in plain code: the oracle of the distributed expansion."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import ModelShape
from megatron_progressive.state.boxes import whole
from megatron_progressive.state.init import initial_values

Full = dict[tuple[str, str], torch.Tensor]


def in_layer(name: str, number: int) -> str:
    parts = name.split(".")
    return ".".join([*parts[:2], str(number), *parts[3:]])


def expanded(
    old: Full, shape: ModelShape, old_layers: int, init: str, order: str, insert: str,
    policy: str, seed: int, adam: Callable[[str], bool],
) -> Full:  # fmt: skip
    """Whole tensors of the deeper model: weights (param, master) and optimizer slots.

    ``adam(name)`` says whether a tensor has AdamW's slots or Muon-NSGD's.
    """
    new_layers = shape.num_layers
    copying = init.startswith("copying")
    if copying:
        origin = {
            "stack": [i % old_layers for i in range(new_layers)],
            "inter": [i * old_layers // new_layers for i in range(new_layers)],
            "last": [min(i, old_layers - 1) for i in range(new_layers)],
        }[order]
        keeps = {}
        for source in range(old_layers):
            places = [i for i in range(new_layers) if origin[i] == source]
            keeps[places[0] if insert == "top" else places[-1]] = source
    else:
        below = new_layers - old_layers if insert == "bottom" else 0
        keeps = {below + source: source for source in range(old_layers)}
    weights = {slot for _, slot in old if slot in ("param", "master")}
    out: Full = {}
    for name, spec in tensor_table(shape).items():
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("decoder.layers.") else None
        slots = {"exp_avg", "exp_avg_sq", "step"} if adam(name) else {"momentum"}
        for slot in weights | slots:
            weight = slot in weights
            dtype = old[next(iter(old))[0], slot].dtype if weight else torch.float32
            size = (1,) if slot == "step" else spec.shape

            source: str | None
            if layer is None:
                source = name
            elif layer in keeps:
                source = in_layer(name, keeps[layer])
            else:
                source = in_layer(name, origin[layer]) if copying else None
            survivor = layer is None or layer in keeps
            if weight and source is not None:
                value = old[source, slot]
                if not survivor and (
                    (init == "copying_zeroL" and ("linear_proj" in name or "linear_fc2" in name))
                    or (init == "copying_zeroN" and "layernorm" in name)
                ):
                    value = torch.zeros_like(value)
            elif weight and init == "zero":
                value = torch.zeros(size, dtype=dtype)
            elif weight:
                value = initial_values(seed, 1, name, spec, whole(spec.shape)).to(dtype)
            elif source is not None and policy != "reset" and (survivor or policy == "copy"):
                value = old[source, slot]
            else:
                value = torch.zeros(size, dtype=dtype)
            out[name, slot] = value
    return out
