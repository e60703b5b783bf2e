# ruff: noqa: ARG005 - a fake takes the arguments of what it stands for
"""A machine that does not exist: spaces with a known optimum, and recorded noisy timings of every point."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from replay import ReplayRunner

from bitgen.cpu import Isa, find_isa, load_isas
from bitgen.fingerprints import Fingerprint
from bitgen.measure import Job, MachinePeak, Measurement, Missing, Race, RaceJob, Runner, Status
from bitgen.search import Plan, SearchConfig, Target, load_search_config
from bitgen.spec import KernelSpec, Layout, Schedule, Shape

WIDE, TALL = Shape(640, 256), Shape(256, 512)
FINGERPRINT = Fingerprint("zen5 26 68", "gcc 12", "abcd", "1234")


def fingerprints(spec: KernelSpec) -> Fingerprint:  # noqa: ARG001 - all kernels have the same
    return FINGERPRINT


SCALAR: Isa = find_isa("scalar", load_isas())
SMALL_AXES = {"streams": (1, 2, 4), "unroll": (1, 2, 4), "prefetch": (0, 512, 1024)}
LARGE_AXES = {
    "streams": (1, 2, 4, 8),
    "nr": (1, 2, 3, 4),
    "unroll": (1, 2, 4, 8),
    "prefetch": (0, 1, 2, 3, 4),
}
SPEED = {
    "i2s": 1.0,
    "tl1": 1.5,
    "tl2": 1.2,
    "t5": 1.4,
    "tl5": 1.3,
}  # a family's best time, in units of I2_S's


@dataclass(frozen=True)
class Grid:
    """A stand-in for `bitgen.space.Space`: every combination of knob values in two layouts."""

    family: str
    isa: Isa
    regime: str
    axes: Mapping[str, tuple[int, ...]]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return Layout(self.family, 16), Layout(self.family, 32)

    @cached_property
    def points(self) -> tuple[KernelSpec, ...]:
        return tuple(
            self.make(layout, **dict(zip(self.axes, values, strict=True)))
            for layout in self.layouts
            for values in product(*self.axes.values())
        )

    def make(self, layout: Layout, **values: int) -> KernelSpec:
        return KernelSpec(
            self.family, self.isa.name, self.regime, layout, Schedule("direct", tuple(values.items()))
        )

    @property
    def default(self) -> KernelSpec:
        return self.points[0]

    @property
    def known_good(self) -> tuple[KernelSpec, ...]:
        return self.points[:2]

    def __iter__(self) -> Iterator[KernelSpec]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def spaces(axes: Mapping[str, tuple[int, ...]] = SMALL_AXES) -> Callable[[str, Isa, str, Shape], Any]:
    return lambda family, isa, regime, shape: Grid(family, isa, regime, axes)


def true_ns(spec: KernelSpec, shape: Shape, n: int) -> float:
    """The best point is the middle of each axis, every step away costs; layout 32 suits the tall shape."""
    wanted = {"streams": 2, "unroll": 2, "prefetch": 512 if spec.schedule["prefetch"] > 9 else 2, "nr": 3}
    steps = sum(
        abs(math.log2((value + 1) / (wanted[knob] + 1))) if knob != "prefetch" else abs(value != wanted[knob])
        for knob, value in spec.schedule
    )
    rows32 = spec.layout.row_block == 32
    fits = rows32 == (shape == TALL)
    base = shape.m * shape.k * n * 0.01 * SPEED[spec.family]
    return base * (1 + 0.15 * steps) * (1.0 if fits else 1.08)


def measured(job: Job, noise: float, seed: int = 0, status: Status = Status.OK) -> Measurement:
    """What the machine answers: nine repeats with log-normal noise and, if any, an occasional hiccup."""
    if status is not Status.OK:
        return Measurement(job, status, "made to fail")
    draw = random.Random(f"{seed} {job.spec.name} {job.shape.name} {job.n} {job.threads}")
    time_ns = true_ns(job.spec, job.shape, job.n)
    hiccups = 0.05 if noise else 0.0
    times = [
        time_ns * math.exp(draw.gauss(0, noise)) * (1.5 if draw.random() < hiccups else 1) for _ in range(9)
    ]
    return Measurement(job, status, times_ns=tuple(times))


def config(**changes: Any) -> SearchConfig:
    return replace(load_search_config(), **changes)


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "model": "toy",
        "targets": (Target(WIDE, ("qkv",), 3), Target(TALL, ("down",), 3)),
        "families": ("i2s", "tl1"),
        "isas": (SCALAR,),
        "regimes": ("n1", "large"),
        "threads": (1,),
        "objective": "balanced",
        "seed": 0,
        "trials": 300,
        "timeout_s": None,
        "race_blocks": 3,
    }
    return Plan(**{**values, **changes})


def runner(
    plan: Plan,
    axes: Mapping[str, tuple[int, ...]] = SMALL_AXES,
    noise: float = 0.02,
    seed: int = 0,
    fails: Callable[[KernelSpec, Shape], Status] = lambda spec, shape: Status.OK,
) -> ReplayRunner:
    """Recorded timings of every point of every space of ``plan``."""
    regimes = load_search_config().regimes
    records = []
    for family, isa, regime, threads in product(plan.families, plan.isas, plan.regimes, plan.threads):
        for spec, shape in product(Grid(family, isa, regime, axes), plan.shapes):
            job = Job(spec, shape, regimes[regime].n, threads, regimes[regime].cold)
            records.append(measured(job, noise, seed, fails(spec, shape)))
    peaks = [
        MachinePeak(threads, {"4 streams": 1000.0}, {isa.name: 1e6 for isa in plan.isas})
        for threads in plan.threads
    ]
    return ReplayRunner(records, peaks)


class CountingRunner:
    """Hands everything on to ``inner`` and remembers which jobs came by."""

    def __init__(self, inner: Runner) -> None:
        self.inner = inner
        self.jobs: list[Job] = []
        self.races: list[tuple[KernelSpec, ...]] = []

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        for job in jobs:
            self.jobs.append(job)
            yield from self.inner.measure([job])

    def race(self, job: RaceJob) -> Race:
        self.races.append(job.specs)
        return self.inner.race(job)

    def machine_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        return self.inner.machine_peak(threads, isas)
