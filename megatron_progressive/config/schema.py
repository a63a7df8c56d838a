"""What a configuration holds: nested frozen dataclasses. Every field has its meaning and unit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

MISSING: Any = "???"
"""The default of a field that has none: a configuration must give it a value."""


@dataclass(frozen=True)
class RunSection:
    name: str = "run"
    """Name of the run; its folder is ``dir/name``, in which one job trains at a time."""
    dir: str = "runs"
    """Folder that holds run folders and prepared corpora."""
    seed: int = 1
    """Seed of initialisation and of the order of samples."""
    init_from: Optional[str] = None
    """A checkpoint whose weights the run starts from, with a new optimizer state: imported,
    expanded or of another run. It gives the model's sizes where ``model`` and ``data`` set none;
    ``data.sequence_length`` may be shorter with rotary positions."""
    extend: bool = False
    """Whether the run that is in the folder, finished or not, goes on to the larger ``train.steps``
    given here, as if it had had them from the start. ``schedule.name`` is ``wsd``, and nothing else
    changes. It goes on from its newest checkpoint before the decay, with weights, optimizer state,
    place in the data and metrics. Warmup and expansions stay at the steps where they were, though
    they be given as fractions; the decay is again its fraction of the steps, at the new end. What
    came after that checkpoint stays in ``until_STEPS`` in the run folder, a run folder itself."""


@dataclass(frozen=True)
class RopeSection:
    """Rotary positions; every field defaults to the preset's."""

    theta: Optional[float] = None
    """Base period."""
    scaling: Optional[str] = None
    """``none``, ``llama3`` (Llama 3.1's by frequency) or ``yarn`` (with MLA only)."""
    factor: Optional[float] = None
    """How much longer sequences are than ``original_length``, for the scaling."""
    original_length: Optional[int] = None
    """Tokens a sample before the scaling."""


@dataclass(frozen=True)
class MLASection:
    """Multi-head latent attention; every field defaults to the preset's."""

    q_lora_rank: Optional[int] = None
    """Width of the compressed queries; 0 projects queries directly."""
    kv_lora_rank: Optional[int] = None
    """Width of the compressed keys and values."""
    qk_nope_head_dim: Optional[int] = None
    """Width of a query and key without position."""
    qk_rope_head_dim: Optional[int] = None
    """Width of a query and key that is rotated by position; one for all heads of the keys."""
    v_head_dim: Optional[int] = None
    """Width of a value."""


@dataclass(frozen=True)
class MoESection:
    """Mixture of experts; every field defaults to the preset's."""

    num_experts: Optional[int] = None
    """Routed experts of a layer."""
    top_k: Optional[int] = None
    """Routed experts of a token."""
    ffn_hidden_size: Optional[int] = None
    """Width of one expert's MLP."""
    shared_experts: Optional[int] = None
    """Experts that every token takes: one MLP of that many times the width."""
    first_k_dense: Optional[int] = None
    """Layers at the bottom that have a dense MLP instead of experts."""
    num_groups: Optional[int] = None
    """Groups of experts for group-limited routing; 1 does not limit."""
    top_k_groups: Optional[int] = None
    """Groups that a token's experts come from."""
    routed_scaling_factor: Optional[float] = None
    """Factor of the routed experts' output."""
    bias_update_rate: Optional[float] = None
    """Step of the expert bias, which balances the load without an auxiliary loss; 0 keeps it."""
    aux_loss_coeff: Optional[float] = None
    """Weight of the load-balancing loss; 0 has none."""


@dataclass(frozen=True)
class ResNetSection:
    """Residual networks; every field defaults to the preset's."""

    block: Optional[str] = None
    """``basic`` (two 3 x 3 convolutions) or ``bottleneck`` (1 x 1, 3 x 3, 1 x 1)."""
    stages: Optional[str] = None
    """Proportion of the stages' blocks, as 3-4-6-3; ``num_layers`` is of the longest."""
    stem: Optional[str] = None
    """``cifar`` (3 x 3) or ``imagenet`` (7 x 7 of stride 2, then pooling of stride 2)."""
    groups: Optional[int] = None
    """Groups of channels of every norm."""


@dataclass(frozen=True)
class ModelSection:
    family: str = MISSING
    """Model family: ``gpt2``, ``llama3``, ``qwen3``, ``mixtral``, ``deepseek_v3`` or ``resnet``."""
    preset: str = "tiny"
    """Named shape of the family; the fields below override it."""
    num_layers: Optional[int] = None
    """Layers at the start of the run, from 0 (default: the preset's). ``resnet``: residual blocks
    of the longest stage; the others have theirs in proportion."""
    hidden_size: Optional[int] = None
    """Width of the residual stream (default: the preset's). ``resnet``: of the first stage; each
    further one is twice as wide."""
    num_attention_heads: Optional[int] = None
    """Attention heads (default: the preset's)."""
    num_query_groups: Optional[int] = None
    """Heads of keys and values, each for a group of query heads (default: the preset's)."""
    head_dim: Optional[int] = None
    """Width of a head (default: the preset's, or hidden_size / num_attention_heads)."""
    ffn_hidden_size: Optional[int] = None
    """Width of the dense MLP (default: in the preset's proportion to hidden_size)."""
    tie_embeddings: Optional[bool] = None
    """Whether the LM head is the embedding's weight (default: the preset's)."""
    linear_bias: Optional[bool] = None
    """Whether linear layers have biases (``gpt2`` only; default: the family's)."""
    norm_epsilon: Optional[float] = None
    """Added under the root of norms (default: the preset's)."""
    mtp_layers: Optional[int] = None
    """Multi-token prediction modules (``deepseek_v3`` only; default: the preset's). A model
    without layers has none."""
    mtp_loss_coeff: float = 0.1
    """Weight of their loss."""
    mup: Optional[bool] = None
    """Whether initial values and updates scale with width and depth by the spectral condition, so
    that one learning rate serves all sizes (default: that of ``run.init_from``, or false)."""
    rope: RopeSection = field(default_factory=RopeSection)
    """Rotary positions, of families that have them."""
    mla: MLASection = field(default_factory=MLASection)
    """Multi-head latent attention, of families that have it."""
    moe: MoESection = field(default_factory=MoESection)
    """Experts, of families that have them."""
    resnet: ResNetSection = field(default_factory=ResNetSection)
    """Residual blocks, of ``resnet``."""


@dataclass(frozen=True)
class DataSection:
    corpus: str = "stdlib"
    """``stdlib``, a file or folder (plain text, JSON lines or arrays, CSV, TSV, Parquet, Arrow;
    also .gz, .xz, .bz2, .zst), or ``hf:NAME``. ``resnet``: ``shapes`` (pictures drawn as they are
    read, in ten classes; its default), or a folder with ``train/CLASS/*.png`` and
    ``val/CLASS/*.png`` (or .jpg, ...)."""
    tokenizer: str = "bpe"
    """``bpe`` (byte-level, trained on the corpus; with ``run.init_from`` the one that the
    checkpoint keeps), a folder or file, or a Hugging Face name."""
    vocab_size: Optional[int] = None
    """Vocabulary of the model; ``bpe`` is trained to this size (default: the preset's)."""
    sequence_length: Optional[int] = None
    """Tokens a sample (default: the preset's)."""
    image_size: Optional[int] = None
    """``resnet``: pixels a side of a picture (default: the preset's)."""
    num_classes: Optional[int] = None
    """``resnet``: classes of the pictures (default: the preset's)."""
    text_field: str = "text"
    """Field or column that holds the text in JSON, CSV, TSV, Parquet, Arrow and Hugging Face
    corpora."""
    validation_fraction: float = 0.02
    """Share of documents held out for validation, chosen by a hash of their content; copies that
    differ by white space, letter case or Unicode's composition are on one side."""
    max_bytes: int = 0
    """Bytes of text to read from the corpus; 0 reads all of it."""
    prepared: Optional[str] = None
    """Folder of a corpus made by ``mprog data prepare`` (default: one under ``run.dir``)."""


@dataclass(frozen=True)
class TrainSection:
    steps: int = 1500
    """Optimizer steps of the run."""
    stop_after: Optional[int] = None
    """Last step to do, of a schedule that is for ``steps`` (default: all of them). A run that was
    stopped goes on when this is raised."""
    global_batch: int = 16
    """Samples an optimizer step, over all ranks."""
    micro_batch: int = 4
    """Samples a forward pass on one rank."""
    precision: str = "fp32"
    """``fp32``, or ``bf16`` with fp32 master weights and fp32 gradient sums."""
    eval_every: int = 100
    """Steps between validations; the last step is always validated."""
    eval_samples: int = 128
    """Validation samples a validation reads: the first ones of the split, the same whatever the
    batch and the layout. A split that has fewer is read once, and a warning says so."""
    save_every: int = 300
    """Steps between checkpoints; 0 saves only before each expansion and at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones; beside them those made before expansions, and the newest
    before the decay, from which ``run.extend`` goes on. 0 keeps all."""
    log_every: int = 50
    """Steps between lines on the terminal (``metrics.jsonl`` has every step)."""
    trackers: list[str] = field(default_factory=list)
    """Where numbers go besides ``metrics.jsonl``: ``tensorboard``, ``wandb`` (offline)."""


@dataclass(frozen=True)
class OptimSection:
    name: str = "muon_nsgd"
    """``muon_nsgd`` or ``adamw``."""
    lr: float = 0.01
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of tensors with two dimensions; vectors have none."""
    clip_grad: float = 0.0
    """Largest global gradient norm; 0 does not clip."""
    momentum: float = 0.95
    """Muon-NSGD: momentum."""
    nesterov: bool = True
    """Muon-NSGD: Nesterov's form of momentum."""
    ns_coefficients: str = "jordan"
    """Muon-NSGD: Newton-Schulz coefficients: ``jordan`` (5 steps, singular values near 1),
    ``polar_express`` (5 steps, closer) or ``deepseek_v4`` (10 steps, closest)."""
    ns_steps: Optional[int] = None
    """Muon-NSGD: Newton-Schulz iterations (default: the coefficients' own)."""
    ns_dtype: Optional[str] = None
    """Muon-NSGD: type that Newton-Schulz computes in: ``fp32``, ``bf16`` or ``fp16`` (default: fp16
    on CUDA, where it has not run yet, and fp32 elsewhere)."""
    ns_kernel_from: Optional[int] = None
    """Muon-NSGD on CUDA: least size of the symmetric products of Newton-Schulz that a Triton kernel
    computes (default: none; it has not been measured on a GPU)."""
    scale: str = "out_in"
    """Muon-NSGD: ``out_in`` = sqrt(n_out/n_in), ``moonlight`` = 0.2 sqrt(max(n_out, n_in))."""
    embeddings: str = "muon"
    """Muon-NSGD: rule of embeddings and LM head: ``muon`` (literal reading) or ``adamw``."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: added to the root of the second moment."""


@dataclass(frozen=True)
class KernelsSection:
    """Fast kernels of the Megatron engine, on CUDA only: by default on there (but CUDA graphs)
    where the model has a use for them. True is refused without CUDA. In fp32 the layers are
    Megatron-core's local ones, without TF32. Not run on a GPU yet."""

    cross_entropy: Optional[bool] = None
    """Fused cross-entropy (bf16 only: it rounds the gradient of the logits)."""
    rope: Optional[bool] = None
    """Fused rotation by position (with Transformer Engine)."""
    activation: Optional[bool] = None
    """Fused bias and activation, SwiGLU included."""
    dropout: Optional[bool] = None
    """Fused bias, dropout and residual addition."""
    grouped_gemm: Optional[bool] = None
    """Experts in one grouped product (with Transformer Engine)."""
    permute: Optional[bool] = None
    """Fused permutation of tokens to experts (with Transformer Engine)."""
    overlap_gradients: Optional[bool] = None
    """Reduce gradients during the backward pass (distributed optimizer)."""
    overlap_parameters: Optional[bool] = None
    """Gather parameters during the forward pass (distributed optimizer)."""
    cuda_graphs: Optional[bool] = None
    """Capture layers as CUDA graphs; each expansion captures anew."""


@dataclass(frozen=True)
class ScheduleSection:
    name: str = "wsd"
    """``wsd`` (warmup-stable-decay), ``cosine`` or ``linear``; all end at zero."""
    warmup: float = 0.02
    """Linear warmup, as a fraction of the steps."""
    decay: float = 0.1
    """Linear decay at the end (``wsd`` only), as a fraction of the steps."""


@dataclass(frozen=True)
class ParallelSection:
    engine: str = "megatron"
    """``megatron``, ``deepspeed`` (data parallel only), or ``torch`` (data parallel only; for
    ``resnet``, whose default it is)."""
    tensor: int = 1
    """Tensor-parallel ranks."""
    pipeline: int = 1
    """Pipeline stages."""
    virtual_pipeline: int = 1
    """Model chunks of each pipeline stage (interleaved schedule); 1 is the plain schedule."""
    uneven: bool = False
    """Whether stages may differ by one layer; otherwise stages x chunks divide the layers (or
    are more than them, which leaves some empty)."""
    expert: int = 1
    """Expert-parallel ranks, which divide the data-parallel ones; each has its share of the
    experts."""
    expert_tensor: Optional[int] = None
    """Tensor-parallel ranks of the experts (default: ``tensor``)."""
    zero_stage: int = 1
    """megatron: 1 divides optimizer state over data-parallel ranks (Megatron's distributed
    optimizer), for Muon-NSGD in whole tensors, each updated by one rank; 0 keeps it on every
    rank, and each repeats Newton-Schulz; torch: the same. deepspeed: 0 to 3: 2 divides gradients
    too, 3 the weights as well."""
    staging_mib: int = 64
    """Most memory a rank stages for sending and receiving at an expansion, MiB."""


@dataclass(frozen=True)
class ParallelOverride:
    """Keys of ``parallel`` that change at an expansion; the others stay."""

    engine: Optional[str] = None
    tensor: Optional[int] = None
    pipeline: Optional[int] = None
    virtual_pipeline: Optional[int] = None
    uneven: Optional[bool] = None
    expert: Optional[int] = None
    expert_tensor: Optional[int] = None
    zero_stage: Optional[int] = None
    staging_mib: Optional[int] = None


@dataclass(frozen=True)
class ExpansionSection:
    at: float = MISSING
    """When: a fraction of ``train.steps`` below 1, or a step; it happens after that step."""
    to_layers: int = MISSING
    """Depth after the expansion."""
    init: str = "random"
    """New layers' weights: random, copying, zero, copying_zeroL or copying_zeroN."""
    order: str = "stack"
    """Order of copied layers: stack (ABAB), inter (AABB) or last (ABBB)."""
    insert: str = "bottom"
    """Side of the trained layers on which new ones go: bottom (next to the embedding) or top."""
    optimizer_state: str = "inherit"
    """inherit (survivors keep theirs, new layers start empty), copy, or reset (all empty)."""
    parallel: ParallelOverride = field(default_factory=ParallelOverride)
    """Layout after the expansion, where it changes."""


@dataclass(frozen=True)
class RunConfig:
    model: ModelSection
    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    optim: OptimSection = field(default_factory=OptimSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    kernels: KernelsSection = field(default_factory=KernelsSection)
    expansion: list[ExpansionSection] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) / self.run.name

    @property
    def last_step(self) -> int:
        """The step that the run ends with."""
        return self.train.steps if self.train.stop_after is None else self.train.stop_after

    def expansion_steps(self) -> list[int]:
        """Step after which each expansion happens (1-based, in order)."""
        return [int(e.at) if e.at >= 1 else round(e.at * self.train.steps) for e in self.expansion]

    def parallel_after(self, index: int) -> ParallelSection:
        """``parallel`` after ``index`` expansions (0: at the start)."""
        current = self.parallel
        for expansion in self.expansion[:index]:
            changes = {k: v for k, v in asdict(expansion.parallel).items() if v is not None}
            current = replace(current, **changes)
        return current


FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet": {"data": {"corpus": "shapes"}, "parallel": {"engine": "torch"}},
}
"""Where a family's defaults are not those above."""
