"""Progress on standard error: a bar with rate and time left on a terminal, else a plain line now and then.

Nothing is drawn but by `ProgressBar.show`, which long work calls between its batches: a thread that refreshes
the terminal would run beside the kernels that are timed.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from bitgen.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_EVERY_S = 10.0  # between plain lines, which cannot be redrawn
_RATE_OVER_S = 60.0  # the time left is judged by the speed of the last minute


class ProgressBar:
    """Use in a with statement: `show` draws the state of the work, leaving the block removes the bar."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._started = time.monotonic()
        self._total: float | None = None  # of the work that is shown in lines; 0: it is not known
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

    def show(self, progress: Progress) -> None:
        if progress.lasting:
            print(f"bitgen: {progress}", file=sys.stderr, flush=True)
        elif sys.stderr.isatty():
            self._draw(progress)
        elif time.monotonic() - self._last >= _EVERY_S:
            print(self._line(progress), file=sys.stderr, flush=True)
            self._last, self._kept = time.monotonic(), ""
        else:
            self._kept = self._line(progress)

    def _line(self, progress: Progress) -> str:
        done, total = progress.done, progress.total
        if self._total is not None and total != self._total:  # other work, with a speed of its own
            self._started = time.monotonic()
        self._total = total
        spent = time.monotonic() - self._started
        if not 0 < done < total:
            return str(progress)
        left = total - done if progress.unit == "seconds" else spent * (total / done - 1)
        return f"{progress}, {left:.0f} s left"

    def _draw(self, progress: Progress) -> None:
        text, done, total, unit, _ = progress
        if self._bar is None:
            self._bar = _bar()
            self._bar.add_task(text, total=None, unit=unit)
            self._bar.start()
        task = self._bar.task_ids[0]
        if total and total != self._bar.tasks[0].total:  # other work: its speed is not known yet
            self._bar.reset(task)
        self._bar.update(task, description=text, completed=done, total=total or None, unit=unit, refresh=True)


def _bar() -> Bar:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Amount(ProgressColumn):
        """How much of what, and how fast; rich has this for bytes alone."""

        def render(self, task: Task) -> Text:
            unit = task.fields["unit"]
            if task.total is None or unit in ("", "seconds"):
                return Text()
            if unit == "bytes":
                text = f"{decimal(int(task.completed))} of {decimal(int(task.total))}"
                return Text(f"{text}, {decimal(int(task.speed))}/s" if task.speed else text)
            text = f"{task.completed:,.0f}/{task.total:,.0f} {unit}"
            return Text(f"{text}, {task.speed:,.1f}/s" if task.speed else text)

    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        Amount(),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True, highlight=False),
        auto_refresh=False,
        transient=True,
        speed_estimate_period=_RATE_OVER_S,
    )
