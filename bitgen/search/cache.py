"""Measurements: from the store where it knows them, else from the runner, and then recorded at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence

from bitgen.fingerprints import Fingerprints
from bitgen.measure import Job, Measurement, Missing, Race, RaceJob, Runner
from bitgen.measure.load import Load
from bitgen.store import LoadRecord, RaceRecord, RecordStore, TrialRecord


class MeasurementCache:
    """A runner with a memory. ``fresh``: ask the runner again what the store knows of earlier runs.

    ``load`` tells now and then what others took of the machine, for the store; it is asked while nothing is
    timed.
    ``recorded`` counts what this run added to the store, ``recalled`` what it took from there. Searches may
    ask at the same time.
    """

    def __init__(
        self,
        runner: Runner,
        store: RecordStore,
        fingerprints: Fingerprints,
        seed: int = 0,
        fresh: bool = False,
        load: Callable[[], Load | None] | None = None,
    ) -> None:
        self.runner = runner
        self.store = store
        self.fingerprints = fingerprints
        self.recorded = 0
        self.recalled = 0
        self._seed = seed
        self._fresh = fresh
        self._load = load or (lambda: None)
        self._raced: set[RaceJob] = set()  # by this run
        self._lock = threading.Lock()

    def measure(self, jobs: Sequence[Job]) -> Generator[Measurement | Missing, None, None]:
        """One measurement for each job: those known first, then the others as they are measured."""
        unknown = []
        for job in jobs:
            known = None if self._fresh else self.store.known(job, self.fingerprints)
            if known is None:
                unknown.append(job)
            else:
                with self._lock:
                    self.recalled += 1
                yield known
        if not unknown:
            return
        for measurement in self.runner.measure(unknown):
            if isinstance(measurement, Measurement):
                fingerprint = self.fingerprints(measurement.job.spec)
                self._record(TrialRecord(fingerprint, measurement, self._seed))
            yield measurement

    def race(self, job: RaceJob) -> Race:
        """One block of a race."""
        may_know = not self._fresh or job in self._raced
        known = self.store.known_race(job, self.fingerprints) if may_know else None
        self._raced.add(job)
        if known is not None:
            with self._lock:
                self.recalled += 1
            return known
        race = self.runner.race(job)
        self._record(RaceRecord.of(map(self.fingerprints, job.specs), job, race))
        return race

    def _record(self, record: TrialRecord | RaceRecord) -> None:
        with self._lock:
            self.store.append(record)
            self.recorded += 1
            if load := self._load():
                self.store.append(LoadRecord(round(load.busy, 4), round(load.steal, 4)))
