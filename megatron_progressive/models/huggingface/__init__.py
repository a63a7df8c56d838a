"""Hugging Face's model folders: which class each family is, its ``config.json`` and tensors.

Nothing here loads torch or transformers; the reading and writing is in ``state/huggingface``.
"""

from __future__ import annotations

from typing import Any

from megatron_progressive.models import TRANSFORMERS
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.models.checks import check_shape
from megatron_progressive.models.huggingface import deepseek_v3, gpt2, llama3, mixtral, qwen3
from megatron_progressive.models.huggingface.family import HuggingFaceFamily
from megatron_progressive.models.huggingface.values import Values

_ALL = (gpt2, llama3, qwen3, mixtral, deepseek_v3)
HUGGING_FACE: dict[str, HuggingFaceFamily] = {m.HUGGING_FACE.family: m.HUGGING_FACE for m in _ALL}
"""By our family."""


def shape_from_config(values: dict[str, Any]) -> tuple[HuggingFaceFamily, TransformerShape]:
    """The family and the shape that a ``config.json`` describes.

    Raises:
        ConfigError: another model type or architecture, or anything in it that the family does
            not have; one line that names the key.
    """
    config = Values(values)
    by_type = {known.model_type: known for known in HUGGING_FACE.values()}
    model_type = config.value("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise config.error("model_type", ", ".join(by_type))
    known = by_type[model_type]
    if config.value("architectures", [known.architecture]) != [known.architecture]:
        raise config.error("architectures", f'["{known.architecture}"]')
    shape = known.shape_of(config)
    config.refuse_unknown(known.config_class)
    check_shape(shape, TRANSFORMERS[known.family])
    return known, shape


def config_from_shape(shape: TransformerShape) -> dict[str, Any]:
    """``config.json`` of a model, the token ids and the type of the weights left out.

    Raises:
        ConfigError: transformers' class cannot be that model.
    """
    known = HUGGING_FACE[shape.family]
    return {
        "architectures": [known.architecture],
        "model_type": known.model_type,
        **known.config_of(shape),
    }
