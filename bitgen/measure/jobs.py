"""What is asked of a measurement and what it answers: frozen records that validate themselves.

Nothing here compiles, forks or renders, so a reader of records pays nothing for the machinery.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from bitgen.errors import BitgenError
from bitgen.spec import KernelSpec, Shape, regime_of


class Status(Enum):
    """How a measurement ended. Only OK has times."""

    OK = "ok"
    COMPILE_ERROR = "compile error"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    INCORRECT = "incorrect"


@dataclass(frozen=True)
class Job:
    """One kernel to be verified and timed: a matmul of ``shape`` with ``n`` tokens on ``threads`` threads.

    ``cold``: every call reads another copy of the weights, from memory. ``against``: a verified kernel whose
    times are taken in turn with the candidate's (A B A B), so that both saw the same moments.
    """

    spec: KernelSpec
    shape: Shape
    n: int
    threads: int = 1
    cold: bool = False
    against: KernelSpec | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise BitgenError(f"threads must be at least 1, not {self.threads}")
        for spec in (self.spec, self.against):
            if spec is None:
                continue
            if regime_of(self.n).name != spec.regime:
                raise BitgenError(f"{spec.name} is a kernel for regime {spec.regime}, not for n = {self.n}")
            if spec.shape is not None and spec.shape != self.shape:
                raise BitgenError(f"{spec.name} is a kernel for {spec.shape.name}, not for {self.shape.name}")

    @property
    def key(self) -> tuple[KernelSpec, Shape, int, int, bool]:
        """What decides the answer: everything but the kernel it is compared with."""
        return (self.spec, self.shape, self.n, self.threads, self.cold)

    @property
    def conditions(self) -> tuple[object, ...]:
        """What jobs of one batch have in common: everything but their kernels."""
        return (self.shape, self.n, self.threads, self.cold, self.spec.shape)


def batches(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that follow each other, at most ``size``, cut where more than their kernels differs."""
    batch: list[Job] = []
    for job in jobs:
        if batch and (len(batch) == size or job.conditions != batch[0].conditions):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


@dataclass(frozen=True)
class RaceJob:
    """Kernels to be timed in ``rounds`` interleaved rounds; ``seed`` shuffles the order of each round."""

    specs: tuple[KernelSpec, ...]
    shape: Shape
    n: int
    threads: int
    rounds: int
    cold: bool = False
    seed: int = 0

    @property
    def key(self) -> tuple[Shape, int, int, bool, int, int, tuple[KernelSpec, ...]]:
        """What decides the answer, as the store keeps it."""
        return (self.shape, self.n, self.threads, self.cold, self.rounds, self.seed, self.specs)


@dataclass(frozen=True)
class Measurement:
    """The answer to ``job``.

    ``times_ns``: for each repeat the time of *one* call of the whole matmul: activation quantisation, lookup
    tables, kernel and epilogue. ``against_ns``: the same for ``job.against``, taken in turn; empty where that
    was not timed. Both are empty unless ``status`` is OK; ``detail`` says what went wrong and is empty when
    nothing did. BitgenError for a measurement that contradicts itself.
    """

    job: Job
    status: Status
    detail: str = ""
    times_ns: tuple[float, ...] = ()
    against_ns: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        name = self.job.spec.name
        if self.status is Status.OK:
            if not self.times_ns:
                raise BitgenError(f"{name}: a measurement that is ok needs at least one time")
            if self.against_ns and len(self.against_ns) != len(self.times_ns):
                raise BitgenError(f"{name}: as many times of the incumbent as of the candidate")
        elif self.times_ns or self.against_ns:
            raise BitgenError(f"{name}: a measurement that is {self.status.value} has no times")
        elif not self.detail:
            raise BitgenError(f"{name}: a measurement that is {self.status.value} says why")
        if self.job.against is None and self.against_ns:
            raise BitgenError(f"{name}: times of an incumbent that is not named")
        if not all(math.isfinite(t) and t > 0 for t in (*self.times_ns, *self.against_ns)):
            raise BitgenError(f"{name}: times are positive and finite")

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def median_ns(self) -> float:
        """The median time of one call; infinity when the kernel has no times."""
        return statistics.median(self.times_ns) if self.times_ns else math.inf

    @property
    def ratio(self) -> float | None:
        """The median of candidate / incumbent over the repeats: below 1 is faster. None without incumbent."""
        if not self.against_ns:
            return None
        return statistics.median(t / a for t, a in zip(self.times_ns, self.against_ns, strict=True))


@dataclass(frozen=True)
class Missing:
    """What a replay answers for a job that was never recorded."""

    job: Job

    @property
    def detail(self) -> str:
        job = self.job
        return f"{job.spec.name} was never measured on {job.shape.name}, n = {job.n}, {job.threads} threads"


@dataclass(frozen=True)
class MachinePeak:
    """What this machine can do at most on ``threads`` threads, measured by generated kernels.

    ``dram_gbs``: for each access pattern (its name: streams, prefetch distance in bytes) the bandwidth of
    reading memory, in 10^9 bytes a second. ``peak_gops``: for each ISA level the rate of int8 multiply-adds
    in registers, in 10^9 operations a second; a multiply and an add count as two.
    """

    threads: int
    dram_gbs: Mapping[str, float]
    peak_gops: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.dram_gbs or not self.peak_gops:
            raise BitgenError("a machine's peak needs at least one bandwidth pattern and one ISA level")

    @property
    def best_dram_gbs(self) -> float:
        """The most bandwidth of any pattern: what decode is compared with."""
        return max(self.dram_gbs.values())

    @property
    def best_pattern(self) -> str:
        return max(self.dram_gbs, key=lambda name: self.dram_gbs[name])


class Timed:
    """A record with a ``measurement``: which kernel that was of, and its time."""

    if TYPE_CHECKING:  # a field of the records

        @property
        def measurement(self) -> Measurement: ...

    @property
    def spec(self) -> KernelSpec:
        return self.measurement.job.spec

    @property
    def shape(self) -> Shape:
        return self.measurement.job.shape

    @property
    def n(self) -> int:
        return self.measurement.job.n

    @property
    def threads(self) -> int:
        return self.measurement.job.threads

    @property
    def time_ns(self) -> float:
        """The median time of one call."""
        return self.measurement.median_ns


class Rates(Timed):
    """What the time of a ``measurement`` means: rates, and the share of the roofline that it reaches."""

    if TYPE_CHECKING:  # a field of the records

        @property
        def limit_ns(self) -> float: ...

    @property
    def weight_gbs(self) -> float:
        """Packed bytes read, in 10^9 bytes a second."""
        return self.spec.layout.packed_bytes(self.shape) / self.time_ns

    @property
    def gops(self) -> float:
        """10^9 operations a second; a multiply and an add count as two."""
        return 2 * self.shape.m * self.shape.k * self.n / self.time_ns

    @property
    def roofline_share(self) -> float:
        """Share of the machine's peak: 1.0 is the roofline, ``limit_ns`` a call."""
        return self.limit_ns / self.time_ns


@dataclass(frozen=True)
class Race(Mapping[KernelSpec, Sequence[float]]):
    """Kernels timed in interleaved rounds, a mapping: ``race[spec][i]`` is nanoseconds a call in round i.

    A kernel that crashed or hung on the way is in ``dropped`` with the reason and is no key.
    ``read_ns_a_byte`` are the same rounds of the best memory-reading probe, in nanoseconds a byte of packed
    weights; empty without the probe. ``peak_gops`` is by ISA level what its fastest probe reached in the same
    rounds, by the median as kernels' times are: 10^9 int8 multiplies and adds a second.
    """

    times_ns: Mapping[KernelSpec, Sequence[float]]
    dropped: Mapping[KernelSpec, str] = field(default_factory=dict)
    read_ns_a_byte: Sequence[float] = ()
    peak_gops: Mapping[str, float] = field(default_factory=dict)

    def __getitem__(self, spec: KernelSpec) -> Sequence[float]:
        return self.times_ns[spec]

    def __iter__(self) -> Iterator[KernelSpec]:
        return iter(self.times_ns)

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def read_gbs(self) -> float | None:
        """The memory bandwidth of the probe in the race's own moments, in 10^9 bytes a second."""
        return 1 / statistics.median(self.read_ns_a_byte) if self.read_ns_a_byte else None


class Runner(Protocol):
    """Answers questions about kernels: `LocalRunner` by running them, a replay from records."""

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        """One answer for each job, in the order of the jobs. A failure is an answer, never an exception."""
        ...

    def race(self, job: RaceJob) -> Race:
        """Time the kernels of ``job`` beside each other."""
        ...

    def machine_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        """What the machine can do at most on ``threads`` threads with these ISA levels."""
        ...
