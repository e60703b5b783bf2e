"""Which bundle to use on a CPU, with the reason for each that is not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bitgen.bundle.manifest import Bundle
from bitgen.cpu import Cpu
from bitgen.errors import UnsupportedError


@dataclass(frozen=True)
class Decision:
    """Whether a CPU can use a bundle, and why."""

    bundle: Bundle
    accepted: bool
    reason: str = field(compare=False)


def choose_bundle(bundles: Iterable[Bundle], cpu: Cpu) -> tuple[Bundle | None, list[Decision]]:
    """The bundle to use on ``cpu``, None when it runs none of them, and a decision for each.

    Among those it runs: made for this CPU family before others, tuned before untuned, more required features
    before fewer (they use more of the CPU), the first given before later ones.
    """
    decisions = [judge(bundle, cpu) for bundle in bundles]
    usable = [decision.bundle for decision in decisions if decision.accepted]
    return max(usable, key=lambda bundle: _preference(bundle, cpu), default=None), decisions


def _preference(bundle: Bundle, cpu: Cpu) -> tuple[bool, bool, int]:
    manifest = bundle.manifest
    return manifest.cpu_family == cpu.family, manifest.is_tuned, len(manifest.features)


def judge(bundle: Bundle, cpu: Cpu) -> Decision:
    """Whether ``cpu`` can run the bundle's library."""
    manifest = bundle.manifest
    if (manifest.system, manifest.arch) != (cpu.os, cpu.arch):
        reason = f"it is for {manifest.system} on {manifest.arch}, this is {cpu.os} on {cpu.arch}"
        return Decision(bundle, False, reason)
    missing = sorted(manifest.features - cpu.features)
    if missing:
        reason = f"it is for {manifest.cpu_family}, this CPU ({cpu.family}) lacks {', '.join(missing)}"
        return Decision(bundle, False, reason)
    tuned = "tuned" if manifest.is_tuned else "untuned"
    where = (
        "this CPU family"
        if manifest.cpu_family == cpu.family
        else f"{manifest.cpu_family}, which also runs here"
    )
    return Decision(bundle, True, f"{tuned}, for {where}")


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
