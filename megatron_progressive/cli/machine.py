"""``mprog env``: this machine."""

from __future__ import annotations

import argparse

from megatron_progressive.cli.arguments import Commands, command


def _env(args: argparse.Namespace, arguments: list[str]) -> int:
    from megatron_progressive.runtime.environment import environment, render

    print(render(environment()))
    return 0


def add(commands: Commands) -> None:
    """Add the commands for the machine."""
    command(commands, "env", _env, "show versions, devices, and what the fast path lacks")
