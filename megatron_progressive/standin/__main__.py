"""``python -m megatron_progressive.standin --mode MODE -- COMMAND…``: a command on the stand-in."""

from __future__ import annotations

import argparse
import os
import sys

from megatron_progressive.standin import MODES, available, environment


def main() -> int:
    """Replaces this process by the command; 2 where the stand-in cannot be had."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_progressive.standin", description=__doc__
    )
    parser.add_argument("--mode", choices=MODES, default="computing")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--gib", type=float, default=79, help="memory of a device")
    parser.add_argument("--alone", action="store_true", help="one rank of many, without peers")
    parser.add_argument("--report", help="counts go to REPORT.<pid>.json")
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    if reason := available():
        print(reason, file=sys.stderr)
        return 2
    variables = environment(
        arguments.mode,
        arguments.devices,
        arguments.gib,
        alone=arguments.alone,
        report=arguments.report,
    )
    os.execvpe(arguments.command[0], arguments.command, variables)


if __name__ == "__main__":
    sys.exit(main())
