"""`bitgen` and `python -m bitgen`."""

from __future__ import annotations

import sys


def main() -> int:
    """The command line; Ctrl-C while its modules are still being read ends it like any other."""
    try:
        from bitgen.cli import main as command_line

        return command_line()
    except KeyboardInterrupt:
        from bitgen.errors import InterruptError

        print("bitgen: interrupted", file=sys.stderr)
        return InterruptError.exit_code


if __name__ == "__main__":
    sys.exit(main())
