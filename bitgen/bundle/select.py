"""Which bundle to use on a CPU, with the reason for each that is not."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field

from bitgen.bundle.manifest import Bundle
from bitgen.bundle.measured import Measured
from bitgen.cpu import Cpu, Isa, accepted_isas, load_isas
from bitgen.errors import UnsupportedError


@dataclass(frozen=True)
class Decision:
    """Whether a CPU can use a bundle, and why."""

    bundle: Bundle
    accepted: bool
    reason: str = field(compare=False)


# What ranks bundles that a CPU runs, most important first, each with what the better one is.
_RANKS = (
    "was faster in the last race here",
    "is for this CPU family",
    "has better tuned kernels",
    "was built here",
    "uses more of the CPU",
    "is of a newer bitgen",
)
_LABELS = {"tuned": "tuned", "transferred": "tuned on another CPU family", "default": "untuned"}
_WORTH = {"default": 0, "transferred": 1, "tuned": 2}


def choose_bundle(
    bundles: Iterable[Bundle],
    cpu: Cpu,
    refused: Set[str] = frozenset(),
    measured: Measured | None = None,
) -> tuple[Bundle | None, list[Decision]]:
    """The bundle to use on ``cpu``, None when it runs none of them, and a decision for each.

    Among those it runs: the fastest, where all were ``measured``; else made for this CPU family before
    others, tuned before untuned, built here before installed, more required features before fewer (they use
    more of the CPU), of a newer bitgen before an older one, the first given before later ones. ``refused``:
    see `refused_features`.
    """
    decisions = [judge(bundle, cpu, refused) for bundle in bundles]
    found = ranked(decisions, cpu, measured)
    return found[0][0].bundle if found else None, decisions


def _preference(bundle: Bundle, cpu: Cpu) -> tuple[bool, int, bool, int, tuple[int, ...]]:
    manifest = bundle.manifest
    age = tuple(int(number) for number in re.findall(r"\d{1,9}", manifest.bitgen_version))
    same, worth = manifest.cpu_family == cpu.family, _WORTH[bundle.label]
    return same, worth, bundle.origin is None, len(manifest.features), age


def ranked(
    decisions: Iterable[Decision], cpu: Cpu, measured: Measured | None = None
) -> list[tuple[Decision, str]]:
    """Accepted decisions, best first, each with what the one before it has more; empty for the first."""
    accepted = [decision for decision in decisions if decision.accepted]
    times = [measured.of(decision.bundle) if measured else None for decision in accepted]
    raced = None not in times  # a bundle that is new since the race makes it void

    def preference(at: int) -> tuple[object, ...]:
        return (-(times[at] or 0) if raced else 0, *_preference(accepted[at].bundle, cpu))

    found, above = [], None
    for at in sorted(range(len(accepted)), key=preference, reverse=True):
        decision, mine = accepted[at], preference(at)
        pairs = zip(_RANKS, above or mine, mine, strict=True)
        why = next((f"the one above {rank}" for rank, theirs, own in pairs if theirs != own), "")
        found.append((decision, why or ("the one above was found first" if above else "")))
        above = mine
    return found


def refused_features(cpu: Cpu) -> frozenset[str]:
    """Features that this machine's ``cpu`` has and the system refuses to this process: AMX's registers.

    Asking for them is granting them, to this process only.
    """
    tiles = frozenset(feature for feature in cpu.features if feature.startswith("amx_"))
    if not tiles or cpu.os != "Linux":
        return frozenset()
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # as csrc/arch_x86_64.h
    granted = ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    return frozenset() if granted else tiles


def judge(bundle: Bundle, cpu: Cpu, refused: Set[str] = frozenset()) -> Decision:
    """Whether ``cpu`` can run the bundle's library, without what the system has ``refused``."""
    manifest = bundle.manifest
    if (manifest.system, manifest.arch) != (cpu.os, cpu.arch):
        reason = f"it is for {manifest.system} on {manifest.arch}, this is {cpu.os} on {cpu.arch}"
        return Decision(bundle, False, reason)
    missing = sorted(manifest.features - cpu.features)
    if missing:
        reason = f"it is for {manifest.cpu_family}, this CPU ({cpu.family}) lacks {', '.join(missing)}"
        return Decision(bundle, False, reason)
    if withheld := sorted(manifest.features & refused):
        reason = f"the system refuses {', '.join(withheld)} to this process"
        return Decision(bundle, False, reason)
    if manifest.dispatches:
        return Decision(bundle, True, f"it serves every {manifest.arch} CPU with the best of its ISA levels")
    where = (
        "this CPU family"
        if manifest.cpu_family == cpu.family
        else f"{manifest.cpu_family}, which also runs here"
    )
    return Decision(bundle, True, f"{_LABELS[bundle.label]}, for {where}")


def level_below_best(bundle: Bundle, cpu: Cpu, refused: Set[str] = frozenset()) -> tuple[Isa, Isa] | None:
    """The best ISA level of a library on ``cpu`` and that CPU's own, where this is a better one.

    Such a library was made on another CPU that had this folder (a home on a network, an image made
    elsewhere), or for less than this one: with --isa, or under BITGEN_ISA_CAP. It is exact, and slow.
    """
    levels = [isa for isa in accepted_isas(cpu, load_isas()) if not isa.requires & refused]
    own = next((isa for isa in levels if isa.name in bundle.manifest.isas), None)
    return None if own in (None, levels[0]) else (own, levels[0])


def require_runnable(bundle: Bundle, cpu: Cpu) -> None:
    """UnsupportedError with the reason when ``cpu`` cannot run the bundle's library."""
    decision = judge(bundle, cpu)
    if not decision.accepted:
        raise UnsupportedError(f"cannot use {bundle.path}: {decision.reason}")


def describe(decisions: Sequence[Decision]) -> list[str]:
    """One line for each decision."""
    return [
        f"{d.bundle.path.name}: {'accepted' if d.accepted else 'rejected'}, {d.reason}" for d in decisions
    ]
