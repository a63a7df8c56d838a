"""What a family is: its presets, the part of a configuration that it reads, and the engines that
train it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.models.base import MLA, ModelShape, MoE, ResNetParts, Rope, TensorSpec

Preset = dict[str, Any]
"""A preset: fields of the family's shape, in which each part (:data:`PARTS`) is a dict of its own
fields."""

PARTS = {"rope": Rope, "mla": MLA, "moe": MoE, "resnet": ResNetParts}
"""The parts that only some models have; each is a section of ``model`` and a field of the shape."""


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """One architecture."""

    presets: dict[str, Preset]
    sections: frozenset[str] = field(default_factory=frozenset)
    """Which of :data:`PARTS` the family has."""

    shape_type: ClassVar[type[ModelShape]]
    engines: ClassVar[tuple[str, ...]]
    """The engines that can train the family, the usual one first."""
    data_sizes: ClassVar[tuple[str, ...]]
    """The fields of ``data`` that are sizes of the model, too."""
    data_keys: ClassVar[frozenset[str]]
    """The fields of ``data`` that the family reads."""

    @abstractmethod
    def shape(self, config: RunConfig, num_layers: int | None) -> ModelShape:
        """The configured model; ``num_layers`` replaces the configured depth where it is given.

        Raises:
            ConfigError: a part or a size is set that the family does not have, or sizes do not fit
                each other.
        """

    @abstractmethod
    def table(self, shape: Any) -> dict[str, TensorSpec]:
        """Every global tensor of a model of this family, by canonical name."""

    def shape_from_values(self, values: dict[str, Any]) -> ModelShape:
        """The shape that ``dataclasses.asdict`` gave these values of.

        Raises:
            KeyError, TypeError: a value is missing or of the wrong type.
        """
        parts = {name: PARTS[name](**values[name]) for name in PARTS if values.get(name)}
        return self.shape_type(**{**values, **parts})

    def _sizes(self, config: RunConfig, num_layers: int | None) -> dict[str, Any]:
        """The sizes that the configuration sets, and its parts, in which the preset's fields stand
        for those that are not set.

        Raises:
            ConfigError: a part or a size is set that the family does not have.
        """
        model = config.model
        known = {"family", "preset"} | {f.name for f in fields(self.shape_type)}
        self._refuse_others(config, "model", known | PARTS.keys())
        self._refuse_others(config, "data", self.data_keys)
        sizes = _given(model)
        for key in ("family", "preset", *PARTS):
            del sizes[key]
        sizes = {key: value for key, value in sizes.items() if key in known}
        sizes |= {
            key: value for key, value in _given(config.data).items() if key in self.data_sizes
        }
        if num_layers is not None:
            sizes["num_layers"] = num_layers
        for part, kind in PARTS.items():
            changed = _given(getattr(model, part))
            if changed and part not in self.sections:
                raise ConfigError(
                    f"model.{part}.{next(iter(changed))}: got a value for family {model.family}, "
                    f"which has no {part}; accepted: none"
                )
            if part in self.sections:
                sizes[part] = kind(**{**self.presets[model.preset][part], **changed})
        return sizes

    def _refuse_others(self, config: RunConfig, section: str, known: Any) -> None:
        """Raise an error where a field is set that the family has no use for."""
        values = getattr(config, section)
        default = asdict(type(values)())
        for key, value in asdict(values).items():
            if key not in known and value != default[key]:
                raise ConfigError(
                    f"{section}.{key}: got {value!r} for family {config.model.family}, which has "
                    f"none; accepted: nothing"
                )


def _given(section: Any) -> dict[str, Any]:
    return {key: value for key, value in asdict(section).items() if value is not None}
