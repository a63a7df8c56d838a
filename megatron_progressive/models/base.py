"""What every family gives: a shape, and one table of its global tensors.

The table is the single source for initialisation, parameter counts, the optimizer's choice
of matrices, expansion and planning. Names are canonical: Megatron-core's, with the *global*
layer and expert numbers on every rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

LAYER_PREFIX = "decoder.layers."
STAGE_PREFIX = "stages."
_LAYER = re.compile(rf"({re.escape(LAYER_PREFIX)}|{re.escape(STAGE_PREFIX)}\d+\.blocks\.)(\d+)\.")

VOCAB_MULTIPLE = 128
"""The vocabulary is padded to a multiple of this on every layout, so that tensor parallelism
never changes the model. Rows of the padding are zero and stay so: no token has them, and their
logits are masked."""

DENSE, MOE = "dense", "moe"
"""Kinds of layers, by their feed-forward part."""


ROWS, TIED_ROWS, MATRIX, VECTOR = "rows", "tied_rows", "matrix", "vector"
"""The norm in which a tensor's size counts (:class:`Scaling`): the RMS of each row of a table that
is looked up, the same of a table that is the head too, the spectral norm, the RMS."""


@dataclass(frozen=True)
class Scaling:
    """How much a tensor may move (muP; :mod:`.mup` says where the numbers come from)."""

    form: str
    """``rows``, ``tied_rows``, ``matrix`` or ``vector``."""
    update: float
    """Size of an update in that norm, for a learning rate of 1. For ``matrix`` a factor of
    sqrt(n_out / n_in)."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions (:class:`.config.RopeSection`)."""

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 8192


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (:class:`.config.MLASection`)."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Width of a query and of a key, both parts."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoE:
    """Mixture of experts (:class:`.config.MoESection`)."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    shared_experts: int = 0
    first_k_dense: int = 0
    num_groups: int = 1
    top_k_groups: int = 1
    routed_scaling_factor: float = 1.0
    bias_update_rate: float = 0.0
    aux_loss_coeff: float = 0.0


@dataclass(frozen=True)
class ResNetParts:
    """Residual networks (:class:`.config.ResNetSection`)."""

    block: str
    stages: str
    stem: str
    groups: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of one model, whatever its family; ``num_layers`` is the only one that expansion
    changes."""

    family: str
    num_layers: int
    """Depth: what it counts is the family's."""
    hidden_size: int
    """Width of the residual stream (its narrowest part where it gets wider)."""
    mup: bool = False
    """Whether initial values and updates follow :mod:`.mup`."""

    unit: ClassVar[str] = "tokens"
    """What a sample is made of: losses, compute and speeds are of one of these."""

    @property
    def sample_units(self) -> int:
        """Units of one sample."""
        return 1

    def stacks(self) -> dict[str, list[str]]:
        """The layers that expansion adds to, by the prefix of their tensors' names: in each
        stack the kind of each layer by its number. Layers of one kind have the same tensors."""
        raise NotImplementedError

    @property
    def micro_batch_decides(self) -> bool:
        """Whether the loss depends on how a global batch is cut into micro-batches."""
        return False


@dataclass(frozen=True, kw_only=True)
class TransformerShape(ModelShape):
    """Sizes of a language model; ``num_layers`` counts transformer layers."""

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    """Of the dense MLP."""
    vocab_size: int
    """Vocabulary before padding."""
    sequence_length: int
    tie_embeddings: bool
    linear_bias: bool
    norm_epsilon: float
    rope: Rope | None = None
    mla: MLA | None = None
    """Then ``num_query_groups`` and ``head_dim`` have no meaning."""
    moe: MoE | None = None
    mtp_layers: int = 0
    """Multi-token prediction modules, where there are layers."""
    mtp_loss_coeff: float = 0.0

    @property
    def sample_units(self) -> int:
        return self.sequence_length

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def mtp_depth(self) -> int:
        """Multi-token prediction modules of this model: none without layers."""
        return self.mtp_layers if self.num_layers else 0

    def layer_kinds(self) -> list[str]:
        """``dense`` or ``moe`` of each layer, by its global number."""
        dense = self.moe.first_k_dense if self.moe else self.num_layers
        return [DENSE if number < dense else MOE for number in range(self.num_layers)]

    def stacks(self) -> dict[str, list[str]]:
        return {LAYER_PREFIX: self.layer_kinds()}

    @property
    def micro_batch_decides(self) -> bool:
        """Under a load-balancing loss, which Megatron-core computes from the experts' loads of one
        micro-batch: loads of fewer samples are less even."""
        return self.moe is not None and self.moe.aux_loss_coeff > 0


@dataclass(frozen=True)
class TensorSpec:
    """One global tensor.

    ``role`` says what it does: ``embedding``, ``position``, ``head``, ``qkv``, ``proj``,
    ``q_proj``, ``q_down``, ``q_up``, ``kv_down``, ``kv_up``, ``fc1``, ``fc2``, ``router``,
    ``expert_bias``, ``mtp_proj``, ``conv``, ``bias`` (of a linear), ``norm_gain`` or ``norm_bias``.

    The last two axes of a weight are (n_out, n_in); an axis before them counts separate matrices
    (gate and up of a gated MLP). The n_in of a convolution are its inputs times its window.
    """

    shape: tuple[int, ...]
    role: str
    init: str
    """``normal``, ``zeros`` or ``ones``."""
    std: float = 0.0
    gain: float = 1.0
    """Of ``ones``: the value in its place."""
    tp_axis: int | None = None
    """Axis that tensor parallelism cuts; None is replicated."""
    row_blocks: tuple[int, ...] = ()
    """Rows of the separate matrices that interleave along the axis of n_out, for one attention
    head or group of heads (QKV: query, key, value rows of a group); empty where they do not."""
    last_linear: bool = False
    """Whether it belongs to the last linear of a sub-layer (what ``zeroL`` zeroes)."""
    live_rows: int | None = None
    """Rows that are no padding of the vocabulary; None: all. The others are zero."""
    expert: int | None = None
    """Global number of the routed expert that it belongs to."""
    trainable: bool = True
    """Whether the optimizer has it. Others are fp32 in every precision."""
    scaling: Scaling | None = None
    """How its updates scale; None: as the optimizer's rule has them."""
    products: int = 1
    """Products with a weight that one token, or one image, takes part in: of a convolution as many
    as it has places."""
    on_data: bool = False
    """Whether its input is the data itself, of which no gradient is computed."""

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


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack (:meth:`ModelShape.stacks`) and the number in it of the layer that a tensor
    belongs to; None outside the layers."""
    found = _LAYER.match(name)
    return None if found is None else (found[1], int(found[2]))


def layer_number(name: str) -> int | None:
    """Number in its stack of the layer a tensor belongs to; None outside the layers."""
    found = layer_of(name)
    return None if found is None else found[1]


def with_layer_number(name: str, number: int) -> str:
    """The same tensor of another layer of its stack."""
    found = _LAYER.match(name)
    assert found is not None, name
    return f"{found[1]}{number}.{name[found.end() :]}"
