"""Which documents are held out for validation: a function of their content alone."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator

_LOWER = bytes(range(256)).lower()
_SPACE = b" \t\n\r\v\f\x1c\x1d\x1e\x1f"  # what str.split takes for white space in ASCII
_UNSEEN = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")


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
    """A uniform hash of 64 bits of what a document shares with its near copies."""
    digest = hashlib.blake2b(normalised(text), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def split_documents(texts: Iterable[str], fraction: float) -> Iterator[tuple[str, bool]]:
    """Pairs of a document and whether it is held out for validation.

    A document is held out when its hash is in the lowest ``fraction``, so that copies
    (:func:`normalised`) are on one side, wherever they stand. Where no hash is that low, as in
    small corpora, the document with the lowest hash is held out; it comes last. To know that
    document in one pass, the lowest one so far waits, which is the only change of order.
    """
    threshold = int(fraction * 2**64)
    lowest: int | None = None
    waiting: list[str] = []  # the document with the lowest hash so far, and its copies
    found = False
    for text in texts:
        number = content_hash(text)
        if number < threshold:
            found = True
            yield text, True
        elif found:
            yield text, False
        elif number == lowest:
            waiting.append(text)
        elif lowest is None or number < lowest:
            yield from ((early, False) for early in waiting)
            waiting, lowest = [text], number
        else:
            yield text, False
        if found and waiting:
            yield from ((early, False) for early in waiting)
            waiting = []
    yield from ((text, not found) for text in waiting)
