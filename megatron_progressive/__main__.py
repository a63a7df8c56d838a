"""``python -m megatron_progressive`` is ``mprog``."""

import sys

from megatron_progressive.cli import main

if __name__ == "__main__":
    sys.exit(main())
