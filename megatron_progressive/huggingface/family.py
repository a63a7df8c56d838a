"""What is known of a family's class in transformers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.huggingface.tensors import NameMap
from megatron_progressive.huggingface.values import Values
from megatron_progressive.models.base import TransformerShape


@dataclass(frozen=True)
class HuggingFaceFamily:
    """One family between a :class:`.base.TransformerShape` and ``config.json``, in both directions,
    and its tensors."""

    family: str
    """Our name of the family."""
    model_type: str
    architecture: str
    """The class of the language model; the class of its configuration is ``config_class``."""
    config_class: str
    shape_of: Callable[[Values], TransformerShape]
    """Reads every key that matters, and notes what the family does not have."""
    config_of: Callable[[TransformerShape], dict[str, Any]]
    """Gives the keys that matter; raises :class:`ConfigError` for what the class cannot express."""
    name_map: Callable[[TransformerShape], NameMap]
    ignored: str = r"(?!)"
    """A regular expression of tensors that some files have and no model needs, which are
    buffers."""
    base_prefix: str = "model."
    """The prefix of all names but the head's, which files of the model without a head lack."""

    def classes(self) -> dict[str, str]:
        """The classes, by the names that ``auto_map`` has for what loads them."""
        base = re.sub("(ForCausalLM|LMHeadModel)$", "Model", self.architecture)
        return {
            "AutoConfig": self.config_class,
            "AutoModel": base,
            "AutoModelForCausalLM": self.architecture,
        }


def inexpressible(field: str, got: object, accepted: str, architecture: str) -> ConfigError:
    """The error of an export of a model that transformers' class cannot express."""
    return ConfigError(f"model.{field}: got {got}; accepted: {accepted} (by {architecture})")
