"""Samples that know their documents, for attention within documents alone (``data.attention:
document``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class DocumentTokens(NamedTuple):
    """Some samples, and where their documents begin."""

    tokens: torch.Tensor
    """int64 [n, S + 1], as without documents."""
    positions: torch.Tensor
    """The position of each input token in its document, int64 [n, S]. A document begins where it is
    0: behind the token that ends another one, and where the sample begins, even amid a document."""


type Sample = torch.Tensor | DocumentTokens
"""Some samples, with or without their documents."""


def with_documents(tokens: torch.Tensor, end_of_document: int) -> DocumentTokens:
    """The samples ``tokens``, int64 [n, S + 1], with the positions of their inputs. The token that
    ends a document is the last one of it."""
    import torch

    inputs = tokens[:, :-1]
    places = torch.arange(inputs.size(1)).expand_as(inputs)
    begins = torch.zeros_like(inputs, dtype=torch.bool)
    begins[:, 1:] = inputs[:, :-1] == end_of_document
    last_begin = torch.where(begins, places, 0).cummax(dim=1).values
    return DocumentTokens(tokens, places - last_begin)


def tokens_in(sample: Sample) -> torch.Tensor:
    """The tokens of some samples, with or without documents."""
    return sample.tokens if isinstance(sample, DocumentTokens) else sample
