"""How far long work is: one record, which whatever takes long hands to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias


class Progress(NamedTuple):
    """``done`` of ``total`` ``unit`` ("bytes", "schedules"); total 0: how much there is to do is not known.

    ``text`` says what is on. As a string it is one line. ``lasting``: it tells a result, which stays to be
    read when the work goes on.
    """

    text: str
    done: float = 0
    total: float = 0
    unit: str = ""
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.text}: {self.done / self.total:.0%}" if self.total else self.text


# Called between batches, never while something is timed; must be quick and must not print to stdout.
Report: TypeAlias = Callable[[Progress], None]
