"""One line of progress on standard error: rewritten in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType

_EVERY_S = 10.0  # between lines that cannot be rewritten


class ProgressLine:
    """Use in a with statement; `show` replaces the line, leaving the block ends it."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = False
        self._last = 0.0
        self._kept = ""  # what was too soon to print; the last of it is how far the work came

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown and self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        elif self._kept and kind is None:
            print(self._kept, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """Show ``text``; cut to the terminal's width."""
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
            self._shown = True
        elif time.monotonic() - self._last >= _EVERY_S:
            print(text, file=sys.stderr, flush=True)
            self._last, self._kept = time.monotonic(), ""
        else:
            self._kept = text
