"""The units of a corpus: runs of its documents, in order, that are prepared independently.

They are a function of the corpus alone, never of how many processes prepare it, so that what is
prepared does not depend on that number either. A corpus of up to :data:`WHOLE_BYTES` is one unit. A
larger one is cut between files, and a large file with a record on each line between lines; a
data set of the hub is cut between its data files.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from megatron_progressive.data.corpus import Corpus, Unit
from megatron_progressive.data.decoding import NotText, open_stream
from megatron_progressive.data.hub import data_files
from megatron_progressive.data.records import JSON_LINES, begins_with_line

WHOLE_BYTES = 256 << 20
"""Up to how many bytes a corpus is a single unit."""

UNIT_BYTES = 64 << 20
"""About how many bytes a unit of a larger corpus has, as they lie on disk."""

UNITS = 1024
"""About how many units there are at most: units of terabytes are larger."""


def plan_units(corpus: Corpus, hub_files: int = 1) -> list[Unit]:
    """The units of a corpus.

    Args:
        corpus: the corpus.
        hub_files: the number of data files of a corpus of the hub, from
            :func:`number_of_data_files`.

    Raises:
        ConfigError: a file or folder may not be read.
    """
    most = corpus.data.max_bytes
    if corpus.is_hub:
        if hub_files == 1 or 0 < most <= WHOLE_BYTES:
            return [corpus.whole()]
        return [Unit(number, None, data_file=number) for number in range(hub_files)]
    files = corpus.files()
    sizes = [path.stat().st_size for path in files]
    whole = sum(sizes)
    if min(whole, most or whole) <= WHOLE_BYTES:
        return [corpus.whole()]
    target = max(UNIT_BYTES, -(-whole // UNITS))
    cut = len(files) == 1
    units: list[Unit] = []
    waiting: list[Path] = []
    waiting_size = 0

    def flush() -> None:
        nonlocal waiting_size
        if waiting:
            units.append(Unit(len(units), waiting_size, tuple(waiting), cut))
        waiting.clear()
        waiting_size = 0

    for path, size in zip(files, sizes, strict=True):
        if size >= 2 * target and _has_lines(path):
            flush()
            count = round(size / target)
            ends = [size * number // count for number in range(count + 1)]
            for begin, end in itertools.pairwise(ends):
                units.append(Unit(len(units), end - begin, (path,), cut, begin, end))
            continue
        waiting.append(path)
        waiting_size += size
        if waiting_size >= target:
            flush()
    flush()
    return units


def number_of_data_files(corpus: Corpus) -> int:
    """The number of data files of a corpus of the hub that are units; 1 for other corpora.

    Raises:
        ConfigError: the data set cannot be reached.
    """
    if not corpus.is_hub or 0 < corpus.data.max_bytes <= WHOLE_BYTES:
        return 1
    return data_files(corpus.data, corpus.revision)


def _has_lines(path: Path) -> bool:
    """Whether a file has a JSON object on each line, as far as its name and its head tell, and can
    be read from the middle."""
    if path.suffix.lower() not in JSON_LINES:
        return False
    try:
        with open_stream(path) as stream:
            if not stream.is_plain:
                return False
            stream.check_text()
            return begins_with_line(stream)
    except NotText:
        return False
