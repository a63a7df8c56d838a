"""Permissions that hold in tests, where root runs them, too."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

_VERSION_3 = 0x20080522
_DAC_OVERRIDE, _DAC_READ_SEARCH = 1, 2  # capabilities(7)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without the right to read and write everything, on this thread; skips where root cannot lay
    it down."""
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("root may read and write everything here")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; of 64 bits in two halves
    if libc.capget(header, before) != 0:
        pytest.skip("capabilities cannot be read")
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH)
    if libc.capset(header, fewer) != 0:
        pytest.skip("capabilities cannot be laid down")
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
