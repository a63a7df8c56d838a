"""Parts of the section ``data``: what a mixture and a further validation set consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from megatron_progressive.config.model_schema import MISSING


@dataclass(frozen=True)
class MixPart:
    """A part of a mixture. Draws are blended as Megatron blends data sets: which part a draw is
    from depends on its number and the weights alone, and after any number of draws each part has
    its share of them to within one sample."""

    corpus: str = MISSING
    """The corpus of this part, as ``data.corpus`` names one; it is prepared once, for all runs and
    mixtures with the same tokenizer."""
    weight: float = MISSING
    """Its share of the samples, over the sum of all weights; shares count to 0.00001."""
    epochs_at_most: Optional[float] = None
    """How often its training text may be seen (default: without end). Once a part is used up, the
    others go on with their weights among themselves."""
    text_field: Optional[str] = None
    """Its field or column with the text (default: ``data.text_field``)."""
    max_bytes: Optional[int] = None
    """Number of bytes of its text to read (default: ``data.max_bytes``)."""
    prepared: Optional[str] = None
    """Folder of this part that ``mprog data prepare`` made (default: one under ``run.dir``)."""


@dataclass(frozen=True)
class ValidationSet:
    """A validation set beside the held-out text, by its name. ``NAME: PATH`` is short for
    ``NAME: {corpus: PATH}``. All of it is read (``train.eval_tokens`` at most), with the run's
    tokenizer; text that is trained on is refused."""

    corpus: str = MISSING
    """The corpus, as ``data.corpus`` names one."""
    split: str = "all"
    """Which of its documents count: ``all``, or ``validation``, those that would be held out of a
    run on this corpus."""
    text_field: Optional[str] = None
    """Its field or column with the text (default: ``data.text_field``)."""
    max_bytes: Optional[int] = None
    """Number of bytes of its text to read (default: all)."""
    prepared: Optional[str] = None
    """Folder of this corpus that ``mprog data prepare`` made (default: one under ``run.dir``)."""
