"""Sections to one HTML file: without JavaScript, without anything from elsewhere, every text escaped."""

from __future__ import annotations

import functools
import math
from typing import Any

import jinja2

from bitgen import __version__
from bitgen.errors import BitgenError
from bitgen.formats.config import printable
from bitgen.paths import templates_dir
from bitgen.report.course import history, machine, noise, thread_scaling
from bitgen.report.fleet import timeline
from bitgen.report.kernels import comparison, formats, rooflines, shares, winners
from bitgen.report.parts import MAX_ROWS, Section, Table
from bitgen.report.plots import Plot, number
from bitgen.report.tune import Tune

MAX_BYTES = 300_000
SECTIONS = (winners, formats, shares, rooflines, history, thread_scaling, noise, machine)


def sections_of(tune: Tune, other: Tune | None = None) -> list[Section]:
    """All sections of a page, in the order in which they are read."""
    compared = [comparison(tune, other)] if other else []
    fleet = [timeline((*tune.jobs, *(other.jobs if other else ())))] if tune.jobs else []
    return [*compared, *(section(tune) for section in SECTIONS), *fleet]


def render_report(tune: Tune, other: Tune | None = None) -> str:
    """The page about ``tune``, compared with ``other`` where there is one; `MAX_BYTES` bytes at the most.

    Where that is too little, tables are cut, and say so; BitgenError where plots alone are larger.
    """
    sections, rows = sections_of(tune, other), MAX_ROWS
    name = tune.model.name if tune.model else f"{len(tune.decisions)} shapes"
    while True:
        data: dict[str, Any] = {"bitgen": __version__, "model": name, "cpu": tune.cpu, "records": tune.source}
        data["sections"] = {section.key: _data(section, rows) for section in sections}
        title = f"bitgen tune: {name} on {tune.cpu}"
        template = _environment().get_template("page.html.j2")
        page = template.render(title=title, sections=sections, data=data, rows=rows, version=__version__)
        if len(page.encode()) <= MAX_BYTES:
            return page
        if not rows:
            raise BitgenError(f"{tune.source}: {len(tune.decisions)} shapes are too many for one page")
        rows //= 2


def render_plot(plot: Plot) -> str:
    """The SVG of one plot."""
    template: Any = _environment().get_template("plot.svg.j2").module
    return str(template.svg(plot))


def _data(section: Section, rows: int) -> list[dict[str, Any]]:
    """What a section shows, as numbers: the rows of its tables, the points of its lines."""
    parts = []
    for part in section.parts:
        entry: dict[str, Any] = {"name": part.name}
        if part.table:
            entry["columns"] = [key for key, _, _ in part.table.columns]
            entry["rows"] = [[_plain(value) for value in row] for row in part.table.rows[:rows]]
        if part.plot and part.plot.lines:
            entry["lines"] = {
                line.title: [[_plain(x), _plain(y)] for x, y in line.points] for line in part.plot.lines
            }
        parts.append(entry)
    return parts


def _plain(value: Any) -> Any:
    """Six digits are more than a time has; JSON knows no infinity."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_dir() / "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["cells"] = Table.shown
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
