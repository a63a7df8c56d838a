"""Reading YAML files and values as nested dicts, lists and :class:`.Written` scalars.

PyYAML reads the structure. What it would silently accept is refused in one line: a key that is
there twice, an anchor inside itself, a tag that makes another kind of value.
"""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import yaml

from megatron_progressive.config.errors import ConfigError
from megatron_progressive.config.values import Written


class NotYaml(ConfigError):
    """The text does not have the structure of YAML."""


_MOST_VALUES = 100_000
"""The most values in one file, where aliases count as often as they are used: a few lines can stand
for millions of values."""
_CORE = "tag:yaml.org,2002:"
_SCALARS = {_CORE + kind for kind in ("str", "int", "float", "bool", "null")}


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; empty where the file is.

    Args:
        path: the path of the file.
        what: the word for the file on the command line, as ``CONFIG``.

    Raises:
        ConfigError: the file is not there, cannot be read, or holds no mapping of unique keys.
    """
    accepted = "accepted: the path of a YAML file"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{what}: no file {path}; {accepted}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{what}: {path} cannot be read ({why}); {accepted}") from None
    loaded = parsed(data, f"{what}: {path}")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        kind = "a list" if isinstance(loaded, list) else "text"
        raise ConfigError(f"{what}: {path} holds {kind}; accepted: a mapping of keys")
    return loaded


def parsed(text: str | bytes, where: str) -> Any:
    """The one document of a YAML text; None where the text is empty.

    Raises:
        ConfigError: it is not YAML, or holds what this module refuses.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Reader(where).value(node, "")
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        line = f" (line {at.line + 1}, column {at.column + 1})" if at else ""
        why = " ".join((error.problem or error.context or "").split())
        if "expected a single document" in (error.context or ""):
            why = "a second document begins"
        raise NotYaml(f"{where} is not YAML: {why}{line}; accepted: one YAML document") from None
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise NotYaml(f"{where} is not YAML: {why}; accepted: one YAML document") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; accepted: sections and lists") from None
    finally:
        if loader is not None:
            loader.dispose()


def parsed_word(text: str, where: str) -> Any:
    """The value of a ``key=value`` word. Where the value is one scalar without quotes, it is the
    whole text: what YAML would take for a comment after it is part of a name.

    Raises:
        ConfigError: see :func:`parsed`.
    """
    value, bare = parsed(text, where), text.strip()
    if value is None or (isinstance(value, Written) and value.plain and bare[:1] not in "!&"):
        return Written(bare)
    return value


class _Loader(yaml.BaseLoader):
    """A reader of YAML's structure alone: which scalar is a number is for the schema to say."""

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        node: Any = super().compose_scalar_node(anchor)
        # without quotes and tag, or tagged as what only such a scalar can be
        node.plain = event.implicit[0] or node.tag in _SCALARS - {_CORE + "str"}
        return typing.cast(yaml.ScalarNode, node)


class _Reader:
    """A reader of the nodes of one document, which gives plain values."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = _MOST_VALUES
        self._open: set[int] = set()
        """The nodes that are being read: one of them inside itself is an anchor's."""

    def value(self, node: yaml.Node, key: str) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self._where}: more than {_MOST_VALUES:,} values; accepted: fewer")
        if id(node) in self._open:
            raise self._refused(node, key, "an anchor that holds itself", "values that end")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, key)
            kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
            if node.tag != _CORE + kind:
                raise self._tagged(node, key)
            if isinstance(node, yaml.SequenceNode):
                return [self.value(n, f"{key}[{i}]") for i, n in enumerate(node.value)]
            return self._mapping(node, key)
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, key: str) -> Written:
        if node.tag not in _SCALARS:
            raise self._tagged(node, key)
        return Written(node.value, plain=bool(vars(node)["plain"]))

    def _mapping(self, node: yaml.Node, prefix: str) -> dict[str, Any]:
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._refused(key_node, prefix, "a key that is no text", "text")
            name = str(key_node.value)
            key = f"{prefix}.{name}" if prefix else name
            if name in lines:
                raise ConfigError(
                    f"{self._where}: {key}: twice (lines {lines[name]} and {line}); accepted: "
                    "each key once"
                )
            lines[name] = line
            if name == "<<" and key_node.style is None:
                merged = self._merged(value_node, key)
            else:
                own[name] = self.value(value_node, key)
        return {**merged, **own}

    def _merged(self, node: yaml.Node, key: str) -> dict[str, Any]:
        """What ``<<: *anchor`` adds to a mapping; of several anchors that have a key the first one
        counts."""
        found = self.value(node, key)
        merged: dict[str, Any] = {}
        for values in reversed(found if isinstance(found, list) else [found]):
            if not isinstance(values, dict):
                raise self._refused(node, key, "no mapping", "an anchor of a mapping")
            merged |= values
        return merged

    def _tagged(self, node: yaml.Node, key: str) -> ConfigError:
        tag = node.tag.replace(_CORE, "!!")
        return self._refused(node, key, f"the tag {tag}", "values without tags")

    def _refused(self, node: yaml.Node, key: str, got: str, accepted: str) -> ConfigError:
        place = f"{key}: " if key else ""
        line = node.start_mark.line + 1
        return ConfigError(f"{self._where}: {place}got {got} (line {line}); accepted: {accepted}")
