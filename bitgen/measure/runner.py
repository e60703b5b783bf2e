"""This process: compile candidates, ask the worker to verify and time them, and tell what came of it.

Nothing that was generated is loaded here: what a candidate does, it does to the worker.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType

from bitgen.cpu import Cpu
from bitgen.errors import BitgenError
from bitgen.measure.candidates import Candidates, Render
from bitgen.measure.client import WorkerClient, WorkerDiedError
from bitgen.measure.harness import Functions, build_harness
from bitgen.measure.jobs import Job, MachinePeak, Measurement, Missing, Race, RaceJob, Status, batches
from bitgen.measure.lock import MachineLock
from bitgen.measure.probes import (
    DEFAULT_PATTERN,
    DOT_SHAPE,
    LAYOUT,
    PATTERNS,
    READ_SHAPE,
    Fma,
    PeakProbe,
    ReadPattern,
    build_probes,
    peak_probes,
)
from bitgen.measure.stats import EarlyStopping
from bitgen.measure.task import Outcome, Task, Timing
from bitgen.render import Source, render_kernel
from bitgen.spec import KernelSpec, Shape
from bitgen.toolchain import Toolchain

_AHEAD = 64  # candidates compiled before the first of them is timed
# Pools of cold weights are four times the last-level cache: with twice its size two cores of a Zen 4 still
# read 75-94 GB/s where DRAM gives 58. Caches above 64 MiB get 256 MiB, above 128 MiB twice their size.
# A virtual machine names the whole cache of its host and gets the share of its few processors: two of a Xeon
# with 480 MiB read 12.6 GB/s each from 128 MiB, 12.2 from 2 GiB. No core of today brings more than 16 MiB.
_POOL_CACHES, _POOL_BYTES, _LLC_BYTES_MAX, _LLC_BYTES_CORE = 4, 256 << 20, 128 << 20, 16 << 20
_NO_BUDGET_NS = 1e18
_TOGETHER = 16  # kernels that are verified in one process

_STATUS = {"crashed": Status.CRASHED, "timeout": Status.TIMEOUT, "failed": Status.CRASHED}


@dataclass(frozen=True)
class TimingPolicy:
    """How long to look at a kernel.

    A candidate gets up to ``repeats`` repeats of at least ``min_repeat_ms``, fewer when ``stopping`` says
    that it lost to its incumbent, or when they take more than ``budget_ms`` together; a contender of a race
    gets every round. ``batch`` candidates are timed in the same rounds. ``peak_rounds`` interleaved rounds
    measure the machine's peak. ``check_timeout_s`` and ``timeout_s`` end a kernel that hangs.
    """

    repeats: int = 3
    min_repeat_ms: float = 3.0
    budget_ms: float = 100.0
    batch: int = 8
    stopping: EarlyStopping = field(default_factory=EarlyStopping)
    race_min_ms: float = 4.0
    peak_rounds: int = 7
    check_timeout_s: float = 10.0
    timeout_s: float = 30.0

    @classmethod
    def smoke(cls) -> TimingPolicy:
        """One repeat each, and patience: an emulator takes far longer than the CPU it plays."""
        return cls(1, 0.0, race_min_ms=0.0, peak_rounds=1, check_timeout_s=300.0, timeout_s=600.0)


@dataclass(frozen=True)
class Verification:
    """Whether a kernel is exact: OK after ``cases`` cases, or what is wrong with it."""

    spec: KernelSpec
    status: Status
    cases: int
    detail: str = ""


class LocalRunner:
    """A `Runner` on this machine, used in a ``with`` statement: it holds the machine's lock and a process.

    ``render`` gives the C text of a spec. ``lock_folder`` and ``report`` are those of `MachineLock`.
    """

    def __init__(
        self,
        toolchain: Toolchain,
        cpu: Cpu,
        *,
        policy: TimingPolicy | None = None,
        render: Render = render_kernel,
        lock_folder: Path | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._toolchain = toolchain
        self._cpu = cpu
        self._policy = policy or TimingPolicy()
        self._candidates = Candidates(toolchain, render=render)
        self._lock = MachineLock(lock_folder, report) if report else MachineLock(lock_folder)
        self._verified: set[KernelSpec] = set()
        self._peaks: dict[int, MachinePeak] = {}
        self._probes: dict[Source, Functions] = {}

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._worker.kill()
        self.close()

    def close(self) -> None:
        """End the worker and free the machine's lock. The runner may be used again."""
        self._worker.close()
        self._lock.release()

    # ---- the questions

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        """One answer for each job, in the order of the jobs.

        Up to 64 candidates are compiled on all cores, then they are timed while nothing is compiled. Jobs
        that follow each other and differ only in their kernels are timed in the same interleaved rounds.
        """
        self._lock.acquire()
        compiled: set[KernelSpec] = set()
        at = 0
        for batch in batches(jobs, self._policy.batch):
            if not set().union(*map(_specs, batch)) <= compiled:
                ahead = _first_specs(jobs[at:])
                self._candidates.compile(ahead)
                compiled |= set(ahead)
            yield from self._measure_batch(batch)
            at += len(batch)

    def race(self, job: RaceJob) -> Race:
        """Time kernels in interleaved rounds; one that fails on the way is dropped and the race restarts.

        The probes of what limits it take part: of reading memory in a cold race, of multiplying where there
        are several tokens.
        """
        self._lock.acquire()
        self._candidates.compile(job.specs)
        dropped: dict[KernelSpec, str] = {}
        while True:
            functions = {spec: self._candidates.functions(spec) for spec in job.specs if spec not in dropped}
            dropped |= {spec: reason for spec, reason in functions.items() if isinstance(reason, str)}
            contenders = {spec: found for spec, found in functions.items() if isinstance(found, Functions)}
            if not contenders:
                return Race({}, dropped)
            peaks = _peaks_beside(contenders, job)
            outcome = self._race_once(contenders, peaks, job)
            failed = _failures(outcome, tuple(contenders))
            if outcome.done:
                self._verified |= set(contenders) - set(failed)
            if not failed:
                times = dict(zip(contenders, outcome.times_ns, strict=False))
                probed = outcome.times_ns[len(contenders) :]
                read = probed[-1] if job.cold else ()
                return Race(
                    times,
                    dropped,
                    tuple(t / LAYOUT.packed_bytes(job.shape) for t in read),
                    _peak_gops(peaks, probed, job.shape),
                )
            self._verified -= set(failed)
            if not self._isolated(outcome, tuple(contenders)):
                dropped |= failed

    def machine_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        """What the machine can do at most; measured once for each number of threads and kept."""
        self._lock.acquire()
        known = self._peaks.get(threads)
        if known is None or not set(isas) <= set(known.peak_gops):
            self._peaks[threads] = self._measure_peak(threads, isas)
        return self._peaks[threads]

    def dram_gbs(self, threads: int, isa: str) -> float:
        """What the best pattern of `machine_peak` reads from memory, 10^9 bytes a second; measured now."""
        self.machine_peak(threads, [isa])
        functions = self._probe(self._best_pattern(threads).source(isa))
        return LAYOUT.packed_bytes(READ_SHAPE) / self._probe_ns([functions], READ_SHAPE, threads, True)[0]

    def fma_gflops(self, threads: int, isa: str) -> float:
        """What float32 multiply-adds in registers reach, 10^9 operations a second; measured now."""
        self._lock.acquire()
        probe = Fma(isa)
        functions = self._probe(probe.source())
        return probe.operations(DOT_SHAPE) / self._probe_ns([functions], DOT_SHAPE, threads, False)[0]

    def verify(self, specs: Sequence[KernelSpec], deep: bool = True) -> Iterator[Verification]:
        """Whether each kernel is exact, without timing it; several share a process."""
        self._lock.acquire()
        for start in range(0, len(specs), _AHEAD):
            ahead = specs[start : start + _AHEAD]
            self._candidates.compile(ahead)
            for first in range(0, len(ahead), _TOGETHER):
                together = ahead[first : first + _TOGETHER]
                for shape in dict.fromkeys(spec.shape for spec in together):
                    yield from self._verify([spec for spec in together if spec.shape == shape], shape, deep)

    @property
    def worker_pid(self) -> int | None:
        """The process id of the worker, None when it does not run."""
        return self._worker.pid

    # ---- jobs

    def _measure_batch(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        """Jobs that differ in their kernels alone; when one of them fails, each is measured by itself."""
        compiled = [job for job in jobs if isinstance(self._candidates.functions(job.spec), Functions)]
        if len(compiled) > 1:
            contenders = self._contenders(compiled)
            outcome = self._time(compiled, contenders)
            if not _failures(outcome, tuple(contenders)):
                found = dict(zip(compiled, self._measurements(compiled, contenders, outcome), strict=True))
                yield from (found.get(job) or self._measure(job) for job in jobs)
                return
        for job in jobs:
            yield self._measure(job)

    def _measure(self, job: Job) -> Measurement:
        functions = self._candidates.functions(job.spec)
        if isinstance(functions, str):
            return Measurement(job, Status.COMPILE_ERROR, functions)
        contenders = self._contenders([job])
        outcome = self._time([job], contenders)
        if not outcome.done and self._isolated(outcome, tuple(contenders)):
            return self._measure(job)
        if outcome.culprit == 1 or any(outcome.wrong[1:]):
            # The incumbent failed, not the candidate: measure that alone.
            return self._measure(Job(*job.key))
        if not outcome.done:
            self._verified.discard(job.spec)
            return Measurement(job, _STATUS[outcome.status], outcome.detail)
        if outcome.wrong[0]:
            self._verified.discard(job.spec)
            return Measurement(job, Status.INCORRECT, outcome.wrong[0])
        (measurement,) = self._measurements([job], contenders, outcome)
        return measurement

    def _contenders(self, jobs: Sequence[Job]) -> dict[KernelSpec, Functions]:
        """The candidates, then their incumbents."""
        specs = [*(job.spec for job in jobs), *(job.against for job in jobs if job.against)]
        found = {spec: self._candidates.functions(spec) for spec in specs}
        return {spec: functions for spec, functions in found.items() if isinstance(functions, Functions)}

    def _time(self, jobs: Sequence[Job], contenders: Mapping[KernelSpec, Functions]) -> Outcome:
        """Verify the candidates, then time them beside their incumbents."""
        policy, (job, *_) = self._policy, jobs
        at = {spec: index for index, spec in enumerate(contenders)}
        against: dict[KernelSpec, int | None] = {}  # in the order of the first contenders
        for one in jobs:
            against[one.spec] = at.get(one.against) if one.against and one.against != one.spec else None
        timing = Timing(
            *(job.shape, job.n, job.threads, job.cold),
            min_ns=1e6 * policy.min_repeat_ms,
            budget_ns=1e6 * policy.budget_ms * len(jobs),
            order=_shuffled_rounds(len(contenders), policy.repeats, seed=0),
            against=tuple(against.values()),
            stopping=policy.stopping,
        )
        checks = tuple(self._level(spec) if spec in against else None for spec in contenders)
        return self._ask(tuple(contenders.values()), checks, timing=timing, fixed_shape=job.spec.shape)

    def _measurements(
        self, jobs: Sequence[Job], contenders: Mapping[KernelSpec, Functions], outcome: Outcome
    ) -> Iterator[Measurement]:
        times = dict(zip(contenders, outcome.times_ns, strict=True))
        for job in jobs:
            self._verified.add(job.spec)
            own = times[job.spec]
            against = times.get(job.against, ()) if job.against and job.against != job.spec else ()
            yield Measurement(job, Status.OK, "", tuple(own), tuple(against[: len(own)]))

    def _verify(self, specs: Sequence[KernelSpec], shape: Shape | None, deep: bool) -> Iterator[Verification]:
        """Kernels for one ``shape``, or for any, in one process."""
        level = "deep" if deep else "quick"
        left = list(specs)
        while left:
            functions = {spec: self._candidates.functions(spec) for spec in left}
            for spec, found in functions.items():
                if isinstance(found, str):
                    yield Verification(spec, Status.COMPILE_ERROR, 0, found)
            good = {spec: found for spec, found in functions.items() if isinstance(found, Functions)}
            if not good:
                return
            left = list(good)
            outcome = self._ask(tuple(good.values()), (level,) * len(good), fixed_shape=shape)
            if outcome.done:
                for spec, wrong, cases in zip(left, outcome.wrong, outcome.cases, strict=True):
                    yield Verification(spec, Status.INCORRECT if wrong else Status.OK, cases, wrong or "")
                return
            if not self._isolated(outcome, left):
                culprit = left.pop(outcome.culprit)
                yield Verification(culprit, _STATUS[outcome.status], 0, outcome.detail)

    def _race_once(
        self, contenders: Mapping[KernelSpec, Functions], peaks: Sequence[PeakProbe], job: RaceJob
    ) -> Outcome:
        kernels, checks = list(contenders.values()), [self._level(spec) for spec in contenders]
        beside = [self._probe(probe.source()) for probe in peaks]
        kernels += beside
        checks += [None] * len(beside)
        if job.cold:
            isa = next(iter(contenders)).isa
            kernels.append(self._probe(self._best_pattern(job.threads).source(isa)))
            checks.append(None)
        timing = Timing(
            *(job.shape, job.n, job.threads, job.cold),
            min_ns=1e6 * self._policy.race_min_ms,
            budget_ns=_NO_BUDGET_NS,
            order=_shuffled_rounds(len(kernels), job.rounds, job.seed),
        )
        return self._ask(kernels, checks, probes=range(len(contenders), len(kernels)), timing=timing)

    def _level(self, spec: KernelSpec) -> str | None:
        """The cases a kernel must pass before it is timed: none when it did so before in this run."""
        return None if spec in self._verified else "quick"

    def _isolated(self, outcome: Outcome, specs: Sequence[KernelSpec]) -> bool:
        """Whether a task died of loading a library of several candidates, each of which has its own now."""
        at = outcome.culprit
        return outcome.loading and at < len(specs) and self._candidates.isolate(specs[at])

    def _ask(
        self,
        kernels: Sequence[Functions],
        checks: Sequence[str | None],
        probes: Sequence[int] = (),
        timing: Timing | None = None,
        fixed_shape: Shape | None = None,
    ) -> Outcome:
        """The answer of the worker, which is started again, once, when it is killed meanwhile."""
        policy = self._policy
        rounds = len(timing.order) * len(kernels) if timing else 0
        total_s = policy.check_timeout_s * len(kernels) + policy.timeout_s + rounds * policy.race_min_ms / 250
        task = Task(
            *(tuple(kernels), tuple(checks), policy.check_timeout_s, total_s),
            probes=frozenset(probes),
            timing=timing,
            fixed_shape=fixed_shape,
        )
        try:
            return self._worker.ask(task)
        except WorkerDiedError:
            pass
        try:
            return self._worker.ask(task)
        except WorkerDiedError as error:
            return Outcome("crashed", str(error))

    @cached_property
    def _worker(self) -> WorkerClient:
        return WorkerClient(build_harness(self._toolchain, self._cpu.arch), _cold_bytes(self._cpu))

    # ---- the machine

    def _best_pattern(self, threads: int) -> ReadPattern:
        known = self._peaks.get(threads)
        return next((p for p in PATTERNS if known and p.name == known.best_pattern), DEFAULT_PATTERN)

    def _probe(self, source: Source) -> Functions:
        if source not in self._probes:
            self._probes[source] = build_probes(self._toolchain, [source])[0]
        return self._probes[source]

    def _measure_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        if not isas:
            raise BitgenError("name at least one ISA level whose peak is to be measured")
        dots = [probe for isa in isas for probe in peak_probes(isa)]
        # Every level reads as fast as memory gives; the first one named is the strongest.
        sources = [*(p.source(isas[0]) for p in PATTERNS), *(dot.source() for dot in dots)]
        probes = build_probes(self._toolchain, sources)
        reads, peaks = probes[: len(PATTERNS)], probes[len(PATTERNS) :]
        read_ns = self._probe_ns(reads, READ_SHAPE, threads, True)
        peak_ns = self._probe_ns(peaks, DOT_SHAPE, threads, False)
        read_bytes = LAYOUT.packed_bytes(READ_SHAPE)
        peak_gops = _peak_gops(dots, [(ns,) for ns in peak_ns], DOT_SHAPE)
        dram_gbs = {p.name: read_bytes / ns for p, ns in zip(PATTERNS, read_ns, strict=True)}
        return MachinePeak(threads, dram_gbs, peak_gops)

    def _probe_ns(self, probes: Sequence[Functions], shape: Shape, threads: int, cold: bool) -> list[float]:
        """Nanoseconds a call of each probe: the median of interleaved rounds."""
        every = tuple(range(len(probes)))
        timing = Timing(
            *(shape, 1, threads, cold),
            min_ns=1e6 * self._policy.min_repeat_ms,
            budget_ns=_NO_BUDGET_NS,
            order=(every,) * self._policy.peak_rounds,
        )
        outcome = self._ask(probes, (None,) * len(probes), probes=every, timing=timing)
        if not outcome.done:
            raise BitgenError(f"the machine's peak cannot be measured: {outcome.detail}")
        return [statistics.median(times) for times in outcome.times_ns]


def _cold_bytes(cpu: Cpu) -> int:
    """Bytes of weights that calls rotate through, so that each call reads its own from memory."""
    most = max(_LLC_BYTES_MAX, min(cpu.llc_bytes, cpu.usable_threads * _LLC_BYTES_CORE))
    llc = min(cpu.llc_total_bytes, most)
    return max(2 * llc, min(_POOL_CACHES * llc, _POOL_BYTES))


def _peaks_beside(contenders: Iterable[KernelSpec], job: RaceJob) -> list[PeakProbe]:
    """The probes of multiplying that take part in a race: of one token a kernel only reads."""
    levels = dict.fromkeys(spec.isa for spec in contenders) if job.n > 1 else {}
    return [probe for isa in levels for probe in peak_probes(isa)]


def _peak_gops(
    probes: Sequence[PeakProbe], times_ns: Sequence[Sequence[float]], shape: Shape
) -> dict[str, float]:
    """By ISA level the rate of its fastest probe, each timed on ``shape``, in 10^9 operations a second."""
    found: dict[str, float] = {}
    for probe, times in zip(probes, times_ns, strict=False):
        gops = probe.operations(shape) / statistics.median(times)
        found[probe.isa] = max(found.get(probe.isa, 0.0), gops)
    return found


def _specs(job: Job) -> set[KernelSpec]:
    return {job.spec} | ({job.against} if job.against else set())


def _first_specs(jobs: Sequence[Job]) -> list[KernelSpec]:
    """The kernels of the first jobs, in their order: at most `_AHEAD`, and all of the first job."""
    found: dict[KernelSpec, None] = {}
    for job in jobs:
        if found and len(found) + len(_specs(job) - found.keys()) > _AHEAD:
            break
        found |= dict.fromkeys(_specs(job))
    return list(found)


def _shuffled_rounds(contenders: int, rounds: int, seed: int) -> tuple[tuple[int, ...], ...]:
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    return tuple(tuple(draw.sample(range(contenders), contenders)) for _ in range(rounds))


def _failures(outcome: Outcome, specs: Sequence[KernelSpec]) -> dict[KernelSpec, str]:
    """The contenders that failed, with the reasons."""
    if not outcome.done:
        return {specs[min(outcome.culprit, len(specs) - 1)]: outcome.detail}
    return {spec: wrong for spec, wrong in zip(specs, outcome.wrong, strict=False) if wrong}
