"""Run configuration: nested frozen dataclasses, filled from YAML and ``key=value`` words.

Every field has a docstring with its unit. A value that cannot work raises
:class:`ConfigError` with one line that names the field, what it got and what it accepts;
the command line turns that into exit code 2.
"""

from __future__ import annotations

import copy
import difflib
import re
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A configuration that cannot run: one line for the user, exit code 2."""


@dataclass(frozen=True)
class RunSection:
    name: str = "run"
    """Name of the run; its folder is ``dir/name``."""
    dir: str = "runs"
    """Folder that holds run folders and prepared corpora."""
    seed: int = 1
    """Seed of initialisation and of the order of samples."""


@dataclass(frozen=True)
class ModelSection:
    family: str = MISSING
    """Model family: ``gpt2``."""
    preset: str = "tiny"
    """Named shape of the family; the fields below override it."""
    num_layers: Optional[int] = None
    """Layers at the start of the run, from 0 (default: the preset's)."""
    hidden_size: Optional[int] = None
    """Width of the residual stream (default: the preset's)."""
    num_attention_heads: Optional[int] = None
    """Attention heads (default: the preset's)."""
    ffn_hidden_size: Optional[int] = None
    """Width of the MLP (default: the preset's, or 4 x hidden_size where that is set)."""
    tie_embeddings: bool = True
    """Whether the LM head is the embedding's weight."""
    linear_bias: bool = True
    """Whether linear layers have biases, as GPT-2's have."""


@dataclass(frozen=True)
class DataSection:
    corpus: str = "stdlib"
    """``stdlib``, a path (folder or .txt, .jsonl, .parquet, ... file), or ``hf:NAME``."""
    tokenizer: str = "bpe"
    """``bpe`` (byte-level, trained on the corpus), a folder or file, or a Hugging Face name."""
    vocab_size: Optional[int] = None
    """Vocabulary of the model; ``bpe`` is trained to this size (default: the preset's)."""
    sequence_length: Optional[int] = None
    """Tokens a sample (default: the preset's)."""
    text_field: str = "text"
    """Field or column that holds the text in JSONL, Parquet and Hugging Face corpora."""
    validation_fraction: float = 0.02
    """Share of documents held out for validation, chosen by a hash of their content."""
    max_bytes: int = 0
    """Bytes of text to read from the corpus; 0 reads all of it."""
    prepared: Optional[str] = None
    """Folder of a corpus made by ``mprog data prepare`` (default: one under ``run.dir``)."""


@dataclass(frozen=True)
class TrainSection:
    steps: int = 1500
    """Optimizer steps of the run."""
    global_batch: int = 16
    """Samples an optimizer step, over all ranks."""
    micro_batch: int = 4
    """Samples a forward pass on one rank."""
    precision: str = "fp32"
    """``fp32``, or ``bf16`` with fp32 master weights and fp32 gradient sums."""
    eval_every: int = 100
    """Steps between validations; the last step is always validated."""
    eval_samples: int = 128
    """Validation samples a validation reads (rounded up to whole global batches)."""
    save_every: int = 300
    """Steps between checkpoints; 0 saves only before each expansion and at the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones and those made before expansions; 0 keeps all."""
    log_every: int = 50
    """Steps between lines on the terminal (``metrics.jsonl`` has every step)."""


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
    ns_steps: int = 5
    """Muon-NSGD: Newton-Schulz iterations."""
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
    """``megatron``, or ``deepspeed`` (data parallel only)."""
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
    """Expert-parallel ranks (1: the families so far have no experts)."""
    zero_stage: int = 1
    """megatron: 1 shards AdamW's state over data-parallel ranks (Megatron's distributed
    optimizer), 0 does not; Muon-NSGD keeps its state on every data-parallel rank. deepspeed: 0
    to 3, with either optimizer: 2 shards gradients too, 3 the weights as well."""
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
    expansion: list[ExpansionSection] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) / self.run.name

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


_CHOICES: dict[str, tuple[Any, ...]] = {
    "train.precision": ("fp32", "bf16"),
    "optim.name": ("muon_nsgd", "adamw"),
    "optim.scale": ("out_in", "moonlight"),
    "optim.embeddings": ("muon", "adamw"),
    "schedule.name": ("wsd", "cosine", "linear"),
    "parallel.engine": ("megatron", "deepspeed"),
    "parallel.zero_stage": (0, 1, 2, 3),
    "parallel.expert": (1,),
    "expansion.init": ("random", "copying", "zero", "copying_zeroL", "copying_zeroN"),
    "expansion.order": ("stack", "inter", "last"),
    "expansion.insert": ("bottom", "top"),
    "expansion.optimizer_state": ("inherit", "copy", "reset"),
    "expansion.parallel.engine": (None, "megatron", "deepspeed"),
    "expansion.parallel.zero_stage": (None, 0, 1, 2, 3),
    "expansion.parallel.expert": (None, 1),
}

# Least and greatest value (inclusive) of numeric fields; None is no bound.
_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "run.seed": (0, 2**63 - 1),
    "model.num_layers": (0, None),
    "model.hidden_size": (1, None),
    "model.num_attention_heads": (1, None),
    "model.ffn_hidden_size": (1, None),
    "data.vocab_size": (2, None),
    "data.sequence_length": (1, None),
    "data.validation_fraction": (0.0001, 0.5),
    "data.max_bytes": (0, None),
    "train.steps": (1, None),
    "train.global_batch": (1, None),
    "train.micro_batch": (1, None),
    "train.eval_every": (1, None),
    "train.eval_samples": (1, None),
    "train.save_every": (0, None),
    "train.keep_checkpoints": (0, None),
    "train.log_every": (1, None),
    "optim.lr": (0, None),
    "optim.weight_decay": (0, None),
    "optim.clip_grad": (0, None),
    "optim.momentum": (0, 0.99999),
    "optim.ns_steps": (1, None),
    "optim.beta1": (0, 0.99999),
    "optim.beta2": (0, 0.99999),
    "optim.eps": (0, None),
    "schedule.warmup": (0, 1),
    "schedule.decay": (0, 1),
    "parallel.tensor": (1, None),
    "parallel.pipeline": (1, None),
    "parallel.virtual_pipeline": (1, None),
    "parallel.staging_mib": (1, None),
    "expansion.to_layers": (1, None),
    "expansion.parallel.tensor": (1, None),
    "expansion.parallel.pipeline": (1, None),
    "expansion.parallel.virtual_pipeline": (1, None),
    "expansion.parallel.staging_mib": (1, None),
}


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind, _ in _field_kinds(cls):
        keys.append(prefix + name)
        if is_dataclass(kind):
            keys += _known_keys(typing.cast(type, kind), prefix + name + ".")
    return keys


def _field_kinds(cls: type) -> list[tuple[str, Any, bool]]:
    """(name, type or element type, whether it is a list) of each field."""
    hints = typing.get_type_hints(cls)
    kinds = []
    for f in fields(cls):
        kind, is_list = hints[f.name], typing.get_origin(hints[f.name]) is list
        if is_list or typing.get_origin(kind) is typing.Union:
            kind = typing.get_args(kind)[0]
        kinds.append((f.name, kind, is_list))
    return kinds


def _unknown_key(full_key: str) -> ConfigError:
    known = _known_keys(RunConfig)
    plain = re.sub(r"\[\d+\]|\.\d+", "", full_key)
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    if not close:  # the right key in the wrong section, or a word close to a last part
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        leaf = difflib.get_close_matches(plain.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)
        close = [leaves[leaf[0]]] if leaf else []
    accepted = f"did you mean {close[0]}?" if close else f"accepted: {', '.join(known)}"
    return ConfigError(f"{full_key}: unknown key; {accepted}")


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def _check_keys(values: Any, cls: type, prefix: str) -> None:
    """Raise on unknown keys and wrong types, naming the whole path (lists included)."""
    if not isinstance(values, dict):
        section = prefix.rstrip(".") or "configuration"
        raise ConfigError(f"{section}: got {values!r}; accepted: a mapping of keys")
    kinds = {name: (kind, is_list) for name, kind, is_list in _field_kinds(cls)}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in kinds:
            raise _unknown_key(name)
        kind, is_list = kinds[key]
        if is_list:
            if not isinstance(value, list):
                raise ConfigError(f"{name}: got {value!r}; accepted: a list")
            for index, item in enumerate(value):
                _check_keys(item, kind, f"{name}[{index}].")
        elif is_dataclass(kind):
            _check_keys(value, typing.cast(type, kind), name + ".")
        elif value is not None and not _fits(value, kind):
            raise ConfigError(f"{name}: got {value!r}; accepted: {_KIND_NAMES[kind]}")


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if isinstance(value, str):  # YAML reads 1e-3 as text; OmegaConf converts it
        if kind is str:
            return True
        try:
            kind(value)
        except ValueError:
            return False
        return True
    return isinstance(value, kind) or (kind is float and isinstance(value, int))


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"CONFIG: no file {path}; accepted: the path of a YAML file")
    try:
        loaded = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"CONFIG: {path} is not YAML: {line}") from None
    if loaded is None:
        loaded = {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"CONFIG: {path} holds {type(loaded).__name__}; accepted: a mapping of sections"
        )
    return loaded


def _check_fields(section: Any, prefix: str) -> None:
    for f in fields(section):
        value, name = getattr(section, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            _check_fields(value, name + ".")
        elif isinstance(value, list):
            for item in value:
                _check_fields(item, name + ".")
        elif name in _CHOICES and value not in _CHOICES[name]:
            accepted = ", ".join(str(c) for c in _CHOICES[name] if c is not None)
            raise ConfigError(f"{name}: got {value!r}; accepted: {accepted}")
        elif name in _BOUNDS and value is not None:
            low, high = _BOUNDS[name]
            # written so that NaN fails too
            if not ((low is None or value >= low) and (high is None or value <= high)):
                accepted = f"from {low}" + (f" to {high}" if high is not None else "")
                raise ConfigError(f"{name}: got {value!r}; accepted: {accepted}")


def from_dict(values: dict[str, Any], overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A checked configuration from nested ``values`` and ``key=value`` words.

    Raises:
        ConfigError: unknown key, wrong type, missing or unaccepted value.
    """
    plain = OmegaConf.create(copy.deepcopy(values))
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word}: not understood; accepted: key=value words")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: got {text!r}; accepted: a YAML value") from None
        try:
            OmegaConf.update(plain, key, value, merge=isinstance(value, dict))
        except (OmegaConfBaseException, IndexError, TypeError, AttributeError):
            raise _unknown_key(key) from None
    _check_keys(OmegaConf.to_container(plain), RunConfig, "")
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
    except OmegaConfBaseException as error:
        message = str(error.msg or error).splitlines()[0]
        raise ConfigError(f"{error.full_key or 'configuration'}: {message}") from None
    for key in _known_keys(RunConfig):
        if key.startswith("expansion"):
            continue
        if OmegaConf.is_missing(*_parent(cfg, key)):
            raise ConfigError(f"{key}: missing; accepted: a value (it has no default)")
    for index in range(len(cfg.expansion)):
        for key in ("at", "to_layers"):
            if OmegaConf.is_missing(cfg.expansion[index], key):
                raise ConfigError(f"expansion[{index}].{key}: missing; accepted: a number")
    config = typing.cast(RunConfig, OmegaConf.to_object(cfg))
    _check_fields(config, "")
    return config


def expansion_from_words(words: dict[str, str]) -> ExpansionSection:
    """A checked expansion outside of a run (``at`` is left open) from its fields as text.

    Raises:
        ConfigError: unknown key, wrong type or value.
    """
    _check_keys(words, ExpansionSection, "expansion.")
    section = ExpansionSection(**{**words, "to_layers": int(words["to_layers"])})  # type: ignore[arg-type]
    _check_fields(section, "expansion.")
    return section


def _parent(cfg: Any, key: str) -> tuple[Any, str]:
    *path, leaf = key.split(".")
    for part in path:
        cfg = cfg[part]
    return cfg, leaf


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A checked configuration from a YAML file and ``key=value`` words.

    Raises:
        ConfigError: no such file, not YAML, unknown key, wrong type or value.
    """
    return from_dict(_read_yaml(Path(path)), overrides)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; :func:`load` reads it back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
