"""What reports say is what is counted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_progressive.compare.data_words import counted
from megatron_progressive.config import from_dict
from megatron_progressive.cost.flops import forward_flops_per_token, linear_flops
from megatron_progressive.models import FAMILIES, model_shape, tensor_table
from megatron_progressive.models.base import TransformerShape


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "resnet"])
def test_flops_are_of_what_the_page_names(family: str) -> None:
    """The lookup of embeddings costs nothing, the head does, whether its weight is tied or not."""
    text = counted(["tokens"])
    assert "looking up embeddings and positions is no matrix product and counts nothing" in text
    assert "the LM head over its padded vocabulary" in text
    data = {"vocab_size": 500, "sequence_length": 16}
    shape = model_shape(from_dict({"model": {"family": family, "preset": "tiny"}, "data": data}))
    assert isinstance(shape, TransformerShape)
    for name, spec in tensor_table(shape).items():
        if spec.role in ("embedding", "position"):
            assert linear_flops(spec, shape) == 0, name
    head = 2 * shape.hidden_size * shape.padded_vocab_size
    for tie in (True, False):
        no_layers = replace(shape, num_layers=0, tie_embeddings=tie)
        assert forward_flops_per_token(no_layers) == head
    assert "forward and the backward pass" in text
    assert "validation is left out" in text
