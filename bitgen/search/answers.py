"""Where answers come from: the store first, then the runner, whose answers are recorded at once."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from bitgen.measure import Job, Measurement, Missing, Race, RaceJob, Runner
from bitgen.store import Fingerprint, RaceKey, RaceRecord, RecordStore, TrialRecord


class Answers:
    """A runner with a memory. ``fresh``: ask the runner again what the store knows of earlier runs.

    ``recorded`` counts what this run added to the store, ``recalled`` what it took from there.
    """

    def __init__(
        self, runner: Runner, store: RecordStore, fingerprint: Fingerprint, seed: int, fresh: bool
    ) -> None:
        self.runner = runner
        self.recorded = 0
        self.recalled = 0
        self._store = store
        self._fingerprint = fingerprint
        self._seed = seed
        self._fresh = fresh
        self._raced: set[RaceKey] = set()  # by this run

    def measure(self, jobs: Sequence[Job]) -> Generator[Measurement | Missing, None, None]:
        """One answer for each job: those known first, then the others as they are measured."""
        unknown = []
        for job in jobs:
            known = None if self._fresh else self._store.known(job.key, self._fingerprint)
            if known is None:
                unknown.append(job)
            else:
                self.recalled += 1
                yield known
        if not unknown:
            return
        for answer in self.runner.measure(unknown):
            if isinstance(answer, Measurement):
                self._store.append(TrialRecord(self._fingerprint, answer, self._seed))
                self.recorded += 1
            yield answer

    def race(self, job: RaceJob) -> Race:
        """One block of a race."""
        key = job.key
        may_know = not self._fresh or key in self._raced
        known = self._store.known_race(key, self._fingerprint) if may_know else None
        self._raced.add(key)
        if known is not None:
            self.recalled += 1
            return known
        race = self.runner.race(job)
        record = RaceRecord(self._fingerprint, *key, race)
        self._store.append(record)
        self.recorded += 1
        return race
