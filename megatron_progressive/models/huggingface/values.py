"""Reads ``config.json`` so that nothing in it is passed over.

Every key is one of: read (a size or an option that the family has), required to have the one
value that the family has, harmless, or equal to the default of transformers' class. Anything
else would change the function that the weights compute, and is refused by its name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from megatron_progressive.config import ConfigError

FILE = "config.json"
_LONGEST = 80

HARMLESS = frozenset({
    # what made the file
    "architectures", "model_type", "auto_map", "transformers_version", "_name_or_path",
    "name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "_experts_implementation", "dtype", "torch_dtype",
    # training: not of the weights' function
    "initializer_range", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "hidden_dropout", "pretraining_tp", "gradient_checkpointing",
    # what a forward pass returns, and generation
    "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "unk_token_id", "decoder_start_token_id", "task_specific_params",
    # other heads than the language model's
    "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout",
})  # fmt: skip
"""Keys of any family that do not change the logits of its language model."""


def show(value: Any) -> str:
    """A value as ``config.json`` has it, shortened."""
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class Values:
    """The values of ``config.json``, or of a mapping in it, and which of them have been read."""

    def __init__(self, values: dict[str, Any], prefix: str = "") -> None:
        self._values, self._prefix = values, prefix
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether there is a value that is not null."""
        return self._values.get(key) is not None

    def error(self, key: str, accepted: str) -> ConfigError:
        got = show(self._values[key]) if key in self._values else "nothing"
        return ConfigError(f"{FILE} {self._prefix}{key}: got {got}; accepted: {accepted}")

    def value(self, key: str, default: Any = None) -> Any:
        """Any value; the default where there is none or null."""
        self._read.add(key)
        value = self._values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(key, f"an integer from {least}")
        return value

    def number(self, key: str, default: float | None = None, *, least: float = 0) -> float:
        value = self.value(key, default)
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
            or value < least
        ):
            raise self.error(key, f"a number from {least}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.value(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def mapping(self, key: str) -> Values:
        value = self.value(key, {})
        if not isinstance(value, dict):
            raise self.error(key, "a mapping")
        return Values(value, f"{self._prefix}{key}.")

    def require(self, key: str, *accepted: Any) -> None:
        """The value is one of these; the first is the one where there is none or null.

        Raises:
            ConfigError: it is another one.
        """
        value = self.value(key, accepted[0])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                   for one in accepted):  # fmt: skip
            raise self.error(key, ", ".join(show(one) for one in accepted))

    def ignore(self, *keys: str) -> None:
        """These keys do not matter, given what has been read."""
        self._read.update(keys)

    def unread(self, harmless: Iterable[str] = ()) -> list[str]:
        """Keys with a value that nobody looked at."""
        known = self._read | set(harmless)
        return [key for key in self._values if key not in known and self.has(key)]

    def refuse_unread(self) -> None:
        """Raise ConfigError where :meth:`unread` finds a key."""
        for key in self.unread():
            raise self.error(key, "no such key")

    def refuse_unknown(self, config_class: str) -> None:
        """Refuse what is neither read, nor harmless, nor the default of transformers' class.

        Raises:
            ConfigError: naming the first such key.
        """
        unknown = self.unread(HARMLESS)
        if not unknown:
            return
        import transformers  # only now: it takes seconds

        defaults = getattr(transformers, config_class)().to_dict()
        for key in unknown:
            if self._values[key] != defaults.get(key):
                accepted = show(defaults[key]) if key in defaults else "no such key"
                raise self.error(key, accepted)
