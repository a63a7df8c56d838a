"""``mprog``: parse, call, print; one file a group of commands, and no logic."""

from megatron_progressive.cli.command_line import main

__all__ = ["main"]
