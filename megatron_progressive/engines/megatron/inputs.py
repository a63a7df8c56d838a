"""What Megatron-core's GPT model is given for the samples of one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_progressive.data.documents import DocumentTokens
from megatron_progressive.engines.megatron.context import SequencePart
from megatron_progressive.runtime.memory import sent_to


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward pass, on the device."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None = None
    """Where a token attends to another one: bool [n, 1, S, S], or what is added to its scores, of
    the weights' type [1, 1, S, S]; None for all before it."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further named arguments."""

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the model's ``forward``."""
        return (self.tokens, self.positions, self.mask), {"labels": self.labels, **self.more}


def model_inputs(
    sample: torch.Tensor | DocumentTokens,
    part: SequencePart,
    device: torch.device,
    packed: bool,
    mask: torch.Tensor | None = None,
) -> Inputs:
    """The inputs for this rank's part of some samples. Without documents each token attends to all
    before it.

    With documents it attends to those of its own document, whose positions begin at 0. Layers of
    Transformer Engine take that as one row of all tokens with the ends of documents (``thd``),
    others as a mask. Rotary positions matter as differences alone, so that a mask is all that
    layers without ``thd`` need.

    Args:
        sample: int64 [n, S + 1] on the host, or the same with documents.
        part: the part of each sample that this rank computes with; all of it with documents.
        packed: whether layers are Transformer Engine's.
        mask: of attention without documents (:meth:`.SequencePart.mask`).
    """
    if not isinstance(sample, DocumentTokens):
        tokens = sent_to(sample, device)
        rows = part.positions.expand(tokens.size(0), -1)
        inputs, labels = part.select(tokens[:, :-1]), part.select(tokens[:, 1:])
        return Inputs(inputs.contiguous(), rows, labels.contiguous(), mask)
    tokens, rows = sent_to(sample.tokens, device), sent_to(sample.positions, device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if not packed:
        document = (rows == 0).cumsum(dim=1)
        same = document[:, :, None] == document[:, None, :]
        return Inputs(inputs, rows, labels, same.tril()[:, None])
    begins = torch.nonzero(sample.positions.flatten() == 0).flatten()  # on the host: no waiting
    ends = torch.cat([begins, begins.new_tensor([sample.positions.numel()])])
    bounds, longest = sent_to(ends.int(), device), int(ends.diff().max())
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    flat = (inputs.view(1, -1), rows.reshape(1, -1), labels.view(1, -1))
    return Inputs(*flat, more={"packed_seq_params": packing})
