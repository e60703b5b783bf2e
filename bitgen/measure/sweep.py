"""Every schedule of every space against the reference: what `bitgen check` runs and the documents count."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bitgen.measure.local import LocalRunner, Proof
from bitgen.measure.records import Status
from bitgen.space import space_for
from bitgen.spec import REGIMES, KernelSpec, Regime, Shape
from bitgen.target import Cpu, find_isa, load_isas

# The rules of a space depend on the shape. The points legal for one of these are all there are for real
# shapes: a long k allows every kc, a short one every panel of whole columns.
SHAPES = (Shape(3200, 8640), Shape(8640, 3200), Shape(530, 97))


@dataclass
class SweepCounts:
    """What a sweep did. ``cases`` counts (schedule, shape, n, data): each compared every integer or float."""

    schedules: int = 0
    cases: int = 0
    failures: list[Proof] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not self.failures

    def add(self, proof: Proof) -> None:
        """Count one kernel."""
        self.schedules += 1
        self.cases += proof.cases
        if proof.status is not Status.OK:
            self.failures.append(proof)

    def __str__(self) -> str:
        verdict = "all exact" if self.exact else f"{len(self.failures)} NOT exact"
        return f"{self.schedules} schedules, {self.cases} (schedule, shape, n) cases: {verdict}"


def sweep(
    runner: LocalRunner,
    specs: Sequence[KernelSpec],
    deep: bool = True,
    progress: Callable[[SweepCounts], None] | None = None,
) -> SweepCounts:
    """Prove each of ``specs``; ``progress`` sees the counts after each kernel."""
    counts = SweepCounts()
    for proof in runner.prove(specs, deep=deep):
        counts.add(proof)
        if progress is not None:
            progress(counts)
    return counts


def all_points(
    cpu: Cpu,
    isas: Sequence[str],
    families: Sequence[str],
    regimes: Sequence[Regime] = REGIMES,
    shapes: Sequence[Shape] = SHAPES,
) -> list[KernelSpec]:
    """Every schedule that is legal for one of ``shapes``, each once."""
    levels = load_isas()
    spaces = (
        space_for(family, find_isa(isa, levels), regime, shape, cpu)
        for isa in isas
        for family in families
        for regime in regimes
        for shape in shapes
    )
    return list(dict.fromkeys(spec for space in spaces for spec in space))


def exact_sweep(
    runner: LocalRunner,
    cpu: Cpu,
    isas: Sequence[str],
    families: Sequence[str],
    sample: int | None = None,
    seed: int = 0,
    regimes: Sequence[Regime] = REGIMES,
    progress: Callable[[SweepCounts], None] | None = None,
) -> SweepCounts:
    """Prove every schedule of the spaces of ``isas`` x ``families`` x ``regimes``, or ``sample`` of each."""
    if sample is None:
        return sweep(runner, all_points(cpu, isas, families, regimes), progress=progress)
    draw = random.Random(seed)  # noqa: S311 - a choice, no secret
    chosen: list[KernelSpec] = []
    for isa in isas:
        for family in families:
            for regime in regimes:
                points = all_points(cpu, [isa], [family], [regime])
                chosen += draw.sample(points, min(sample, len(points)))
    return sweep(runner, chosen, progress=progress)
