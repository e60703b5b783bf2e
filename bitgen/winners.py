"""Winners that are committed for CPU families: schedules without timings, where a search and a build start.

``tune_logs/winners/<cpu family>.json`` holds, beside the schedules, what the family looks like to a search
(its vendor, the ISA levels it runs, its caches), so that a CPU without winners of its own starts from those
of the nearest family.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bitgen.cpu import Cpu, Isa, accepted_isas
from bitgen.errors import BitgenError, FileError
from bitgen.paths import ensure_dir, winners_dir
from bitgen.spec import KernelSpec, Shape
from bitgen.store import Fingerprint, RecordStore

SCHEMA = 2


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

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Traits:
        sizes = (int(data[name]) for name in ("l1d_bytes", "l2_bytes", "llc_bytes"))
        return cls(str(data["arch"]), str(data["vendor"]), tuple(map(str, data["isas"])), *sizes)

    def distance(self, other: Traits) -> tuple[int, float, int]:
        """The less the nearer: ISA levels only one has, powers of two between the caches, another vendor."""
        mine = (self.l1d_bytes, self.l2_bytes, self.llc_bytes)
        theirs = (other.l1d_bytes, other.l2_bytes, other.llc_bytes)
        caches = sum(abs(math.log2(a / b)) for a, b in zip(mine, theirs, strict=True))
        return len({*self.isas} ^ {*other.isas}), round(caches, 1), int(self.vendor != other.vendor)


@dataclass(frozen=True)
class FamilyWinner:
    """A schedule that won on a CPU family; committed without its timing, which belongs to one machine."""

    shape: Shape
    threads: int
    spec: KernelSpec

    def to_dict(self) -> dict[str, Any]:
        return {"shape": self.shape.name, "threads": self.threads, "spec": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FamilyWinner:
        return cls(Shape.parse(data["shape"]), int(data["threads"]), KernelSpec.from_dict(data["spec"]))


@dataclass(frozen=True)
class FamilyWinners:
    """The winners of one CPU family, and ``why`` these."""

    cpu_family: str
    traits: Traits
    winners: tuple[FamilyWinner, ...]
    why: str = "this CPU's family"


def family_winners(cpu_family: str, folder: Path | None = None) -> tuple[FamilyWinner, ...]:
    """The committed winners of a CPU family, if any. BitgenError when their file is wrong."""
    found = _read(_family_path(cpu_family, winners_dir() if folder is None else folder))
    return found.winners if found else ()


def nearest_winners(cpu: Cpu, isas: Iterable[Isa], folder: Path | None = None) -> FamilyWinners | None:
    """The winners of this CPU's family, else of the nearest family of its architecture; None without any."""
    own = winners_dir() if folder is None else folder
    found = _read(_family_path(cpu.family, own))
    if found:
        return found
    here = Traits.of(cpu, isas)
    others = [known for path in sorted(own.glob("*.json")) if (known := _read(path))]
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


def export_winners(
    store: RecordStore, fingerprint: Fingerprint, cpu: Cpu, isas: Iterable[Isa], folder: Path | None = None
) -> Path:
    """Write the schedules (no timings) of the layouts chosen last to ``<folder>/<cpu family>.json``.

    Winners of shapes, regimes and thread counts that this store does not know stay as they are, except those
    that read another layout than the new ones of their shape: its weights are packed once. ``tuned_on`` names
    the CPU, the compiler and the templates of the newest. The text is a pure function of what it holds, so a
    diff shows what changed. Returns the path of the file.
    """
    target = _family_path(cpu.family, ensure_dir(winners_dir() if folder is None else folder))
    merged = {_slot(winner): winner for winner in family_winners(cpu.family, target.parent)}
    for record in store.tunings:
        if record.fingerprint.digest == fingerprint.digest:
            layout = store.layout(record.shape, fingerprint)
            new = [
                FamilyWinner(record.shape, w.threads, w.spec)
                for w in record.winners
                if w.spec.layout == layout
            ]
            at = {(winner.shape, winner.threads) for winner in new}
            merged = {
                slot: old
                for slot, old in merged.items()
                if old.spec.layout == layout or (old.shape, old.threads) not in at
            }
            merged |= {_slot(winner): winner for winner in new}
    content = {
        "schema": SCHEMA,
        "cpu_family": cpu.family,
        "traits": asdict(Traits.of(cpu, isas)),
        "tuned_on": asdict(fingerprint),
        "winners": [merged[slot].to_dict() for slot in sorted(merged)],
    }
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FileError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _read(path: Path) -> FamilyWinners | None:
    """What a file holds; None where there is none, or one of another schema."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read {path}: {error}") from error
    try:
        if data["schema"] != SCHEMA:
            return None
        winners = tuple(FamilyWinner.from_dict(winner) for winner in data["winners"])
        return FamilyWinners(str(data["cpu_family"]), Traits.from_dict(data["traits"]), winners)
    except (LookupError, TypeError, ValueError, AttributeError, BitgenError) as error:
        raise FileError(f"{path} does not hold winners: {error!r}") from error


def _slot(winner: FamilyWinner) -> tuple[Shape, str, int]:
    return winner.shape, winner.spec.regime, winner.threads


def _family_path(cpu_family: str, folder: Path) -> Path:
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in cpu_family)
    return folder / f"{safe}.json"
