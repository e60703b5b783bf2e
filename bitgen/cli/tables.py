"""Tables on standard output: aligned text for people, or Markdown, CSV and JSON for everything else."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

FORMATS = ("text", "md", "csv", "json")
_ANY_WIDTH = 10_000  # columns: a schedule is copied from a table, so it is never cut or folded


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=FORMATS, default="text", help="form of the tables (text)")


@dataclass(frozen=True)
class Column:
    """A column: the key in JSON and CSV, the heading for people, and how a value is written for them.

    ``text`` is another heading in plain text; there a ratio of times, below 1 where it is faster, is shown as
    the speedup that it is, if the column ``is_speedup``. A share above 1 ``of_limit`` is no share of a limit.
    People do not see an ``optional`` column without values.
    """

    key: str
    title: str
    form: str = ""
    text: str = ""
    is_speedup: bool = False
    of_limit: bool = False
    optional: bool = False

    def show(self, value: Any) -> str:
        if value is None:
            return "-"
        if self.of_limit and value > 1:
            return "> limit"
        return format(value, self.form) if self.form else str(value)

    def show_text(self, value: Any) -> str:
        return self.show(1 / value if self.is_speedup and value else value)

    @property
    def right(self) -> bool:
        return bool(self.form)


@dataclass(frozen=True)
class Table:
    """A titled table; ``rows`` hold one value a column, ``text`` is another title in plain text."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    text: str = ""

    def records(self) -> list[dict[str, Any]]:
        return [dict(zip((c.key for c in self.columns), row, strict=True)) for row in self.rows]

    def shown(self) -> Table:
        """Without optional columns that have no values."""
        kept = [
            i
            for i, column in enumerate(self.columns)
            if not column.optional or any(row[i] is not None for row in self.rows)
        ]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    def cells(self) -> list[list[str]]:
        return [[c.show(v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]


def render_tables(tables: Sequence[Table], output: str, facts: dict[str, Any] | None = None) -> str:
    """All tables in one form. ``facts`` are further values that only JSON carries."""
    if output == "json":
        content = {**(facts or {}), **{table.title: table.records() for table in tables}}
        return json.dumps(content, indent=2, default=str)
    if output == "csv":
        return "\n\n".join(map(_csv, tables))
    write = {"text": _text, "md": _markdown}[output]
    return "\n\n".join(write(table.shown()) for table in tables)


def _text(table: Table) -> str:
    """The table as a person reads it: in colour on a terminal, never folded to its width."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    rule = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    grid = Grid(box=rule, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in table.columns:
        grid.add_column(
            Text(column.text or column.title), justify="right" if column.right else "left", no_wrap=True
        )
    for row in table.rows:
        grid.add_row(*(Text(c.show_text(v)) for c, v in zip(table.columns, row, strict=True)))
    text = io.StringIO()
    console = Console(file=text, width=_ANY_WIDTH, highlight=False, force_terminal=sys.stdout.isatty())
    console.print(Text(table.text or table.title, style="bold"))
    console.print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


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
