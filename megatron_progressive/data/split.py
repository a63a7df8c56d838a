"""Which documents are held out for validation: a function of their content alone."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

_LOWER = bytes(range(256)).lower()
_SPACE = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # what str.split takes for white space in ASCII
_UNSEEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")

SHINGLE_BYTES = 16
"""The length of the pieces of text by which near copies are told."""

Hash = Callable[[str], int]
"""A hash of 64 bits of a document, whose value decides on which side it stands."""


def normalised(text: str) -> bytes:
    """What all copies of a document share: its text in lower case and without white space.

    Copies of a page differ in line ends, indentation, a newline at the end, non-breaking or
    zero-width spaces, composed or decomposed accents, and letter case. None of that may put one
    copy into training and another into validation. The result decides the split and is not trained
    on, so nothing is lost where different documents share it.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.casefold())
        text = _UNSEEN.sub("", "".join(text.split()))
    return text.encode().translate(_LOWER, _SPACE)


def content_hash(text: str) -> int:
    """A uniform hash of 64 bits of what a document shares with its copies."""
    return _uniform(normalised(text))


def near_hash(text: str) -> int:
    """A hash of 64 bits that a document shares with its near copies: the MinHash (Broder 1997, "On
    the resemblance and containment of documents") of all its pieces of :data:`SHINGLE_BYTES` bytes
    of normalised text, made uniform.

    Two documents that share a part J of the pieces that either has (their Jaccard similarity) have
    the same hash with probability J, which is the most that a function of one document can reach.
    Where one word in a page of text was changed, J is about 0.99.
    """
    import numpy as np

    content = normalised(text)
    if len(content) <= SHINGLE_BYTES:
        return _uniform(content)
    # a polynomial in the bytes of each piece, by doubling, modulo 2^64
    values = np.frombuffer(content, np.uint8).astype(np.uint64)
    base, width = 0x9E3779B97F4A7C15, 1
    while width < SHINGLE_BYTES:
        values = values[:-width] * np.uint64(base) + values[width:]
        base, width = base * base % 2**64, 2 * width
    # the finaliser of SplitMix64 (Steele, Lea and Flood 2014; constants of Stafford's mix 13)
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return _uniform(int(values.min()).to_bytes(8, "big"))


def _uniform(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


class Splitter:
    """The split of documents that come one after the other.

    A document is held out when its hash is in the lowest ``fraction``, so that copies
    (:func:`normalised`) are on one side, wherever they stand. Where no hash is that low, as in
    small corpora, the document with the lowest hash is held out; it comes last. To know that
    document in one pass, the lowest one so far waits until a hash is low enough, which is the only
    change of order.
    """

    def __init__(
        self,
        fraction: float,
        near: bool = False,
        begun: bool = False,
        alone: bool = True,
        only: int | None = None,
    ) -> None:
        """Begin a split.

        Args:
            fraction: the share of the documents that is held out.
            near: whether near copies are on one side, too (:func:`near_hash`).
            begun: whether documents came before, so that none has to wait.
            alone: whether no other documents come after these, of which one may be held out.
            only: the one hash whose documents are held out, in place of ``fraction``.
        """
        self._threshold = int(fraction * 2**64)
        self._hash: Hash = near_hash if near else content_hash
        self._found, self._alone, self._only = begun or only is not None, alone, only
        self.waiting: list[tuple[str, int]] = []
        """The document with the lowest hash so far and its copies, where they wait."""
        self.lowest: int | None = None
        """The lowest hash so far."""

    def split(self, documents: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, bool]]:
        """Triples of a document, its size, which is passed on, and whether it is held out."""
        for text, size in documents:
            number = self._hash(text)
            lower = self.lowest is None or number < self.lowest
            equal = number == self.lowest
            if lower:
                self.lowest = number
            if self._only is not None:
                yield text, size, number == self._only
            elif number < self._threshold:
                self._found = True
                yield text, size, True
                for early, early_size in self.waiting:
                    yield early, early_size, False
                self.waiting = []
            elif self._found:
                yield text, size, False
            elif equal:
                self.waiting.append((text, size))
            elif lower:
                early_ones, self.waiting = self.waiting, [(text, size)]
                for early, early_size in early_ones:
                    yield early, early_size, False
            else:
                yield text, size, False
        for text, size in self.waiting:
            yield text, size, self._alone and not self._found
        self.waiting = []


def split_documents(
    texts: Iterable[str], fraction: float, near: bool = False
) -> Iterator[tuple[str, bool]]:
    """Pairs of a document and whether it is held out for validation (see :class:`Splitter`)."""
    for text, _, held_out in Splitter(fraction, near).split((text, 0) for text in texts):
        yield text, held_out
