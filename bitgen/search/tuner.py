"""The whole tune: the machine's peaks, search of every group, races, choice of the layouts, records."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypeVar

from bitgen.errors import BitgenError, InterruptError
from bitgen.fingerprints import Fingerprints
from bitgen.measure import Job, MachinePeak, Measurement, Race, RaceJob, Runner
from bitgen.measure.load import Load
from bitgen.progress import Progress, Report
from bitgen.search.cache import MeasurementCache
from bitgen.search.choose import (
    Choice,
    Option,
    Slot,
    SlotRace,
    choose,
    fastest_threads,
    options_of,
    slot_of,
    token_weights,
    total_ns,
)
from bitgen.search.group import Candidate, GroupOutcome, GroupSearch, roofline_ns
from bitgen.search.plan import (
    Group,
    Plan,
    SearchConfig,
    SpaceFactory,
    groups_of,
    load_search_config,
    seed_of,
)
from bitgen.search.race import finalists_of, run_race
from bitgen.search.result import GroupReport, ThreadCost, TuningResult, formats_of, rows_of
from bitgen.spec import KernelSpec, Layout, Shape
from bitgen.store import PeakRecord, RecordStore, TuningRecord

_LEAST_REPEAT_NS = 5e6  # a runner repeats a short call at least this long
_LEAST_TURN_S = 5.0  # left for another turn: in less, compiling would take the most of it

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Session:
    """What a tune is given besides its plan.

    ``family_winners``: committed schedules of this CPU family or of the nearest one (``started_from`` says
    which), tried first, as are stale winners, on the ISA levels of the plan whatever level they won on.
    ``non_matmul_ns(regime, threads)``: what a token takes outside the matrices, asked only when there are
    several numbers of threads to compare. ``fresh``: measure again what the store knows. ``earlier``: what
    the store says of earlier tunes is tried first and races again; False where ``family_winners`` has all of
    that, so that a tune which was killed after it had recorded its own winners is not led another way by
    them.
    ``at_once``: searches, and races, that go on at the same time, for a runner that asks many machines; they
    ask for nothing in common, so the outcome is the same. ``load`` is that of `MeasurementCache`.
    """

    config: SearchConfig = field(default_factory=load_search_config)
    family_winners: tuple[KernelSpec, ...] = ()
    started_from: str = ""
    non_matmul_ns: Callable[[str, int], float] | None = None
    fresh: bool = False
    earlier: bool = True
    at_once: int = 1
    progress: Report | None = None
    load: Callable[[], Load | None] | None = None
    clock: Callable[[], float] = time.monotonic


def tune(
    plan: Plan,
    runner: Runner,
    store: RecordStore,
    fingerprints: Fingerprints,
    spaces: SpaceFactory,
    session: Session | None = None,
) -> TuningResult:
    """Find the fastest kernels of ``plan`` and record them in ``store``.

    Everything that is measured is recorded at once, and what still holds by its fingerprint is not measured
    again: after a kill the same call walks the same way and continues. With a trial budget and no timeout the
    outcome depends on the measurements and ``plan.seed`` alone.
    InterruptError after Ctrl-C; FileError when the store cannot be written.
    """
    session = session or Session()
    cache = MeasurementCache(runner, store, fingerprints, plan.seed, session.fresh, session.load)
    try:
        return _Tune(plan, session, cache).run(spaces)
    except KeyboardInterrupt:
        kept = "nothing new was measured"
        if cache.recorded:
            kept = f"{cache.recorded} new measurements are in {store.path}, and the same command continues "
            kept += "from them"
        raise InterruptError(f"interrupted; {kept}") from None


class _Tune:
    """One tune under way."""

    def __init__(self, plan: Plan, session: Session, cache: MeasurementCache) -> None:
        self._plan = plan
        self._session = session
        self._config = session.config
        self._cache = cache
        self._store = cache.store
        self._fingerprints = cache.fingerprints
        self._clock = session.clock
        self._starters: list[KernelSpec] = []
        self._stale: list[KernelSpec] = []
        self._left_races: dict[str, None] = {}
        self._begin = self._clock()
        self._end = self._begin + (plan.timeout_s or math.inf)
        self._peaks: dict[int, MachinePeak] = {}
        self._read_gbs: dict[int, float] = {}
        self._peak_gops: dict[int, dict[str, float]] = {}
        self._anchors: dict[Slot, dict[Shape, Candidate]] = {}
        self._lock = threading.Lock()  # of `_read_gbs`, while slots race at the same time

    def run(self, spaces: SpaceFactory) -> TuningResult:
        plan = self._plan
        groups, rejected = groups_of(plan, spaces)
        for done, threads in enumerate(plan.threads):
            self._report("peaks", f"the machine's peaks, {threads} threads", done, len(plan.threads))
            self._peaks[threads] = self._cache.runner.machine_peak(threads, [i.name for i in plan.isas])
            self._read_gbs[threads] = self._peaks[threads].best_dram_gbs
            self._peak_gops[threads] = dict(self._peaks[threads].peak_gops)
            cpu = self._fingerprints(groups[0].points[0]).cpu
            self._store.append(PeakRecord(cpu, self._peaks[threads]))
        # The runner now holds the machine; the tune it may have waited for has recorded what we can use.
        self._store.reload()
        self._stale = self._store.stale(self._fingerprints) if self._session.earlier else []
        self._starters = [
            replace(spec, isa=isa.name)
            for spec in (*self._stale, *self._session.family_winners)
            for isa in plan.isas
        ]
        self._anchors = self._measure_anchors(groups)
        outcomes, races = self._search_and_race(groups)
        layouts = list(dict.fromkeys(layout for group in groups for layout in group.layouts))
        self._require_kernels(self._options(plan.threads[0], races, layouts), outcomes)
        choices = {
            threads: self._choose(threads, races, layouts, self._default_layouts(groups))
            for threads in plan.threads
        }
        costs = self._thread_costs(choices)
        best = fastest_threads({cost.threads: cost.session_ns for cost in costs}, self._config.margin)
        self._record(choices[best], best if len(costs) > 1 else 0)
        return self._result(choices[best], outcomes, rejected, best, costs)

    # ---- search ----

    def _search_and_race(
        self, groups: Sequence[Group]
    ) -> tuple[list[GroupOutcome], dict[Shape, dict[Slot, SlotRace]]]:
        """Search, then race the fastest; what time the races leave goes to searches that were cut short.

        After those the races are run again: what they took the first time is kept for them.
        """
        searches = [self._search_of(group) for group in groups]
        end = self._begin + (self._end - self._begin) * (1 - self._config.race_share)
        if self._session.at_once > 1:
            return self._search_and_race_at_once(searches, end)
        while True:
            self._search(searches, end)
            outcomes = [search.outcome for search in searches]
            begin = self._clock()
            races = self._race_all(outcomes)
            end = self._end - (self._clock() - begin)
            if all(search.complete for search in searches) or self._clock() + _LEAST_TURN_S > end:
                return outcomes, races

    def _search_and_race_at_once(
        self, searches: Sequence[GroupSearch], end: float
    ) -> tuple[list[GroupOutcome], dict[Shape, dict[Slot, SlotRace]]]:
        """All searches at the same time, each until ``end``; the races of a slot follow its own searches.

        So no machine waits for the longest search of another regime.
        """

        def whole(slot: Slot) -> dict[Shape, dict[Slot, SlotRace]]:
            mine = [search for search in searches if slot_of(search.group) == slot]
            self._each(lambda search: self._run(search, searches, end), mine)
            self._recall(mine)
            return self._race_all([search.outcome for search in mine])

        races: dict[Shape, dict[Slot, SlotRace]] = {shape: {} for shape in self._plan.shapes}
        for found in self._each(whole, dict.fromkeys(slot_of(search.group) for search in searches)):
            for shape, of_slot in found.items():
                races[shape].update(of_slot)
        return [search.outcome for search in searches], races

    def _measure_anchors(self, groups: Sequence[Group]) -> dict[Slot, dict[Shape, Candidate]]:
        """The default of each slot's first family on every shape, for the times of others to be told in."""
        first: dict[Slot, Group] = {}
        for group in groups:
            first.setdefault(slot_of(group), group)
        regimes = self._config.regimes
        jobs = [
            Job(spec, shape, regimes[slot.regime].n, slot.threads, regimes[slot.regime].cold)
            for slot, group in first.items()
            for shape, spec in group.defaults.items()
        ]
        anchors: dict[Slot, dict[Shape, Candidate]] = {slot: {} for slot in first}
        for measurement in self._cache.measure(jobs):
            if isinstance(measurement, Measurement) and measurement.ok:
                job = measurement.job
                known = Candidate(job.spec, {job.shape: measurement.median_ns})
                anchors[Slot(job.spec.regime, job.threads)][job.shape] = known
        return anchors

    def _search_of(self, group: Group) -> GroupSearch:
        starters = [spec for spec in self._starters if spec.family == group.family]
        peaks, anchors = self._peaks[group.threads], self._anchors[slot_of(group)]
        return GroupSearch(
            group, self._plan, starters, self._config, self._cache, peaks, self._clock, anchors
        )

    def _search(self, searches: Sequence[GroupSearch], end: float) -> None:
        """Search one group after the other, until all are complete or it is ``end``.

        Each gets its share of the time that is left when its turn comes, so what one leaves goes to those
        behind it; what they leave goes to those that were cut short, in further turns. The first turn takes
        ``first_share`` of the time: what is left goes to families that may still win.
        """
        begin = self._clock()
        first = begin + self._config.first_share * (end - begin) if math.isfinite(end) else end
        self._turn([search for search in searches if not search.complete], searches, first)
        for wanted in (self._hopeful, lambda every: [search for search in every if not search.complete]):
            while (turn := wanted(searches)) and end - self._clock() >= _LEAST_TURN_S:
                self._turn(turn, searches, end)
        self._recall(searches)

    def _turn(self, turn: Sequence[GroupSearch], searches: Sequence[GroupSearch], end: float) -> None:
        """Each of ``turn`` once, until ``end`` at the latest."""
        shares = [self._config.regimes[search.group.regime].time_share for search in turn]
        for i, search in enumerate(turn):
            now = self._clock()
            share = (end - now) * shares[i] / sum(shares[i:]) if math.isfinite(end) else end
            self._run(search, searches, now + share)

    def _hopeful(self, searches: Sequence[GroupSearch]) -> list[GroupSearch]:
        """What is open of families whose kernels so far cost a session little more than the best family's."""
        tokens = token_weights(self._config, self._plan.objective, self._plan.regimes)
        best: dict[tuple[int, str], dict[str, float]] = {}
        for search in searches:
            group = search.group
            found = best.setdefault((group.threads, group.family), {})
            per_token = search.best_ns / self._config.regimes[group.regime].n
            found[group.regime] = min(per_token, found.get(group.regime, math.inf))
        costs = {
            key: sum(count * found.get(regime, math.inf) for regime, count in tokens.items() if count)
            for key, found in best.items()
        }
        least = {threads: min(c for (t, _), c in costs.items() if t == threads) for threads, _ in costs}
        return [
            search
            for search in searches
            if not search.complete
            and costs[search.group.threads, search.group.family]
            <= self._config.hopeless_ratio * least[search.group.threads]
        ]

    def _recall(self, searches: Sequence[GroupSearch]) -> None:
        """A previous winner must not be lost by a shorter tune."""
        for search, shape in product(searches, self._plan.shapes):
            search.recall(self._previous(shape))

    def _previous(self, shape: Shape) -> list[KernelSpec]:
        """What the newest tune of ``shape`` selected."""
        if not self._session.earlier:
            return []
        return self._store.current(shape, self._fingerprints, self._plan.kind)

    def _each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``work`` of every item, in their order; `Session.at_once` of them at the same time."""
        if self._session.at_once == 1:
            return [work(item) for item in items]
        pool = ThreadPoolExecutor(self._session.at_once)
        try:
            return list(pool.map(work, items))
        finally:  # after Ctrl-C nobody waits for what others are still asking for
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, search: GroupSearch, searches: Sequence[GroupSearch], deadline: float) -> None:
        done = sum(other.complete for other in searches)

        def seen(candidates: int) -> None:
            title = f"{search.group.name}: {candidates} of {len(search.group.points)} points"
            self._report("search", title, done, len(searches))

        seen(len(search.outcome.candidates))
        search.run(deadline, seen)

    # ---- races ----

    def _race_all(self, outcomes: Sequence[GroupOutcome]) -> dict[Shape, dict[Slot, SlotRace]]:
        """One race for each shape, regime and thread count, in which all families take part."""
        slots = list(dict.fromkeys(slot_of(o.group) for o in outcomes))
        pairs = [(slot, shape) for slot in slots for shape in self._plan.shapes]
        races: dict[Shape, dict[Slot, SlotRace]] = {shape: {} for shape in self._plan.shapes}

        def race(item: tuple[int, tuple[Slot, Shape]]) -> SlotRace:
            done, (slot, shape) = item
            self._report("race", f"{shape.name} {slot.regime}, {slot.threads} threads", done, len(pairs))
            now, left = self._clock(), len(pairs) - done if self._session.at_once == 1 else 1
            mine = [o for o in outcomes if slot_of(o.group) == slot]
            return self._race(shape, slot, mine, now + (self._end - now) / left)

        for (slot, shape), raced in zip(pairs, self._each(race, enumerate(pairs)), strict=True):
            races[shape][slot] = raced
            with self._lock:
                self._read_gbs[slot.threads] = max(self._read_gbs[slot.threads], raced.raced.read_gbs)
        return races

    def _race(self, shape: Shape, slot: Slot, outcomes: Sequence[GroupOutcome], deadline: float) -> SlotRace:
        regime = self._config.regimes[slot.regime]
        defaults: dict[str, KernelSpec] = {}
        for outcome in outcomes:  # best ISA level first
            defaults.setdefault(outcome.group.family, outcome.group.defaults[shape])
        previous = set(self._previous(shape))
        limit = self._config.finalist_ratio
        finalists = finalists_of(shape, outcomes, regime.finalists, limit, defaults, previous)
        for fewer in range(regime.finalists - 1, 0, -1):
            if self._race_seconds(shape, finalists, outcomes) <= deadline - self._clock():
                break
            finalists = finalists_of(shape, outcomes, fewer, limit, defaults, previous)

        rounds = self._config.race_block
        job = RaceJob(tuple(finalists), shape, regime.n, slot.threads, rounds, regime.cold)

        def ask(running: Sequence[KernelSpec], block: int) -> Race:
            seed = seed_of(self._plan.seed, shape.name, slot.regime, slot.threads, block)
            return self._cache.race(replace(job, specs=tuple(running), seed=seed))

        raced = run_race(
            finalists,
            list(defaults.values()),
            ask,
            self._plan.race_blocks,
            self._config,
            lambda: self._clock() >= deadline,
        )
        left = (f"{spec.name} on {shape.name}: {reason}" for spec, reason in raced.dropped.items())
        self._left_races.update(dict.fromkeys(left))
        return SlotRace(raced, defaults, job, self._fingerprints)

    def _race_seconds(
        self, shape: Shape, finalists: Sequence[KernelSpec], outcomes: Sequence[GroupOutcome]
    ) -> float:
        """About how long one block takes: a round times each finalist for some milliseconds at least."""
        times = {c.spec: c.time_ns(shape) for outcome in outcomes for c in outcome.candidates}
        round_ns = sum(max(times[spec], _LEAST_REPEAT_NS) for spec in finalists)
        return self._config.race_block * round_ns * 1e-9

    # ---- choices ----

    def _options(
        self, threads: int, races: Mapping[Shape, Mapping[Slot, SlotRace]], layouts: Sequence[Layout]
    ) -> dict[Shape, tuple[Option, ...]]:
        objective = self._plan.objective
        return {
            target.shape: options_of(target, layouts, races[target.shape], self._config, objective, threads)
            for target in self._plan.targets
        }

    def _choose(
        self,
        threads: int,
        races: Mapping[Shape, Mapping[Slot, SlotRace]],
        layouts: Sequence[Layout],
        default_layouts: Mapping[str, Layout],
    ) -> Choice:
        every = self._options(threads, races, layouts)
        return choose(self._plan.targets, self._plan.families, every, default_layouts, self._config)

    def _thread_costs(self, choices: Mapping[int, Choice]) -> tuple[ThreadCost, ...]:
        """What a session takes on each number of threads: the matrices, and what is no matmul."""
        weights = token_weights(self._config, self._plan.objective, self._plan.regimes)
        costs = []
        for done, (threads, choice) in enumerate(choices.items()):
            matrices = statistics.median(total_ns(self._plan.targets, choice.options))
            others = 0.0
            if (cost_ns := self._session.non_matmul_ns) and len(choices) > 1:
                self._report("non-matmul", f"non-matmul cost, {threads} threads", done, len(choices))
                others = sum(n * cost_ns(regime, threads) for regime, n in weights.items() if n)
            costs.append(ThreadCost(threads, matrices, others))
        return tuple(costs)

    # ---- outcome ----

    @staticmethod
    def _require_kernels(every: Mapping[Shape, tuple[Option, ...]], outcomes: Sequence[GroupOutcome]) -> None:
        for shape, options in every.items():
            if not options:
                failures = [text for outcome in outcomes for text in outcome.failures]
                reason = failures[0] if failures else "none was measured"
                raise BitgenError(f"no layout of {shape.name} has a kernel for every regime: {reason}")

    def _default_layouts(self, groups: Sequence[Group]) -> dict[str, Layout]:
        """The layout of each family's default in the first regime searched."""
        found: dict[str, Layout] = {}
        for group in groups:
            found.setdefault(group.family, next(iter(group.defaults.values())).layout)
        return found

    def _record(self, choice: Choice, best_threads: int) -> None:
        for shape, option in choice.options.items():
            winners = tuple(w for other in choice.every[shape] for w in other.winners.values())
            record = TuningRecord(
                shape,
                self._plan.objective,
                option.layout,
                winners,
                self._plan.seed,
                best_threads,
            )
            self._store.append(record)

    def _result(
        self,
        choice: Choice,
        outcomes: Sequence[GroupOutcome],
        rejected: Sequence[str],
        threads: int,
        thread_costs: tuple[ThreadCost, ...],
    ) -> TuningResult:
        self._raise_roof(choice)
        return TuningResult(
            model=self._plan.model,
            objective=self._plan.objective,
            seed=self._plan.seed,
            rows=rows_of(self._plan, choice, outcomes, self._roofline_ns),
            formats=formats_of(self._plan, choice),
            threads=threads,
            thread_costs=thread_costs,
            layouts={shape: option.layout for shape, option in choice.options.items()},
            peaks=self._peaks,
            dram_gbs=self._read_gbs,
            peak_gops=self._peak_gops,
            groups=tuple(
                GroupReport(
                    o.group.name, len(o.group.points), o.outcomes, tuple(o.failures), o.seconds, o.complete
                )
                for o in outcomes
            ),
            rejected=tuple(rejected),
            left_races=tuple(self._left_races),
            started_from=self._tried_first(),
            recorded=self._cache.recorded,
            recalled=self._cache.recalled,
            seconds=self._clock() - self._begin,
        )

    def _tried_first(self) -> tuple[str, ...]:
        stale = len(self._stale)
        before = f"{stale} winners of earlier tunes whose timing is stale" if stale else ""
        return tuple(filter(None, [before, self._session.started_from]))

    def _raise_roof(self, choice: Choice) -> None:
        """The peaks quoted are the most that any probe *or kernel* of this run reached."""
        for option in (option for options in choice.every.values() for option in options):
            for slot, winner in option.winners.items():
                regime, threads, isa = self._config.regimes[slot.regime], slot.threads, winner.spec.isa
                if regime.cold:
                    gbs = option.layout.packed_bytes(option.shape) / winner.time_ns
                    self._read_gbs[threads] = max(self._read_gbs[threads], gbs)
                gops = 2 * option.shape.m * option.shape.k * regime.n / winner.time_ns
                self._peak_gops[threads][isa] = max(self._peak_gops[threads][isa], gops)

    def _roofline_ns(self, spec: KernelSpec, shape: Shape, slot: Slot) -> float:
        regime = self._config.regimes[slot.regime]
        dram_gbs, peak_gops = self._read_gbs[slot.threads], self._peak_gops[slot.threads][spec.isa]
        return roofline_ns(spec.layout, shape, regime.n, regime.cold, dram_gbs, peak_gops)

    def _report(self, stage: str, title: str, done: int, total: int) -> None:
        """Tell what is on, part ``done`` + 1 of ``total`` of its stage, and how much of the time is used."""
        if self._session.progress is not None:
            spent, limit = self._clock() - self._begin, self._plan.timeout_s or 0.0
            text = f"{stage} {done + 1} of {total}: {title}"
            self._session.progress(Progress(text, min(spent, limit), limit, "seconds"))
