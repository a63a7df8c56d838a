"""The store of a job of which this process is the only rank that exists."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

_ANSWER = b"x" * 128
"""What a peer would have written: as long as a communicator's id, which is looked at no further."""


class AbsentPeers(Store):  # type: ignore[misc]
    """Answers as if all other ranks had come and done their part.

    Nobody waits: each key that is asked for has a value, each counter is as far as the caller has
    brought it, and no error was posted. Use with ``environment(..., alone=True)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Any] = {}

    def set(self, key: str, value: Any) -> None:
        self._values[key] = value

    def get(self, key: str) -> bytes:
        value = self._values.get(key, _ANSWER)
        return value if isinstance(value, bytes) else str(value).encode()

    def add(self, key: str, amount: int) -> int:
        self._values[key] = int(self._values.get(key, 0)) + amount
        return int(self._values[key])

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        pass

    def check(self, keys: list[str]) -> bool:
        return False

    def compare_set(self, key: str, expected: Any, desired: Any) -> bytes:
        return desired.encode() if isinstance(desired, str) else bytes(desired)

    def clone(self) -> AbsentPeers:
        return self

    def set_timeout(self, timeout: timedelta) -> None:
        pass

    def num_keys(self) -> int:
        return len(self._values)

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def append(self, key: str, value: Any) -> None:
        pass

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def multi_set(self, keys: list[str], values: list[Any]) -> None:
        self._values.update(zip(keys, values, strict=True))

    def has_extended_api(self) -> bool:
        return False

    # C++ calls some of them by its own names.
    compareSet, setTimeout, deleteKey = compare_set, set_timeout, delete_key
    getNumKeys, multiGet, multiSet = num_keys, multi_get, multi_set
    hasExtendedApi = has_extended_api
