"""The lines a server writes to standard error."""

from __future__ import annotations

import os
import sys


def write(line: str) -> None:
    """Write a line to standard error; where nobody reads it any more, it and all later ones go nowhere.

    A server outlives what started it, and a line that cannot be written is no reason to fail: the first one
    after a signal stood between the signal and the end.
    """
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


def say(line: str) -> None:
    """`write`, with who says it."""
    write(f"bitgen: {line}")
