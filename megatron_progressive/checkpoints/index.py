"""Which tensors a checkpoint holds, from its index alone; needs no torch.

The index is a pickle of torch's own classes. Plain stand-ins take the place of these classes, so
that reading is fast and runs no code that a file names.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_progressive.config import ConfigError
from megatron_progressive.reshard.metadata import DTYPE_BYTES

INDEX_FILE = ".metadata"


@dataclass(frozen=True)
class StoredTensor:
    """One slot of one global tensor."""

    shape: tuple[int, ...]
    dtype: str
    """The name of its type: ``float32``, ``bfloat16``, ..."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BYTES[self.dtype]


Slots = dict[str, StoredTensor]


class _StandIn:
    """An object in place of any class, which keeps its state and does nothing."""

    state: Any = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            return tuple if name == "Size" else name  # the other globals are types of elements
        return _StandIn


def stored_tensors(checkpoint: Path) -> dict[str, Slots]:
    """The global tensors of a checkpoint and their slots, by name and in the order of saving.

    Raises:
        ConfigError: the index cannot be read.
    """
    tensors: dict[str, Slots] = {}
    try:
        with open(checkpoint / INDEX_FILE, "rb") as file:
            entries = _Index(file).load().state["state_dict_metadata"]
        for key, entry in entries.items():
            if not entry.state:
                continue  # Megatron-core's own entry, which is no tensor
            name, slot = key.rsplit("/", 1)
            dtype = entry.state["properties"].state[0]
            tensors.setdefault(name, {})[slot] = StoredTensor(tuple(entry.state["size"]), dtype)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError):  # fmt: skip
        raise ConfigError(
            f"checkpoint: {checkpoint / INDEX_FILE} is not readable; accepted: a checkpoint that "
            "mprog saved"
        ) from None
    return tensors
