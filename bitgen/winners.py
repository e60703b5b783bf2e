"""Winners that are committed for CPU families: schedules without timings, where a search and a build start.

``tune_logs/winners/<cpu family>.json`` holds, beside the schedules, what the family looks like to a search
(its vendor, the ISA levels it runs, its caches), so that a CPU without winners of its own starts from those
of the nearest family.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from bitgen import __version__
from bitgen.cpu import Cpu, Isa, accepted_isas, detect_cpu
from bitgen.errors import FileError
from bitgen.fingerprints import Fingerprints
from bitgen.measure import Job
from bitgen.paths import ensure_dir, winners_dir
from bitgen.records import dump, load, load_json
from bitgen.space import space_for
from bitgen.spec import KernelSpec, Shape, WeightKind, regime_named
from bitgen.store import RecordStore
from bitgen.whole import whole

SCHEMA = 2
_FAMILY = re.compile(r"[a-z0-9][a-z0-9_.-]{0,40}")


@dataclass(frozen=True)
class Traits:
    """What makes two CPU families alike for a search: levels of equal name run the same instructions."""

    arch: str
    vendor: str
    isas: tuple[str, ...]
    l1d_bytes: int
    l2_bytes: int
    llc_bytes: int

    @classmethod
    def of(cls, cpu: Cpu, isas: Iterable[Isa]) -> Traits:
        levels = tuple(isa.name for isa in accepted_isas(cpu, isas))
        return cls(cpu.arch, cpu.vendor, levels, cpu.l1d_bytes, cpu.l2_bytes, cpu.llc_bytes)

    def distance(self, other: Traits) -> tuple[int, float, int]:
        """The less the nearer: ISA levels only one has, powers of two between the caches, another vendor."""
        mine = (self.l1d_bytes, self.l2_bytes, self.llc_bytes)
        theirs = (other.l1d_bytes, other.l2_bytes, other.llc_bytes)
        caches = sum(abs(math.log2(a / b)) for a, b in zip(mine, theirs, strict=True))
        return len({*self.isas} ^ {*other.isas}), round(caches, 1), int(self.vendor != other.vendor)


@dataclass(frozen=True)
class FamilyWinners:
    """The winners of one CPU family, without timings, which belong to one machine; and ``why`` these."""

    cpu_family: str
    traits: Traits
    winners: tuple[Job, ...]
    why: str = "this CPU's family"


@dataclass(frozen=True)
class _Entry:
    """A winner as a file has it."""

    shape: Shape
    threads: int
    spec: KernelSpec

    @property
    def job(self) -> Job:
        return Job(self.spec, self.shape, regime_named(self.spec.regime).n_min, self.threads)


@dataclass(frozen=True)
class _File:
    schema: int
    cpu_family: str
    traits: Traits
    tuned_on: dict[str, str]
    winners: tuple[_Entry, ...]


def family_winners(cpu_family: str, folder: Path | None = None) -> tuple[Job, ...]:
    """The committed winners of a CPU family, if any. BitgenError when their file is wrong."""
    found = _winners(_family_path(cpu_family, winners_dir() if folder is None else folder))
    return found.winners if found else ()


def winners_in_force(cpu_family: str, folder: Path) -> tuple[Job, ...]:
    """The winners of a CPU family that ship with bitgen, with those in ``folder`` in their places.

    As `commit_winners` would fold them: shipped winners of weights that ``folder`` packs otherwise do not
    count. BitgenError when a file is wrong.
    """
    files = [_read(_family_path(cpu_family, at)) for at in (winners_dir(), folder)]
    shipped, own = (file.winners if file else () for file in files)
    return tuple(entry.job for entry in _folded(shipped, own))


def nearest_winners(cpu: Cpu, isas: Iterable[Isa], folder: Path | None = None) -> FamilyWinners | None:
    """The winners of this CPU's family, else of the nearest family of its architecture; None without any."""
    own = winners_dir() if folder is None else folder
    found = _winners(_family_path(cpu.family, own))
    if found:
        return found
    here = Traits.of(cpu, isas)
    others = [known for path in sorted(own.glob("*.json")) if (known := _winners(path))]
    alike = [known for known in others if known.traits.arch == here.arch and known.winners]
    if not alike:
        return None
    best = min(alike, key=lambda known: here.distance(known.traits))
    levels, caches, vendor = here.distance(best.traits)
    why = (
        f"the nearest family to {cpu.family}: {levels} ISA levels differ, caches by {caches:g} powers "
        f"of two, {'another' if vendor else 'the same'} vendor"
    )
    return FamilyWinners(best.cpu_family, best.traits, best.winners, why)


def committed_shapes(arch: str, folder: Path | None = None) -> tuple[Shape, ...]:
    """The shapes without groups that some family of an architecture has winners for, in order."""
    found = (_winners(path) for path in (winners_dir() if folder is None else folder).glob("*.json"))
    jobs = [job for known in found if known and known.traits.arch == arch for job in known.winners]
    return tuple(sorted({job.shape for job in jobs if not job.spec.layout.group}))


def export_winners(
    store: RecordStore, fingerprints: Fingerprints, cpu: Cpu, isas: Iterable[Isa], folder: Path | None = None
) -> Path:
    """Write the schedules (no timings) of the layouts chosen last to ``<folder>/<cpu family>.json``.

    Winners of shapes, ISA levels, regimes and thread counts that this store does not know stay as they are,
    except those that read another layout than the new ones of their shape and level: weights are packed once.
    ``tuned_on`` names the CPU, the compiler, the harness and the version of the newest. The text is a pure
    function of what it holds, so a diff shows what changed. Returns the path of the file.
    """
    target = _family_path(cpu.family, ensure_dir(winners_dir() if folder is None else folder))
    before = _read(target)
    kept = before.winners if before else ()
    tuned_on = dict(before.tuned_on) if before else {}
    for record in store.tunings:
        new, kind = [], record.layout.kind
        for winner in record.current(fingerprints):
            if winner.spec.layout == store.layout(record.shape, fingerprints, winner.spec.isa, kind):
                new.append(_Entry(record.shape, winner.threads, winner.spec))
                tuned_on = dump(winner.fingerprint) | {"version": __version__}
                del tuned_on["kernel"]
        kept = _folded(kept, new)
    return _write(target, _File(SCHEMA, cpu.family, Traits.of(cpu, isas), tuned_on, kept))


def commit_winners(
    cpu: Cpu, isas: Iterable[Isa], jobs: Iterable[Job], tuned_on: dict[str, str], folder: Path | None = None
) -> Path:
    """Fold ``jobs``, schedules that several machines of the family of ``cpu`` agree on, into its winners.

    What they do not cover stays, as in `export_winners`. Returns the path of the family's file.
    """
    target = _family_path(cpu.family, ensure_dir(winners_dir() if folder is None else folder))
    before = _read(target)
    kept = _folded(before.winners if before else (), [_Entry(j.shape, j.threads, j.spec) for j in jobs])
    traits = before.traits if before else Traits.of(cpu, isas)
    return _write(target, _File(SCHEMA, cpu.family, traits, tuned_on, kept))


def merge_winners(file: Path, isas: Iterable[Isa], folder: Path | None = None) -> Path:
    """Fold what somebody exported into the winners of its family in ``folder`` (None: those committed).

    Each schedule must be a legal one of today's: what comes from elsewhere is not believed. Winners of
    shapes, regimes, thread counts and ISA levels that ``file`` does not have stay. Returns the path of the
    family's file. FileError: ``file`` is no export, or holds a schedule that is not legal.
    """
    if not file.is_file():
        raise FileError(f"there is no file {file}")
    new = load(_File, load_json(file), str(file))
    if new.schema != SCHEMA or not new.winners or not _FAMILY.fullmatch(new.cpu_family):
        raise FileError(f"{file} holds no winners of a CPU family in schema {SCHEMA}")
    levels = {isa.name: isa for isa in isas}
    for entry in new.winners:
        spec, level = entry.spec, levels.get(entry.spec.isa)
        if level is None or level.name not in new.traits.isas:
            raise FileError(f"{file}: {spec.name} is for {spec.isa}, which {new.cpu_family} does not run")
        regime, group = regime_named(spec.regime), spec.layout.group
        space = space_for(spec.family, level, regime, entry.shape, detect_cpu(), group)
        if texts := [rule.text for rule in space.broken(spec) if not rule.local]:
            raise FileError(f"{file}: {spec.name} is not legal: {'; '.join(texts)}")
    target = _family_path(new.cpu_family, ensure_dir(winners_dir() if folder is None else folder))
    before = _read(target)
    merged = _folded(before.winners if before else (), new.winners)
    return _write(target, replace(new, winners=merged))


def _folded(winners: Iterable[_Entry], new: Iterable[_Entry]) -> tuple[_Entry, ...]:
    """Winners with ``new`` ones in their places, in order; what reads another layout than those goes."""
    layouts = {_weights(entry): entry.spec.layout for entry in new}
    same = (old for old in winners if layouts.get(_weights(old), old.spec.layout) == old.spec.layout)
    kept = {_slot(entry): entry for entry in (*same, *new)}
    return tuple(kept[slot] for slot in sorted(kept))


def _write(target: Path, content: _File) -> Path:
    try:
        with whole(target, synced=False) as file:
            file.write(f"{json.dumps(dump(content), indent=1)}\n".encode())
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _read(path: Path) -> _File | None:
    """What a file holds; None where there is none, or one of another schema."""
    if not path.exists():
        return None
    data = load_json(path)
    return load(_File, data, str(path)) if data.get("schema") in (SCHEMA, None) else None


def _winners(path: Path) -> FamilyWinners | None:
    file = _read(path)
    if file is None:
        return None
    return FamilyWinners(file.cpu_family, file.traits, tuple(entry.job for entry in file.winners))


def _weights(winner: _Entry) -> tuple[Shape, str, int, WeightKind]:
    """What is packed once, in one layout: for an ISA level and a number of threads."""
    return winner.shape, winner.spec.isa, winner.threads, winner.spec.layout.kind


def _slot(winner: _Entry) -> tuple[Shape, str, int, WeightKind, str]:
    return (*_weights(winner), winner.spec.regime)


def _family_path(cpu_family: str, folder: Path) -> Path:
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in cpu_family)
    return folder / f"{safe}.json"
