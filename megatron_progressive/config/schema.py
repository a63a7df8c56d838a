"""What a configuration holds: nested frozen dataclasses, each field with its meaning and unit.

The section of the model is in :mod:`.model_schema`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

from megatron_progressive.config.data_schema import MixPart, ValidationSet
from megatron_progressive.config.model_schema import (
    MISSING,
    ModelSection,
)


@dataclass(frozen=True)
class RunSection:
    name: str = "run"
    """Name of the run. Its folder is ``dir/name``; one job at a time trains in it."""
    dir: str = "runs"
    """Folder that holds the run folders and the prepared corpora."""
    seed: int = 1
    """Seed of the initial weights and of the order of the samples."""
    init_from: Optional[str] = None
    """A checkpoint whose weights the run starts from, with a new optimizer state. It may be
    imported, expanded or of another run. It gives the sizes of the model where ``model`` and
    ``data`` set none; with rotary positions ``data.sequence_length`` may be shorter."""
    extend: bool = False
    """Whether the run in the folder, finished or not, goes on to the larger ``train.steps`` given
    here, as if it had had them from the start. ``schedule.name`` must be ``wsd``, and nothing else
    may change. The run goes on from its newest checkpoint before the decay, with weights, optimizer
    state, position in the data and metrics. Warmup and expansions stay at the steps where they
    were, even where they are given as fractions; the decay takes its fraction of the new steps.
    What came after that checkpoint is kept in ``until_STEPS`` in the run folder, itself a run
    folder."""


@dataclass(frozen=True)
class DataSection:
    corpus: str = "stdlib"
    """The corpus: ``stdlib`` (Python's own sources), ``packages`` (those of the installed packages,
    more than 200 MB), a file or folder (plain text, JSON lines or arrays, CSV, TSV, Parquet or
    Arrow, also compressed as .gz, .xz, .bz2 or .zst), ``hf:NAME``, or ``megatron:PREFIX[,PREFIX]``
    (tokens that Megatron-LM or Bridge has written to PREFIX.bin and PREFIX.idx, made with
    ``data.tokenizer``). For ``resnet``: ``shapes`` (pictures of ten classes, drawn as they are
    read; the default), or a folder with ``train/CLASS/*.png`` and ``val/CLASS/*.png`` (or .jpg,
    ...). Empty with ``data.mix``."""
    tokenizer: str = "bpe"
    """The tokenizer: ``bpe`` (byte-level, trained on the corpus; with ``run.init_from`` the one
    that the checkpoint keeps), a folder or file, or a name on the Hugging Face hub."""
    vocab_size: Optional[int] = None
    """Size of the model's vocabulary, to which ``bpe`` is trained (default: the preset's)."""
    sequence_length: Optional[int] = None
    """Length of a sample in tokens (default: the preset's)."""
    image_size: Optional[int] = None
    """Side of a picture in pixels, for ``resnet`` (default: the preset's)."""
    num_classes: Optional[int] = None
    """Number of classes of pictures, for ``resnet`` (default: the preset's)."""
    text_field: str = "text"
    """Field or column that holds the text in corpora other than plain text; ``a.b`` is the field
    ``b`` of the object in field ``a``."""
    validation_fraction: float = 0.02
    """Share of the documents that is held out for validation, chosen by a hash of their content.
    Copies that differ in white space, letter case or Unicode composition are all on one side."""
    validation_near: Optional[bool] = None
    """Whether the split goes by a MinHash of the content in place of a hash, so that near copies
    are on one side as well: those that share a part J of their text with probability J (default:
    no)."""
    max_bytes: int = 0
    """Number of bytes of text to read from the corpus; 0 reads all of it."""
    prepared: Optional[str] = None
    """Folder of a corpus that ``mprog data prepare`` made (default: a folder under ``run.dir``)."""
    mix: Optional[list[MixPart]] = None
    """Several corpora in place of ``data.corpus``, with weights. One tokenizer serves all parts:
    ``bpe`` is trained on equal amounts of the training text of each, whatever the weights."""
    validation: Optional[dict[str, ValidationSet]] = None
    """Further validation sets by name. Each has its loss and its bits per byte in ``metrics.jsonl``
    and in reports."""
    attention: Optional[str] = None
    """``document``: tokens attend to their own document alone, whose positions begin at 0 (default:
    to all tokens before them in the sample)."""


@dataclass(frozen=True)
class TrainSection:
    steps: int = 1500
    """Number of optimizer steps of the run."""
    stop_after: Optional[int] = None
    """Last step to do of a schedule that is for ``steps`` (default: the last one of all). A run
    that was stopped by it goes on when it is raised."""
    global_batch: int = 16
    """Number of samples in an optimizer step, over all ranks."""
    micro_batch: int = 4
    """Number of samples in one forward pass on one rank."""
    precision: str = "fp32"
    """Number format: ``fp32``, or ``bf16`` with fp32 master weights and fp32 gradient sums."""
    eval_every: int = 100
    """Number of steps between validations; the start, the step after which the model grows and the
    last one are always validated."""
    eval_tokens: Optional[int] = None
    """Number of tokens (or images) of each validation set that a validation reads, in whole
    samples: the first ones, whatever the batch and the layout. A set that has fewer is read once,
    and a warning says so."""
    eval_samples: Optional[int] = 128
    """The same in samples, as older configurations have it: null where ``eval_tokens`` is
    given."""
    eval_tasks: list[str] = field(default_factory=list)
    """Downstream tasks on which saved checkpoints are evaluated, by lm-evaluation-harness (the
    extra ``eval``) in a process of its own beside the run: names of tasks, groups or tags, or YAML
    files of tasks. The scores are in ``evaluations`` in the run folder, and in the report."""
    eval_tasks_every: int = 0
    """Number of steps between evaluations on ``eval_tasks``, a multiple of ``save_every``; the last
    checkpoint is always evaluated, and with 0 it alone."""
    eval_tasks_limit: Optional[int] = None
    """Number of questions of each task (default: all of them)."""
    eval_tasks_device: str = "cpu"
    """Where evaluations on ``eval_tasks`` compute, as torch names it. A GPU should be one that no
    rank has: its memory and time would be the run's."""
    save_every: int = 300
    """Number of steps between checkpoints; 0 saves only before each expansion and at the end."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept. Beside these the checkpoints before expansions
    stay, and the newest one before the decay, from which ``run.extend`` goes on; 0 keeps all."""
    log_every: int = 50
    """Number of steps between lines on the terminal; ``metrics.jsonl`` has every step."""
    trackers: list[str] = field(default_factory=list)
    """Where numbers go besides ``metrics.jsonl``: ``tensorboard`` and ``wandb`` (offline)."""


@dataclass(frozen=True)
class OptimSection:
    name: str = "muon_nsgd"
    """Optimizer: ``muon_nsgd`` or ``adamw``."""
    lr: float = 0.01
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of tensors with two dimensions; vectors are not decayed."""
    clip_grad: float = 0.0
    """Largest global norm of the gradient, to which it is clipped; 0 does not clip."""
    momentum: float = 0.95
    """Muon-NSGD: decay of the momentum."""
    nesterov: bool = True
    """Muon-NSGD: whether momentum takes Nesterov's form."""
    ns_coefficients: str = "jordan"
    """Muon-NSGD: set of Newton-Schulz coefficients: ``jordan`` (5 steps, singular values near 1),
    ``polar_express`` (5 steps, closer to 1) or ``deepseek_v4`` (10 steps, closest to 1)."""
    ns_steps: Optional[int] = None
    """Muon-NSGD: number of Newton-Schulz iterations (default: that of the set of coefficients)."""
    ns_dtype: Optional[str] = None
    """Muon-NSGD: number format that Newton-Schulz computes in: ``fp32``, ``bf16`` or ``fp16``
    (default: fp16 on CUDA, where it has not run yet, and fp32 elsewhere)."""
    ns_kernel_from: Optional[int] = None
    """Muon-NSGD on CUDA: the least size from which a Triton kernel computes the symmetric products
    of Newton-Schulz (default: none; the kernel has not been measured on a GPU)."""
    scale: str = "out_in"
    """Muon-NSGD: ``out_in`` is sqrt(n_out/n_in), ``moonlight`` is 0.2 sqrt(max(n_out, n_in))."""
    embeddings: str = "muon"
    """Muon-NSGD: rule of embeddings and LM head: ``muon`` (the paper's words) or ``adamw``."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.95
    """AdamW: decay of the second moment."""
    eps: float = 1e-8
    """AdamW: number added to the root of the second moment."""


@dataclass(frozen=True)
class KernelsSection:
    """Fast kernels of the Megatron engine, on CUDA only. Each but CUDA graphs is on by default
    where the model has a use for it; ``true`` is refused without CUDA, and where it could not be
    had. In fp32 the layers are Megatron-core's local ones, without TF32. They have not run on a GPU
    yet."""

    transformer_engine: Optional[bool] = None
    """Whether layers are Transformer Engine's (in bf16), where it is installed; otherwise they are
    Megatron-core's local ones."""
    attention: Optional[str] = None
    """The attention of Transformer Engine: ``flash`` (the package flash-attn), ``fused`` (cuDNN) or
    ``unfused``; by default it takes the fastest that can do the sizes."""
    cross_entropy: Optional[bool] = None
    """Whether the cross-entropy is fused (in bf16 only: it rounds the gradient of the logits)."""
    rope: Optional[bool] = None
    """Whether the rotation by position is fused (with Transformer Engine)."""
    activation: Optional[bool] = None
    """Whether bias and activation, SwiGLU included, are fused."""
    dropout: Optional[bool] = None
    """Whether bias, dropout and residual addition are fused."""
    grouped_gemm: Optional[bool] = None
    """Whether a layer's experts are computed in one grouped product (with Transformer Engine)."""
    permute: Optional[bool] = None
    """Whether the permutation of tokens to experts is fused (with Transformer Engine)."""
    deepep: Optional[bool] = None
    """Whether tokens go to expert-parallel ranks and back by DeepEP (the package ``deep_ep``), once
    to each node that has some of their experts: Megatron-core's flexible dispatcher, in bf16. The
    experts of a layer lie on up to 8 ranks, or on a multiple of 8."""
    overlap_gradients: Optional[bool] = None
    """Whether gradients are reduced during the backward pass (with the distributed optimizer)."""
    overlap_parameters: Optional[bool] = None
    """Whether parameters are gathered during the forward pass (with the distributed optimizer)."""
    cuda_graphs: Optional[bool] = None
    """Whether layers are captured as CUDA graphs: not possible with Megatron-core 0.19.2, whose
    graphs belong to the process and not to a model that an expansion may replace."""
    deterministic: Optional[bool] = None
    """Whether only kernels are used that give the same bits each time, which is slower. Without it
    a run on GPUs that is resumed, or repeated, differs from an unbroken one by rounding."""


@dataclass(frozen=True)
class ScheduleSection:
    name: str = "wsd"
    """Learning rate: ``wsd`` (warmup-stable-decay), ``cosine`` or ``linear``; all end at zero."""
    warmup: float = 0.02
    """Length of the linear warmup, as a fraction of the steps."""
    decay: float = 0.1
    """Length of the linear decay at the end (``wsd`` only), as a fraction of the steps."""
    rewarm: Optional[float] = None
    """Length of the climb of the learning rate after each expansion, up to the schedule's, as a
    fraction of the steps (default: none)."""
    rewarm_from: Optional[float] = None
    """Share of the schedule's learning rate from which it climbs (default: 0)."""
    rewarm_layers: Optional[str] = None
    """Layers whose learning rate climbs: ``all``, with all that is outside of layers (default), or
    the ``new`` ones alone."""


@dataclass(frozen=True)
class ParallelSection:
    engine: str = "megatron"
    """Engine that trains the model: ``megatron``, ``deepspeed`` (data parallel only), or ``torch``
    (data parallel only; for ``resnet``, whose default it is)."""
    tensor: int = 1
    """Number of tensor-parallel ranks."""
    pipeline: int = 1
    """Number of pipeline stages."""
    virtual_pipeline: int = 1
    """Number of model chunks in each pipeline stage; more than 1 is the interleaved schedule."""
    uneven: bool = False
    """Whether stages may differ by one layer. Otherwise the number of stages times chunks divides
    that of the layers, or is larger, which leaves some of them empty."""
    context: int = 1
    """Number of ranks that divide each sequence (context parallelism). Weights are the same on all
    of them, as on data-parallel ranks, of which there are as many fewer. Twice the number divides
    ``data.sequence_length``: each rank has one part from its first half and one from the second, so
    that all have equally much attention to compute."""
    expert: int = 1
    """Number of expert-parallel ranks, which divides that of the data-parallel ranks times
    ``context``; each rank has its share of the experts."""
    expert_tensor: Optional[int] = None
    """Number of tensor-parallel ranks of the experts (default: ``tensor``)."""
    zero_stage: int = 1
    """How far training state is divided over data-parallel ranks. With ``megatron`` and ``torch``:
    1 divides the optimizer state (for Muon-NSGD in whole tensors, each updated by one rank); 0
    keeps it on every rank, and each repeats Newton-Schulz. With ``deepspeed``, from 0 to 3: 2
    divides the gradients, too, and 3 the weights as well."""
    sequence: Optional[bool] = None
    """Whether tensor-parallel ranks divide the sequence where they do not divide weights, in norms
    and residual streams (sequence parallelism). The default is to do so where ``tensor`` times
    ``context`` divides ``data.sequence_length``; layers with experts must."""
    recompute: str = "none"
    """What the backward pass computes anew in place of keeping it: ``none``, ``selective`` (the
    parts named by ``recompute_modules``) or ``full`` (whole layers, of which the inputs stay)."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """The parts of a layer that ``recompute: selective`` computes anew, by Megatron-core's names:
    ``core_attn``, ``layernorm``, ``mla_up_proj``, ``mlp`` (of layers without experts), ``moe``,
    ``moe_act``, ``shared_experts``. Those that a phase's layers lack take no part in it. Fused
    attention keeps no scores, so that ``core_attn`` saves little."""
    recompute_layers: Optional[int] = None
    """How many layers of each model chunk ``recompute: full`` computes anew (default: all)."""
    staging_mib: int = 64
    """Most memory that a rank stages for sending and receiving at an expansion, in MiB."""


@dataclass(frozen=True)
class ParallelOverride:
    """Keys of ``parallel`` that change at an expansion; the others stay as they are."""

    engine: Optional[str] = None
    tensor: Optional[int] = None
    pipeline: Optional[int] = None
    virtual_pipeline: Optional[int] = None
    context: Optional[int] = None
    uneven: Optional[bool] = None
    expert: Optional[int] = None
    expert_tensor: Optional[int] = None
    zero_stage: Optional[int] = None
    sequence: Optional[bool] = None
    recompute: Optional[str] = None
    recompute_modules: Optional[list[str]] = None
    recompute_layers: Optional[int] = None
    staging_mib: Optional[int] = None


@dataclass(frozen=True)
class ExpansionSection:
    at: float = MISSING
    """When it happens: after a fraction of ``train.steps`` (below 1), or after a step."""
    to_layers: int = MISSING
    """Number of layers after the expansion."""
    init: str = "random"
    """New layers' weights: ``random``, ``copying``, ``zero``, ``copying_zeroL`` or
    ``copying_zeroN``."""
    order: str = "stack"
    """Order of copied layers: ``stack`` (ABAB), ``inter`` (AABB) or ``last`` (ABBB)."""
    insert: str = "bottom"
    """Place of the new layers among the trained ones: ``bottom`` (at the embedding), ``top`` or
    ``middle``. Copied in the ``middle`` are the middle layers, in whole copies."""
    block: Optional[list[int]] = None
    """The trained layers to copy, ``[first, last]`` without ``last`` (default: all; with ``insert:
    middle`` those in the middle). The layers below and above it stay single."""
    optimizer_state: str = "inherit"
    """Optimizer state after the expansion: ``inherit`` (surviving layers keep theirs, new layers
    start empty), ``copy`` (copied layers get their sources'), or ``reset`` (all start empty)."""
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
        """The last step that the run does."""
        return self.train.steps if self.train.stop_after is None else self.train.stop_after

    def expansion_steps(self) -> list[int]:
        """The steps (1-based, in order) after which the expansions happen."""
        return [int(e.at) if e.at >= 1 else round(e.at * self.train.steps) for e in self.expansion]

    def parallel_after(self, index: int) -> ParallelSection:
        """The section ``parallel`` after ``index`` expansions; 0 is the start of the run."""
        current = self.parallel
        for expansion in self.expansion[:index]:
            changes = {k: v for k, v in asdict(expansion.parallel).items() if v is not None}
            current = replace(current, **changes)
        return current


FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "resnet": {"data": {"corpus": "shapes"}, "parallel": {"engine": "torch"}},
}
"""The values of defaults that differ for a family."""
