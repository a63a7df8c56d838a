"""What every family gives: a shape, and one table of its global tensors.

The table is the single source for initialisation, parameter counts, the optimizer's choice of
matrices, expansion and planning. Names are canonical: Megatron-core's, with the *global* layer and
expert numbers on every rank.
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
"""The vocabulary is padded to a multiple of this on every layout, so that tensor parallelism never
changes the model. The rows of the padding are zero and stay zero: no token uses them, and their
logits are masked."""

DENSE, MOE = "dense", "moe"
"""The kinds of layers, told apart by their feed-forward part."""


ROWS, TIED_ROWS, MATRIX, VECTOR = "rows", "tied_rows", "matrix", "vector"
"""The norm in which the size of a tensor counts (:class:`Scaling`): for a table in which tokens are
looked up the RMS of each row (``ROWS``), the same for a table that is the head, too
(``TIED_ROWS``), the spectral norm (``MATRIX``), or the RMS of all elements (``VECTOR``)."""


@dataclass(frozen=True)
class Scaling:
    """How much an update may change a tensor under muP; :mod:`.mup` says where the numbers come
    from."""

    form: str
    """The norm in which the size counts: ``rows``, ``tied_rows``, ``matrix`` or ``vector``."""
    update: float
    """Size of an update in that norm at a learning rate of 1; for ``matrix`` in units of sqrt(n_out
    / n_in)."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions; the fields are those of :class:`.config.RopeSection`."""

    theta: float
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 8192


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention; the fields are those of :class:`.config.MLASection`."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Width of a query and of a key, with and without position together."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoE:
    """Mixture of experts; the fields are those of :class:`.config.MoESection`."""

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
    """Parts of a residual network; the fields are those of :class:`.config.ResNetSection`."""

    block: str
    stages: str
    stem: str
    groups: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of one model, whatever its family. Expansion changes ``num_layers`` and nothing
    else."""

    family: str
    num_layers: int
    """Depth of the model; each family says what it counts."""
    hidden_size: int
    """Width of the residual stream; of one that gets wider, its narrowest part."""
    mup: bool = False
    """Whether initial values and updates follow muP (:mod:`.mup`)."""

    unit: ClassVar[str] = "tokens"
    """What a sample is made of, ``tokens`` or ``images``: losses, compute and speeds are counted
    per unit."""

    @property
    def sample_units(self) -> int:
        """The number of units in one sample."""
        return 1

    def stacks(self) -> dict[str, list[str]]:
        """The layers that expansion adds to: by the prefix of the tensors' names, the kind of each
        layer in the stack. Layers of one kind have the same tensors."""
        raise NotImplementedError

    @property
    def micro_batch_decides(self) -> bool:
        """Whether the loss depends on how a global batch is cut into micro-batches."""
        return False


@dataclass(frozen=True, kw_only=True)
class TransformerShape(ModelShape):
    """The sizes of a language model; ``num_layers`` counts transformer layers."""

    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    """Width of the dense MLP."""
    vocab_size: int
    """Size of the vocabulary before padding."""
    sequence_length: int
    tie_embeddings: bool
    linear_bias: bool
    norm_epsilon: float
    rope: Rope | None = None
    mla: MLA | None = None
    """Latent attention; where it is set, ``num_query_groups`` and ``head_dim`` have no meaning."""
    moe: MoE | None = None
    mtp_layers: int = 0
    """Number of multi-token prediction modules that the model has once it has layers."""
    mtp_loss_coeff: float = 0.0

    @property
    def sample_units(self) -> int:
        return self.sequence_length

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def mtp_depth(self) -> int:
        """The number of multi-token prediction modules of this model, which is none without
        layers."""
        return self.mtp_layers if self.num_layers else 0

    def layer_kinds(self) -> list[str]:
        """The kind of each layer, ``dense`` or ``moe``, by its global number."""
        dense = self.moe.first_k_dense if self.moe else self.num_layers
        return [DENSE if number < dense else MOE for number in range(self.num_layers)]

    def stacks(self) -> dict[str, list[str]]:
        return {LAYER_PREFIX: self.layer_kinds()}

    def recomputable(self) -> set[str]:
        """The parts of its layers that the backward pass can compute anew, by Megatron-core's names
        (0.19.2: ``TransformerConfig.recompute_modules``)."""
        kinds = self.layer_kinds()
        found = {"core_attn", "layernorm"} if kinds else set()
        if kinds and self.mla is not None:
            found.add("mla_up_proj")
        if DENSE in kinds:
            found.add("mlp")
        if MOE in kinds:
            assert self.moe is not None
            found |= {"moe", "moe_act"} | ({"shared_experts"} if self.moe.shared_experts else set())
        return found

    @property
    def micro_batch_decides(self) -> bool:
        """True under a load-balancing loss: Megatron-core computes it from the experts' loads in
        one micro-batch, and the loads of fewer samples are less even."""
        return self.moe is not None and self.moe.aux_loss_coeff > 0


@dataclass(frozen=True)
class TensorSpec:
    """The specification of one global tensor.

    ``role`` says what it does: ``embedding``, ``position``, ``head``, ``qkv``, ``proj``,
    ``q_proj``, ``q_down``, ``q_up``, ``kv_down``, ``kv_up``, ``fc1``, ``fc2``, ``router``,
    ``expert_bias``, ``mtp_proj``, ``conv``, ``bias`` (of a linear), ``norm_gain`` or ``norm_bias``.

    The last two axes of a weight are (n_out, n_in); an axis before them counts separate matrices
    (gate and up of a gated MLP). For a convolution n_in is its number of inputs times the size of
    its window.
    """

    shape: tuple[int, ...]
    role: str
    init: str
    """How it is initialised: ``normal``, ``zeros`` or ``ones``."""
    std: float = 0.0
    gain: float = 1.0
    """The value that ``ones`` stands for."""
    tp_axis: int | None = None
    """The axis that tensor parallelism cuts; None where the tensor is replicated."""
    row_blocks: tuple[int, ...] = ()
    """The numbers of rows of the separate matrices that interleave along the axis of n_out, for one
    attention head or group of heads (the query, key and value rows of a group); empty where no
    matrices interleave."""
    last_linear: bool = False
    """Whether it belongs to the last linear of a sub-layer, which ``zeroL`` sets to zero."""
    live_rows: int | None = None
    """The number of rows that are no padding of the vocabulary, None where all are; the others are
    zero."""
    expert: int | None = None
    """The global number of the routed expert that it belongs to; None outside of experts."""
    trainable: bool = True
    """Whether the optimizer updates it. A tensor that is not trained is fp32 in every precision."""
    scaling: Scaling | None = None
    """How its updates scale; None leaves them as the optimizer's rule has them."""
    products: int = 1
    """How many products with the weight one token or one image takes part in; for a convolution it
    is the number of places where the window stands."""
    on_data: bool = False
    """Whether its input is the data itself, so that no gradient of that input is computed."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def spectral_std(n_out: int, n_in: int) -> float:
    """The standard deviation of a Gaussian matrix whose spectral norm is about sqrt(n_out/n_in).

    A Gaussian n_out x n_in matrix with deviation s has spectral norm near s (sqrt(n_out) +
    sqrt(n_in)); the target is the spectral condition of muP (Yang, Simon and Bernstein 2023, arXiv
    2310.17813, condition 1).
    """
    return math.sqrt(n_out / n_in) / (math.sqrt(n_out) + math.sqrt(n_in))


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack (see :meth:`ModelShape.stacks`) that a tensor's layer belongs to, and the layer's
    number in it; None for a tensor outside of layers."""
    found = _LAYER.match(name)
    return None if found is None else (found[1], int(found[2]))


def layer_number(name: str) -> int | None:
    """The number of a tensor's layer in its stack; None for a tensor outside of layers."""
    found = layer_of(name)
    return None if found is None else found[1]


def with_layer_number(name: str, number: int) -> str:
    """The name of the same tensor in another layer of its stack."""
    found = _LAYER.match(name)
    assert found is not None, name
    return f"{found[1]}{number}.{name[found.end() :]}"
