"""The whole command line: its groups of commands, how errors end a command, and its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_progressive import __version__
from megatron_progressive.cli import checkpoints, machine, studies, training
from megatron_progressive.cli.arguments import Parser
from megatron_progressive.config import ConfigError
from megatron_progressive.config.places import PLACE_ERRORS
from megatron_progressive.runtime.files import WriteFailed
from megatron_progressive.runtime.signals import INTERRUPTED
from megatron_progressive.runtime.terminal import write_plainly

GROUPS = (
    ("Train a model", training),
    ("Find out whether growing pays", studies),
    ("Work on checkpoints", checkpoints),
    ("Look at this machine", machine),
)
"""What a person is about to do, and the commands for it."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help without argparse's own list of commands, since the description has the groups."""

    def add_argument(self, action: argparse.Action) -> None:
        if not isinstance(action, argparse._SubParsersAction):
            super().add_argument(action)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mprog", formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"mprog {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    lines = ["Train deep language models by growing them, and learn whether that paid."]
    for title, group in GROUPS:
        before = len(commands._choices_actions)
        group.add(commands)
        added = [(a.dest, a.help or "") for a in commands._choices_actions[before:]]
        lines += ["", f"{title}:", *(f"  {name:<12} {text}" for name, text in added)]
    lines += ["", "`mprog COMMAND --help` says more."]
    parser.description = "\n".join(lines)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (0, 1, 2 or 75; 130 after Ctrl-C)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    write_plainly()
    try:
        args = _parsed(words)
        code = int(args.call(args, words))
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"mprog: {error}", file=sys.stderr)
        return 2
    except WriteFailed as error:
        print(f"mprog: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mprog: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, say) has seen enough: nothing to report
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except OSError as error:  # what no check has seen coming
        if error.filename is None:
            raise
        print(f"mprog: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2 if error.errno in PLACE_ERRORS else 1


def _parsed(words: list[str]) -> argparse.Namespace:
    # argparse cannot put an option among a sub-command's open-ended words: options go first
    parser = _parser()
    args, rest = parser.parse_known_args(_options_first(words))
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value words after an option
        args.overrides += rest
    return args


_FLAGS = ("--search",)
_OPTIONS = (
    "--nproc", "--gpus", "--link-gb-per-s", "--gpu", "--gpu-memory-gib", "--peak-tflops", "--mfu",
    "--widths", "--depths", "--steps", "--slope", "--out",
)  # fmt: skip


def _options_first(words: list[str]) -> list[str]:
    if words[:1] not in (["train"], ["plan"], ["pilot"], ["coordcheck"]):
        return words
    options, rest, at = [], words[1:], 0
    while at < len(rest):
        if rest[at] in _OPTIONS:
            options += rest[at : at + 2]
            del rest[at : at + 2]
        elif rest[at] in _FLAGS:
            options.append(rest.pop(at))
        else:
            at += 1
    return [words[0], *options, *rest]
