"""Answer from records instead of a machine: the search runs in milliseconds and gives the same each time."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from bitgen.errors import BitgenError
from bitgen.measure.records import Job, Limits, Measurement, Missing, Race
from bitgen.spec import KernelSpec, Shape


class ReplayRunner:
    """A `Runner` that answers from recorded measurements; it compiles and starts nothing.

    Of several records of one job the last counts. A job that was never recorded is answered by `Missing`.
    """

    def __init__(self, records: Iterable[Measurement], limits: Iterable[Limits] = ()) -> None:
        self._records = {record.key: record for record in records}
        self._limits = {limit.threads: limit for limit in limits}

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement | Missing]:
        """One recorded answer for each job, in the order of the jobs."""
        for job in jobs:
            record = self._records.get(job.key)
            yield Missing(job) if record is None else record

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
        """Rounds drawn from the recorded repeats by ``seed``; a kernel without recorded times is dropped."""
        times: dict[KernelSpec, list[float]] = {}
        dropped: dict[KernelSpec, str] = {}
        for spec in dict.fromkeys(specs):
            job = Job(spec, shape, n, threads, cold)
            record = self._records.get(job.key)
            if record is None:
                dropped[spec] = Missing(job).detail
            elif not record.ok:
                dropped[spec] = record.detail
            else:
                # Seeded by the kernel too: the same rounds whoever else takes part.
                draw = random.Random(f"{seed} {spec.name} {shape.name} {n} {threads}")  # noqa: S311 - no secret
                times[spec] = [draw.choice(record.times_ns) for _ in range(rounds)]
        return Race(times, dropped)

    def limits(self, threads: int, isas: Sequence[str]) -> Limits:
        """The recorded limits; BitgenError when those of ``threads`` or of an ISA level are not recorded."""
        found = self._limits.get(threads)
        if found is None:
            raise BitgenError(f"the machine's limits with {threads} threads were never recorded")
        missing = [isa for isa in isas if isa not in found.peak_gops]
        if missing:
            raise BitgenError(f"the peak of {', '.join(missing)} was never recorded")
        return found
