"""``python -m megatron_progressive`` is ``mprog``."""

import sys

from megatron_progressive.runtime.signals import INTERRUPTED
from megatron_progressive.runtime.tied import end_with_starter

if __name__ == "__main__":
    end_with_starter()
    try:
        from megatron_progressive.cli import main
    except KeyboardInterrupt:  # it takes a moment
        print("mprog: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(main())
