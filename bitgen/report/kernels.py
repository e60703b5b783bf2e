"""Sections about the kernels a tune ended with: against defaults, by format, by matrix, against the peaks."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bitgen.measure.stats import median_interval
from bitgen.report.parts import (
    Part,
    Section,
    Table,
    color,
    family_name,
    legend,
    shape_name,
    slot_name,
    utc,
    weighing,
)
from bitgen.report.plots import Axis, Line, Mark, Plot
from bitgen.report.tune import Tune
from bitgen.search.choose import Slot
from bitgen.search.group import roofline_ns
from bitgen.spec import Shape
from bitgen.store import Winner

_WINNERS = (
    "shape|m x k; roles|used by; family; time_us|µs|,.1f; default_us|default µs|,.1f; ratio|ratio|.3f; "
    "low|from|.3f; high|to|.3f; rounds|rounds|d"
)
_KERNELS = "slot|tuned for; shape|m x k; layout; schedule; isa|ISA"
_ROOFLINE = (
    "shape|m x k; family; intensity|op/byte|.1f; gops|GOP/s|,.1f; gbs|GB/s|,.1f; share|% of roofline|.0%; "
    "chosen"
)
_COMPARED = "shape|m x k; this_us|this µs|,.1f; other_us|against µs|,.1f; ratio|ratio|.3f"
_BOTH = "slot|tuned for; shape|m x k; tune; layout; schedule; isa|ISA"


def winners(tune: Tune) -> Section:
    """The kernels of the chosen layouts, each against its family's untuned default in the same rounds."""
    parts, kernels = [], []
    for slot in tune.shown:
        own = [winner for (_, at), winner in tune.kernels(None).items() if at == slot]
        rows, marks = [], []
        for place, winner in enumerate(own):
            shape, spec, base = winner.measurement.job.shape, winner.spec, winner.baseline
            ratios = _ratios(winner)
            ratio = statistics.median(ratios) if ratios else None
            same = base is not None and base.job.spec == spec
            low, high = (None if same else median_interval(ratios)) or (None, None)
            names = (shape.name, tune.roles(shape), family_name(spec.family))
            times = (winner.time_ns / 1e3, base.median_ns / 1e3 if base else None, ratio, low, high)
            rows.append((*names, *times, len(ratios)))
            kernels.append((slot_name(slot), shape.name, *_kernel(winner)))
            if ratio is not None:
                told = "the default itself" if same else f"{ratio:.3f} of its default's time"
                title = f"{shape.name} {spec.schedule.name}: {told}"
                marks.append(Mark(ratio, place, title, color(spec.family), low, high))
        values = [value for mark in marks for value in (mark.x, mark.low, mark.high) if value is not None]
        plot = Plot(
            f"Winner / default, {slot_name(slot)}",
            Axis.over("time / default's time", [*values, 1.0]),
            marks=marks,
            rows=[shape_name(tune, winner.measurement.job.shape) for winner in own],
            reference=1.0,
            legend=legend(winner.spec.family for winner in own),
        )
        parts.append(Part(slot_name(slot), plot if marks else None, Table.of(_WINNERS, rows)))
    # Names of schedules are long: beside a plot they would leave no room for the numbers.
    parts.append(Part("kernels", table=Table.of(_KERNELS, kernels)))
    text = (
        "Each kernel the tune chose, beside its family's untuned default: the median over the rounds of "
        "the race in which both were timed, and the distribution-free 95 % interval of that median (none "
        "below 6 rounds). Left of 1 is faster; at 1 without an interval the default itself won."
    )
    return Section("winners", "Winners against defaults", text, parts)


def _ratios(winner: Winner) -> list[float]:
    """Winner / default of each round that both were in."""
    base = winner.baseline.times_ns if winner.baseline else ()
    return [t / b for t, b in zip(winner.measurement.times_ns, base, strict=False)]


def formats(tune: Tune) -> Section:
    """What the model's matrices cost in one family throughout, and in the layouts chosen."""
    chosen = tune.kernels(None)
    mixed = "+".join(sorted({family_name(winner.spec.family) for winner in chosen.values()}))
    named = [(family_name(family), color(family), tune.kernels(family)) for family in tune.families]
    named.append((f"chosen ({mixed})", "chosen", chosen))
    rows: list[tuple[Any, ...]] = []
    for name, _, kernels in named:
        layouts = {shape: winner.spec.layout for (shape, _), winner in kernels.items()}
        packed = sum(tune.count(shape) * layout.packed_bytes(shape) for shape, layout in layouts.items())
        rows.append((name, packed / 1e6, *(tune.token_ms(kernels, slot) for slot in tune.shown)))
    parts = []
    for slot in tune.shown:
        each = [(name, style, tune.token_ms(kernels, slot)) for name, style, kernels in named]
        known = [(name, style, ms) for name, style, ms in each if ms is not None]
        told = [(name, ms, f"{name}: {ms:.3f} ms a token", style) for name, style, ms in known]
        title = f"Milliseconds a token, {slot_name(slot)}"
        parts.append(Part(slot_name(slot), _bars(title, "ms a token", told)))
    columns = [("format", "format", ""), ("packed_mb", "MB", ",.1f")]
    columns += [(f"token_ms_{s.regime}_t{s.threads}", f"ms/token {slot_name(s)}", ".3f") for s in tune.shown]
    text = (
        "All the ternary matrices for one token in one family throughout: of each shape the layout that "
        f"costs least over the objective {tune.first.objective!r}, with its winners. A tune leaves the "
        f"default format only beyond the noise, so the chosen one may not be the shortest. {weighing(tune)}"
    )
    left_out = [
        "Times of different shapes are of different moments of the tune: their sums have no interval."
    ]
    table = Part("all", table=Table(columns, [row for row in rows if row[1]]))
    return Section("formats", "Formats compared", text, [*parts, table], left_out)


def _bars(title: str, unit: str, bars: list[tuple[str, float, str, str]]) -> Plot:
    """A row for each (name, value, what is told of it, style)."""
    marks = [Mark(value, place, told, style) for place, (_, value, told, style) in enumerate(bars)]
    axis = Axis.over(unit, [mark.x for mark in marks], zero=True)
    return Plot(title, axis, marks=marks, rows=[name for name, *_ in bars], bars=True)


def shares(tune: Tune) -> Section:
    """How the matrices share a token's time."""
    parts = []
    for slot in tune.shown:
        own = {shape: winner for (shape, at), winner in tune.kernels(None).items() if at == slot}
        ms = {s: tune.count(s) * w.time_ns / w.measurement.job.n / 1e6 for s, w in own.items()}
        total = sum(ms.values())
        rows = [(shape_name(tune, shape), each, each / total) for shape, each in ms.items()]
        bars = [
            (name, 100 * share, f"{name}: {each:.3f} ms a token", color(winner.spec.family))
            for (name, each, share), winner in zip(rows, own.values(), strict=True)
        ]
        plot = _bars(f"Share of each matrix, {slot_name(slot)}", "% of the matrices' time", bars)
        table = Table.of("matrix; ms|ms a token|.3f; share|share|.0%", rows)
        parts.append(Part(slot_name(slot), plot, table))
    left_out = [
        "The records of a tune hold no times of attention, norms, activations and the output matrix: bitgen "
        "bench measures whole tokens."
    ]
    text = f"The ternary matrices of the chosen layouts. {weighing(tune)}"
    return Section("forward", "Where a forward pass spends its time", text, parts, left_out)


def rooflines(tune: Tune) -> Section:
    """GOP/s over operations a packed byte; the machine's peaks as lines."""
    parts, left_out = [], []
    for slot in tune.shown:
        parts.append(_roofline(tune, slot))
        if slot.threads not in tune.peaks:
            left_out.append(f"The records hold no peaks for {slot_name(slot)}: limits are not drawn.")
    text = (
        "The best kernels of each family, and a ring around those the tune chose. Limits are the most that"
        " the probes of this machine reached in these records; a kernel beyond a limit tells that its "
        "probe was disturbed. Where weights stay in cache memory is no limit, and has no line."
    )
    return Section("roofline", "Roofline", text, parts, left_out)


def _roofline(tune: Tune, slot: Slot) -> Part:
    peak, chosen = tune.peaks.get(slot.threads), tune.kernels(None)
    dram = peak.best_dram_gbs if peak else None
    rows: list[tuple[Any, ...]] = []
    marks = []
    cold = False
    for family in tune.families:
        for shape, winner in _drawn(tune, family, slot):
            job, spec = winner.measurement.job, winner.spec
            cold = job.cold
            packed, operations = spec.layout.packed_bytes(shape), 2 * shape.m * shape.k * job.n
            intensity, gops, gbs = operations / packed, operations / winner.time_ns, packed / winner.time_ns
            share = None
            if peak and dram and (top := peak.peak_gops.get(spec.isa)):
                share = roofline_ns(spec.layout, shape, job.n, cold, dram, top) / winner.time_ns
            won = chosen.get((shape, slot)) == winner
            title = f"{family_name(family)} {shape.name}: {gops:.1f} GOP/s, {gbs:.1f} GB/s"
            marks.append(Mark(intensity, gops, title, color(family), ring=won))
            names = (shape.name, family_name(family), intensity)
            rows.append((*names, gops, gbs, share, "yes" if won else ""))
    limits = {
        f"int8 {isa}: {gops:,.0f} GOP/s": gops for isa, gops in (peak.peak_gops if peak else {}).items()
    }
    xs = [mark.x for mark in marks] or [1.0]
    x = Axis("operations a packed byte", 0.6 * min(xs), 1.5 * max(xs), log=True)
    roof = [x.low * dram, x.high * dram] if dram and cold else []
    y = Axis.over("GOP/s", [*(mark.y for mark in marks), *limits.values(), *roof], log=True)
    lines = [Line([(x.low, gops), (x.high, gops)], title, "limit") for title, gops in limits.items()]
    if roof:
        lines.append(Line([(x.low, roof[0]), (x.high, roof[1])], f"memory: {dram:,.1f} GB/s", "memory"))
    known = [*legend(tune.families), *((line.style, line.title) for line in lines)]
    title = f"Roofline, {slot_name(slot)}, weights {'from memory' if cold else 'in cache'}"
    return Part(slot_name(slot), Plot(title, x, y, lines, marks, legend=known), Table.of(_ROOFLINE, rows))


def _drawn(tune: Tune, family: str, slot: Slot) -> list[tuple[Shape, Winner]]:
    """The kernels of a family's best layouts, and the chosen ones that are in another layout of it."""
    best, chosen = tune.kernels(family), tune.kernels(None)
    pairs = [(shape, winner) for (shape, at), winner in best.items() if at == slot]
    pairs += [
        (shape, winner)
        for (shape, at), winner in chosen.items()
        if at == slot and winner.spec.family == family and best.get((shape, at)) != winner
    ]
    return pairs


# ---- two tunes ----

_FACTS: tuple[tuple[str, Callable[[Tune], str]], ...] = (
    ("records", lambda tune: tune.source),
    ("CPU", lambda tune: tune.cpu),
    ("compiler", lambda tune: ", ".join(tune.compilers)),
    ("model", lambda tune: tune.model.name if tune.model else "–"),
    ("objective", lambda tune: tune.first.objective),
    ("decided", lambda tune: utc(max(record.time for record in tune.decisions.values()))),
    ("DRAM read", lambda tune: ", ".join(f"{p.best_dram_gbs:.1f} GB/s" for p in tune.peaks.values()) or "–"),
)


def comparison(tune: Tune, other: Tune) -> Section:
    """Before and after, or two CPUs: ratios of times that were not taken in the same moments."""
    facts = [(name, read(tune), read(other)) for name, read in _FACTS]
    parts = [Part("facts", table=Table.of("what|; this; other|against", facts))]
    left_out, kernels = [], []
    mine, theirs = tune.kernels(None), other.kernels(None)
    alike = tune.decisions.keys() == other.decisions.keys() and tune.model == other.model
    for slot in tune.shown:
        pairs = {
            shape: (winner, theirs[shape, slot])
            for (shape, at), winner in mine.items()
            if at == slot and (shape, slot) in theirs
        }
        if not pairs:
            left_out.append(f"{slot_name(slot)}: both tunes have no kernel of one shape.")
            continue
        rows = [_compared(tune, shape, *pair) for shape, pair in pairs.items()]
        for shape, (this, against) in pairs.items():
            each = [("both", this)] if this.spec == against.spec else [("this", this), ("against", against)]
            kernels += [(slot_name(slot), shape.name, name, *_kernel(winner)) for name, winner in each]
        these, those = tune.token_ms(mine, slot), other.token_ms(theirs, slot)
        if alike and these and those:
            rows.append(("all, a token", 1e3 * these, 1e3 * those, these / those))
        plot = Plot(
            f"This / against, {slot_name(slot)}",
            Axis.over("time / time of the other", [*(row[3] for row in rows), 1.0]),
            marks=[Mark(row[3], place, f"{row[0]}: {row[3]:.3f}", "s0") for place, row in enumerate(rows)],
            rows=[row[0] for row in rows],
            reference=1.0,
        )
        parts.append(Part(slot_name(slot), plot, Table.of(_COMPARED, rows)))
    parts.append(Part("kernels", table=Table.of(_BOTH, kernels)))
    left_out.append(
        "The tunes ran in different moments: these ratios hold the noise of both, without interval."
    )
    text = f"This tune ({tune.source}) beside {other.source}. Left of 1 this one is faster."
    return Section("against", "Two tunes compared", text, parts, left_out)


def _compared(tune: Tune, shape: Shape, a: Winner, b: Winner) -> tuple[str, float, float, float]:
    return shape_name(tune, shape), a.time_ns / 1e3, b.time_ns / 1e3, a.time_ns / b.time_ns


def _kernel(winner: Winner) -> tuple[str, str, str]:
    return winner.spec.layout.name, winner.spec.schedule.name, winner.spec.isa
