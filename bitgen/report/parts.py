"""What a section is made of, and the words that all of them use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import groupby
from typing import Any

from bitgen.report.plots import Plot
from bitgen.report.tune import Tune
from bitgen.search.choose import Slot
from bitgen.spec import EVERY_FAMILY, FAMILIES, Shape

MAX_ROWS = 60  # of a table, and with it the size of the page is bounded
MAX_POINTS = 60  # of a line
MAX_TEXT = 160  # characters of a message that a compiler or a kernel left


@dataclass(frozen=True)
class Table:
    """Columns (key, heading, format; an empty format is text), and rows of plain values."""

    columns: Sequence[tuple[str, str, str]]
    rows: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, columns: str, rows: Sequence[Sequence[Any]]) -> Table:
        """Columns as "key|heading|format; ...": what is left out is the key again, and text."""
        split = [f"{column}||".split("|")[:3] for column in columns.split("; ")]
        return cls([(key, heading or key, form) for key, heading, form in split], rows)

    def shown(self, rows: int) -> list[list[str]]:
        """The first ``rows`` rows as a person reads them."""
        forms = [form for _, _, form in self.columns]
        return [[_show(v, form) for v, form in zip(row, forms, strict=True)] for row in self.rows[:rows]]


@dataclass(frozen=True)
class Part:
    """A plot with the table beside it; either may be missing."""

    name: str
    plot: Plot | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A heading, what it means, its parts, and in ``left_out`` what the records do not hold."""

    key: str
    title: str
    text: str
    parts: Sequence[Part]
    left_out: Sequence[str] = ()

    @property
    def runs(self) -> list[tuple[bool, list[Part]]]:
        """Neighbours that are plots alone (True) stand beside each other, the others below each other."""
        alone = groupby(self.parts, key=lambda part: part.table is None)
        return [(key, list(parts)) for key, parts in alone]


def _show(value: Any, form: str) -> str:
    if value is None:
        return "–"
    return format(value, form) if form else str(value)


def slot_name(slot: Slot) -> str:
    return f"{slot.regime}, {slot.threads} thread{'s' if slot.threads > 1 else ''}"


def shape_name(tune: Tune, shape: Shape) -> str:
    return f"{shape.name} {tune.roles(shape)}".strip()


def family_name(family: str) -> str:
    return EVERY_FAMILY[family].title


def color(family: str) -> str:
    """The class that draws a family: the same on every page."""
    return f"s{list(FAMILIES | EVERY_FAMILY).index(family) % 8}"


def legend(families: Iterable[str]) -> list[tuple[str, str]]:
    return [(color(family), family_name(family)) for family in dict.fromkeys(families)]


def weighing(tune: Tune) -> str:
    """Where the numbers of matrices are from: records know shapes, not models."""
    if tune.model is None:
        return "The records name no model, and no preset has exactly these shapes: each matrix counts once."
    how = "the only preset with exactly these shapes" if tune.guessed else "as asked for"
    return f"The matrices are weighed as in {tune.model.name} ({how})."


def utc(time: float) -> str:
    return datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
