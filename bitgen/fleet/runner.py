"""A `Runner` whose machine is a fleet: each question becomes jobs for whichever machine is free.

Every candidate is timed beside an incumbent on the machine that times it, the default of its space where the
search names none, so the search compares ratios. Where it needs nanoseconds (what a shape weighs in the
whole model, how near to the roofline) all are told in units of one machine's peak, the one that answered
first: a time t of a machine with twice its bandwidth counts as 2 t.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from bitgen.cpu import Isa
from bitgen.errors import BitgenError
from bitgen.fleet.messages import Answer, Request, scaled_race
from bitgen.measure import Job, MachinePeak, Measurement, Race, RaceJob
from bitgen.measure.jobs import batches
from bitgen.search import SpaceFactory
from bitgen.spec import KernelSpec, Shape

BATCH = 8  # candidates of a request at most: 10 s to a minute of a machine
# Requests that all searches together have in flight where they can: two for each of eight machines. By the
# plan alone, not by the machines that are there, so that who begins again asks the same questions.
IN_FLIGHT = 16


class Exchange(Protocol):
    """Carries requests to machines and answers back."""

    def ask(self, request: Request, apart_from: str = "") -> Future[Answer]:
        """The answer of one machine, checked; another one than ``apart_from`` where the family has one."""
        ...


class FleetRunner:
    """A `Runner` over ``exchange``, for one kind of CPU; ``searches`` ask it at once.

    The fewer they are, the smaller are their requests: of a tune of one space each candidate is a job.
    """

    def __init__(
        self,
        exchange: Exchange,
        label: str,
        code: str,
        isas: Sequence[Isa],
        spaces: SpaceFactory,
        searches: int,
    ) -> None:
        self._exchange = exchange
        self._label, self._code = label, code
        self._isas = {isa.name: isa for isa in isas}
        self._spaces = spaces
        self._searches = searches
        self._defaults: dict[tuple[str, str, str, Shape], KernelSpec | None] = {}
        self._peaks: dict[int, MachinePeak] = {}
        self._lock = threading.Lock()

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        """One answer for each job, in the order of the jobs; batches go to different machines."""
        size = max(1, min(BATCH, math.ceil(len(jobs) * self._searches / IN_FLIGHT)))
        requests = [
            self._request("measure", batch[0].threads, jobs=tuple(map(self._compared, batch)))
            for batch in batches(jobs, size)
        ]
        for request, answer in [(request, self._exchange.ask(request)) for request in requests]:
            found = answer.result()
            for trial in found.trials:
                job = trial.measurement.job
                factor = self._factor(found.unit, job.spec.isa, job.cold, request.threads)
                yield _scaled(trial.measurement, factor)

    def race(self, job: RaceJob) -> Race:
        """One block of a race, all of it on one machine."""
        return self.raced(job)[0]

    def raced(self, job: RaceJob, occasion: int = 0, apart_from: str = "") -> tuple[Race, str]:
        """`race` and the machine that ran it, another one than ``apart_from`` where there is one."""
        request = self._request("race", job.threads, race=job, occasion=occasion)
        answer = self._exchange.ask(request, apart_from).result()
        if answer.race is None:  # `Answer.check` has seen to it
            raise BitgenError(f"{answer.machine} gave no race")
        factor = self._factor(answer.unit, job.specs[0].isa, job.cold, job.threads)
        return scaled_race(answer.race.race, factor), answer.machine

    def machine_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        """The peak of the machine that answers first: the unit of all times."""
        unknown = [name for name in isas if name not in self._isas]
        if unknown:
            raise BitgenError(f"{', '.join(unknown)}: no level of this fleet's plan")
        with self._lock:
            if threads not in self._peaks:
                self._peaks[threads] = self._exchange.ask(self._request("peak", threads)).result().unit
            return self._peaks[threads]

    def _request(
        self,
        kind: str,
        threads: int,
        jobs: tuple[Job, ...] = (),
        race: RaceJob | None = None,
        occasion: int = 0,
    ) -> Request:
        isas = tuple(self._isas)
        return Request(kind, self._label, self._code, threads, isas, jobs, race, occasion)  # type: ignore[arg-type]

    def _compared(self, job: Job) -> Job:
        """``job`` beside the default of its space where it stands alone; the default itself does."""
        if job.against is not None:
            return job
        default = self._default(job.spec, job.shape)
        return job if default in (None, job.spec) else replace(job, against=default)

    def _default(self, spec: KernelSpec, shape: Shape) -> KernelSpec | None:
        key = (spec.family, spec.isa, spec.regime, shape)
        if key not in self._defaults:
            self._defaults[key] = self._spaces(spec.family, self._isas[spec.isa], spec.regime, shape).default
        return self._defaults[key]

    def _factor(self, unit: MachinePeak, isa: str, cold: bool, threads: int) -> float:
        """What times of a machine with the peak ``unit`` are multiplied with."""
        own = self.machine_peak(threads, [isa])
        if cold:
            return unit.best_dram_gbs / own.best_dram_gbs
        return unit.peak_gops[isa] / own.peak_gops[isa]


def _scaled(measurement: Measurement, factor: float) -> Measurement:
    return replace(
        measurement,
        times_ns=tuple(factor * time for time in measurement.times_ns),
        against_ns=tuple(factor * time for time in measurement.against_ns),
    )
