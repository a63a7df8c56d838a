"""Reading a configuration from YAML and ``key=value`` words, and checking it."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_progressive.config.accepted import (
    BOUNDS,
    CHOICES,
    LONGEST_PATH,
    LONGEST_TEXT,
    NAMES,
    PATHS,
    TAKEN,
    WORDING,
)
from megatron_progressive.config.alternatives import one_way
from megatron_progressive.config.errors import ConfigError
from megatron_progressive.config.model_schema import MISSING
from megatron_progressive.config.places import check_run_name, expanded
from megatron_progressive.config.schema import (
    FAMILY_DEFAULTS,
    ExpansionSection,
    RunConfig,
)
from megatron_progressive.config.values import KIND_NAMES, converted, is_null, shown
from megatron_progressive.config.yaml_text import NotYaml, parsed_word, read_yaml

CONFIG_FILE = "config.yaml"
"""The name of the file in a run folder that holds the resolved configuration."""

Override = str | tuple[str, Any]
"""A ``key=value`` word, or a pair of a key and its value."""

_INDEX = re.compile(r"\[(\d+)\]|\.(\d+)(?=\.|\[|$)")
_ENTRY = re.compile(r"^(data\.validation)\.[^.]*")
_ENTRY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")


class _Kind(typing.NamedTuple):
    """The kind of value that a field holds."""

    type: Any
    """The type of the value, or of the elements where the value is a list."""
    is_list: bool
    optional: bool
    """Whether null is a value of the field."""
    is_map: bool = False
    """Whether the field holds values of the type by names that the user gives."""


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    keys = []
    for name, kind in _kinds(cls).items():
        keys.append(prefix + name)
        if is_dataclass(kind.type):
            keys += _known_keys(typing.cast(type, kind.type), prefix + name + ".")
    return keys


def _kinds(cls: type) -> dict[str, _Kind]:
    """The kind of each field of a section."""
    hints = typing.get_type_hints(cls)
    kinds = {}
    for f in fields(cls):
        hint = hints[f.name]
        optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
        hint = typing.get_args(hint)[0] if optional else hint
        origin = typing.get_origin(hint)
        hint = typing.get_args(hint)[-1] if origin in (list, dict) else hint
        kinds[f.name] = _Kind(hint, origin is list, optional, origin is dict)
    return kinds


def _unknown_key(full_key: str) -> ConfigError:
    known = _known_keys(RunConfig)
    plain = _generic(full_key)
    if plain in known and plain == full_key:  # at a level where it has no place
        section, _, leaf = plain.rpartition(".")
        return ConfigError(f"{full_key}: unknown key; accepted: the key {leaf} in {section}")
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    if not close:  # the right key in the wrong section, or a word close to a last part
        leaves = {k.rsplit(".", 1)[-1]: k for k in known}
        leaf_of = difflib.get_close_matches(plain.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)
        close = [leaves[leaf_of[0]]] if leaf_of else []
    beside = [k for k in known if k.rpartition(".")[0] == plain.rpartition(".")[0]]
    beside = beside or [k for k in known if "." not in k]
    accepted = f"did you mean {close[0]}?" if close else f"accepted: {', '.join(beside)}"
    return ConfigError(f"{shown_key(full_key)}: unknown key; {accepted}")


def shown_key(key: str) -> str:
    """A key as it can stand in the line of an error."""
    return key if key.isprintable() and len(key) <= 80 else shown(key)


def _section(cls: type, values: Any, name: str) -> Any:
    """One section of the configuration, made from nested values.

    Args:
        cls: the dataclass of the section.
        values: a mapping from the names of its fields to their values.
        name: the name of the section; empty where it is the whole configuration.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name or 'configuration'}: got {shown(values)}; accepted: a mapping of keys"
        )
    prefix = f"{name}." if name else ""
    kinds = _kinds(cls)
    for key in values:
        if key not in kinds:
            raise _unknown_key(f"{prefix}{key}")
    found = {}
    for f in fields(cls):
        kind, field = kinds[f.name], f"{prefix}{f.name}"
        if f.name in values:
            found[f.name] = _field(kind, values[f.name], field)
        elif f.default is NO_DEFAULT and f.default_factory is NO_DEFAULT:
            found[f.name] = _section(kind.type, {}, field)  # which names the field that lacks
        elif f.default is MISSING:
            accepted = WORDING.get(_generic(field), f"{KIND_NAMES[kind.type]} (it has no default)")
            raise ConfigError(f"{field}: missing; accepted: {accepted}")
    return cls(**found)


def _field(kind: _Kind, value: Any, name: str) -> Any:
    if kind.is_map:
        return _map(kind, value, name)
    if not kind.is_list:
        return _item(kind, value, name)
    if is_null(value) and kind.optional:
        return None
    if not isinstance(value, list):
        accepted = "a list, or null" if kind.optional else "a list"
        raise ConfigError(f"{name}: got {shown(value)}; accepted: {accepted}")
    item_kind = kind._replace(optional=False)
    return [_item(item_kind, item, f"{name}[{index}]") for index, item in enumerate(value)]


def _map(kind: _Kind, values: Any, name: str) -> dict[str, Any] | None:
    """Sections by the names that the user gives them. A text in place of a section is its first
    field."""
    if is_null(values) and kind.optional:
        return None
    accepted = "names, each with a path or a section" + ", or null" * kind.optional
    if not isinstance(values, dict) or not values:
        raise ConfigError(f"{name}: got {shown(values)}; accepted: {accepted}")
    found, first = {}, fields(kind.type)[0].name
    for key, value in values.items():
        if not _ENTRY_NAME.fullmatch(key) or key in TAKEN:
            raise ConfigError(
                f"{name}: got the name {shown(key)}; accepted: names of up to 40 letters, digits, "
                f"_ and -, but {', '.join(TAKEN)}"
            )
        section = {first: value} if isinstance(value, str) and not is_null(value) else value
        found[key] = _item(kind, section, f"{name}.{key}")
    return found


def _item(kind: _Kind, value: Any, name: str) -> Any:
    if is_dataclass(kind.type):
        return _section(typing.cast(type, kind.type), value, name)
    key = _generic(name)
    if is_null(value) and not kind.optional and key in CHOICES:
        raise ConfigError(f"{name}: got {shown(value)}; accepted: {_choices(key)}")
    if value == "~" and key in PATHS and not kind.optional:
        return str(value)  # no null, which this field has not, but the home folder
    return converted(name, value, kind.type, kind.optional)


def _generic(name: str) -> str:
    """A field's name without the numbers of lists and the names that the user gave."""
    return _ENTRY.sub(r"\1", _INDEX.sub("", name))


def _choices(key: str) -> str:
    accepted = ", ".join(str(choice) for choice in CHOICES[key] if choice is not None)
    return accepted + (", or null" if None in CHOICES[key] else "")


def check_value(name: str, value: Any, like: str = "", resolved: bool = False) -> None:
    """Check that a field accepts a value of its kind: that it is one of the field's choices, or
    within its bounds.

    Args:
        name: the name of the field; positions in lists are in brackets.
        value: a value of the field's kind.
        like: the name of the field whose limits apply, where that is another field.
        resolved: whether a run already has this value; it may then be above the upper bound.

    Raises:
        ConfigError: the field does not accept the value.
    """
    key = _generic(like or name)
    longest = LONGEST_PATH if key in PATHS else LONGEST_TEXT
    if isinstance(value, str) and len(value) > longest and key not in NAMES:
        raise ConfigError(f"{name}: got {shown(value)}; accepted: up to {longest} characters")
    if key in CHOICES and value not in CHOICES[key]:
        raise ConfigError(f"{name}: got {shown(value)}; accepted: {_choices(key)}")
    if key in WORDING and not math.isfinite(value):
        raise ConfigError(f"{name}: got {shown(value)}; accepted: {WORDING[key]}")
    if key in BOUNDS and value is not None:
        low, high = BOUNDS[key]
        # written so that NaN fails too
        if not (value >= low and (resolved or value <= high)):
            top = f"{high:.6g}" if isinstance(high, float) else str(high)
            raise ConfigError(f"{name}: got {shown(value)}; accepted: from {low} to {top}")


def _checked(section: Any, prefix: str, resolved: bool) -> Any:
    """The section itself, once every value in it has been accepted, with the variables in its paths
    replaced."""
    changed: dict[str, Any] = {}
    for f in fields(section):
        value, name = getattr(section, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            changed[f.name] = _checked(value, f"{name}.", resolved)
        elif isinstance(value, dict):
            changed[f.name] = {
                key: _checked(item, f"{name}.{key}.", resolved) for key, item in value.items()
            }
        elif isinstance(value, list):
            named = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
            changed[f.name] = [
                _checked(item, f"{at}.", resolved)
                if is_dataclass(item)
                else _accepted(at, item, resolved)
                for at, item in named
            ]
        else:
            changed[f.name] = _accepted(name, value, resolved)
    return replace(section, **changed)


def _accepted(name: str, value: Any, resolved: bool) -> Any:
    check_value(name, value, resolved=resolved)
    is_path = _generic(name) in PATHS
    if value is None or (name == "data.corpus" and not value):
        return value  # with a mixture there is no single corpus
    if resolved:  # earlier versions left ~ in it
        return os.path.expanduser(value) if is_path else value
    if name in NAMES:
        check_run_name(name, value)
        if why := NAMES[name].get(value):
            raise ConfigError(f"{name}: got {shown(value)}; accepted: another name ({why})")
    if is_path:
        return _HUB + expanded(name, value[3:]) if _is_hub(name, value) else expanded(name, value)
    return value


_HUB = "hf:"


def _is_hub(name: str, value: str) -> bool:
    """Whether a value names a data set or tokenizer of the Hugging Face hub; a folder may stand
    behind the prefix, too."""
    return (
        name.startswith("data.")
        and name.endswith("corpus")
        and value.startswith(_HUB)
        and value != _HUB
    )


def split_word(word: str) -> tuple[str, Any]:
    """The key and the value of a ``key=value`` word.

    Raises:
        ConfigError: the word has no ``=``, or its value is not YAML.
    """
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"{shown_key(word)}: not understood; accepted: key=value words")
    try:
        return key, parsed_word(text, key)
    except NotYaml:
        raise ConfigError(
            f"{shown_key(key)}: got {shown(text)}; accepted: a YAML value (text with its signs in "
            "quotes)"
        ) from None


def with_value(values: Any, key: str, value: Any) -> Any:
    """Nested values with another value at a dotted key such as ``expansion.0.at``; the mapping that
    was given stays as it is.

    A mapping is merged into the one that is there; any other value replaces what is there. Sections
    that are missing are made, entries of lists are not.

    Raises:
        KeyError: the key leads through a value that is neither a mapping nor a list with that
            entry.
    """
    part, _, rest = _INDEX.sub(r".\1\2", key).partition(".")
    if isinstance(values, list):
        if not part.isdecimal() or int(part) >= len(values):
            raise KeyError(key)
        index = int(part)
        new = with_value(values[index], rest, value) if rest else _merged(values[index], value)
        return [*values[:index], new, *values[index + 1 :]]
    if not isinstance(values, dict) or not part or key.endswith("."):
        raise KeyError(key)
    if rest:
        return {**values, part: with_value(values.get(part, {}), rest, value)}
    return {**values, part: _merged(values.get(part), value)}


def _merged(below: Any, above: Any) -> Any:
    """The mapping ``above``, with the keys that only ``below`` has added to it at every level."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {key: _merged(below[key], above[key]) for key in below.keys() & above.keys()}
    return {**below, **above, **both}


def from_dict(
    values: dict[str, Any], overrides: typing.Sequence[Override] = (), *, resolved: bool = False
) -> RunConfig:
    """A checked configuration from nested ``values`` and ``key=value`` words.

    Args:
        values: nested mappings of sections and fields.
        overrides: ``key=value`` words, or pairs of a key and its value, in the order in which they
            apply.
        resolved: whether a run already has these values, so that names and paths are taken as they
            are. Otherwise ``~``, ``$NAME`` and ``${NAME}`` in paths (:data:`.accepted.PATHS`) are
            replaced by what they mean in a shell.

    Raises:
        ConfigError: a key is unknown, or a value is missing, of the wrong type or not accepted.
    """
    for override in overrides:
        key, value = split_word(override) if isinstance(override, str) else override
        try:
            values = with_value(values, key, value)
        except KeyError:
            raise _unknown_key(key) from None
    values = one_way(values)
    family = values.get("model", {}).get("family") if _has_section(values, "model") else None
    defaults = FAMILY_DEFAULTS.get(family, {}) if isinstance(family, str) else {}
    for section, below in defaults.items():
        if section not in values or _has_section(values, section):
            values = {**values, section: _merged(below, values.get(section, {}))}
    return typing.cast(RunConfig, _checked(_section(RunConfig, values, ""), "", resolved))


def _has_section(values: Any, name: str) -> bool:
    return isinstance(values, dict) and isinstance(values.get(name), dict)


def expansion_from_words(words: typing.Mapping[str, Any]) -> ExpansionSection:
    """A checked expansion that belongs to no run (its ``at`` is left open), made from its fields as
    text, or lists of text.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type or not accepted.
    """
    kinds = _kinds(ExpansionSection)
    found = {}
    for key, text in words.items():
        found[key] = _field(kinds[key], text, f"expansion.{key}")
        for item in found[key] if isinstance(found[key], list) else [found[key]]:
            check_value(f"expansion.{key}", item)
    return ExpansionSection(**found)


def load(
    path: str | Path, overrides: typing.Sequence[Override] = (), *, resolved: bool = False
) -> RunConfig:
    """A checked configuration from a YAML file and ``key=value`` words; see :func:`from_dict`.

    Raises:
        ConfigError: the file is not there or is not YAML, a key is unknown, or a value is of the
            wrong type or not accepted.
    """
    return from_dict(read_yaml(Path(path), "CONFIG"), overrides, resolved=resolved)


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; :func:`load` reads it back to an equal one."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
