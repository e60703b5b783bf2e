"""Measure on this machine: compile, prove and time kernels in processes that may die."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from bitgen.cpu import Cpu
from bitgen.errors import BitgenError
from bitgen.measure.candidates import Candidates, Render
from bitgen.measure.harness import Functions, build_harness, isas
from bitgen.measure.jobs import Job, Limits, Load, Measurement, Missing, Race, Status
from bitgen.measure.link import ServerDiedError, ServerLink
from bitgen.measure.lock import MachineLock
from bitgen.measure.probes import (
    DEFAULT_PATTERN,
    DOT_SHAPE,
    LAYOUT,
    PATTERNS,
    READ_SHAPE,
    Fma,
    ReadPattern,
    Tiles,
    build_probes,
    peak_probe,
)
from bitgen.measure.server import Deadlines
from bitgen.measure.stats import DropRule, heats
from bitgen.measure.worker import Task, Timing
from bitgen.render import Source, render_kernel
from bitgen.spec import N1, KernelSpec, Shape
from bitgen.toolchain import Toolchain

_AHEAD = 64  # candidates compiled before the first of them is timed
# Pools of cold weights are four times the last-level cache: with twice its size two cores of a Zen 4 still
# read 75-94 GB/s where DRAM gives 58. Caches above 64 MiB get 256 MiB, above 128 MiB twice their size.
_POOL_CACHES, _POOL_BYTES, _LLC_BYTES_MAX = 4, 256 << 20, 128 << 20
_NO_BUDGET_NS = 1e18

DROP = DropRule()

_STATUS = {"crashed": Status.CRASHED, "timeout": Status.TIMEOUT, "failed": Status.CRASHED}


@dataclass(frozen=True)
class TimingPolicy:
    """How long to look at a kernel.

    A candidate gets up to ``repeats`` repeats of at least ``min_repeat_ms``, fewer when ``drop`` says that it
    lost to its incumbent, or when they take more than ``budget_ms`` together; a finalist of a race gets
    every round. ``heat`` candidates are timed in the same rounds. ``limit_rounds`` interleaved rounds
    measure the machine's limits. ``check_timeout_s`` and ``timeout_s`` end a kernel that hangs.
    """

    repeats: int = 3
    min_repeat_ms: float = 3.0
    budget_ms: float = 100.0
    heat: int = 8
    drop: DropRule = DROP
    race_min_ms: float = 4.0
    limit_rounds: int = 7
    check_timeout_s: float = 10.0
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Proof:
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
        huge_pages: bool = True,
        pool_budget_bytes: int = 1024 << 20,
        lock_folder: Path | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._toolchain = toolchain
        self._cpu = cpu
        self._policy = policy or TimingPolicy()
        self._candidates = Candidates(toolchain, render=render)
        self._lock = MachineLock(lock_folder, report) if report else MachineLock(lock_folder)
        self._huge_pages = huge_pages
        self._pool_budget_bytes = pool_budget_bytes
        self._proven: set[KernelSpec] = set()
        self._limits: dict[int, Limits] = {}
        self._race_probes: dict[Source, Functions] = {}

    def __enter__(self) -> LocalRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._server.kill()
            self.close()

    def close(self) -> None:
        """End the measuring process and free the machine's lock. The runner may be used again."""
        self._server.close()
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
        for heat in heats(jobs, self._policy.heat):
            if not set().union(*map(_specs, heat)) <= compiled:
                ahead = _first_specs(jobs[at:])
                self._candidates.compile(ahead)
                compiled |= set(ahead)
            yield from self._measure_heat(heat)
            at += len(heat)

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
        """Time kernels in interleaved rounds; one that fails on the way is dropped and the race starts anew.

        A cold race has the reading probe as a participant, one of 2 tokens and more on a level with tile
        registers the probe of tiles.
        """
        self._lock.acquire()
        self._candidates.compile(specs)
        functions = {spec: self._candidates.functions(spec) for spec in specs}
        dropped = {spec: reason for spec, reason in functions.items() if isinstance(reason, str)}
        lanes = {spec: found for spec, found in functions.items() if isinstance(found, Functions)}
        while lanes:
            answer = self._race_once(lanes, shape, n, threads, rounds, cold, seed)
            failed = _failures(answer, tuple(lanes))
            self._proven |= set(lanes) - set(failed) if answer["status"] == "done" else set()
            if not failed:
                return _race_of(answer, tuple(lanes), dropped, shape, cold)
            self._proven -= set(failed)
            dropped |= failed
            lanes = {spec: found for spec, found in lanes.items() if spec not in failed}
        return Race({}, dropped)

    def limits(self, threads: int, isas: Sequence[str]) -> Limits:
        """What the machine can do at most; measured once for each number of threads and kept."""
        self._lock.acquire()
        known = self._limits.get(threads)
        if known is None or not set(isas) <= set(known.peak_gops):
            self._limits[threads] = self._measure_limits(threads, isas)
        return self._limits[threads]

    def dram_gbs(self, threads: int, isa: str) -> float:
        """What the best pattern of `limits` reads from memory, 10^9 bytes a second; measured now."""
        self.limits(threads, [isa])
        functions = self._race_probe(self._best_pattern(threads).source(isa))
        return LAYOUT.packed_bytes(READ_SHAPE) / self._probe([functions], READ_SHAPE, threads, True)[0]

    def fma_gflops(self, threads: int, isa: str) -> float:
        """What float32 multiply-adds in registers reach, 10^9 operations a second; measured now."""
        self._lock.acquire()
        probe = Fma(isa)
        functions = self._race_probe(probe.source())
        return probe.operations / self._probe([functions], DOT_SHAPE, threads, False)[0]

    def prove(self, specs: Sequence[KernelSpec], deep: bool = True, together: int = 16) -> Iterator[Proof]:
        """Whether each kernel is exact, without timing it; ``together`` kernels share a process."""
        self._lock.acquire()
        for start in range(0, len(specs), _AHEAD):
            self._candidates.compile(specs[start : start + _AHEAD])
            for first in range(start, min(start + _AHEAD, len(specs)), together):
                batch = specs[first : min(first + together, start + _AHEAD)]
                for shape in dict.fromkeys(spec.shape for spec in batch):
                    yield from self._prove([spec for spec in batch if spec.shape == shape], shape, deep)

    @property
    def server_pid(self) -> int | None:
        """The process id of the measuring process, None when it does not run."""
        return self._server.pid

    # ---- one job

    def _measure_heat(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        """Jobs that differ in their kernels alone; when one of them fails, each is measured by itself."""
        compiled = [job for job in jobs if isinstance(self._candidates.functions(job.spec), Functions)]
        if len(compiled) > 1:
            load = Load.now()
            lanes = self._lanes(compiled)
            answer = self._time(compiled, lanes)
            if not _failures(answer, tuple(lanes)):
                found = dict(zip(compiled, self._measurements(compiled, lanes, answer, load), strict=True))
                yield from (found.get(job) or self._measure(job) for job in jobs)
                return
        for job in jobs:
            yield self._measure(job)

    def _measure(self, job: Job) -> Measurement:
        load = Load.now()
        functions = self._candidates.functions(job.spec)
        if isinstance(functions, str):
            return Measurement.of(job, Status.COMPILE_ERROR, functions, load=load)
        lanes = self._lanes([job])
        answer = self._time([job], lanes)
        if answer.get("culprit") == 1 or any(answer.get("wrong", ())[1:]):
            # The incumbent failed, not the candidate: measure that alone.
            return self._measure(replace(job, against=None))
        if answer["status"] != "done":
            self._proven.discard(job.spec)
            return Measurement.of(job, _STATUS[answer["status"]], answer["detail"], load=load)
        if answer["wrong"][0]:
            self._proven.discard(job.spec)
            return Measurement.of(job, Status.INCORRECT, answer["wrong"][0], load=load)
        (measurement,) = self._measurements([job], lanes, answer, load)
        return measurement

    def _lanes(self, jobs: Sequence[Job]) -> dict[KernelSpec, Functions]:
        """The candidates, then their incumbents."""
        specs = [*(job.spec for job in jobs), *(job.against for job in jobs if job.against)]
        found = {spec: self._candidates.functions(spec) for spec in specs}
        return {spec: functions for spec, functions in found.items() if isinstance(functions, Functions)}

    def _time(self, jobs: Sequence[Job], lanes: Mapping[KernelSpec, Functions]) -> dict[str, Any]:
        """Prove the candidates, then time them beside their incumbents."""
        policy, (job, *_) = self._policy, jobs
        at = {spec: lane for lane, spec in enumerate(lanes)}
        against: dict[KernelSpec, int | None] = {}  # in the order of the first lanes
        for one in jobs:
            against[one.spec] = at.get(one.against) if one.against and one.against != one.spec else None
        order = _shuffled_rounds(len(lanes), policy.repeats, seed=0)
        budget_ms = policy.budget_ms * len(jobs)
        timing = self._timing(job.shape, job.n, job.threads, job.cold, order, policy.min_repeat_ms, budget_ms)
        timing = replace(timing, against=tuple(against.values()), rule=policy.drop)
        checks = tuple(self._level(spec) if spec in against else None for spec in lanes)
        return self._ask(Task(tuple(lanes.values()), checks, frozenset(), timing, job.spec.shape))

    def _measurements(
        self, jobs: Sequence[Job], lanes: Mapping[KernelSpec, Functions], answer: dict[str, Any], load: Load
    ) -> Iterator[Measurement]:
        times = dict(zip(lanes, answer["times"], strict=True))
        for job in jobs:
            self._proven.add(job.spec)
            own = times[job.spec]
            rival = times.get(job.against, ()) if job.against and job.against != job.spec else ()
            yield Measurement.of(job, Status.OK, "", own, rival[: len(own)], load)

    def _prove(self, specs: Sequence[KernelSpec], shape: Shape | None, deep: bool) -> Iterator[Proof]:
        """Kernels for one ``shape``, or for any, in one process."""
        level = "deep" if deep else "quick"
        left = list(specs)
        while left:
            functions = [self._candidates.functions(spec) for spec in left]
            for spec, found in zip(left, functions, strict=True):
                if isinstance(found, str):
                    yield Proof(spec, Status.COMPILE_ERROR, 0, found)
            good = [(s, f) for s, f in zip(left, functions, strict=True) if isinstance(f, Functions)]
            if not good:
                return
            left = [spec for spec, _ in good]
            answer = self._ask(Task(tuple(f for _, f in good), (level,) * len(good), fixed_shape=shape))
            if answer["status"] == "done":
                for spec, wrong, cases in zip(left, answer["wrong"], answer["cases"], strict=True):
                    yield Proof(spec, Status.INCORRECT if wrong else Status.OK, cases, wrong or "")
                return
            culprit = left.pop(answer["culprit"])
            yield Proof(culprit, _STATUS[answer["status"]], 0, answer["detail"])

    def _race_once(
        self,
        runners: Mapping[KernelSpec, Functions],
        shape: Shape,
        n: int,
        threads: int,
        rounds: int,
        cold: bool,
        seed: int,
    ) -> dict[str, Any]:
        lanes, checks = list(runners.values()), [self._level(spec) for spec in runners]
        tiles = _tile_probe(runners)
        if cold:
            isa = next(iter(runners)).isa
            lanes.append(self._race_probe(self._best_pattern(threads).source(isa)))
        if tiles:
            lanes.append(self._race_probe(tiles.source()))
        probes = frozenset(range(len(runners), len(lanes)))
        checks += [None] * len(probes)
        order = _shuffled_rounds(len(lanes), rounds, seed)
        timing = self._timing(shape, n, threads, cold, order, self._policy.race_min_ms, None)
        timing = replace(timing, last_shape=DOT_SHAPE if tiles else None)
        return self._ask(Task(tuple(lanes), tuple(checks), probes, timing))

    def _level(self, spec: KernelSpec) -> str | None:
        """The cases a kernel must pass before it is timed: none when it did so before in this run."""
        return None if spec in self._proven else "quick"

    def _timing(
        self,
        shape: Shape,
        n: int,
        threads: int,
        cold: bool,
        order: tuple[tuple[int, ...], ...],
        min_ms: float,
        budget_ms: float | None,
    ) -> Timing:
        budget_ns = _NO_BUDGET_NS if budget_ms is None else 1e6 * budget_ms
        return Timing(shape, n, threads, cold, 1e6 * min_ms, budget_ns, order)

    def _ask(self, task: Task) -> dict[str, Any]:
        """The answer of the measuring process, which is started anew, once, when it is killed meanwhile."""
        policy, kernels = self._policy, len(task.kernels)
        rounds = len(task.timing.order) * kernels if task.timing else 0
        total_s = policy.check_timeout_s * kernels + policy.timeout_s + rounds * policy.race_min_ms / 250
        deadlines = Deadlines(policy.check_timeout_s, total_s)
        try:
            return self._server.ask(task, deadlines)
        except ServerDiedError:
            pass
        try:
            return self._server.ask(task, deadlines)
        except ServerDiedError as error:
            return {"status": "crashed", "detail": str(error), "culprit": 0}

    @cached_property
    def _server(self) -> ServerLink:
        options = {
            "harness": str(build_harness(self._toolchain, self._cpu.arch)),
            "cold_bytes": _cold_bytes(self._cpu),
            "pool_budget_bytes": self._pool_budget_bytes,
            "huge_pages": self._huge_pages,
        }
        return ServerLink(options)

    # ---- the machine

    def _best_pattern(self, threads: int) -> ReadPattern:
        known = self._limits.get(threads)
        return next((p for p in PATTERNS if known and p.name == known.best_pattern), DEFAULT_PATTERN)

    def _race_probe(self, source: Source) -> Functions:
        if source not in self._race_probes:
            self._race_probes[source] = build_probes(self._toolchain, [source])[0]
        return self._race_probes[source]

    def _measure_limits(self, threads: int, isas: Sequence[str]) -> Limits:
        if not isas:
            raise BitgenError("name at least one ISA level whose limits are to be measured")
        dots = [peak_probe(isa) for isa in isas]
        # Every level reads as fast as memory gives; the first one named is the strongest.
        sources = [*(p.source(isas[0]) for p in PATTERNS), *(dot.source() for dot in dots)]
        probes = build_probes(self._toolchain, sources)
        reads, peaks = probes[: len(PATTERNS)], probes[len(PATTERNS) :]
        read_ns = self._probe(reads, READ_SHAPE, threads, True)
        peak_ns = self._probe(peaks, DOT_SHAPE, threads, False)
        read_bytes = LAYOUT.packed_bytes(READ_SHAPE)
        return Limits(
            threads,
            {p.name: read_bytes / t for p, t in zip(PATTERNS, read_ns, strict=True)},
            {dot.isa: dot.operations / t for dot, t in zip(dots, peak_ns, strict=True)},
        )

    def _probe(self, probes: Sequence[Functions], shape: Shape, threads: int, cold: bool) -> list[float]:
        """Nanoseconds a call of each probe: the median of interleaved rounds."""
        lanes = tuple(range(len(probes)))
        rounds = self._policy.limit_rounds
        timing = self._timing(shape, 1, threads, cold, (lanes,) * rounds, self._policy.min_repeat_ms, None)
        answer = self._ask(Task(tuple(probes), (None,) * len(probes), frozenset(lanes), timing))
        if answer["status"] != "done":
            raise BitgenError(f"the machine's limits cannot be measured: {answer['detail']}")
        return [statistics.median(times) for times in answer["times"]]


def measure_limits(toolchain: Toolchain, cpu: Cpu, threads: int, isas: Sequence[str]) -> Limits:
    """What this machine can do at most on ``threads`` threads with ``isas``, in two to three seconds."""
    with LocalRunner(toolchain, cpu) as runner:
        return runner.limits(threads, isas)


def _cold_bytes(cpu: Cpu) -> int:
    """Bytes of weights that calls rotate through, so that each call reads its own from memory."""
    llc = min(cpu.llc_total_bytes, max(cpu.llc_bytes, _LLC_BYTES_MAX))
    return max(2 * llc, min(_POOL_CACHES * llc, _POOL_BYTES))


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


def _shuffled_rounds(lanes: int, rounds: int, seed: int) -> tuple[tuple[int, ...], ...]:
    draw = random.Random(seed)  # noqa: S311 - an order, no secret
    return tuple(tuple(draw.sample(range(lanes), lanes)) for _ in range(rounds))


def _failures(answer: dict[str, Any], runners: Sequence[KernelSpec]) -> dict[KernelSpec, str]:
    """The finalists that failed in a race, with the reasons."""
    if answer["status"] != "done":
        at = min(int(answer["culprit"]), len(runners) - 1)
        return {runners[at]: str(answer["detail"])}
    return {spec: wrong for spec, wrong in zip(runners, answer["wrong"], strict=False) if wrong}


def _tile_probe(runners: Iterable[KernelSpec]) -> Tiles | None:
    """The probe that takes part in a race of these kernels: those for one token multiply no tiles."""
    levels = [s.isa for s in runners if s.regime != N1.name and isas()[s.isa].tile_registers]
    return Tiles(levels[0]) if levels else None


def _race_of(
    answer: dict[str, Any],
    runners: Sequence[KernelSpec],
    dropped: dict[KernelSpec, str],
    shape: Shape,
    cold: bool,
) -> Race:
    times = dict(zip(runners, answer["times"], strict=False))
    probes, tiles = answer["times"][len(runners) :], _tile_probe(runners)
    read = [t / LAYOUT.packed_bytes(shape) for t in probes[0]] if cold else []
    gops = [tiles.operations / t for t in probes[-1]] if tiles else []
    return Race(times, dropped, tuple(read), tuple(gops))
