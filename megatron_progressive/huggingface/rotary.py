"""Rotary positions in ``config.json``, in the style of transformers 4 and in that of transformers
5."""

from __future__ import annotations

from typing import Any

from megatron_progressive.huggingface.values import Values, show
from megatron_progressive.models.base import Rope
from megatron_progressive.models.transformer_family import LLAMA3_ORIGINAL_LENGTH

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": LLAMA3_ORIGINAL_LENGTH}  # fmt: skip
"""The constants in Megatron-core's Llama 3 scaling."""
_YARN = {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
"""The constants with which :mod:`megatron_progressive.engines.megatron.transformer_kwargs`
configures Megatron-core's YaRN."""


def rope_of(config: Values, scaling: str, default_theta: float = 10000.0) -> Rope:
    """The rotary positions that a configuration names.

    Args:
        scaling: the scaling that the family can have, ``llama3`` or ``yarn``.
        default_theta: the base of the rotation in the class.

    A scaling, or a constant of one, that the family does not have is noted.
    """
    config.require("partial_rotary_factor", 1.0)
    key = "rope_scaling" if config.has("rope_scaling") else "rope_parameters"
    old, new = config.value("rope_scaling"), config.value("rope_parameters")
    if old and new and old != new:
        config.refuse("rope_scaling", "rope_scaling or rope_parameters, not both")
    part = config.mapping(key)
    theta = config.number("rope_theta", default_theta, least=1)
    if config.has("rope_theta") and part.has("rope_theta") and part.value("rope_theta") != theta:
        accepted = f"{show(part.value('rope_theta'))}, as in {key}"
        config.refuse("rope_theta", accepted, can_be_allowed=True)
    theta = part.number("rope_theta", theta, least=1)
    part.require("partial_rotary_factor", 1.0)
    kind = "rope_type" if part.has("rope_type") or not part.has("type") else "type"
    if part.value(kind) not in (None, "default", scaling):
        part.ignore_rest()  # constants of that scaling
    chosen = part.require(kind, "default", scaling)
    part.ignore("type", "rope_type")
    if chosen == "default":
        part.refuse_unread()
        return Rope(theta=theta)
    factor = part.number("factor", least=1)
    if scaling == "llama3":
        for name, constant in _LLAMA3.items():
            if not part.has(name):
                part.refuse(name, str(constant))
            part.require(name, constant)
        length = LLAMA3_ORIGINAL_LENGTH
    else:
        for name in ("mscale", "mscale_all_dim"):  # their absence means another scale
            if not part.has(name):
                part.refuse(name, "1.0")
        for name, constant in _YARN.items():
            part.require(name, constant)
        part.require("truncate", True)
        part.require("attention_factor", 1.0)  # what the two scales make of it
        length = part.integer("original_max_position_embeddings")
    part.refuse_unread()
    return Rope(theta=theta, scaling=scaling, factor=factor, original_length=length)


def rope_values(rope: Rope) -> dict[str, Any]:
    """The keys of ``config.json``, in the style that transformers 4 and 5 both read."""
    if rope.scaling == "none":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    constants = _LLAMA3 if rope.scaling == "llama3" else _YARN
    values = {
        **constants,
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_length,
    }
    return {"rope_theta": rope.theta, "rope_scaling": values}
