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
from enum import IntEnum
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
    if not target.universal:
        return _at_level(target.cpu, target.isa, wanted, target, folder)
    entries: list[KernelEntry] = []
    found: list[str] = []
    for isa in target.levels:
        part = _of_any_family(isa, wanted, target, folder)
        own = _of_each_family(isa, wanted, target, folder, part.entries)
        entries += [*part.entries, *own]
        names = ", ".join(dict.fromkeys(entry.cpu_family for entry in own))
        found.append(f"{isa.name}: {part.origin}" + (f"; others for {names}" if names else ""))
    # Whatever its levels were measured on, a CPU of this library may be of any family.
    return Chosen(tuple(entries), "transferred" if entries else "default", "; ".join(found))


def _served(cpu: Cpu, isas: Sequence[Isa]) -> tuple[Isa, ...]:
    """The levels that CPUs of a family find best: its own, and where a system hides their tiles the next."""
    first, *others = accepted_isas(cpu, isas)
    return (first, *([isa for isa in others if not isa.tile_registers][:1] if first.tile_registers else []))


def _families_of(isa: Isa, target: Target) -> list[Cpu]:
    known = [target_cpu(name, target.cpu.os) for name in target_names()]
    return [cpu for cpu in known if cpu.arch == isa.arch and isa in _served(cpu, target.isas)]


def _of_any_family(
    isa: Isa, shapes: Sequence[tuple[Shape, int]], target: Target, folder: Path | None
) -> Chosen:
    """What a CPU gets at a level, of whatever family: layouts that won at it, and not all of their knobs."""
    families = _families_of(isa, target)
    stand = next((cpu for cpu in families if family_winners(cpu.family, folder)), target.cpu_of(isa))
    alike = len({cpu.vendor for cpu in families}) == 1
    return _at_level(stand, isa, shapes, target, folder, most=_Kept.MANY if alike else _Kept.LAYOUT)


def _of_each_family(
    isa: Isa,
    shapes: Sequence[tuple[Shape, int]],
    target: Target,
    folder: Path | None,
    anyone: Sequence[KernelEntry],
) -> list[KernelEntry]:
    """What is known better of a family, and comes first on its CPUs, than what ``anyone`` gets."""
    found = {cpu.family: _at_level(cpu, isa, shapes, target, folder) for cpu in _families_of(isa, target)}
    return [
        replace(entry, cpu_family=family)
        for family, part in found.items()
        if part.entries != tuple(anyone)
        for entry in part.entries
    ]


class _Kept(IntEnum):
    """What of a winner serves another CPU; the default's knobs take the place of the rest.

    Between two Zens the default's were 4 % from the best for few tokens, the other family's 9 %; for many 6 %
    and 1 % (docs/lab/search.md). Those of a Zen 4 took 1.30 times as long for both on an Emerald Rapids.
    """

    LAYOUT = 0  # nothing else: it is of another vendor
    MANY = 1  # and the schedule for many tokens: it is of another family
    ALL = 2


def _at_level(
    cpu: Cpu,
    isa: Isa,
    shapes: Sequence[tuple[Shape, int]],
    target: Target,
    folder: Path | None,
    most: _Kept = _Kept.ALL,
) -> Chosen:
    near = nearest_winners(cpu, target.isas, folder)
    if near is None:
        return Chosen((), "default", f"no family of {cpu.arch} has winners: default schedules")
    kept = _Kept.ALL if near.cpu_family == cpu.family else _Kept(int(near.traits.vendor == cpu.vendor))
    entries: list[KernelEntry] = []
    moved = False
    for shape, group in shapes:
        kind = WeightKind(group=group)
        jobs = [job for job in near.winners if (job.shape, job.spec.layout.kind) == (shape, kind)]
        own = [job for job in jobs if job.spec.isa == isa.name]
        specs = [_legal(job, isa, cpu, min(kept, most)) for job in own or jobs]
        if specs and None not in specs:
            moved = moved or not own or any(spec != job.spec for spec, job in zip(specs, own, strict=True))
            made = zip(own or jobs, specs, strict=True)
            entries += [KernelEntry(spec, shape, job.threads) for job, spec in made if spec]
    if not entries:
        return Chosen((), "default", "no family has winners for these shapes: default schedules")
    tuned = near.cpu_family == cpu.family and not moved
    origin = f"winners of {near.cpu_family}"
    if near.cpu_family != cpu.family:
        origin += f" ({near.why})"
    if moved:
        origin += f", moved to {isa.name}"
    return Chosen(tuple(dict.fromkeys(entries)), "tuned" if tuned else "transferred", origin)


def _legal(job: Job, isa: Isa, cpu: Cpu, kept: _Kept) -> KernelSpec | None:
    """A winner on another level or other caches: itself where it is legal, else the nearest that is."""
    spec = replace(job.spec, isa=isa.name)
    space = space_for(spec.family, isa, regime_named(spec.regime), job.shape, cpu, spec.layout.group)
    default = replace(space.default, layout=spec.layout)
    mine, theirs = default.schedule.algorithm, find_isa(job.spec.isa, load_isas())
    gained = (mine == "tiles" and not theirs.tiles) or (mine == "mmla" and not theirs.mmla)
    foreign = kept < (_Kept.MANY if spec.regime == LARGE.name else _Kept.ALL)
    wanted = default if foreign or gained else spec
    if not space.broken(wanted):
        return wanted
    alike = [point for point in space if point.layout == spec.layout and point.shape == spec.shape]
    if wanted == default or spec.schedule.algorithm not in {point.schedule.algorithm for point in alike}:
        # Or one of the two levels lacks the unit that wins on the other: without tiles 3B's prompts took 2.6
        # times as long, and the knobs of tiles say nothing about other algorithms.
        wanted = default
        if not space.broken(wanted):
            return wanted
        alike = [point for point in alike if point.schedule.algorithm == mine] or alike
    return min(alike, key=lambda point: _distance(point, wanted), default=None)


def _distance(spec: KernelSpec, other: KernelSpec) -> tuple[bool, float]:
    """Another algorithm before any knob, then powers of two between the knobs that both have."""
    mine, theirs = dict(spec.schedule), dict(other.schedule)
    steps = sum(abs(math.log2((mine[key] + 1) / (theirs[key] + 1))) for key in mine.keys() & theirs.keys())
    return spec.schedule.algorithm != other.schedule.algorithm, steps
