"""``mprog``: parse, call, print. One file has one group of commands, and no logic."""

from megatron_progressive.cli.command_line import main

__all__ = ["main"]
