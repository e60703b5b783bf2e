"""transformers' command line on bitgen's kernels: `python -m bitgen.hf serve ...`."""

from __future__ import annotations

import sys

from bitgen.errors import BitgenError


def main() -> int:
    """Install, then be transformers' command line; BitgenErrors are one line."""
    try:
        import bitgen.hf

        bitgen.hf.install()
        from transformers.cli.transformers import main as transformers
    except BitgenError as error:
        print(f"bitgen: {error.message}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"bitgen: {error.name} is not installed: pip install 'transformers[serving]'", file=sys.stderr)
        return BitgenError.exit_code
    try:
        transformers()
    except ImportError as error:  # what a command of theirs needs; it says what to install
        print(f"bitgen: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        return BitgenError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
