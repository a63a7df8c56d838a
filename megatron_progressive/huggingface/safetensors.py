"""Writing safetensors while holding one tensor.

The library's own writer takes all tensors of a file at once. The format is the length of a JSON
header (8 bytes, little-endian), the header, padded with spaces to a multiple of 8, and the tensors'
bytes: https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megatron_progressive.reshard.metadata import DTYPE_BYTES
from megatron_progressive.runtime.files import write_json

if TYPE_CHECKING:  # bad input is refused without loading torch
    import torch

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 5_000_000_000
"""The most bytes of a file, unless one tensor is larger."""

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Its type: ``float32`` or ``bfloat16``."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def shards(tensors: Sequence[Header], most: int) -> Iterator[list[Header]]:
    """Cut a list of tensors into files of at most ``most`` bytes, in order."""
    current: list[Header] = []
    size = 0
    for tensor in tensors:
        if current and size + tensor.nbytes > most:
            yield current
            current, size = [], 0
        current.append(tensor)
        size += tensor.nbytes
    yield current


class SafetensorsWriter:
    """A writer of the tensors of a model, which are announced beforehand and written in their
    order.

    It is a context manager in which each tensor is passed to :meth:`write`; at the end the index is
    written where there is more than one file.

    Args:
        tensors: the headers of all tensors. Elements of 4 bytes come before those of 2, so that
            every tensor is aligned.
        most: the most bytes of a file.
    """

    def __init__(self, folder: Path, tensors: Sequence[Header], most: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._files = list(shards(tensors, most))
        self._due = [tensor for file in self._files for tensor in file]
        self._number = 0
        self._written = 0
        self._file = self._open()

    def _name(self, number: int) -> str:
        count = len(self._files)
        return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _open(self) -> BinaryIO:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in self._files[self._number]:
            start, end = end, end + tensor.nbytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = open(self._folder / self._name(self._number), "wb")  # noqa: SIM115 (closed below)
        file.write(struct.pack("<Q", len(text)) + text)
        self._left = len(self._files[self._number])
        return file

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor.

        Raises:
            ValueError: the tensor is not the one that was announced.
        """
        import torch

        expected = self._due[self._written]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if (tuple(tensor.shape), dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"{expected} cannot be {dtype} {tuple(tensor.shape)}")
        if not self._left:
            self._close()
            self._number += 1
            self._file = self._open()
        if tensor.numel():
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            self._file.write(memoryview(flat.numpy()))
        self._written += 1
        self._left -= 1

    def _close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._close()
        if kind is not None:
            return
        if self._written != len(self._due):
            raise ValueError(f"{len(self._due) - self._written} announced tensors are missing")
        if len(self._files) > 1:
            total = sum(tensor.nbytes for tensor in self._due)
            weight_map = {
                tensor.name: self._name(number)
                for number, file in enumerate(self._files)
                for tensor in file
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(self._folder / INDEX_FILE, index)
