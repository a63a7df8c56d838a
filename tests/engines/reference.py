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
    copying = init.startswith("copying")
    dense = shape.moe.first_k_dense if shape.moe else shape.num_layers
    origin: dict[int, int] = {}
    keeps: dict[int, int] = {}
    for kind in ("dense", "moe"):  # each kind of layer on its own
        targets = [i for i in range(shape.num_layers) if (i < dense) == (kind == "dense")]
        own = [i for i in range(old_layers) if (i < dense) == (kind == "dense")]
        sources = own or list(range(old_layers))
        n, m = len(sources), len(targets)
        if copying:
            for j, i in enumerate(targets):
                places = {"stack": j % n, "inter": j * n // m, "last": min(j, n - 1)}
                origin[i] = sources[places[order]]
            for source in own:
                copies = [i for i in targets if origin[i] == source]
                keeps[copies[0] if insert == "top" else copies[-1]] = source
        else:
            below = m - len(own) if insert == "bottom" else 0
            keeps |= {targets[below + j]: source for j, source in enumerate(own)}
    weights = {slot for _, slot in old if slot in ("param", "master")}
    low = next(value.dtype for (name, slot), value in old.items()
               if slot == "param" and "expert_bias" not in name)  # fmt: skip
    out: Full = {}
    for name, spec in tensor_table(shape).items():
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("decoder.layers.") else None
        slots = {"exp_avg", "exp_avg_sq", "step"} if adam(name) else {"momentum"}
        bias = name.endswith("router.expert_bias")  # no master, no optimizer
        for slot in {"param"} if bias else weights | slots:
            weight = slot in weights
            dtype = low if slot == "param" and not bias else torch.float32
            size = (1,) if slot == "step" else spec.shape

            source: str | None
            if layer is None:
                source = name
            elif layer in keeps:
                source = in_layer(name, keeps[layer])
            else:
                source = in_layer(name, origin[layer]) if copying else None
            if (source, "param") not in old or old[str(source), "param"].shape != spec.shape:
                source = None  # a layer of the other kind has no such tensor
            survivor = layer is None or layer in keeps
            zeroed = not survivor and (
                init == "zero"
                or (init == "copying_zeroL" and ("linear_proj" in name or "linear_fc2" in name))
                or (init == "copying_zeroN" and "layernorm" in name)
            )
            if weight and zeroed:
                value = torch.zeros(size, dtype=dtype)
            elif weight and source is not None:
                value = old[source, slot]
            elif weight:
                value = initial_values(seed, 1, name, spec, whole(spec.shape)).to(dtype)
            elif source is not None and policy != "reset" and (survivor or policy == "copy"):
                value = old[source, slot]
            else:
                value = torch.zeros(size, dtype=dtype)
            out[name, slot] = value
    return out
