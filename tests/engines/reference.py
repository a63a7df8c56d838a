"""Expand on a dict of whole tensors, in plain code: the oracle of the distributed expansion."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from megatron_progressive.models import tensor_table
from megatron_progressive.reshard.boxes import whole
from megatron_progressive.reshard.initial_values import initial_values

Full = dict[tuple[str, str], torch.Tensor]


LAYER = re.compile(r"(decoder\.layers|stages\.\d+\.blocks)\.(\d+)\.")


def in_layer(name: str, number: int) -> str:
    return LAYER.sub(rf"\g<1>.{number}.", name)


def kinds_of(shape: Any, layers: int) -> dict[str, list[str]]:
    """Of each stack of layers: the kind of each."""
    if shape.family == "resnet":
        stages = [int(blocks) for blocks in shape.resnet.stages.split("-")]
        widens = shape.resnet.block == "bottleneck"  # also the first stage
        return {
            f"stages.{s}.blocks": [
                "first" if i == 0 and (s > 0 or widens) else "plain"
                for i in range(math.ceil(blocks * layers / max(stages)))
            ]
            for s, blocks in enumerate(stages)
        }
    dense = shape.moe.first_k_dense if shape.moe else layers
    return {"decoder.layers": ["dense" if i < dense else "moe" for i in range(layers)]}


def zeroed_by(init: str, name: str, shape: Any) -> bool:
    if init == "copying_zeroL":
        last = "linear_proj", "linear_fc2"
        if shape.family == "resnet":  # the affine map that ends a branch
            last = (".norm3." if shape.resnet.block == "bottleneck" else ".norm2.",)
        return any(part in name for part in last)
    if init == "copying_zeroN":
        return "layernorm" in name or ".norm" in name
    return init == "zero"


def copied_layers(
    sources: list[int], own: list[int], places: int, insert: str, block: list[int] | None
) -> list[int]:
    """The layers of a kind that are copied: of the configured block, or the middle ones."""
    if block is not None:
        return [s for s in sources if s in range(*block)]
    if insert == "middle" and own:
        n, new = len(own), places - len(own)
        for size in reversed(range(1, n - 1)):  # one stays below, one above
            if new and new % size == 0:
                skipped = (n - size) // 2
                return own[skipped : skipped + size]
    return sources


def in_order(
    own: list[int], targets: list[int], row: list[int], insert: str
) -> list[tuple[int, int]]:
    """Where each trained layer stays: of all places of their copies in the layers' order the
    highest ones, or the lowest."""
    found: list[list[tuple[int, int]]] = [[]]
    for source in own:
        found = [
            [*chain, (i, source)]
            for chain in found
            for i, s in zip(targets, row, strict=True)
            if s == source and (not chain or i > chain[-1][0])
        ]
    chains = sorted(found)
    return chains[-1] if insert == "bottom" else chains[0]


def expanded(
    old: Full, shape: Any, old_layers: int, init: str, order: str, insert: str,
    policy: str, seed: int, adam: Callable[[str], bool], block: list[int] | None = None,
    generation: int = 1,
) -> Full:  # fmt: skip
    """Whole tensors of the deeper model: weights (param, master) and optimizer slots.

    ``adam(name)`` says whether a tensor has AdamW's slots or Muon-NSGD's.
    """
    copying = init.startswith("copying")
    origin: dict[tuple[str, int], int] = {}
    keeps: dict[tuple[str, int], int] = {}
    before = kinds_of(shape, old_layers)
    for stack, kinds in kinds_of(shape, shape.num_layers).items():
        for kind in set(kinds):  # each kind of layer on its own
            targets = [i for i, k in enumerate(kinds) if k == kind]
            own = [i for i, k in enumerate(before[stack]) if k == kind]
            sources = own or list(range(len(before[stack])))
            if copying:
                copied = copied_layers(sources, own, len(targets), insert, block)
                row = [s for s in own if copied and s < copied[0]]
                rest = [s for s in own if s not in row and s not in copied]
                n, m = len(copied), len(targets) - len(row) - len(rest)
                for j in range(m):
                    places = {"stack": j % n, "inter": j * n // m, "last": min(j, n - 1)}
                    row.append(copied[places[order]])
                for i, source in zip(targets, row + rest, strict=True):
                    origin[stack, i] = source
                keeps |= {(stack, i): s for i, s in in_order(own, targets, row + rest, insert)}
            else:
                new = len(targets) - len(own)
                below = {"bottom": new, "top": 0, "middle": None}[insert]
                for j, source in enumerate(own):
                    up = new * (2 * j + 1 >= len(own)) if below is None else below
                    keeps[stack, targets[j + up]] = source
    weights = {slot for _, slot in old if slot in ("param", "master")}
    low = next(value.dtype for (name, slot), value in old.items()
               if slot == "param" and "expert_bias" not in name)  # fmt: skip
    out: Full = {}
    for name, spec in tensor_table(shape).items():
        found = LAYER.match(name)
        layer = (found[1], int(found[2])) if found else None
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
            zeroed = not survivor and zeroed_by(init, name, shape)
            if weight and zeroed:
                value = torch.zeros(size, dtype=dtype)
            elif weight and source is not None:
                value = old[source, slot]
            elif weight:
                value = initial_values(seed, generation, name, spec, whole(spec.shape)).to(dtype)
            elif source is not None and policy != "reset" and (survivor or policy == "copy"):
                value = old[source, slot]
            else:
                value = torch.zeros(size, dtype=dtype)
            out[name, slot] = value
    return out
