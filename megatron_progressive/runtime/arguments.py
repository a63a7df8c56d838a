"""The command line's parser, and numbers on it."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from megatron_progressive.config import ConfigError
from megatron_progressive.config.values import shown


class Parser(argparse.ArgumentParser):
    """Whose errors are one line, as all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} ({self.prog} --help says more)")


def count(text: str) -> int:
    """An integer from 1."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {shown(text)}; accepted: an integer from 1")
    return int(text)


def positive(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {shown(text)}; accepted: a number above 0")
    return value
