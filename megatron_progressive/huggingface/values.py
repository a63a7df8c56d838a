"""Reading ``config.json`` so that nothing in it is passed over.

Every key has to be one of these: read (a size or an option that the family has), required to have
the one value that the family has, harmless (:mod:`.harmless`), or equal to the default of
transformers' class. Any other key would change the function that the weights compute. All such keys
are refused in one line, except for those that the user allows by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.models.huggingface.harmless import describes_file, is_kept, same

FILE = "config.json"
_LONGEST = 80


def show(value: Any) -> str:
    """A value as ``config.json`` has it, shortened."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@dataclass
class Findings:
    """What is wrong with a configuration, and which part of it goes on all the same."""

    allowed: Collection[str] = ()
    """The keys, by their full names, whose values may be passed over; a mapping allows everything
    in it."""
    file: str = FILE
    """The name of the file with the keys."""
    wrong: dict[str, str] = field(default_factory=dict)
    """The keys that are wrong, by full name, each with what it has and what is accepted."""
    could_be_allowed: list[str] = field(default_factory=list)
    passed_over: dict[str, str] = field(default_factory=dict)
    """The keys that are wrong and allowed, in the same form."""

    @property
    def sizes_are_known(self) -> bool:
        """Whether every size could be read, so that sizes can be compared."""
        return set(self.wrong) <= set(self.could_be_allowed)

    def add(self, name: str, text: str, *, can_be_allowed: bool) -> None:
        parts = name.split(".")
        names = {".".join(parts[: n + 1]) for n in range(len(parts))}
        if can_be_allowed and not names.isdisjoint(self.allowed):
            self.passed_over.setdefault(name, text)
        elif name not in self.wrong:
            self.wrong[name] = text
            self.could_be_allowed += [name] * can_be_allowed

    def unneeded(self) -> list[str]:
        """The allowed keys with which nothing was wrong."""
        used = {name for name in self.allowed for found in self.passed_over
                if f"{found}.".startswith(f"{name}.")}  # fmt: skip
        return [name for name in self.allowed if name not in used]

    def refuse(self) -> None:
        """Raise :class:`ConfigError`, in one line with every key, where something is wrong."""
        if not self.wrong:
            return
        line = f"{self.file} " + " | ".join(f"{name}: {text}" for name, text in self.wrong.items())
        if self.could_be_allowed:
            options = " ".join(f"--allow {name}" for name in self.could_be_allowed)
            line += f" ({options}: import all the same)"
        raise ConfigError(line)


class Values:
    """The values of ``config.json``, or of a mapping in it, and which of them have been read.

    Where a value is wrong this is noted and a stand-in is returned; :meth:`Findings.refuse` raises
    one error for all.
    """

    def __init__(
        self, values: dict[str, Any], findings: Findings | None = None, prefix: str = ""
    ) -> None:
        self._values, self._prefix = values, prefix
        self.findings = Findings() if findings is None else findings
        self._read: set[str] = set()
        self._ignored: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether a key has a value that is not null."""
        return self._values.get(key) is not None

    def _wrong(self, key: str, accepted: str) -> str:
        got = show(self._values[key]) if key in self._values else "nothing"
        return f"got {got}; accepted: {accepted}"

    def error(self, key: str, accepted: str) -> ConfigError:
        """The error of a value without which nothing else can be judged."""
        return ConfigError(f"{FILE} {self._prefix}{key}: {self._wrong(key, accepted)}")

    def refuse(self, key: str, accepted: str, *, can_be_allowed: bool = False) -> None:
        """Note that a value is not accepted."""
        text = self._wrong(key, accepted)
        self.findings.add(f"{self._prefix}{key}", text, can_be_allowed=can_be_allowed)

    def value(self, key: str, default: Any = None) -> Any:
        """Any value of a key; the default where there is none or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.value(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self.refuse(key, f"an integer from {least}")
        return max(least, 1)

    def number(self, key: str, default: float | None = None, *, least: float = 0) -> float:
        value = self.value(key, default)
        if (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and value >= least
        ):
            return float(value)
        self.refuse(key, f"a number from {least}")
        return max(float(least), 1.0)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if isinstance(value, bool):
            return value
        self.refuse(key, "true or false")
        return default

    def mapping(self, key: str) -> Values:
        value = self.value(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "a mapping")
            value = {}
        return Values(value, self.findings, f"{self._prefix}{key}.")

    def require(self, key: str, *accepted: Any) -> Any:
        """The value of a key, which has to be one of these. The first stands for a value that is
        missing or null, and for any other one, which is noted."""
        value = self.value(key, accepted[0])
        if any(same(value, one) for one in accepted):
            return value
        self.refuse(key, ", ".join(show(one) for one in accepted), can_be_allowed=True)
        return accepted[0]

    def ignore(self, *keys: str) -> None:
        """Mark keys that do not matter, given what has been read; an export gives these keys
        back."""
        self._ignored.update(keys)

    def ignore_rest(self) -> None:
        """Mark everything else in the mapping as not mattering any more."""
        self._ignored.update(self._values)

    def refuse_unread(self) -> None:
        """Note every key with a value at which nobody has looked."""
        for key in self._values:
            if self.has(key) and key not in self._read | self._ignored:
                self.refuse(key, "no such key", can_be_allowed=True)

    def refuse_unknown(self, config_class: str) -> None:
        """Note every key that is neither read, nor harmless, nor the default of transformers'
        class."""
        known = self._read | self._ignored | self.kept().keys()
        unknown = [
            key
            for key in self._values
            if self.has(key) and key not in known and not describes_file(key)
        ]
        if not unknown:
            return
        import transformers  # only now: it takes seconds

        defaults = getattr(transformers, config_class)().to_dict()
        generation = transformers.GenerationConfig().to_dict()
        for key in unknown:
            if key in generation:
                self._ignored.add(key)
            elif not same(self._values[key], defaults.get(key)):
                accepted = show(defaults[key]) if key in defaults else "no such key"
                self.refuse(key, accepted, can_be_allowed=True)

    def kept(self) -> dict[str, Any]:
        """What an export gives back as it is: harmless values, including null."""
        return {
            key: value
            for key, value in self._values.items()
            if key in self._ignored
            or (key not in self._read and not describes_file(key) and is_kept(key, value))
        }
