"""Every schedule of every space against the reference: what `bitgen verify` runs and the documents count."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from bitgen.cpu import Cpu, find_isa, load_isas
from bitgen.errors import BitgenError
from bitgen.measure.jobs import Status
from bitgen.measure.runner import LocalRunner, Verification
from bitgen.progress import Progress, Report
from bitgen.render import inherits
from bitgen.space import space_for
from bitgen.spec import REGIMES, KernelSpec, Regime, Shape

# The rules of a space depend on the shape. The points legal for one of these are all there are for real
# shapes: a long k allows every kc, a short one every panel of whole columns.
SHAPES = (Shape(3200, 8640), Shape(8640, 3200), Shape(530, 97))


@dataclass
class SweepCounts:
    """What a sweep did. ``cases`` counts (schedule, shape, n, data): each compared every integer or float.

    ``inherited`` kernels are word for word those of their ISA level's parent, which was verified.
    """

    schedules: int = 0
    cases: int = 0
    inherited: int = 0
    failures: list[Verification] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return not self.failures

    def add(self, verification: Verification) -> None:
        """Count one kernel."""
        self.schedules += 1
        self.cases += verification.cases
        if verification.status is not Status.OK:
            self.failures.append(verification)

    def __str__(self) -> str:
        verdict = "all exact" if self.exact else f"{len(self.failures)} NOT exact"
        more = f" ({self.inherited} more have the text of their parent level)" if self.inherited else ""
        return f"{self.schedules} schedules, {self.cases} (schedule, shape, n) cases: {verdict}{more}"


def sweep(
    runner: LocalRunner,
    specs: Sequence[KernelSpec],
    deep: bool = True,
    progress: Report | None = None,
) -> SweepCounts:
    """Verify each of ``specs``, at least one; ``progress`` is called after each kernel."""
    if not specs:
        raise BitgenError("no kernel to verify: name ISA levels, families and regimes that have some")
    counts = SweepCounts()
    for verification in runner.verify(specs, deep=deep):
        counts.add(verification)
        if progress is not None:
            progress(Progress(str(counts), counts.schedules, len(specs), "schedules"))
    return counts


def all_points(
    cpu: Cpu,
    isas: Sequence[str],
    families: Sequence[str],
    regimes: Sequence[Regime] = REGIMES,
    shapes: Sequence[Shape] = SHAPES,
    group: int = 0,
) -> list[KernelSpec]:
    """Every schedule that is legal for one of ``shapes``, each once; ``group``: see `space_for`."""
    levels = load_isas()
    spaces = (
        space_for(family, find_isa(isa, levels), regime, shape, cpu, group)
        for isa in isas
        for family in families
        for regime in regimes
        for shape in shapes
    )
    return list(dict.fromkeys(spec for space in spaces for spec in space))


def own_points(points: Sequence[KernelSpec]) -> list[KernelSpec]:
    """Those of ``points`` whose text no other of them has on an ISA level below."""
    known = set(points)

    def is_inherited(spec: KernelSpec) -> bool:
        parent = inherits(spec)
        if parent is None:
            return False
        below = replace(spec, isa=parent)
        return below in known or is_inherited(below)

    return [spec for spec in points if not is_inherited(spec)]


def exact_sweep(
    runner: LocalRunner,
    cpu: Cpu,
    isas: Sequence[str],
    families: Sequence[str],
    sample: int | None = None,
    seed: int = 0,
    regimes: Sequence[Regime] = REGIMES,
    progress: Report | None = None,
    inherit: bool = True,
    group: int = 0,
) -> SweepCounts:
    """Verify every schedule of the spaces of ``isas`` x ``families`` x ``regimes``, or ``sample`` of each.

    In a whole sweep a kernel that has the text of its ISA level's parent, which is verified too, is counted
    and not compiled again; ``inherit`` False compiles it all the same, with the flags of its own level.
    """
    if sample is None:
        points = all_points(cpu, isas, families, regimes, group=group)
        own = own_points(points) if inherit else points
        counts = sweep(runner, own, progress=progress)
        counts.inherited = len(points) - len(own)
        return counts
    draw = random.Random(seed)  # noqa: S311 - a choice, no secret
    chosen: list[KernelSpec] = []
    for isa in isas:
        for family in families:
            for regime in regimes:
                points = all_points(cpu, [isa], [family], [regime], group=group)
                chosen += draw.sample(points, min(sample, len(points)))
    return sweep(runner, chosen, progress=progress)
