"""What is asked of a measurement and what it answers: frozen records that validate themselves.

Nothing here compiles, forks or imports numpy, so a reader of records pays nothing for the machinery.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

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
class Load:
    """What else the machine did: its 1-minute load average and its runnable tasks (None: not known here).

    Both count the measuring processes themselves.
    """

    average: float
    runnable: int | None

    @classmethod
    def now(cls) -> Load:
        """The load of this machine at this moment; an average of 0 where the system does not tell."""
        try:
            average = os.getloadavg()[0]
        except OSError:
            average = 0.0
        try:
            runnable = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return cls(average, None)
        return cls(average, runnable)


@dataclass(frozen=True)
class Job:
    """One kernel to be proven and timed: a matmul of ``shape`` with ``n`` tokens on ``threads`` threads.

    ``cold``: every call reads another copy of the weights, from memory. ``against``: a proven kernel whose
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


@dataclass(frozen=True)
class Measurement:
    """The answer to a `Job`.

    ``times_ns``: for each repeat the time of *one* call of the whole matmul: activation quantisation, lookup
    tables, kernel and epilogue. ``against_ns``: the same for ``against``, taken in turn. Both are empty
    unless ``status`` is OK; ``detail`` says what went wrong and is empty when nothing did.
    """

    spec: KernelSpec
    shape: Shape
    n: int
    threads: int
    cold: bool
    status: Status
    detail: str = ""
    times_ns: tuple[float, ...] = ()
    against: KernelSpec | None = None
    against_ns: tuple[float, ...] = ()
    load: float = 0.0
    runnable: int | None = None

    def __post_init__(self) -> None:
        if self.status is Status.OK:
            if not self.times_ns:
                raise BitgenError(f"{self.spec.name}: a measurement that is ok needs at least one time")
            if self.against is not None and len(self.against_ns) != len(self.times_ns):
                raise BitgenError(f"{self.spec.name}: as many times of the incumbent as of the candidate")
        elif self.times_ns or self.against_ns:
            raise BitgenError(f"{self.spec.name}: a measurement that is {self.status.value} has no times")
        elif not self.detail:
            raise BitgenError(f"{self.spec.name}: a measurement that is {self.status.value} says why")
        if self.against is None and self.against_ns:
            raise BitgenError(f"{self.spec.name}: times of an incumbent that is not named")
        if not all(math.isfinite(t) and t > 0 for t in (*self.times_ns, *self.against_ns)):
            raise BitgenError(f"{self.spec.name}: times are positive and finite")

    @classmethod
    def of(
        cls,
        job: Job,
        status: Status,
        detail: str = "",
        times_ns: Sequence[float] = (),
        against_ns: Sequence[float] = (),
        load: Load | None = None,
    ) -> Measurement:
        """The answer to ``job``; ``load`` is the machine's when it was measured (default: now)."""
        load = load or Load.now()
        return cls(
            job.spec,
            job.shape,
            job.n,
            job.threads,
            job.cold,
            status,
            detail,
            tuple(times_ns),
            job.against if against_ns else None,
            tuple(against_ns),
            load.average,
            load.runnable,
        )

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def key(self) -> tuple[KernelSpec, Shape, int, int, bool]:
        """The same as the key of the job it answers."""
        return (self.spec, self.shape, self.n, self.threads, self.cold)

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

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_dict(),
            "shape": [self.shape.m, self.shape.k],
            "n": self.n,
            "threads": self.threads,
            "cold": self.cold,
            "status": self.status.value,
            "detail": self.detail,
            "times_ns": list(self.times_ns),
            "against": self.against.to_dict() if self.against else None,
            "against_ns": list(self.against_ns),
            "load": self.load,
            "runnable": self.runnable,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        against = data.get("against")
        m, k = data["shape"]
        runnable = data.get("runnable")
        return cls(
            spec=KernelSpec.from_dict(data["spec"]),
            shape=Shape(int(m), int(k)),
            n=int(data["n"]),
            threads=int(data["threads"]),
            cold=bool(data["cold"]),
            status=Status(data["status"]),
            detail=str(data.get("detail", "")),
            times_ns=tuple(float(t) for t in data["times_ns"]),
            against=KernelSpec.from_dict(against) if against else None,
            against_ns=tuple(float(t) for t in data.get("against_ns", ())),
            load=float(data.get("load", 0.0)),
            runnable=None if runnable is None else int(runnable),
        )


@dataclass(frozen=True)
class Missing:
    """What a replay answers for a job that was never recorded."""

    job: Job

    @property
    def detail(self) -> str:
        job = self.job
        return f"{job.spec.name} was never measured on {job.shape.name}, n = {job.n}, {job.threads} threads"


@dataclass(frozen=True)
class Limits:
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
            raise BitgenError("limits need at least one bandwidth pattern and one ISA level")

    @property
    def best_dram_gbs(self) -> float:
        """The most bandwidth of any pattern: the roof that decode is held against."""
        return max(self.dram_gbs.values())

    @property
    def best_pattern(self) -> str:
        return max(self.dram_gbs, key=lambda name: self.dram_gbs[name])

    def to_dict(self) -> dict[str, Any]:
        return {"threads": self.threads, "dram_gbs": dict(self.dram_gbs), "peak_gops": dict(self.peak_gops)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Limits:
        return cls(
            int(data["threads"]),
            {str(k): float(v) for k, v in data["dram_gbs"].items()},
            {str(k): float(v) for k, v in data["peak_gops"].items()},
        )


# Of the best round of a run. One loop of tiles runs at 4.3 or, for seconds at a time, at 1.1 TOPS on some
# hosts: half of the best is a factor of two from either.
FAST_SHARE = 0.5


@dataclass(frozen=True)
class TileState:
    """What a kernel did in the rounds of one state of the tile unit; medians, None without rounds."""

    rounds: int
    time_ns: float | None
    probe_gops: float | None


@dataclass(frozen=True)
class Race(Mapping[KernelSpec, Sequence[float]]):
    """Finalists timed in interleaved rounds, a mapping: ``race[spec][i]`` is nanoseconds a call in round i.

    A finalist that crashed or hung on the way is in ``dropped`` with the reason and is no key.
    ``read_ns_a_byte`` are the same rounds of the best memory-reading probe, in nanoseconds a byte of packed
    weights, ``tile_gops`` those of the probe of tiles, in 10^9 operations a second; empty without the probe.
    """

    times_ns: Mapping[KernelSpec, Sequence[float]]
    dropped: Mapping[KernelSpec, str] = field(default_factory=dict)
    read_ns_a_byte: Sequence[float] = ()
    tile_gops: Sequence[float] = ()

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

    def tile_states(self, spec: KernelSpec, best_gops: float) -> tuple[TileState, TileState] | None:
        """A kernel in the fast and in the slow rounds; None when the race had no probe of tiles.

        A round is fast when its own probe reached `FAST_SHARE` of ``best_gops``, the best round of the run.
        """
        if not self.tile_gops:
            return None
        rounds = list(zip(self[spec], self.tile_gops, strict=True))
        fast = [(time_ns, gops) for time_ns, gops in rounds if gops >= FAST_SHARE * best_gops]
        slow = [(time_ns, gops) for time_ns, gops in rounds if gops < FAST_SHARE * best_gops]
        return _state(fast), _state(slow)

    def median_ns(self, spec: KernelSpec, best_gops: float) -> float:
        """The median of the fast rounds (`tile_states`); of all when none is fast or nothing tells."""
        states = self.tile_states(spec, best_gops)
        return (states and states[0].time_ns) or statistics.median(self[spec])


def _state(rounds: Sequence[tuple[float, float]]) -> TileState:
    if not rounds:
        return TileState(0, None, None)
    times, gops = zip(*rounds, strict=True)
    return TileState(len(rounds), statistics.median(times), statistics.median(gops))


class Runner(Protocol):
    """Answers questions about kernels: `LocalRunner` by running them, `ReplayRunner` from records."""

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        """One answer for each job, in the order of the jobs. A failure is an answer, never an exception."""
        ...

    def race(
        self,
        specs: Sequence[KernelSpec],
        shape: Shape,
        n: int,
        threads: int,
        rounds: int,
        cold: bool = False,
        seed: int = 0,
    ) -> Race:
        """Time kernels in ``rounds`` interleaved rounds; each round's order is shuffled by ``seed``."""
        ...

    def limits(self, threads: int, isas: Sequence[str]) -> Limits:
        """What the machine can do at most on ``threads`` threads with these ISA levels."""
        ...
