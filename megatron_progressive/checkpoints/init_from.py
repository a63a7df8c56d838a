"""A run that starts from the weights of a checkpoint: what its model then is.

:func:`with_initial_model` comes right after a configuration is read, so that everything later sees
a configuration whose model is complete.
"""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from megatron_progressive.checkpoints.checkpoint import (
    checkpoints,
    newest_checkpoint,
    read_description,
)
from megatron_progressive.checkpoints.tokenizer_files import FOLDER
from megatron_progressive.config import CONFIG_FILE, ConfigError, DataSection, RunConfig, load
from megatron_progressive.data.manifest import prepared_folder, read_manifest
from megatron_progressive.data.tokenizer import is_tokenizer, load_tokenizer
from megatron_progressive.models import FAMILIES, transformer_shape
from megatron_progressive.models.base import ModelShape, TransformerShape
from megatron_progressive.models.family import PARTS

_TRAINING = {"mup", "mtp_loss_coeff", "moe.bias_update_rate", "moe.aux_loss_coeff"}
"""Fields of the model that say how it is trained, in which a run may differ from the checkpoint."""

_DATA_FIELDS = {field.name for field in fields(DataSection)}


def with_initial_model(config: RunConfig) -> RunConfig:
    """The configuration with the sizes of ``run.init_from``'s model where it sets none, and with
    the path of that very checkpoint where it names a run's folder.

    A run that has checkpoints of its own goes on from those: the configuration in its folder then
    gives the sizes, and ``run.init_from`` may be gone.

    Raises:
        ConfigError: there is no whole checkpoint, its family is another one, or a size is set that
            differs from the checkpoint's.
    """
    start = config.run.init_from
    if start is None:
        return config
    own = _own_configuration(config)
    if own is not None:
        config = _with_tokenizer(_from(config, own.run.init_from), own.data.tokenizer)
        return _filled(config, _sizes_of_configuration(own))
    try:
        checkpoint = newest_checkpoint(Path(start))
        shape = read_description(checkpoint)[1].shape
    except ConfigError as error:
        raise ConfigError(f"run.init_from: {error}") from None
    config = _from(config, str(checkpoint))
    if config.model.family != shape.family:
        raise ConfigError(
            f"model.family: got {config.model.family!r}; accepted: {shape.family} (the model of "
            f"run.init_from {checkpoint})"
        )
    sizes = sizes_of_model(shape)
    _check_given(config, sizes, shape, checkpoint)
    return _filled(with_initial_tokenizer(config), sizes)


def with_initial_tokenizer(config: RunConfig) -> RunConfig:
    """The configuration with the tokenizer that ``run.init_from`` keeps in place of ``bpe``."""
    if config.run.init_from is None or config.data.prepared is not None:
        return config
    checkpoint = Path(config.run.init_from).expanduser()
    if not _keeps_tokenizer(checkpoint):
        return config
    return _with_tokenizer(config, str(checkpoint / FOLDER))


def _keeps_tokenizer(checkpoint: Path) -> bool:
    """Whether a checkpoint has a tokenizer that can be read here."""
    return is_tokenizer(checkpoint / FOLDER)


def _with_tokenizer(config: RunConfig, tokenizer: str) -> RunConfig:
    """The configuration with a tokenizer in place of ``bpe``, which would train another one on the
    corpus than the one to which the weights belong."""
    if config.data.tokenizer != "bpe":
        return config
    return replace(config, data=replace(config.data, tokenizer=tokenizer))


def unknown_tokenizer(config: RunConfig) -> list[str]:
    """The warning for a run whose weights come without their tokenizer."""
    start = config.run.init_from
    if start is None or config.data.tokenizer != "bpe" or config.data.prepared is not None:
        return []
    if "vocab_size" not in FAMILIES[config.model.family].data_sizes:
        return []
    return [
        f"run.init_from {start} keeps no tokenizer that is read here: data.tokenizer bpe makes a "
        "new one, whose tokens mean nothing to its weights (data.tokenizer=FOLDER names theirs)"
    ]


def check_tokenizer(config: RunConfig) -> None:
    """Check that a run which starts from a checkpoint reads text by the checkpoint's tokenizer,
    where that keeps one.

    Raises:
        ConfigError: the run would have another tokenizer, or one of the two cannot be read.
    """
    if config.run.init_from is None:
        return
    checkpoint = Path(config.run.init_from)
    kept = checkpoint / FOLDER
    if not _keeps_tokenizer(checkpoint):
        return
    if config.data.prepared is not None:
        field, got = "data.prepared", config.data.prepared
        name = str(Path(got) / FOLDER)
        read_manifest(prepared_folder(config))
    else:
        field, got, name = "data.tokenizer", config.data.tokenizer, config.data.tokenizer
    if Path(name).resolve() == kept.resolve():
        return
    size = transformer_shape(config).vocab_size
    theirs, ours = (
        load_tokenizer(replace(config.data, tokenizer=one), size) for one in (str(kept), name)
    )
    if ours is None or theirs is None or not ours.tokens_as(theirs):
        accepted = str(kept) if config.data.prepared is None else f"one made with {kept}"
        raise ConfigError(
            f"{field}: got {got}, whose tokenizer is not that of run.init_from "
            f"{config.run.init_from}; accepted: {accepted}"
        )


def _own_configuration(config: RunConfig) -> RunConfig | None:
    """The configuration of the run's folder, where it is the same run and has checkpoints."""
    path = config.folder / CONFIG_FILE
    if not path.is_file() or not checkpoints(config.folder):
        return None
    own = load(path, resolved=True)
    same = own.model.family == config.model.family and _means(
        config.run.init_from, own.run.init_from
    )
    return own if same else None


def _means(given: str | None, checkpoint: str | None) -> bool:
    """Whether ``given`` is the checkpoint, or the folder of its run, which may have newer
    checkpoints."""
    if given is None or checkpoint is None:
        return given == checkpoint
    places = Path(checkpoint), *list(Path(checkpoint).parents)[:2]
    return Path(given) in places


def _from(config: RunConfig, checkpoint: str | None) -> RunConfig:
    return replace(config, run=replace(config.run, init_from=checkpoint))


def sizes_of_model(shape: ModelShape) -> dict[str, Any]:
    """The fields of ``model`` and ``data`` (:attr:`.Family.data_sizes`) that make this shape, by
    their names in those sections; a field of a part is named ``part.field``."""
    sizes: dict[str, Any] = {}
    sections = FAMILIES[shape.family].sections
    for field, value in asdict(shape).items():
        if field in PARTS:
            if field in sections:
                sizes |= {f"{field}.{part}": given for part, given in value.items()}
        elif field != "family":
            sizes[field] = value
    if isinstance(shape, TransformerShape) and shape.mla is not None:  # they have no meaning
        del sizes["num_query_groups"], sizes["head_dim"]
    return sizes


def _sizes_of_configuration(config: RunConfig) -> dict[str, Any]:
    names = FAMILIES[config.model.family].data_sizes
    sizes: dict[str, Any] = {key: getattr(config.data, key) for key in names}
    for field, value in asdict(config.model).items():
        if isinstance(value, dict):
            sizes |= {f"{field}.{part}": given for part, given in value.items()}
        elif field not in ("family", "preset"):
            sizes[field] = value
    return sizes


def _given(config: RunConfig, name: str) -> tuple[str, Any]:
    """The full name of a field, and its value in the configuration."""
    section = "data" if name in _DATA_FIELDS else "model"
    value: Any = getattr(config, section)
    for part in name.split("."):
        value = getattr(value, part)
    return f"{section}.{name}", value


def _check_given(
    config: RunConfig, sizes: dict[str, Any], shape: ModelShape, checkpoint: Path
) -> None:
    for name, size in sizes.items():
        field, got = _given(config, name)
        if got is None or got == size or name in _TRAINING - {"moe.bias_update_rate"}:
            continue
        if name == "moe.bias_update_rate" and (got > 0) == (size > 0):
            continue
        rotary = isinstance(shape, TransformerShape) and shape.rope is not None
        shorter = name == "sequence_length" and rotary
        if shorter and got < size:
            continue
        accepted = f"up to {size}" if shorter else size
        if name == "moe.bias_update_rate":
            accepted = "above 0" if size > 0 else "0"
        raise ConfigError(
            f"{field}: got {got}; accepted: {accepted} (the model of run.init_from {checkpoint})"
        )


def _filled(config: RunConfig, sizes: dict[str, Any]) -> RunConfig:
    """The configuration with ``sizes`` where it sets none."""

    def fill(section: Any, prefix: str) -> Any:
        values = {}
        for field in section.__dataclass_fields__:
            value, name = getattr(section, field), f"{prefix}{field}"
            if is_dataclass(value):
                values[field] = fill(value, f"{name}.")
            elif value is None and name in sizes:
                values[field] = sizes[name]
        return replace(section, **values)

    data = {
        key: sizes[key]
        for key in FAMILIES[config.model.family].data_sizes
        if getattr(config.data, key) is None
    }
    return replace(config, model=fill(config.model, ""), data=replace(config.data, **data))
