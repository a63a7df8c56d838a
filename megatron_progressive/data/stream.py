"""The tokens of one split as one stream, wherever its files lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a stream, which lie side by side in one file."""

    file: Path
    """The ``.bin`` file."""
    first: int
    """The number of its tokens before them."""
    tokens: int


class TokenStream:
    """The tokens of files, or of pieces of files, one after the other.

    Files are mapped into memory when they are first read. A window within one piece, as almost all
    are, costs one copy, whatever the number of files.
    """

    def __init__(self, pieces: Sequence[Piece], dtype: str) -> None:
        """Name the pieces in their order, of files whose tokens are of NumPy's type ``dtype``."""
        self._dtype = np.dtype(dtype)
        self._files = list(dict.fromkeys(piece.file for piece in pieces))
        numbers = {file: number for number, file in enumerate(self._files)}
        self._file = np.array([numbers[piece.file] for piece in pieces], dtype=np.int64)
        self._first = np.array([piece.first for piece in pieces], dtype=np.int64)
        lengths = np.array([piece.tokens for piece in pieces], dtype=np.int64)
        self._ends = np.cumsum(lengths)
        self._begins = self._ends - lengths
        self._mapped: dict[int, NDArray[np.integer]] = {}

    def __len__(self) -> int:
        """The number of tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
        """The ``length`` tokens from each of ``starts`` [n] on, as int64 [n, length].

        Raises:
            IndexError: a window is not within the stream.
        """
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"tokens {starts.min()} to {starts.max() + length} of {len(self)}")
        windows = np.empty((len(starts), length), dtype=np.int64)
        pieces = np.searchsorted(self._ends, starts, side="right")
        for window, start, piece in zip(windows, starts.tolist(), pieces.tolist(), strict=True):
            done = 0
            while done < length:
                place = start + done - int(self._begins[piece])
                count = min(length - done, int(self._ends[piece]) - start - done)
                first = int(self._first[piece]) + place
                window[done : done + count] = self._tokens(piece)[first : first + count]
                done, piece = done + count, piece + 1
        return windows

    def _tokens(self, piece: int) -> NDArray[np.integer]:
        """The tokens of the file of a piece."""
        number = int(self._file[piece])
        if number not in self._mapped:
            import torch

            file = self._files[number]
            # unlike NumPy's, this map does not keep the file open, and there may be thousands
            mapped = torch.from_file(
                str(file),
                shared=False,
                size=file.stat().st_size // self._dtype.itemsize,
                dtype=getattr(torch, self._dtype.name),
            )
            self._mapped[number] = mapped.numpy()
        return self._mapped[number]
