"""The section about a fleet: which machine did what when."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from bitgen.report.parts import Part, Section, Table
from bitgen.report.plots import Axis, Mark, Plot
from bitgen.report.tune import PAUSE_S
from bitgen.store import JobRecord

_KINDS = {"measure": "s0", "race": "s1", "peak": "s2"}
_MAX_BARS = 240  # on the page; neighbours become one until there are no more
_COLUMNS = (
    "machine; jobs|jobs|d; races|races|d; seconds|s at work|,.0f; share|share of the time|.0%; "
    "again|taken over|d"
)


def timeline(jobs: Sequence[JobRecord]) -> Section:
    """A row a machine, a bar a job (or several that follow each other), over the seconds of the tune.

    Of two tunes that are compared the jobs of both: one coordinator tunes several kinds of CPU at once.
    """
    spans = _spans(jobs)
    machines = sorted({job.machine for job in jobs})
    end = max((high for _, _, high in spans), default=0.0) or 1.0
    rows = []
    for machine in machines:
        own = [(job, high - low) for job, low, high in spans if job.machine == machine]
        work = sum(seconds for _, seconds in own)
        races = sum(job.what == "race" for job, _ in own)
        rows.append((machine, len(own), races, work, work / end, sum(job.attempt > 0 for job, _ in own)))
    marks = [
        Mark(
            high,
            machines.index(machine),
            f"{machine}: {count} {kind}, {low:.1f} to {high:.1f} s",
            _KINDS.get(kind, "s3"),
            low,
            high,
        )
        for machine, kind, count, low, high in _bars(spans, end)
    ]
    plot = Plot(
        "Jobs of each machine",
        Axis("seconds of the tune", 0.0, end),
        marks=marks,
        rows=machines,
        legend=[(style, kind) for kind, style in _KINDS.items()],
    )
    text = (
        "Each bar ends with a dot when its answer came to the database, and is as long as measuring took; "
        f"between bars a machine waits, compiles or is not there. Pauses of more than {PAUSE_S:.0f} s are "
        "left out. Taken over: jobs that another machine had before and did not finish."
    )
    return Section("fleet", "The fleet", text, [Part("jobs", plot, Table.of(_COLUMNS, rows))])


def _spans(jobs: Sequence[JobRecord]) -> list[tuple[JobRecord, float, float]]:
    """Each job with its begin and end in seconds of the tune, without pauses."""
    found: list[tuple[JobRecord, float, float]] = []
    offset = latest = 0.0
    for job in sorted(jobs, key=lambda job: job.time):
        begin = job.time - job.seconds
        if not found:
            offset = latest = begin
        if begin - latest > PAUSE_S:
            offset += begin - latest
        latest = max(latest, job.time)
        found.append((job, max(0.0, begin - offset), job.time - offset))
    return found


def _bars(
    spans: Sequence[tuple[JobRecord, float, float]], end: float
) -> list[tuple[str, str, int, float, float]]:
    """(machine, kind, jobs, begin, end), of one machine and kind; joined across gaps that nobody sees."""
    gap = 0.0
    while True:
        bars: list[tuple[str, str, int, float, float]] = []
        last: dict[str, int] = defaultdict(lambda: -1)
        for job, low, high in spans:
            at = last[job.machine]
            if at >= 0 and bars[at][1] == job.what and low - bars[at][4] <= gap:
                machine, kind, count, first, until = bars[at]
                bars[at] = (machine, kind, count + 1, first, max(until, high))
            else:
                last[job.machine] = len(bars)
                bars.append((job.machine, job.what, 1, low, high))
        if len(bars) <= _MAX_BARS or gap > end:
            return bars[:_MAX_BARS]
        gap = max(2 * gap, end / 1000)
