"""The search of one group: propose candidates, measure them on every shape, tell what the model would pay."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from bitgen.measure import Job, MachinePeak, Measurement, Race, RaceJob, Status
from bitgen.search.cache import MeasurementCache
from bitgen.search.plan import Group, Plan, RegimeConfig, SearchConfig, seed_of
from bitgen.search.propose import Proposer, proposer_for
from bitgen.spec import KernelSpec, Layout, Shape

_GRACE = 0.1  # of a group's time: how much later than its end a batch under way may finish
_LEAST_IDLE = 2  # batches without a gain before a search may end


def roofline_ns(layout: Layout, shape: Shape, n: int, cold: bool, dram_gbs: float, peak_gops: float) -> float:
    """The least time of one matmul of ``n`` tokens on a machine with these peaks.

    Cold, every packed byte is read once: packed_bytes / dram_gbs (1 GB/s is 1 byte a ns). In any case 2 * m *
    k * n int8 operations are done: 2mkn / peak_gops. The larger of both counts.
    """
    memory = layout.packed_bytes(shape) / dram_gbs if cold else 0.0
    return max(memory, 2 * shape.m * shape.k * n / peak_gops)


@dataclass
class Candidate:
    """What is known of one kernel: its time on each shape it was measured on, in nanoseconds a call.

    ``failure`` is the first measurement that was not OK. A kernel that fails on one shape wins on none.
    """

    spec: KernelSpec
    times_ns: dict[Shape, float] = field(default_factory=dict)
    failure: Measurement | None = None

    def time_ns(self, shape: Shape) -> float:
        """Infinity where it failed or was not timed."""
        return math.inf if self.failure else self.times_ns.get(shape, math.inf)

    @property
    def outcome(self) -> str:
        if self.failure:
            return self.failure.status.value
        return Status.OK.value if self.times_ns else "not measured"


@dataclass(frozen=True)
class GroupOutcome:
    """What the search of a group found; ``complete`` is False where its time ran out before its space did."""

    group: Group
    candidates: tuple[Candidate, ...]
    seconds: float
    complete: bool

    def ranked(self, shape: Shape) -> list[KernelSpec]:
        """The candidates timed on ``shape``, fastest first; equals stay in the order they were tried."""
        timed = [c for c in self.candidates if math.isfinite(c.time_ns(shape))]
        return [c.spec for c in sorted(timed, key=lambda c: c.time_ns(shape))]

    def times_ns(self, shape: Shape) -> list[float]:
        """The times on ``shape`` of all candidates timed there."""
        return [t for t in (c.time_ns(shape) for c in self.candidates) if math.isfinite(t)]

    @property
    def outcomes(self) -> Counter[str]:
        """Candidates by how they ended: a status, or "not measured"."""
        return Counter(c.outcome for c in self.candidates)

    @property
    def failures(self) -> list[str]:
        """What went wrong, one text a candidate that failed."""
        failures = [c.failure for c in self.candidates if c.failure]
        return [f"{f.job.spec.name} on {f.job.shape.name}: {f.status.value}: {f.detail}" for f in failures]


class GroupSearch:
    """Searches one group until its trials or its space end, or every shape is near its roofline.

    Where the time runs out before, `run` called again goes on from there. ``clock`` gives seconds.
    ``anchors``: for each shape a kernel of the same regime, whatever its family, with its time. What has no
    incumbent of its layout to be timed beside is timed beside that: without it the first kernel of a layout
    had the nanoseconds of its own moment, 590 us where a quiet one gives 415, and TPE left that layout.
    """

    def __init__(
        self,
        group: Group,
        plan: Plan,
        starters: Iterable[KernelSpec],
        config: SearchConfig,
        cache: MeasurementCache,
        peaks: MachinePeak,
        clock: Callable[[], float],
        anchors: Mapping[Shape, Candidate] | None = None,
    ) -> None:
        self.group = group
        self._anchors = anchors or {}
        self.complete = False
        self._count = {target.shape: target.count for target in plan.targets}
        self._trials = min(plan.trials, len(group.points))
        self._config = config
        self._regime: RegimeConfig = config.regimes[group.regime]
        self._cache = cache
        self._peaks = peaks
        self._clock = clock
        self._seconds = 0.0
        self._candidates: dict[KernelSpec, Candidate] = {}
        self._asked = 0
        self._batch: list[KernelSpec] = []  # under way
        self._measured: set[tuple[KernelSpec, Shape]] = set()
        self._reference: dict[Shape, float] = {}  # times of the first candidate that ran on every shape
        # The best so far, beside which others are timed.
        self._incumbents: dict[tuple[Shape, Layout], KernelSpec] = {}
        self._best_total = math.inf  # of the best kernels on every shape, when a batch last improved it
        self._idle = 0  # candidates since then
        for shape, anchor in self._anchors.items():
            if anchor.spec == group.defaults.get(shape):
                self._candidates.setdefault(anchor.spec, Candidate(anchor.spec)).times_ns |= anchor.times_ns
                self._measured.add((anchor.spec, shape))
        self._beside_probes: dict[tuple[Shape, KernelSpec], Race] = {}
        self._patience = max(_LEAST_IDLE * config.batch, config.patience * len(group.points))
        self._proposer: Proposer = proposer_for(
            group.points,
            [*group.defaults.values(), *starters, *group.known_good],
            seed_of(plan.seed, group.name),
            config.strategy,
            config.enumerate_up_to,
        )

    def run(self, deadline: float, seen: Callable[[int], None]) -> None:
        """Search until ``deadline`` on the clock; ``seen`` hears the number of candidates after each batch.

        The defaults are measured whatever the time: everything is compared with them.
        """
        begin = self._clock()
        if not self._asked:
            self._ask(len(set(self.group.defaults.values())))  # the starters begin with them
            self._measure(self._batch, list(self._count), math.inf)
            self._judge(seen)
        # Compiling costs more than timing: a batch that is a little late is worth its end.
        late = deadline if math.isinf(deadline) else deadline + _GRACE * (deadline - begin)
        while not self.complete and (now := self._clock()) < deadline:
            if not self._batch:
                # No more than the time allows at the pace so far: what is compiled should be timed, too.
                pace = self._asked / max(self._seconds + now - begin, 1e-9)
                size = min(self._config.batch, self._trials - self._asked, pace * (deadline - now))
                self._ask(max(1, int(size)))
            if not self._measure_batch(self._batch, self._open_shapes(), late):
                break  # in the middle of a batch
            self._judge(seen)
        self._seconds += self._clock() - begin

    @property
    def best_ns(self) -> float:
        """All the model's matrices of these shapes with the best kernels so far, once; in nanoseconds."""
        candidates = self._candidates.values()
        return sum(
            count * min((c.time_ns(shape) for c in candidates), default=math.inf)
            for shape, count in self._count.items()
        )

    @property
    def outcome(self) -> GroupOutcome:
        return GroupOutcome(self.group, tuple(self._candidates.values()), self._seconds, self.complete)

    def recall(self, specs: Iterable[KernelSpec]) -> None:
        """Measure kernels that earlier tunes selected, so that they take part in the race."""
        known = set(self.group.points)
        new = [s for s in dict.fromkeys(specs) if s in known and s not in self._candidates]
        self._measure(new, list(self._count), math.inf)

    # ---- measuring ----

    def _ask(self, count: int) -> None:
        self._batch = self._proposer.ask(count)
        self._asked += len(self._batch)

    def _measure_batch(self, batch: list[KernelSpec], shapes: list[Shape], deadline: float) -> bool:
        """With a drop ratio the first shape decides who is timed on the others. False: out of time."""
        if self._regime.drop_ratio is None:
            return self._measure(batch, shapes, deadline)
        first, *others = shapes
        if not self._measure(batch, [first], deadline):
            return False
        best: dict[Layout, float] = {}
        for spec, candidate in self._candidates.items():
            best[spec.layout] = min(candidate.time_ns(first), best.get(spec.layout, math.inf))
        good = [
            spec
            for spec in batch
            if spec not in self.group.legal[first]
            or self._candidates[spec].time_ns(first) <= self._regime.drop_ratio * best[spec.layout]
        ]
        return self._measure(good, others, deadline)

    def _measure(self, specs: list[KernelSpec], shapes: list[Shape], deadline: float) -> bool:
        """Measure what was not measured before; False when the time ran out on the way."""
        pairs = [(spec, shape) for shape in shapes for spec in specs if spec in self.group.legal[shape]]
        jobs = [self._job(*pair) for pair in pairs if pair not in self._measured]
        if jobs and self._clock() >= deadline:
            return False
        # A generator closed early tells the runner to stop what it prepared.
        measurements = self._cache.measure(jobs)
        with closing(measurements):
            for done, measurement in enumerate(measurements, start=1):
                job = measurement.job
                candidate = self._candidates.setdefault(job.spec, Candidate(job.spec))
                self._measured.add((job.spec, job.shape))
                if isinstance(measurement, Measurement):
                    self._note(candidate, measurement)
                if done < len(jobs) and self._clock() >= deadline:
                    return False
        return True

    def _job(self, spec: KernelSpec, shape: Shape) -> Job:
        against = self._incumbents.get((shape, spec.layout))
        if against is None and (anchor := self._anchors.get(shape)) and anchor.spec != spec:
            against = anchor.spec
        return Job(spec, shape, self._regime.n, self.group.threads, self._regime.cold, against)

    def _note(self, candidate: Candidate, measurement: Measurement) -> None:
        if not measurement.ok:
            candidate.failure = candidate.failure or measurement
            return
        time_ns = measurement.median_ns
        against, shape = measurement.job.against, measurement.job.shape
        baseline = self._candidates.get(against) if against else None
        if baseline is None and (anchor := self._anchors.get(shape)) and anchor.spec == against:
            baseline = anchor
        if baseline and measurement.ratio is not None and shape in baseline.times_ns:
            # In units of the incumbent's time at that very moment: a slow moment of the machine cancels.
            time_ns = measurement.ratio * baseline.times_ns[shape]
        candidate.times_ns[shape] = time_ns

    def _judge(self, seen: Callable[[int], None]) -> None:
        """A batch is measured: select the best, tell the proposer, see whether the search is over."""
        self._select(len(self._batch))
        self._tell(self._batch)
        self._batch = []
        over = self._asked >= self._trials or self._idle >= self._patience
        self.complete = over or not self._open_shapes()
        seen(len(self._candidates))

    def _select(self, tried: int) -> None:
        """The best so far of each layout is the incumbent: layouts are compared later, on the whole model."""
        for shape in self._count:
            known = {key: self._candidates[spec].time_ns(shape) for key, spec in self._incumbents.items()}
            for spec, candidate in self._candidates.items():
                key = (shape, spec.layout)
                if candidate.time_ns(shape) < known.get(key, math.inf):
                    known[key] = candidate.time_ns(shape)
                    self._incumbents[key] = spec
        total = self.best_ns
        self._idle += tried
        if not total > (1 - self._config.margin) * self._best_total:
            self._best_total, self._idle = total, 0

    # ---- judging ----

    def _tell(self, batch: list[KernelSpec]) -> None:
        for spec in batch:
            candidate = self._candidates.get(spec)
            if candidate is None:  # legal on none of the open shapes
                continue
            if not candidate.failure and len(candidate.times_ns) == len(self._count) and not self._reference:
                self._reference = dict(candidate.times_ns)
            self._proposer.tell(spec, self._cost(candidate))

    def _cost(self, candidate: Candidate) -> float | None:
        """Time of all the model's matrices of these shapes, sum of count * time, in nanoseconds.

        On a shape where it was not timed (dropped, finished, not legal) the candidate is taken to stand to
        the reference as it does on the others.
        """
        if candidate.failure or not candidate.times_ns:
            return None
        known = candidate.times_ns
        missing = [shape for shape in self._count if shape not in known]
        cost = sum(self._count[shape] * time for shape, time in known.items())
        if missing:
            if not self._reference:
                return None
            factor = statistics.geometric_mean(time / self._reference[shape] for shape, time in known.items())
            cost += sum(self._count[shape] * self._reference[shape] * factor for shape in missing)
        return cost

    def _open_shapes(self) -> list[Shape]:
        """The shapes where something is left to win: no kernel is within reach of the roofline yet.

        A few candidates are timed on every shape all the same, so that the median of a space means something.
        """
        if len(self._candidates) < self._config.least_trials:
            return list(self._count)
        return [shape for shape in self._count if not self._is_finished(shape)]

    def _is_finished(self, shape: Shape) -> bool:
        """Whether the best kernel of ``shape`` reaches the roofline, beside the probes of that limit.

        The machine's peaks are of another moment: memory that gave 27 GB/s when they were taken and 31 later
        ended a search of 200 points at its 25th, 12 % above the best. So near them kernel and probes run in
        the same rounds. A kernel beyond a limit shows that it was none, and finishes nothing.
        """
        best = min(self._candidates.values(), key=lambda candidate: candidate.time_ns(shape))
        share = self._share(best, shape, self._peaks.best_dram_gbs, self._peaks.peak_gops)
        if share < self._config.roofline_share:
            return False
        if (shape, best.spec) not in self._beside_probes:
            regime, rounds = self._regime, self._config.race_block
            job = RaceJob((best.spec,), shape, regime.n, self.group.threads, rounds, regime.cold)
            self._beside_probes[shape, best.spec] = self._cache.race(job)
        race = self._beside_probes[shape, best.spec]
        time_ns = statistics.median(race[best.spec]) if best.spec in race else math.inf
        dram_gbs = race.read_gbs or self._peaks.best_dram_gbs
        raced = Candidate(best.spec, {shape: time_ns})
        share = self._share(raced, shape, dram_gbs, {**self._peaks.peak_gops, **race.peak_gops})
        return self._config.roofline_share <= share <= 1

    def _share(
        self, candidate: Candidate, shape: Shape, dram_gbs: float, peak_gops: Mapping[str, float]
    ) -> float:
        """The share of these limits that ``candidate`` reaches on ``shape``."""
        n, cold = self._regime.n, self._regime.cold
        layout, gops = candidate.spec.layout, peak_gops[self.group.isa.name]
        return roofline_ns(layout, shape, n, cold, dram_gbs, gops) / candidate.time_ns(shape)
