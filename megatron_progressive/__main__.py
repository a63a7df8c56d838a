"""``python -m megatron_progressive`` runs ``mprog``."""

import sys


def main() -> int:
    """Run a command of ``mprog``; returns the exit code. Nothing is imported outside of the part in
    which an interrupt ends it without a traceback."""
    try:
        from megatron_progressive.runtime.tied import end_with_starter

        end_with_starter()
        from megatron_progressive import cli
    except KeyboardInterrupt:
        print("mprog: interrupted", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
