"""What the configuration says of the model: the sections ``model`` and those within it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

MISSING: Any = "???"
"""The default of a field that has no default: a configuration must give such a field a value."""


@dataclass(frozen=True)
class RopeSection:
    """Rotary positions. Every field defaults to the preset's value."""

    theta: Optional[float] = None
    """Base of the periods of rotation."""
    scaling: Optional[str] = None
    """Scaling for longer sequences: ``none``, ``llama3`` (Llama 3.1's) or ``yarn`` (MLA only)."""
    factor: Optional[float] = None
    """Factor by which sequences are longer than ``original_length``; the scaling uses it."""
    original_length: Optional[int] = None
    """Sequence length in tokens before the scaling."""


@dataclass(frozen=True)
class MLASection:
    """Multi-head latent attention. Every field defaults to the preset's value."""

    q_lora_rank: Optional[int] = None
    """Width of the compressed queries; 0 projects queries directly."""
    kv_lora_rank: Optional[int] = None
    """Width of the compressed keys and values."""
    qk_nope_head_dim: Optional[int] = None
    """Width of the part of a query or key that has no position."""
    qk_rope_head_dim: Optional[int] = None
    """Width of the rotated part of a query or key; all heads share one key part."""
    v_head_dim: Optional[int] = None
    """Width of one head's values."""


@dataclass(frozen=True)
class MoESection:
    """Mixture of experts. Every field defaults to the preset's value."""

    num_experts: Optional[int] = None
    """Number of routed experts in a layer."""
    top_k: Optional[int] = None
    """Number of routed experts that each token takes."""
    ffn_hidden_size: Optional[int] = None
    """Width of one expert's MLP."""
    shared_experts: Optional[int] = None
    """Number of experts that every token takes: one MLP of that many times the width."""
    first_k_dense: Optional[int] = None
    """Number of layers at the bottom that have a dense MLP instead of experts."""
    num_groups: Optional[int] = None
    """Number of groups of experts for group-limited routing; 1 does not limit the choice."""
    top_k_groups: Optional[int] = None
    """Number of groups that the experts of one token come from."""
    routed_scaling_factor: Optional[float] = None
    """Factor by which the output of the routed experts is multiplied."""
    bias_update_rate: Optional[float] = None
    """Step size of the bias that balances the experts without an auxiliary loss; 0 keeps it."""
    aux_loss_coeff: Optional[float] = None
    """Weight of the load-balancing loss; 0 leaves it out."""


@dataclass(frozen=True)
class ResNetSection:
    """Residual networks. Every field defaults to the preset's value."""

    block: Optional[str] = None
    """Block: ``basic`` (two 3 x 3 convolutions) or ``bottleneck`` (1 x 1, 3 x 3, 1 x 1)."""
    stages: Optional[str] = None
    """Proportion of the stages' blocks, as in ``3-4-6-3``; ``num_layers`` is the longest's."""
    stem: Optional[str] = None
    """First part: ``cifar`` (3 x 3) or ``imagenet`` (7 x 7 of stride 2, then pooling of stride
    2)."""
    groups: Optional[int] = None
    """Number of groups of channels in every group norm."""


@dataclass(frozen=True)
class ModelSection:
    family: str = MISSING
    """Model family: ``gpt2``, ``llama3``, ``qwen3``, ``mixtral``, ``deepseek_v3`` or ``resnet``."""
    preset: str = "tiny"
    """Named shape of the family; the fields below override its sizes."""
    num_layers: Optional[int] = None
    """Number of layers at the start of the run, from 0 (default: the preset's). For ``resnet``:
    residual blocks of the longest stage; the other stages have theirs in proportion."""
    hidden_size: Optional[int] = None
    """Width of the residual stream (default: the preset's). For ``resnet`` it is the width of the
    first stage; each further stage is twice as wide as the one before."""
    num_attention_heads: Optional[int] = None
    """Number of attention heads (default: the preset's)."""
    num_query_groups: Optional[int] = None
    """Number of key-value heads, each for a group of query heads (default: the preset's)."""
    head_dim: Optional[int] = None
    """Width of one attention head (default: the preset's, or hidden_size / num_attention_heads)."""
    ffn_hidden_size: Optional[int] = None
    """Width of the dense MLP (default: hidden_size times the preset's ratio)."""
    tie_embeddings: Optional[bool] = None
    """Whether the LM head uses the embedding's weight (default: the preset's)."""
    linear_bias: Optional[bool] = None
    """Whether linear layers have biases (``gpt2`` only; default: the family's)."""
    norm_epsilon: Optional[float] = None
    """Number added under the root in every norm (default: the preset's)."""
    mtp_layers: Optional[int] = None
    """Number of multi-token prediction modules (``deepseek_v3`` only; default: the preset's). A
    model without layers has none."""
    mtp_loss_coeff: float = 0.1
    """Weight of the loss of the multi-token prediction modules."""
    mup: Optional[bool] = None
    """Whether initial values and updates scale with width and depth by the spectral condition, so
    that one learning rate serves all sizes (default: as in ``run.init_from``, or false)."""
    rope: RopeSection = field(default_factory=RopeSection)
    """Rotary positions, for families that have them."""
    mla: MLASection = field(default_factory=MLASection)
    """Multi-head latent attention, for families that have it."""
    moe: MoESection = field(default_factory=MoESection)
    """Mixture of experts, for families that have it."""
    resnet: ResNetSection = field(default_factory=ResNetSection)
    """Residual blocks, for the family ``resnet``."""
