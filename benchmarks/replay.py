"""Answer from records instead of a machine: the search runs in milliseconds and gives the same each time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from bitgen.errors import BitgenError
from bitgen.measure import EarlyStopping, Job, MachinePeak, Measurement, Missing, Race, RaceJob
from bitgen.measure.jobs import batches
from bitgen.spec import KernelSpec


class ReplayRunner:
    """A `Runner` that answers from recorded measurements; it compiles and starts nothing.

    Of several records of one job the last counts. A job that was never recorded is answered by `Missing`.
    """

    def __init__(self, records: Iterable[Measurement], peaks: Iterable[MachinePeak] = ()) -> None:
        self._records = {record.job.key: record for record in records}
        self._peaks = {peak.threads: peak for peak in peaks}

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        """One recorded answer for each job, in the order of the jobs."""
        for job in jobs:
            yield self._recorded(job)

    def _recorded(self, job: Job) -> Measurement | Missing:
        return self._records.get(job.key) or Missing(job)

    def race(self, job: RaceJob) -> Race:
        """Rounds drawn from the recorded repeats by its seed; a kernel without recorded times is dropped."""
        times: dict[KernelSpec, list[float]] = {}
        dropped: dict[KernelSpec, str] = {}
        for spec in dict.fromkeys(job.specs):
            record = self._recorded(Job(spec, job.shape, job.n, job.threads, job.cold))
            if isinstance(record, Missing) or not record.ok:
                dropped[spec] = record.detail
            else:
                times[spec] = self._rounds(record, job.rounds, job.seed)
        return Race(times, dropped)

    def _rounds(self, record: Measurement, rounds: int, seed: int) -> list[float]:
        """``rounds`` of the recorded times; seeded by the kernel too: the same whoever else takes part."""
        job = record.job
        draw = random.Random(f"{seed} {job.spec.name} {job.shape.name} {job.n} {job.threads}")  # noqa: S311 - no secret
        return [draw.choice(record.times_ns) for _ in range(rounds)]

    def machine_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        """The recorded peak; BitgenError when that of ``threads`` or of an ISA level are not recorded."""
        found = self._peaks.get(threads)
        if found is None:
            raise BitgenError(f"the machine's peak with {threads} threads were never recorded")
        missing = [isa for isa in isas if isa not in found.peak_gops]
        if missing:
            raise BitgenError(f"the peak of {', '.join(missing)} was never recorded")
        return found


@dataclass(frozen=True)
class Contention:
    """Other work on the machine, which only adds time: a burst in a ``share`` of all turns.

    A burst makes a turn longer by a share of its time that is drawn from an exponential distribution of mean
    ``mean``, for each kernel and turn alone: pairs of one round do not share it, as slow moments are shared.
    """

    share: float
    mean: float

    def disturb(self, times: Sequence[float], key: str) -> list[float]:
        """The times with bursts, drawn by ``key``."""
        draw = random.Random(key)  # noqa: S311 - no secret
        hits = [(draw.random() < self.share, draw.expovariate(1 / self.mean)) for _ in times]
        return [time * (1 + more if hit else 1) for time, (hit, more) in zip(times, hits, strict=True)]


class RoundReplay(ReplayRunner):
    """A replay of records whose repeat i was taken in the same round for every kernel of a shape.

    Times of a round stay together, so that candidates are pruned as on a machine: after up to ``repeats``
    pairs, by ``stopping``. ``seed`` draws the order of the rounds. ``spent_ns`` adds up how long the machine
    would have measured: a turn of a kernel lasts at least ``min_ns``, and an incumbent's turns serve all
    candidates of a batch of ``batch``. ``contention`` disturbs all of it, each batch and race anew.
    """

    def __init__(
        self,
        records: Iterable[Measurement],
        peaks: Iterable[MachinePeak] = (),
        *,
        stopping: EarlyStopping,
        repeats: int,
        batch: int,
        min_ns: float,
        seed: int = 0,
        contention: Contention | None = None,
    ) -> None:
        super().__init__(records, peaks)
        self.spent_ns = 0.0
        self._contention, self._moment = contention, 0
        self._stopping, self._repeats, self._batch = stopping, repeats, batch
        self._min_ns, self._seed = min_ns, seed

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        """One answer for each job, with the pairs that were timed until it lost."""
        for batch in batches(jobs, self._batch):
            self._moment += 1
            answers = [self._paired(job) for job in batch]
            turns: dict[KernelSpec, Sequence[float]] = {}  # an incumbent's, as long as anybody needs them
            for answer in answers:
                if isinstance(answer, Measurement):
                    self._spend(answer.times_ns)
                    against = answer.job.against
                    if against and answer.against_ns:
                        turns[against] = max(turns.get(against, ()), answer.against_ns, key=len)
            for times in turns.values():
                self._spend(times)
            yield from answers

    def race(self, job: RaceJob) -> Race:
        """Recorded rounds in an order drawn by the race's seed."""
        self._moment += 1
        race = super().race(job)
        for times in race.values():
            self._spend(times)
        return race

    def _spend(self, times: Sequence[float]) -> None:
        self.spent_ns += sum(max(time, self._min_ns) for time in times)

    def _paired(self, job: Job) -> Measurement | Missing:
        record = self._recorded(job)
        if isinstance(record, Missing) or not record.ok:
            return record
        times = self._rounds(record, self._repeats, self._seed)
        baseline = (
            self._recorded(replace(job, spec=job.against))
            if job.against and job.against != job.spec
            else None
        )
        if not isinstance(baseline, Measurement) or not baseline.ok:
            return replace(record, times_ns=tuple(times), against_ns=())
        against = self._rounds(baseline, self._repeats, self._seed)
        pairs = self._stopping.pairs(times, against)
        return Measurement(job, record.status, "", tuple(times[:pairs]), tuple(against[:pairs]))

    def _rounds(self, record: Measurement, rounds: int, seed: int) -> list[float]:
        """Recorded rounds in a drawn order, the same for every kernel; after the last from the start."""
        order = list(range(len(record.times_ns)))
        job = record.job
        draw = random.Random(f"{self._seed} {seed} {job.shape.name} {job.n} {job.threads}")  # noqa: S311
        draw.shuffle(order)
        times = [record.times_ns[order[i % len(order)]] for i in range(rounds)]
        if self._contention is None:
            return times
        key = f"{self._seed} {self._moment} {job.spec.name} {job.shape.name} {job.n} {job.threads}"
        return self._contention.disturb(times, key)
