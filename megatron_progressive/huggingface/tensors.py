"""How the tensors of a model correspond to those of transformers' class for it.

Each family declares a table: our name, the kind of mapping, their names; ``*`` stands for a number
(of a layer, of an expert) that both have. One tensor of ours is always one or more whole tensors of
theirs, so either side can be written while one tensor is held.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_progressive.models import tensor_table
from megatron_progressive.models.base import LAYER_PREFIX, TensorSpec, TransformerShape
from megatron_progressive.models.tensor_table import MTP_PREFIX

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch

Shape = tuple[int, ...]
Rules = Mapping[str, tuple["type[Entry]", tuple[str, ...]]]
"""For each name of ours, the kind of mapping and their names."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Entry:
    """One tensor of ours, and the same values in their tensors. This kind maps one tensor as it
    is."""

    ours: str
    spec: TensorSpec
    theirs: tuple[str, ...]

    def shapes(self) -> list[Shape]:
        """The shapes of their tensors."""
        return [self.spec.shape]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Their tensors, made from ours."""
        return [tensor]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Our tensor, made from theirs."""
        (tensor,) = tensors
        return tensor


class Transposed(Entry):
    """A linear of GPT-2, which is (n_in, n_out)."""

    def shapes(self) -> list[Shape]:
        return [self.spec.shape[::-1]]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.t()]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        return tensor.t().contiguous()


class VocabularyRows(Entry):
    """A vocabulary: theirs has no padding, the rows of which are zero in ours."""

    def shapes(self) -> list[Shape]:
        rows = self.spec.live_rows
        return [(self.spec.shape[0] if rows is None else rows, *self.spec.shape[1:])]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[: self.spec.live_rows]]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        padded = tensor.new_zeros(self.spec.shape)
        padded[: len(tensor)] = tensor
        return padded


class QKV(Entry):
    """Queries, keys and values: ours interleaves their rows by group of heads; theirs are three
    tensors."""

    def shapes(self) -> list[Shape]:
        rows, rest = self.spec.row_blocks, self.spec.shape[1:]
        return [(count * self._groups, *rest) for count in rows]

    @property
    def _groups(self) -> int:
        return self.spec.shape[0] // sum(self.spec.row_blocks)

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch

        by_group = tensor.view(self._groups, -1, *tensor.shape[1:])
        parts = torch.split(by_group, list(self.spec.row_blocks), dim=1)
        return [part.flatten(0, 1) for part in parts]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        parts = [t.reshape(self._groups, -1, *t.shape[1:]) for t in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)


class FusedQKV(QKV):
    """Queries, keys and values of GPT-2: all queries, then keys, then values in one tensor, (n_in,
    n_out)."""

    def shapes(self) -> list[Shape]:
        return [self.spec.shape[::-1]]

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        import torch

        joined = torch.cat(super().split(tensor))
        return [joined.t() if joined.dim() == 2 else joined]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        (tensor,) = tensors
        rows = tensor.t() if tensor.dim() == 2 else tensor
        return super().join(rows.chunk(3)).contiguous()


class GateUp(Entry):
    """Gate and up: ours is (2, n_out, n_in); theirs are two tensors."""

    def shapes(self) -> list[Shape]:
        return [self.spec.shape[1:]] * 2

    def split(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[0], tensor[1]]

    def join(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        import torch

        return torch.stack(list(tensors))


@dataclass(frozen=True)
class Copy:
    """A tensor of theirs that repeats another one of theirs, which we have once."""

    theirs: str
    of: Entry
    written: bool = True
    """Whether an export writes it, and an import requires it; it may be there either way."""

    def shape(self) -> Shape:
        (shape,) = self.of.shapes()
        return shape


@dataclass(frozen=True)
class Zeros:
    """A tensor of theirs that we lack, and that has no effect where its values are zero."""

    theirs: str
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class NameMap:
    """Every tensor of a model, in our names and in theirs."""

    entries: tuple[Entry, ...]
    copies: tuple[Copy, ...] = ()
    zeros: tuple[Zeros, ...] = ()

    def required(self) -> dict[str, Shape]:
        """The shapes of the tensors that a folder of theirs must have, by name."""
        return {
            **{n: s for e in self.entries for n, s in zip(e.theirs, e.shapes(), strict=True)},
            **{zeros.theirs: zeros.shape for zeros in self.zeros},
        }

    def optional(self) -> dict[str, Shape]:
        """The shapes of the tensors that such a folder may have besides, by name."""
        return {copy.theirs: copy.shape() for copy in self.copies}


def entries_of(shape: TransformerShape, rules: Rules) -> Iterator[Entry]:
    """The entries that ``rules`` give for every tensor of a model.

    As in theirs, the layer of a prediction module comes after the model's own layers.

    Raises:
        KeyError: a tensor has no rule.
    """
    for name, spec in tensor_table(shape).items():
        common = _with_their_layer(name, shape.num_layers)
        kind, patterns = rules[re.sub(r"(?<=\.)\d+(?=\.)", "*", common)]
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", common)
        yield kind(
            name, _with_blocks(spec, kind, shape), tuple(_fill(p, numbers) for p in patterns)
        )


def _with_their_layer(name: str, num_layers: int) -> str:
    if not name.startswith(MTP_PREFIX):
        return name
    number, rest = name[len(MTP_PREFIX) :].split(".", 1)
    layer = num_layers + int(number)
    if rest.startswith("mtp_model_layer."):
        return f"{LAYER_PREFIX}{layer}.{rest.removeprefix('mtp_model_layer.')}"
    return f"{MTP_PREFIX}{layer}.{rest}"


def _with_blocks(spec: TensorSpec, kind: type[Entry], shape: TransformerShape) -> TensorSpec:
    """The spec of a tensor with its blocks of rows, which the table names for a QKV weight only;
    its bias has the same blocks."""
    if not issubclass(kind, QKV) or spec.row_blocks:
        return spec
    queries = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
    return replace(spec, row_blocks=(queries, shape.head_dim, shape.head_dim))


def _fill(pattern: str, numbers: Sequence[str]) -> str:
    left = iter(numbers)
    return re.sub(r"\*", lambda _: next(left), pattern)
