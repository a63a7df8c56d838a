"""The parts of a mixture and the further validation sets, each as a run on a single corpus: that is
how they are checked, prepared and kept."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_progressive.config import ConfigError, DataSection, MixPart, RunConfig, ValidationSet
from megatron_progressive.data.identity import DataIdentity
from megatron_progressive.data.manifest import prepared_folder, read_manifest
from megatron_progressive.data.mixture import Blend, whole_weights
from megatron_progressive.data.shared_tokenizer import shared_tokenizer
from megatron_progressive.models import transformer_shape
from megatron_progressive.runtime.text import short_counts

MANY_EPOCHS = 4.0
"""From how many epochs on repeated text is worth clearly less than new text (Muennighoff et al.
2023, "Scaling data-constrained language models", arXiv 2305.16264)."""


def _single(data: DataSection, one: MixPart | ValidationSet, max_bytes: int) -> DataSection:
    return replace(
        data,
        corpus=one.corpus,
        text_field=data.text_field if one.text_field is None else one.text_field,
        max_bytes=max_bytes if one.max_bytes is None else one.max_bytes,
        prepared=one.prepared,
        mix=None,
        validation=None,
    )


def part_configs(config: RunConfig, tokenizer: str | None = None) -> list[RunConfig]:
    """The configuration of each part of a mixture, as of a run on that part alone.

    Args:
        tokenizer: the ``data.tokenizer`` of the parts (default: the run's).
    """
    data = config.data if tokenizer is None else replace(config.data, tokenizer=tokenizer)
    return [
        replace(config, data=_single(data, part, data.max_bytes)) for part in config.data.mix or ()
    ]


def set_configs(config: RunConfig, tokenizer: str | None = None) -> dict[str, RunConfig]:
    """The configuration of each further validation set, by its name, as of a run on it alone."""
    data = config.data if tokenizer is None else replace(config.data, tokenizer=tokenizer)
    return {
        name: replace(config, data=_single(data, one, 0))
        for name, one in (config.data.validation or {}).items()
    }


def training_configs(config: RunConfig) -> list[RunConfig]:
    """The configurations of what is trained on: of the parts of a mixture, or of the corpus."""
    if config.data.mix:
        return part_configs(config)
    return [replace(config, data=replace(config.data, validation=None))]


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Give the errors of a part, or of a validation set, the name of its ``field``, as
    ``data.mix[0]``."""
    try:
        yield
    except ConfigError as error:
        line = re.sub(
            r"^data\.(corpus|prepared|text_field|max_bytes)\b", rf"{field}.\1", str(error)
        )
        word = re.sub(r"\[(\d+)\]", r".\1", field)
        raise ConfigError(line.replace("data.prepared=", f"{word}.prepared=")) from None


@dataclass(frozen=True)
class PartDraws:
    """What a run draws of one part of a mixture."""

    corpus: str
    share: float
    """Its weight over the sum of all weights."""
    tokens: int
    """The number of tokens drawn."""
    epochs: float | None
    """How often its training text is seen; None where its size is not known."""
    used_up_at: int | None
    """The number of the first sample without it; None where it is not used up."""

    def words(self) -> str:
        """The part in words."""
        epochs = "" if self.epochs is None else f", {self.epochs:.2f} epochs"
        tokens = short_counts([self.tokens])[0]
        return f"{self.corpus} {100 * self.share:.3g} %: {tokens} tokens{epochs}"


def samples_in(tokens: int, sequence_length: int) -> int:
    """The number of samples in a split (:class:`.samples.Samples`)."""
    return max(0, (tokens - 1) // sequence_length)


def at_most(mix: Sequence[MixPart], sizes: Sequence[int | None]) -> list[int | None]:
    """How many draws of each part ``epochs_at_most`` allows; None for any number, or where the
    size is not known."""
    return [
        None if part.epochs_at_most is None or size is None else int(part.epochs_at_most * size)
        for part, size in zip(mix, sizes, strict=True)
    ]


def part_draws(config: RunConfig, tokens: Sequence[int | None], samples: int) -> list[PartDraws]:
    """What the first ``samples`` draws of a mixture take of each part.

    Args:
        tokens: the number of tokens of each part's training split; None where it is not known.
        samples: the number of samples; those past the end of the mixture do not count.
    """
    mix, length = config.data.mix or [], transformer_shape(config).sequence_length
    sizes = [None if one is None else samples_in(one, length) for one in tokens]
    blend = Blend([part.weight for part in mix], at_most(mix, sizes))
    drawn = blend.drawn(samples if blend.total is None else min(samples, blend.total))
    weights = whole_weights([part.weight for part in mix])
    return [
        PartDraws(
            corpus=part.corpus,
            share=weights[k] / sum(weights),
            tokens=drawn[k] * length,
            epochs=None if not (size := sizes[k]) else drawn[k] / size,
            used_up_at=_before(samples, blend.used_up.get(k)),
        )
        for k, part in enumerate(mix)
    ]


def _before(samples: int, draw: int | None) -> int | None:
    return draw if draw is not None and draw < samples else None


def check_enough(config: RunConfig, tokens: Sequence[int | None]) -> None:
    """Check that the parts of a mixture have as many samples as the run draws.

    Raises:
        ConfigError: ``epochs_at_most`` leaves fewer.
    """
    mix, length = config.data.mix or [], transformer_shape(config).sequence_length
    sizes = [None if one is None else samples_in(one, length) for one in tokens]
    total = Blend([part.weight for part in mix], at_most(mix, sizes)).total
    wanted = config.last_step * config.train.global_batch
    if total is not None and total < wanted:
        raise ConfigError(
            f"data.mix: got parts whose epochs_at_most leave {total:,} samples; accepted: at least "
            f"the {wanted:,} of {config.last_step:,} steps (more text, a part without a limit, or "
            f"{total // config.train.global_batch:,} steps)"
        )


def mix_warnings(config: RunConfig, tokens: Sequence[int | None]) -> list[str]:
    """What the user should know of the parts of a run's mixture: which are used up, and which are
    seen more than :data:`MANY_EPOCHS` times."""
    size = config.train.global_batch
    found = []
    for number, part in enumerate(part_draws(config, tokens, config.last_step * size)):
        field = f"data.mix[{number}]"
        if part.used_up_at is not None:
            found.append(
                f"{field}: {part.corpus} is used up (epochs_at_most) in step "
                f"{part.used_up_at // size + 1:,}: from then on the other parts are drawn with "
                "their weights among themselves"
            )
        if part.epochs is not None and part.epochs > MANY_EPOCHS:
            found.append(
                f"{field}: {part.corpus} is seen {part.epochs:.1f} times: past "
                f"{MANY_EPOCHS:g} epochs repeated text adds little (arXiv 2305.16264)"
            )
    return found


def known_tokens(config: RunConfig) -> list[int | None]:
    """The number of tokens in each part's training split, None where the part is not prepared.
    Nothing is prepared."""
    found: list[int | None] = []
    for part in part_configs(config, shared_tokenizer(config)):
        try:
            found.append(read_manifest(prepared_folder(part)).splits["train"].tokens)
        except ConfigError:
            found.append(None)
    return found


def tokens_of(trained_on: DataIdentity) -> list[int | None]:
    """The number of tokens in the training split of each part of a mixture."""
    return [part.tokens for part in trained_on.parts]
