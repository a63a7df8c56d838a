"""``python -m megatron_progressive`` is ``mprog``."""

import sys


def main() -> int:
    """Run ``mprog``'s command; returns the exit code. Nothing is imported before it can be
    interrupted without a traceback."""
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
