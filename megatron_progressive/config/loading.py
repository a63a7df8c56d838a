"""A configuration from YAML and ``key=value`` words, checked."""

from __future__ import annotations

import copy
import difflib
import re
import typing
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_progressive.config.accepted import BOUNDS, CHOICES
from megatron_progressive.config.schema import (
    FAMILY_DEFAULTS,
    ConfigError,
    ExpansionSection,
    RunConfig,
)

CONFIG_FILE = "config.yaml"
"""In a run folder: the resolved configuration."""


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
                if is_dataclass(kind):
                    _check_keys(item, typing.cast(type, kind), f"{name}[{index}].")
                elif not _fits(item, kind):
                    accepted = _KIND_NAMES[kind]
                    raise ConfigError(f"{name}[{index}]: got {item!r}; accepted: {accepted}")
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


def _check_choice(name: str, value: Any) -> None:
    if value not in CHOICES[name]:
        accepted = ", ".join(str(c) for c in CHOICES[name] if c is not None)
        raise ConfigError(f"{name}: got {value!r}; accepted: {accepted}")


def _check_fields(section: Any, prefix: str) -> None:
    for f in fields(section):
        value, name = getattr(section, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            _check_fields(value, name + ".")
        elif isinstance(value, list):
            for item in value:
                if is_dataclass(item):
                    _check_fields(item, name + ".")
                else:
                    _check_choice(name, item)
        elif name in CHOICES:
            _check_choice(name, value)
        elif name in BOUNDS and value is not None:
            low, high = BOUNDS[name]
            # written so that NaN fails too
            if not ((low is None or value >= low) and (high is None or value <= high)):
                accepted = f"from {low}" + (f" to {high}" if high is not None else "")
                raise ConfigError(f"{name}: got {value!r}; accepted: {accepted}")


def split_word(word: str) -> tuple[str, Any]:
    """The key and the value of a ``key=value`` word.

    Raises:
        ConfigError: it is none, or its value is not YAML.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{word}: not understood; accepted: key=value words")
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: got {text!r}; accepted: a YAML value") from None


def from_dict(values: dict[str, Any], overrides: typing.Sequence[str] = ()) -> RunConfig:
    """A checked configuration from nested ``values`` and ``key=value`` words.

    Raises:
        ConfigError: unknown key, wrong type, missing or unaccepted value.
    """
    plain = OmegaConf.create(copy.deepcopy(values))
    for word in overrides:
        key, value = split_word(word)
        try:
            OmegaConf.update(plain, key, value, merge=isinstance(value, dict))
        except (OmegaConfBaseException, IndexError, TypeError, AttributeError):
            raise _unknown_key(key) from None
    _check_keys(OmegaConf.to_container(plain), RunConfig, "")
    family = OmegaConf.select(plain, "model.family")
    defaults = FAMILY_DEFAULTS.get(family, {}) if isinstance(family, str) else {}
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(RunConfig), defaults, plain)
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
