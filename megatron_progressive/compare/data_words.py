"""Words that depend on what the models of a study are trained on."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_progressive.config import RunConfig
from megatron_progressive.data import mix_words
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.models.description import input_words

_COUNTED = {
    "tokens": "every linear (of routed experts those that a token takes), the LM head over its "
    "padded vocabulary, and attention scores and values on the full square, also where documents "
    "are masked; looking up embeddings "
    "and positions is no matrix product and counts nothing",
    "images": "every convolution and the head",
}
_HELD_OUT = {"tokens": "text", "images": "images"}


def per_unit(units: Iterable[str]) -> str:
    """What a loss is the mean over: ``token``, ``image``, or ``token or image``."""
    return " or ".join(dict.fromkeys(unit.removesuffix("s") for unit in units)) or "token"


def counted(units: Iterable[str]) -> str:
    """The sentence that says what the FLOPs count."""
    parts = "; ".join(_COUNTED[unit] for unit in dict.fromkeys(units)) or _COUNTED["tokens"]
    return (
        f"FLOPs count matrix products: {parts}. They are those of the forward and the backward "
        "pass and of the optimizer's Newton-Schulz; validation is left out."
    )


def held_out(unit: str) -> str:
    """What the validation losses are measured on."""
    return f"on {_HELD_OUT[unit]} held out of training"


def data_text(config: RunConfig) -> str:
    """The data of a run in words."""
    data, shape = config.data, model_shape(config)
    if not isinstance(shape, TransformerShape):
        return f"corpus {data.corpus}, {' of '.join(input_words(shape))}"
    corpus = mix_words(config) if data.mix else f"corpus {data.corpus}"
    return (
        f"{corpus}, tokenizer {data.tokenizer}, vocabulary {shape.vocab_size:,}, "
        f"sequences of {shape.sequence_length:,} tokens"
    )
