"""Progress on standard error: a bar with rate and time left on a terminal, else a plain line now and then.

Nothing is drawn but by `ProgressBar.show`, which long work calls between its batches: a thread that refreshes
the terminal would run beside the kernels that are timed.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_EVERY_S = 10.0  # between plain lines, which cannot be redrawn
_RATE_OVER_S = 60.0  # the time left is judged by the speed of the last minute


class ProgressBar:
    """Use in a with statement: `show` draws the state of the work, leaving the block removes the bar.

    ``unit`` is what ``done`` and ``total`` count ("kernels", "windows"); bytes are shown as MB and GB.
    """

    def __init__(self, unit: str = "") -> None:
        self._unit = unit
        self._bar: Progress | None = None
        self._started = time.monotonic()
        self._last = 0.0
        self._kept = ""  # what was too soon to print; the last of it is how far the work came

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._kept and kind is None:
            print(self._kept, file=sys.stderr, flush=True)

    def show(self, text: str, done: float = 0, total: float = 0) -> None:
        """Show ``text``, and how much of ``total`` is done; 0: how much there is to do is not known."""
        if sys.stderr.isatty():
            self._draw(text, done, total)
        elif time.monotonic() - self._last >= _EVERY_S:
            print(self._line(text, done, total), file=sys.stderr, flush=True)
            self._last, self._kept = time.monotonic(), ""
        else:
            self._kept = self._line(text, done, total)

    def _line(self, text: str, done: float, total: float) -> str:
        if not total:
            return text
        spent = time.monotonic() - self._started
        left = f", {spent * (total / done - 1):.0f} s left" if 0 < done < total else ""
        return f"{text}: {100 * done / total:3.0f} %{left}"

    def _draw(self, text: str, done: float, total: float) -> None:
        if self._bar is None:
            self._bar = _bar(self._unit)
            self._bar.add_task(text, total=None)
            self._bar.start()
        self._bar.update(
            self._bar.task_ids[0], description=text, completed=done, total=total or None, refresh=True
        )


def _bar(unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(unit)]
    if unit == "bytes":
        amount = [DownloadColumn(), TransferSpeedColumn()]
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *(amount if unit else ()),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,
        transient=True,
        speed_estimate_period=_RATE_OVER_S,
    )
