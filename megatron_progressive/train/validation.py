"""Validating a run: each of its sets, to the loss and to bits per byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_progressive.config import RunConfig
from megatron_progressive.data import (
    HELD_OUT,
    Data,
    HeldOut,
    bits_per_byte,
    validation_sets,
    wanted_samples,
)
from megatron_progressive.engines.base import Engine, GlobalBatch, in_batches


@dataclass(frozen=True)
class Measured:
    """What a validation found on one set."""

    loss: float
    """Mean cross-entropy in nats per token or image."""
    bits_per_byte: float | None
    """The same in bits per byte of text (:mod:`.data.validation`); None for images, and for
    tokenizers whose tokens do not tell their bytes."""

    def to_values(self) -> dict[str, float]:
        """The numbers as an event of ``metrics.jsonl`` has them."""
        values = {"loss": self.loss, "bits_per_byte": self.bits_per_byte}
        return {name: value for name, value in values.items() if value is not None}


class Validation:
    """The validation sets of a run, of each of which the same samples are read every time."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        """Args:
        config: the run, in which all data is settled.
        data: its open data.
        """
        self._config, self._sets = config, validation_sets(config, data)
        wanted = wanted_samples(config)
        self._samples = {
            name: wanted if one.samples is None else min(wanted, one.samples)
            for name, one in self._sets.items()
        }
        self._bytes = {n: one.text_bytes(self._samples[n]) for n, one in self._sets.items()}

    def probe(self) -> GlobalBatch:
        """Held-out samples for the checks at an expansion, one batch at most."""
        count = min(self._config.train.global_batch, self._samples[HELD_OUT])
        return GlobalBatch(self._sets[HELD_OUT].read, 0, count)

    def warnings(self) -> list[str]:
        """What the user should know: which sets have fewer samples than asked for."""
        return [w for name, one in self._sets.items() for w in self._short(name, one)]

    def _short(self, name: str, one: HeldOut) -> list[str]:
        config, wanted, there = self._config, wanted_samples(self._config), self._samples[name]
        if there == wanted:
            return []
        asked = f"train.eval_samples is {wanted:,}"
        if config.train.eval_tokens is not None:
            asked = f"train.eval_tokens is {config.train.eval_tokens:,} ({wanted:,} samples)"
        what = f"data.validation.{name}"
        if name == HELD_OUT:
            what = f"the validation split of {config.data.corpus}"
            what = "the held-out text in the proportions of data.mix" if config.data.mix else what
        return [f"{asked}, but {what} has {there:,}: validations read each of these once"]

    def measure(self, engine: Engine) -> dict[str, Measured]:
        """The loss of each set, by its name. Collective over all ranks."""
        size, found = self._config.train.global_batch, {}
        for name, one in self._sets.items():
            samples, text_bytes = self._samples[name], self._bytes[name]
            loss = engine.evaluate(in_batches(one.read, samples, size))
            tokens = samples * engine.shape.sample_units
            bits = bits_per_byte(loss, tokens, text_bytes) if text_bytes else None
            found[name] = Measured(loss, bits)
        return found


def as_event(found: Mapping[str, Measured]) -> dict[str, Any]:
    """What a validation found as an ``eval`` event has it: the held-out text beside the step, the
    further sets by their names."""
    further = {n: one.to_values() for n, one in found.items() if n != HELD_OUT}
    return found[HELD_OUT].to_values() | ({"sets": further} if further else {})


def as_summary(event: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the last validation, an ``eval`` event, as ``summary.json`` has them."""
    values = {
        "final_eval_loss": event.get("loss"),
        "final_bits_per_byte": event.get("bits_per_byte"),
    }
    if "sets" in event:
        values["final_sets"] = event["sets"]
    return {n: v for n, v in values.items() if v is not None or n == "final_eval_loss"}
