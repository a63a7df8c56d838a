"""What every family gives: a shape, and one table of its global tensors.

The table is the single source for initialisation, parameter counts, the optimizer's choice
of matrices, expansion and planning. Names are canonical: Megatron-core's, with the *global*
layer number on every pipeline stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LAYER_PREFIX = "decoder.layers."

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this on every layout, so that tensor parallelism
never changes the model."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model; ``num_layers`` is the only one that expansion changes."""

    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    vocab_size: int
    """Vocabulary before padding."""
    sequence_length: int
    tie_embeddings: bool
    linear_bias: bool

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class TensorSpec:
    """One global tensor.

    ``role`` says what it does: ``embedding``, ``position``, ``head``, ``qkv``, ``proj``,
    ``fc1``, ``fc2``, ``bias`` (of the linear named ``of``), ``norm_gain`` or ``norm_bias``.
    """

    shape: tuple[int, ...]
    role: str
    init: str
    """``normal``, ``zeros`` or ``ones``."""
    std: float = 0.0
    tp_axis: int | None = None
    """Axis that tensor parallelism cuts; None is replicated."""
    row_blocks: tuple[int, ...] = ()
    """Rows of the separate matrices that interleave along axis 0, for one attention head
    group (QKV: query, key, value rows of a group); empty where the tensor is one matrix."""
    last_linear: bool = False
    """Whether it belongs to the last linear of a sub-layer (what ``zeroL`` zeroes)."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def spectral_std(n_out: int, n_in: int) -> float:
    """Standard deviation of a Gaussian matrix whose spectral norm is about sqrt(n_out/n_in).

    A Gaussian n_out x n_in matrix with deviation s has spectral norm near
    s (sqrt(n_out) + sqrt(n_in)); the target is the spectral condition of muP (Yang, Simon and
    Bernstein 2023, arXiv 2310.17813, condition 1).
    """
    return math.sqrt(n_out / n_in) / (math.sqrt(n_out) + math.sqrt(n_in))


def layer_number(name: str) -> int | None:
    """Global number of the layer a tensor belongs to; None outside the layers."""
    if not name.startswith(LAYER_PREFIX):
        return None
    return int(name[len(LAYER_PREFIX) :].split(".", 1)[0])


def with_layer_number(name: str, number: int) -> str:
    """The same tensor of another layer."""
    rest = name[len(LAYER_PREFIX) :].split(".", 1)[1]
    return f"{LAYER_PREFIX}{number}.{rest}"
