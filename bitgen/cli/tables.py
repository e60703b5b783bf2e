"""Tables on standard output: aligned text for people, or Markdown, CSV and JSON for everything else."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("text", "md", "csv", "json")


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=FORMATS, default="text", help="form of the tables (text)")


@dataclass(frozen=True)
class Column:
    """A column: the key in JSON and CSV, the heading for people, and how a value is written for them."""

    key: str
    title: str
    form: str = ""

    def show(self, value: Any) -> str:
        if value is None:
            return "-"
        return format(value, self.form) if self.form else str(value)

    @property
    def right(self) -> bool:
        return bool(self.form)


@dataclass(frozen=True)
class Table:
    """A titled table; ``rows`` hold one value a column."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip((c.key for c in self.columns), row, strict=True)) for row in self.rows]

    def cells(self) -> list[list[str]]:
        return [[c.show(v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]


def render_tables(tables: Sequence[Table], output: str, facts: dict[str, Any] | None = None) -> str:
    """All tables in one form. ``facts`` are further values that only JSON carries."""
    if output == "json":
        content = {**(facts or {}), **{table.title: table.records() for table in tables}}
        return json.dumps(content, indent=2, default=str)
    write = {"text": _text, "md": _markdown, "csv": _csv}[output]
    return "\n\n".join(write(table) for table in tables)


def _text(table: Table) -> str:
    cells = table.cells()
    widths = [
        max(len(column.title), *(len(row[i]) for row in cells), 0) if cells else len(column.title)
        for i, column in enumerate(table.columns)
    ]

    def line(values: Sequence[str]) -> str:
        padded = (
            value.rjust(width) if column.right else value.ljust(width)
            for value, width, column in zip(values, widths, table.columns, strict=True)
        )
        return "  ".join(padded).rstrip()

    head = line([c.title for c in table.columns])
    return "\n".join([table.title, head, "-" * len(head), *(line(row) for row in cells)])


def _markdown(table: Table) -> str:
    rule = ["---:" if c.right else "---" for c in table.columns]
    lines = [[c.title for c in table.columns], rule, *table.cells()]
    return "\n".join([f"**{table.title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([c.key for c in table.columns])
    writer.writerows(table.rows)
    return text.getvalue().rstrip("\n")


def numbers(option: str, text: str, least: int) -> list[int]:
    """The numbers of a list like 1,2,4."""
    from bitgen.errors import UsageError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) >= least for word in words):
        raise UsageError(f"{option} {text}: give numbers from {least} on, separated by commas")
    return [int(word) for word in words]
