"""A machine's part without any network: a request in, an answer out, and what it says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable

from bitgen.errors import BitgenError
from bitgen.fingerprints import Fingerprints
from bitgen.fleet.bounds import BOUNDS, Bounds, Machine, RefusedError
from bitgen.fleet.messages import Answer, Request
from bitgen.fleet.statistics import Calibration
from bitgen.measure import MachinePeak, Measurement, RaceJob, Runner
from bitgen.measure.stats import ratio
from bitgen.space import space_for
from bitgen.spec import N1, Shape
from bitgen.store import RaceRecord, TrialRecord

_KNOWN = Shape(4096, 4096)  # of the two kernels whose ratio tells whether a machine is like its family


class AbortedError(BitgenError):
    """The worker was told to stop before it had the answer."""


def answer_of(
    request: Request,
    machine: str,
    runner: Runner,
    fingerprints: Fingerprints,
    bounds: Bounds = BOUNDS,
    stops: Callable[[], bool] = lambda: False,
) -> Answer:
    """Measure what ``request`` asks for. ``stops`` is asked between kernels; AbortedError when it says so.

    RefusedError when it takes longer than the bounds allow, BitgenError when the machine cannot measure.
    """
    unit = runner.machine_peak(request.threads, list(request.isas))  # waits until the machine is free
    begin, trials, race = time.monotonic(), [], None
    for found in runner.measure(request.jobs) if request.jobs else ():
        if stops():
            raise AbortedError("told to stop")
        if time.monotonic() - begin > bounds.seconds:
            raise RefusedError(f"it takes more than {bounds.seconds:g} s")
        if not isinstance(found, Measurement):
            raise BitgenError(found.detail)
        trials.append(TrialRecord(fingerprints(found.job.spec), found, 0))
    if request.race:
        run = runner.race(request.race)
        race = RaceRecord.of(map(fingerprints, request.race.specs), request.race, run)
    seconds = round(time.monotonic() - begin, 3)
    peak = MachinePeak(unit.threads, unit.dram_gbs, {name: unit.peak_gops[name] for name in request.isas})
    return Answer(request.key, machine, peak, tuple(trials), race, seconds)


def calibrate(runner: Runner, machine: Machine) -> Calibration:
    """What the machine reaches on all threads it gives, and how two known kernels stand to each other."""
    best = next(iter(machine.levels.values()))
    peak = runner.machine_peak(machine.threads, [best.name])
    known = tuple(space_for(name, best, N1, _KNOWN, machine.cpu).default for name in ("i2s", "t5"))
    race = runner.race(RaceJob(known, _KNOWN, 1, 1, 9))
    if race.dropped:
        raise BitgenError(f"a known kernel fails here: {'; '.join(race.dropped.values())}")
    return Calibration(
        threads=machine.threads,
        dram_gbs=peak.best_dram_gbs,
        peak_gops=peak.peak_gops[best.name],
        ratio=ratio(race[known[0]], race[known[1]]),
    )
