"""Settling all data of a run: what it is trained on, and its further validation sets."""

from __future__ import annotations

from dataclasses import replace

from megatron_progressive.config import ConfigError, RunConfig
from megatron_progressive.data.identity import DataIdentity
from megatron_progressive.data.mix import settle_mix
from megatron_progressive.data.settling import Begun, settle_corpus
from megatron_progressive.data.validation import check_sets, settle_sets
from megatron_progressive.models import model_shape
from megatron_progressive.models.base import TransformerShape
from megatron_progressive.runtime.progress import ShowBytes


def settle(
    config: RunConfig, begun: Begun | None = None, progress: ShowBytes | None = None
) -> tuple[DataIdentity, list[str]]:
    """The data that a run is trained on and validated on, prepared and whole, and what the user
    should be told about it.

    Args:
        config: the configuration of the run.
        begun: what is continued; None for a fresh start.
        progress: told how far a preparation is (default: it is shown on standard error).

    Raises:
        ConfigError: the data is not there, does not fit the model, or is not what ``begun`` was
            trained on.
    """
    if begun is None:
        check_sets(config)
    known = None if begun is None else begun.data
    if begun is not None and known is not None and known.parts and not config.data.mix:
        raise ConfigError(
            f"data.corpus: got {config.data.corpus}, and {begun.what} was trained on a "
            f"{known.corpus}; accepted: that, or {begun.another}"
        )
    found, notes = (settle_mix if config.data.mix else settle_corpus)(config, begun, progress)
    found = replace(found, further=())
    if config.data.validation:
        sets, said = settle_sets(config, found, begun, progress)
        found, notes = replace(found, further=tuple(sets.items())), [*notes, *said]
    return found, notes


def check_keys(config: RunConfig) -> None:
    """Check that the model can have what ``data`` asks for.

    Raises:
        ConfigError: attention within documents is asked for with multi-token prediction.
    """
    shape = model_shape(config)
    predicts = isinstance(shape, TransformerShape) and shape.mtp_layers
    if config.data.attention is not None and predicts:
        raise ConfigError(
            f"data.attention: got {config.data.attention!r} with model.mtp_layers {predicts}; "
            "accepted: null, or model.mtp_layers: 0 (multi-token prediction looks past the end of "
            "a document)"
        )
