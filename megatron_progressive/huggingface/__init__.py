"""Hugging Face's model folders: the class of each family, its ``config.json`` and its tensors.

Nothing in this file loads torch or transformers; :mod:`.importing` and :mod:`.exporting` read and
write.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from megatron_progressive.huggingface.families import deepseek_v3, gpt2, llama3, mixtral, qwen3
from megatron_progressive.huggingface.family import HuggingFaceFamily
from megatron_progressive.huggingface.values import Findings, Values
from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.models.transformer_family import check_shape

_ALL = (gpt2, llama3, qwen3, mixtral, deepseek_v3)
HUGGING_FACE: dict[str, HuggingFaceFamily] = {m.HUGGING_FACE.family: m.HUGGING_FACE for m in _ALL}
"""What is known of transformers' class, by the name of our family."""


@dataclass(frozen=True)
class Described:
    """What a ``config.json`` describes."""

    known: HuggingFaceFamily
    shape: TransformerShape
    kept: dict[str, Any]
    """The keys that mean nothing for the weights, which an export gives back."""
    findings: Findings
    """What was passed over because the user allowed it."""


def read_description(values: dict[str, Any], allowed: Collection[str] = ()) -> Described:
    """The model that a ``config.json`` describes.

    Args:
        values: the values of the file.
        allowed: keys, by their full names (``rope_scaling.type``), that are passed over although
            the family does not have what they say.

    Raises:
        ConfigError: the model type or the architecture is another one, or something in the file is
            not in the family; one line names every such key.
    """
    config = Values(values, Findings(allowed))
    by_type = {known.model_type: known for known in HUGGING_FACE.values()}
    model_type = config.value("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise config.error("model_type", ", ".join(by_type))
    known = by_type[model_type]
    if config.value("architectures", [known.architecture]) != [known.architecture]:
        raise config.error("architectures", f'["{known.architecture}"]')
    shape = known.shape_of(config)
    _check_own_code(config, known)
    config.refuse_unknown(known.config_class)
    config.findings.refuse()
    check_shape(shape, TRANSFORMERS[known.family])
    return Described(known, shape, config.kept(), config.findings)


def _check_own_code(config: Values, known: HuggingFaceFamily) -> None:
    """Check a class of the folder's own code. A class that is named as transformers' class is taken
    for the same model; another name is another model."""
    own = config.value("auto_map", {})
    classes = known.classes()
    named = {k: str(v).rsplit(".", 1)[-1] for k, v in own.items()} if isinstance(own, dict) else {}
    if not isinstance(own, dict) or any(classes.get(k, v) != v for k, v in named.items()):
        accepted = f"no code of its own but of {', '.join(classes.values())}"
        config.refuse("auto_map", accepted, can_be_allowed=True)


def config_from_shape(shape: TransformerShape) -> dict[str, Any]:
    """The ``config.json`` of a model, without the token ids and the type of the weights.

    Raises:
        ConfigError: transformers' class cannot express the model.
    """
    known = HUGGING_FACE[shape.family]
    return {
        "architectures": [known.architecture],
        "model_type": known.model_type,
        **known.config_of(shape),
    }
