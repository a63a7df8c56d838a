"""What a checkpoint says of its model and of what it was trained on, so that it can be read
without its run folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_progressive.config import RunConfig
from megatron_progressive.data import DataIdentity
from megatron_progressive.models import shape_from_values
from megatron_progressive.models.base import ModelShape
from megatron_progressive.runtime.layout import Layout

DepthHistory = tuple[tuple[int, int], ...]
"""The depths of a run, oldest first: (the step after which it begins, the number of layers) for
each."""


@dataclass(frozen=True)
class ModelRecord:
    """The ``model`` of ``progress.json``: which tensors and slots there are, and where they come
    from."""

    shape: ModelShape
    precision: str
    """``fp32``, or ``bf16``, which has fp32 master weights."""
    optimizer: str
    embeddings: str
    """The rule of embeddings and LM head under Muon-NSGD: with ``adamw`` they have AdamW's
    slots."""
    seed: int
    layout: str
    """The layout of the job that saved it, to tell people; any layout can load it."""
    depth_history: DepthHistory
    data: DataIdentity | None = None
    """What it was trained on; None where that is not known, or where it was not trained here."""
    imported: dict[str, Any] | None = None
    """Where the weights were imported from, and what was passed over then
    (:mod:`megatron_progressive.huggingface.importing`); None for weights that were not imported."""

    def to_values(self) -> dict[str, Any]:
        """The record as JSON has it, with the fields of the shape beside the others."""
        values = asdict(self)
        if self.imported is None:
            del values["imported"]
        values["data"] = None if self.data is None else self.data.to_values()
        return {**values.pop("shape"), **values}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> ModelRecord:
        """The record that :meth:`to_values` gave these values of.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or of the wrong type.
        """
        rest = dict(values)
        data = DataIdentity.from_values(rest.pop("data", None))
        own = {f.name for f in fields(cls)}
        shape = shape_from_values({key: rest.pop(key) for key in [*rest] if key not in own})
        history = tuple((int(step), int(layers)) for step, layers in rest.pop("depth_history"))
        if not history or history[-1][1] != shape.num_layers:
            raise ValueError(f"depth_history {history} of {shape.num_layers} layers")
        return cls(shape=shape, depth_history=history, data=data, **rest)


def record_of_run(
    config: RunConfig, shape: ModelShape, layout: Layout, history: DepthHistory,
    trained_on: DataIdentity | None = None,
) -> ModelRecord:  # fmt: skip
    """The record that a run writes into its checkpoints."""
    return ModelRecord(
        shape=shape,
        precision=config.train.precision,
        optimizer=config.optim.name,
        embeddings=config.optim.embeddings,
        seed=config.run.seed,
        layout=str(layout),
        depth_history=history,
        data=trained_on,
    )
