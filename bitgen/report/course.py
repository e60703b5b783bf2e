"""Sections about how a tune went: its searches, its threads, its noise, and the machine it ran on."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from bitgen.measure import EarlyStopping
from bitgen.report.parts import (
    MAX_POINTS,
    MAX_ROWS,
    MAX_TEXT,
    Part,
    Section,
    Table,
    color,
    family_name,
    slot_name,
    utc,
    weighing,
)
from bitgen.report.plots import Axis, Line, Mark, Plot
from bitgen.report.tune import PAUSE_S, Tune
from bitgen.search.choose import Slot
from bitgen.spec import KernelSpec, Shape
from bitgen.store import Record, TrialRecord

_SPACES = (
    "space; first|first ms|.3f; best|best ms|.3f; kernels|kernels|d; pruned|pruned early|d; "
    "partly|not on every shape|d; failed|failed|d; raced|raced|d; left|left the race early|d; "
    "dropped|dropped in it|d"
)
_SPREAD = "stage; regime; kernels|kernels|d; median|median %|.1f; p90|p90 %|.1f; worst|worst %|.1f"
_SECONDS = "seconds of the tune"


# ---- search history ----


def history(tune: Tune) -> Section:
    """The best kernels so far of each space over the time that was measured, and who was eliminated why."""
    parts = [_searches(tune, slot) for slot in tune.shown]
    failures = Counter(
        (family_name(m.job.spec.family), f"{m.status.value}: {m.detail}"[:MAX_TEXT])
        for m in (trial.measurement for trial in tune.trials)
        if not m.ok
    )
    if failures:
        rows = [(*key, count) for key, count in failures.most_common()]
        table = Table.of("family; why|eliminated because; count|measurements|d", rows)
        parts.append(Part("failures", table=table))
    text = (
        "For each space (family and ISA level) the sum over the model's matrices of the best kernel so "
        f"far, from the moment that every shape has one. {weighing(tune)} Pauses of more than {PAUSE_S:.0f}"
        " s between two records are left out. Pruned early: its pairs with the best so far said with "
        "confidence that it gains less than 2 %. Not on every shape: it was far behind on the largest, not"
        " legal on another, or the time was up."
    )
    left_out = [] if tune.trials else ["The records hold no trials of this tune: there is no history."]
    return Section("history", "Search history", text, parts, left_out)


def _searches(tune: Tune, slot: Slot) -> Part:
    """The searches of all spaces in one regime and number of threads."""
    spaces: dict[tuple[str, str], list[TrialRecord]] = defaultdict(list)
    for trial in tune.trials:
        job = trial.measurement.job
        if Slot(job.spec.regime, job.threads) == slot:
            spaces[job.spec.family, job.spec.isa].append(trial)
    lines, rows = [], []
    for (family, isa), trials in spaces.items():
        points = _best_so_far(tune, trials)
        name = f"{family_name(family)} {isa}"
        first, best = (points[0][1], points[-1][1]) if points else (None, None)
        if points:
            title = f"{name}: {first:.3f} to {best:.3f} ms a token"
            lines.append(Line(points, title, color(family), steps=True))
        rows.append((name, first, best, *_fates(tune, trials), *_raced(tune, slot, family, isa)))
    xs, ys = [[point[axis] for line in lines for point in line.points] for axis in (0, 1)]
    plot = Plot(
        f"Best so far, {slot_name(slot)}",
        Axis.over(_SECONDS, xs, zero=True),
        Axis.over("ms a token, all matrices", ys, log=True),
        lines,
        [Mark(*line.points[-1], line.title, line.style) for line in lines],
        legend=[(line.style, line.title.partition(":")[0]) for line in lines],
    )
    return Part(slot_name(slot), plot if lines else None, Table.of(_SPACES, rows))


def _best_so_far(tune: Tune, trials: Sequence[TrialRecord]) -> list[tuple[float, float]]:
    """(seconds, milliseconds a token) at each gain, at most `MAX_POINTS` of them, and at the end."""
    best: dict[Shape, float] = {}
    points: list[tuple[float, float]] = []
    for trial in trials:
        job = trial.measurement.job
        best[job.shape] = min(best.get(job.shape, math.inf), trial.measurement.median_ns / job.n)
        total = sum(tune.count(shape) * ns for shape, ns in best.items()) / 1e6
        if (
            len(best) == len(tune.decisions)
            and math.isfinite(total)
            and (not points or total < points[-1][1])
        ):
            points.append((tune.elapsed(trial.time), total))
    if not points:
        return []
    thinned = [*points[: -1 : math.ceil(len(points) / MAX_POINTS)], points[-1]]
    return [*thinned, (tune.elapsed(trials[-1].time), points[-1][1])]


def _fates(tune: Tune, trials: Sequence[TrialRecord]) -> list[int]:
    """Kernels timed, pruned early, timed on some shapes only, and failed."""
    rule = EarlyStopping()
    by_kernel: dict[KernelSpec, list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        by_kernel[trial.measurement.job.spec].append(trial)
    pruned = partly = failed = 0
    for own in by_kernel.values():
        measurements = [trial.measurement for trial in own]
        if not all(m.ok for m in measurements):
            failed += 1
        else:
            pruned += any(rule.should_prune(m.times_ns, m.against_ns) for m in measurements)
            partly += len({m.job.shape for m in measurements}) < len(tune.decisions)
    return [len(by_kernel), pruned, partly, failed]


def _raced(tune: Tune, slot: Slot, family: str, isa: str) -> tuple[int, int, int]:
    """Contenders of the races on all shapes, those with fewer rounds than others had, and those dropped."""
    rounds: dict[Shape, Counter[KernelSpec]] = defaultdict(Counter)
    dropped: set[tuple[Shape, KernelSpec]] = set()
    for record in tune.races:
        for spec, times, why in zip(record.job.specs, record.times_ns, record.dropped, strict=True):
            if Slot(spec.regime, record.job.threads) == slot:
                rounds[record.job.shape][spec] += len(times)
                if why:
                    dropped.add((record.job.shape, spec))
    mine = [
        ((shape, spec) in dropped, count < max(own.values()))
        for shape, own in rounds.items()
        for spec, count in own.items()
        if (spec.family, spec.isa) == (family, isa)
    ]
    return len(mine), sum(fewer and not out for out, fewer in mine), sum(out for out, _ in mine)


# ---- threads, noise, machine ----


def thread_scaling(tune: Tune) -> Section:
    """Milliseconds a token over the number of threads."""
    counts = sorted({slot.threads for slot in tune.slots})
    text = f"The matrices of the chosen layouts on each number of threads. {weighing(tune)}"
    if len(counts) < 2:
        left = f"One number of threads was tuned, {counts[0]}; bitgen tune --threads auto compares some."
        return Section("threads", "Thread scaling", text, [], [left])
    kernels, lines, rows = tune.kernels(None), [], []
    for place, regime in enumerate(dict.fromkeys(slot.regime for slot in tune.slots)):
        known = [(t, ms) for t in counts if (ms := tune.token_ms(kernels, Slot(regime, t)))]
        lines.append(Line(known, regime, f"s{place}"))
        for threads, ms in known:
            chosen = "yes" if threads == tune.first.best_threads else ""
            rows.append((regime, threads, ms, known[0][1] / ms, chosen))
    plot = _dotted("Milliseconds a token over threads", "threads", "ms a token", lines, log=True)
    columns = "regime; threads|threads|d; ms|ms a token|.3f; speedup|speedup|.2f; chosen"
    left = "Numbers of threads are tuned one after the other: their times are of different moments."
    return Section("threads", "Thread scaling", text, [Part("all", plot, Table.of(columns, rows))], [left])


def _dotted(title: str, x: str, y: str, lines: Sequence[Line], log: bool = False) -> Plot:
    """Lines with a dot at each of their points."""
    xs, ys = [[point[axis] for line in lines for point in line.points] for axis in (0, 1)]
    marks = [
        Mark(*point, f"{line.title}: {point[1]:.3g} at {point[0]:.4g}", line.style)
        for line in lines
        for point in line.points
    ]
    known = [(line.style, line.title) for line in lines]
    y_axis = Axis.over(y, ys, log=log, zero=not log)
    return Plot(title, Axis.over(x, xs, zero=True), y_axis, lines, marks, legend=known)


def noise(tune: Tune) -> Section:
    """How much repeats of one kernel differ, and what the memory probe saw during the races."""
    samples = [
        ("search", t.measurement.job.spec.regime, t.measurement.job.threads, t.time, t.measurement.times_ns)
        for t in tune.trials
    ]
    samples += [
        ("race", spec.regime, record.job.threads, record.time, times)
        for record in tune.races
        for spec, times in zip(record.job.specs, record.times_ns, strict=True)
    ]
    spread: dict[tuple[str, str], list[float]] = defaultdict(list)
    points: list[tuple[float, float]] = []
    for stage, regime, threads, time, times in samples:
        if len(times) >= 3:
            percent = 100 * statistics.stdev(map(math.log, times))
            spread[stage, slot_name(Slot(regime, threads))].append(percent)
            points.append((tune.elapsed(time), percent))
    rows = [(*key, len(v), statistics.median(v), _p90(v), max(v)) for key, v in spread.items()]
    buckets = _buckets(points)
    lines = [
        Line([(x, statistics.median(v)) for x, v in buckets], "median", "s0"),
        Line([(x, _p90(v)) for x, v in buckets], "90th percentile", "s1"),
    ]
    plot = _dotted("Spread of repeats", _SECONDS, "spread, %", lines) if buckets else None
    parts = [Part("spread", plot, Table.of(_SPREAD, rows))]
    reads = [
        (tune.elapsed(r.time), 1 / max(ns), 1 / statistics.median(ns), 1 / min(ns), r.job.shape.name)
        for r in tune.races
        if (ns := r.read_ns_a_byte)
    ]
    if reads:
        shown = reads[:: math.ceil(len(reads) / MAX_ROWS)]
        line = Line([(x, median) for x, _, median, *_ in shown], "memory read", "s0")
        table = Table.of(
            "seconds|s|.0f; low|least GB/s|.1f; gbs|median|.1f; high|most|.1f; shape|race on", shown
        )
        parts.append(
            Part("memory", _dotted("Memory probe during the races", _SECONDS, "GB/s", [line]), table)
        )
    parts += _load(tune)
    text = (
        "Spread: the standard deviation of the logarithm of the repeats of one kernel (3 at least), as a "
        "percentage. It is what the paired tests of search and race have to see through."
    )
    what = "no frequency" if tune.loads else "neither load nor frequency"
    left_out = [f"The records hold {what}; the memory probe shows what it did to memory."]
    return Section("noise", "Noise", text, parts, left_out)


def _load(tune: Tune) -> list[Part]:
    """What others took of the CPUs while the tune ran; nothing where that was not told."""
    loads = [(tune.elapsed(load.time), 100 * load.busy, 100 * load.steal) for load in tune.loads]
    if not loads:
        return []
    thin = loads[:: math.ceil(len(loads) / MAX_POINTS)]
    lines = [
        Line([(x, busy) for x, busy, _ in thin], "other programs", "s0"),
        Line([(x, steal) for x, _, steal in thin], "the hypervisor", "s1"),
    ]
    plot = _dotted("Load by others during the tune", _SECONDS, "% of all CPUs", lines)
    table = Table.of(
        "seconds|s|.0f; busy|other programs %|.1f; steal|hypervisor %|.1f",
        loads[:: math.ceil(len(loads) / MAX_ROWS)],
    )
    return [Part("load", plot, table)]


def _p90(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.9 * len(values)) - 1]


def _buckets(points: Sequence[tuple[float, float]], count: int = 24) -> list[tuple[float, list[float]]]:
    """The values of ``count`` equal stretches of x, at the middle of each stretch that has some."""
    end = max((x for x, _ in points), default=0.0) or 1.0
    found: dict[int, list[float]] = defaultdict(list)
    for x, y in points:
        found[min(int(count * x / end), count - 1)].append(y)
    return [((place + 0.5) * end / count, found[place]) for place in sorted(found)]


def machine(tune: Tune) -> Section:
    """Where the tune ran, with what, when."""
    cpu = tune.machine
    records: tuple[Record, ...] = (*tune.trials, *tune.races, *tune.decisions.values())
    times = [record.time for record in records]
    rows = [
        ("CPU", tune.cpu),
        ("compiler", ", ".join(tune.compilers)),
        ("records", tune.source),
        ("measured", f"{utc(min(times))} to {utc(max(times))}"),
        ("trials", f"{len(tune.trials):,}, and {len(tune.races):,} blocks of races"),
        ("objective", f"{tune.first.objective}, seed {tune.first.seed}"),
    ]
    if cpu:
        cores = f"{cpu.physical_cores} physical, {cpu.logical_cpus} logical, {cpu.usable_threads} usable"
        rows.append(("cores", cores))
        for cache in cpu.caches:
            size = f"{cache.size_bytes >> 10:,} KiB, shared by {cache.shared_by}"
            rows.append((f"L{cache.level} {cache.type}", size))
    parts = [Part("facts", table=Table.of("what|; value|", rows))]
    peaks = [
        (what, threads, value, unit)
        for threads, peak in tune.peaks.items()
        for kind, values, unit in (
            ("DRAM read", peak.dram_gbs, "GB/s"),
            ("int8 in registers", peak.peak_gops, "GOP/s"),
        )
        for what, value in ((f"{kind}, {name}", value) for name, value in values.items())
    ]
    if peaks:
        table = Table.of("what|peak; threads|threads|d; value|value|,.1f; unit", peaks)
        parts.append(Part("peaks", table=table))
    other = "The records are not of this CPU: they hold its name, not its cores and caches."
    return Section("machine", "The machine", "", parts, [] if cpu else [other])
