"""The kernels that a release has for a CPU that need not be here: from committed winners, and how they came.

Winners of the CPU's family are *tuned*. A family that nobody measured gets those of the nearest one, moved
to its ISA level: the same layout, algorithm and knobs where they are legal there, else the legal schedule
with the nearest knobs. They are *transferred*, and a shape that no family has winners for runs on *default*
schedules. The result is a function of the winners' files, so a release can be built again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bitgen.bundle.contents import Target
from bitgen.bundle.manifest import KernelEntry, Label
from bitgen.cpu import Cpu, Isa, accepted_isas, find_isa, load_isas, target_cpu, target_names
from bitgen.measure import Job
from bitgen.space import space_for
from bitgen.spec import LARGE, KernelSpec, Shape, WeightKind, regime_named
from bitgen.winners import family_winners, nearest_winners


@dataclass(frozen=True)
class Chosen:
    """Kernels for shapes, by ISA level and shape; how they were found, in a word and for people."""

    entries: tuple[KernelEntry, ...]
    label: Label
    origin: str


def committed_kernels(
    target: Target, shapes: Iterable[Shape], folder: Path | None = None, group: int = 0
) -> Chosen:
    """The kernels of ``shapes`` for a family's library, at its level, or at each level of a universal one.

    ``folder``: of the winners (default: those that are committed). ``group``: weights along k that share a
    scale; 0: scales lie outside.
    """
    wanted = [(shape, group) for shape in dict.fromkeys(shapes)]
    levels = target.levels if target.universal else (target.isa,)
    stands = [_stands_for(isa, target, folder) for isa in levels]
    places = tuple(zip(stands, levels, strict=True))
    parts = [_at_level(cpu, isa, wanted, target.isas, folder) for cpu, isa in places]
    if not target.universal:
        return parts[0]
    entries = tuple(
        entry
        for (cpu, isa), part in zip(places, parts, strict=True)
        for entry in (*part.entries, *_of_other_families(cpu, isa, wanted, target, folder))
    )
    found = [f"{isa.name}: {part.origin}" for isa, part in zip(levels, parts, strict=True)]
    # Whatever its levels were measured on, a CPU of this library may be of any family.
    return Chosen(entries, "transferred" if entries else "default", "; ".join(found))


def _stands_for(isa: Isa, target: Target, folder: Path | None) -> Cpu:
    """The CPU whose winners a level gets: one whose best level it is, of a family that has some."""
    if not target.universal:
        return target.cpu
    known = [target_cpu(name, target.cpu.os) for name in target_names()]
    best = [cpu for cpu in known if cpu.arch == isa.arch and accepted_isas(cpu, target.isas)[0] == isa]
    return next((cpu for cpu in best if family_winners(cpu.family, folder)), target.cpu_of(isa))


def _of_other_families(
    first: Cpu, isa: Isa, shapes: Sequence[tuple[Shape, int]], target: Target, folder: Path | None
) -> list[KernelEntry]:
    """What other families of a level than that of ``first`` won with; it comes first on their own CPUs."""
    known = {cpu.family: cpu for cpu in (target_cpu(name, target.cpu.os) for name in target_names())}
    return [
        replace(entry, cpu_family=cpu.family)
        for cpu in known.values()
        if cpu.family != first.family
        and cpu.arch == isa.arch
        and accepted_isas(cpu, target.isas)[0] == isa
        and family_winners(cpu.family, folder)
        for entry in _at_level(cpu, isa, shapes, target.isas, folder).entries
    ]


def _at_level(
    cpu: Cpu, isa: Isa, shapes: Sequence[tuple[Shape, int]], isas: Sequence[Isa], folder: Path | None
) -> Chosen:
    near = nearest_winners(cpu, isas, folder)
    if near is None:
        return Chosen((), "default", f"no family of {cpu.arch} has winners: default schedules")
    entries: list[KernelEntry] = []
    moved = False
    for shape, group in shapes:
        kind = WeightKind(group=group)
        jobs = [job for job in near.winners if (job.shape, job.spec.layout.kind) == (shape, kind)]
        own = [job for job in jobs if job.spec.isa == isa.name]
        specs = [_legal(job, isa, cpu, same=near.cpu_family == cpu.family) for job in own or jobs]
        if specs and None not in specs:
            moved = moved or not own or any(spec != job.spec for spec, job in zip(specs, own, strict=True))
            kept = zip(own or jobs, specs, strict=True)
            entries += [KernelEntry(spec, shape, job.threads) for job, spec in kept if spec]
    if not entries:
        return Chosen((), "default", "no family has winners for these shapes: default schedules")
    tuned = near.cpu_family == cpu.family and not moved
    origin = f"winners of {near.cpu_family}"
    if near.cpu_family != cpu.family:
        origin += f" ({near.why})"
    if moved:
        origin += f", moved to {isa.name}"
    return Chosen(tuple(dict.fromkeys(entries)), "tuned" if tuned else "transferred", origin)


def _legal(job: Job, isa: Isa, cpu: Cpu, *, same: bool) -> KernelSpec | None:
    """A winner on another level or other caches: itself where it is legal, else the nearest that is.

    Not of the ``same`` family its layout alone for few tokens: between two Zens the default's knobs were 4 %
    from the best there, another family's 9 % (docs/lab/search.md); for many 6 % and 1 %.
    """
    spec = replace(job.spec, isa=isa.name)
    space = space_for(spec.family, isa, regime_named(spec.regime), job.shape, cpu, spec.layout.group)
    alike = [point for point in space if point.layout == spec.layout and point.shape == spec.shape]
    mine, theirs = space.default.schedule.algorithm, find_isa(job.spec.isa, load_isas())
    gained = (mine == "tiles" and not theirs.tiles) or (mine == "mmla" and not theirs.mmla)
    foreign = not same and job.spec.regime != LARGE.name
    if foreign or gained or spec.schedule.algorithm not in {point.schedule.algorithm for point in alike}:
        # Or one of the two levels lacks the unit that wins on the other: without tiles 3B's prompts took 2.6
        # times as long, and the knobs of tiles say nothing about other algorithms.
        spec = replace(space.default, layout=spec.layout)
        alike = [point for point in alike if point.schedule.algorithm == mine] or alike
    if not space.broken(spec):
        return spec
    return min(alike, key=lambda point: _distance(point, spec), default=None)


def _distance(spec: KernelSpec, other: KernelSpec) -> tuple[bool, float]:
    """Another algorithm before any knob, then powers of two between the knobs that both have."""
    mine, theirs = dict(spec.schedule), dict(other.schedule)
    steps = sum(abs(math.log2((mine[key] + 1) / (theirs[key] + 1))) for key in mine.keys() & theirs.keys())
    return spec.schedule.algorithm != other.schedule.algorithm, steps
