"""Geometry of the plots: from numbers to places on a small canvas that a template draws as SVG.

A canvas is `WIDTH` units wide, so that its text can be read on a telephone and several stand beside each
other on a desk. Colours and marks are names of classes of the page's style.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # margins of a plot with two axes
LABEL, ROW = 124, 22  # of a plot with a row a thing: room for names, height of a row


@dataclass(frozen=True)
class Mark:
    """A dot in data units with what a pointer (or a screen reader) is told; ``low`` to ``high`` along x."""

    x: float
    y: float
    title: str
    style: str
    low: float | None = None
    high: float | None = None
    ring: bool = False


@dataclass(frozen=True)
class Line:
    """Points in data units, joined straight or as steps."""

    points: Sequence[tuple[float, float]]
    title: str
    style: str
    steps: bool = False


@dataclass(frozen=True)
class Axis:
    """One direction: its name, its range, and whether it is logarithmic."""

    name: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, name: str, values: Iterable[float], log: bool = False, zero: bool = False) -> Axis:
        """An axis on which ``values`` have room; ``zero``: it begins at 0."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = min(known), max(known)
        if log:
            room = max((high / low) ** 0.08, 1.05)
            return cls(name, low / room, high * room, True)
        low = 0.0 if zero else low
        room = 0.08 * (high - low) or 0.08 * (abs(high) or 1.0)
        return cls(name, low if zero else low - room, high + room)

    def share(self, value: float) -> float:
        """Where ``value`` lies between the ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round numbers inside, about five."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= 6:
                    break
            else:
                found = found[:: math.ceil(len(found) / 6)]
            if len(found) >= 3:
                return found
        rough = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(d * unit for d in (1, 2, 2.5, 5, 10) if d * unit >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Plot:
    """What a template draws: ``lines`` and ``marks`` over two axes, or over one axis with named rows.

    With ``rows`` a mark's y is the number of its row. ``bars``: each mark is a bar from the axis' low end.
    ``reference`` is a value of x that gets a line of its own.
    """

    title: str
    x: Axis
    y: Axis | None = None
    lines: Sequence[Line] = ()
    marks: Sequence[Mark] = ()
    rows: Sequence[str] = ()
    bars: bool = False
    reference: float | None = None
    legend: Sequence[tuple[str, str]] = ()  # style, name

    @property
    def height(self) -> int:
        return HEIGHT if self.y else TOP + ROW * len(self.rows) + BOTTOM

    @property
    def left(self) -> int:
        return LEFT if self.y else LABEL

    @property
    def right(self) -> int:
        return WIDTH - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def px(self, x: float) -> str:
        return _short(self.left + (self.right - self.left) * min(max(self.x.share(x), 0.0), 1.0))

    def py(self, y: float) -> str:
        if self.y is None:
            return _short(TOP + ROW * (y + 0.5))
        return _short(self.bottom - (self.bottom - TOP) * min(max(self.y.share(y), 0.0), 1.0))

    def path(self, line: Line) -> str:
        """The line as an SVG path."""
        at = [(self.px(x), self.py(y)) for x, y in line.points]
        joints = [f"H{x}V{y}" if line.steps else f"L{x} {y}" for x, y in at[1:]]
        return "".join((f"M{at[0][0]} {at[0][1]}", *joints))


def _short(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def number(value: float) -> str:
    """A value of an axis as a person writes it."""
    if value and not 1e-3 <= abs(value) < 1e4:  # what is longer does not fit beside an axis
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) < 1e3 else f"{value:,.0f}"
