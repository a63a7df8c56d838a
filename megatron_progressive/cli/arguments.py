"""What commands have in common: the parser, numbers, and places that are checked."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_progressive.config import ConfigError, RunConfig, load
from megatron_progressive.config.places import check_paths, check_writable, place
from megatron_progressive.config.values import shown


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

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


def least_zero(text: str) -> int:
    """An integer from 0."""
    return 0 if text == "0" else count(text)


def limit(text: str) -> float:
    """A number of things, or a fraction of them below 1."""
    value = positive(text)
    if value > 1 and value != int(value):
        raise argparse.ArgumentTypeError(
            f"got {shown(text)}; accepted: a count, or a share below 1"
        )
    return value


def batch(text: str) -> str:
    """An integer from 1, or ``auto``."""
    return text if text == "auto" else str(count(text))


Call = Callable[[argparse.Namespace, list[str]], int]
"""A command: it gets its parsed arguments and all of them as they were given, and returns the exit
code."""

type Commands = argparse._SubParsersAction[argparse.ArgumentParser]
"""The parser to which a group adds its commands."""


def command(commands: Commands, name: str, call: Call, text: str) -> argparse.ArgumentParser:
    """Add a command, which ``call`` carries out."""
    sub = commands.add_parser(name, help=text, description=text)
    sub.set_defaults(call=call)
    assert isinstance(sub, argparse.ArgumentParser)
    return sub


def takes_config(sub: argparse.ArgumentParser) -> None:
    """Add a configuration and words that replace fields of it."""
    sub.add_argument("config", metavar="CONFIG", help="a YAML file")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="replace fields of the file")


def config_of(args: argparse.Namespace) -> RunConfig:
    """The configuration of a command, with the model of ``run.init_from`` where it names one.

    Raises:
        ConfigError: the configuration cannot be read, or a value in it is not accepted.
    """
    from megatron_progressive.checkpoints.init_from import with_initial_model
    from megatron_progressive.runs.extension import resolved

    config = load(place("CONFIG", args.config), args.overrides)
    check_paths(config)
    return resolved(with_initial_model(config))


def checkpoint_of(args: argparse.Namespace) -> Path:
    """The checkpoint of a command; for a run folder its newest one."""
    from megatron_progressive.checkpoints.checkpoint import newest_checkpoint

    return newest_checkpoint(place("CHECKPOINT", args.checkpoint))


def out_of(args: argparse.Namespace) -> Path:
    """The folder that ``--out`` names, which is made where it is not there."""
    out = place("--out", args.out)
    check_writable("--out", out)
    return out
