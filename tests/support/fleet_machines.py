"""Machines that do not exist: their times are a function of what is asked, and a factor of their own.

As a script it is a worker process of such a machine:

    python tests/support/fleet_machines.py --dsn DSN --name m1 --cpu zen4 --factor 2 --outbox FOLDER
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from bitgen.cpu import load_isas, target_cpu
from bitgen.fingerprints import Fingerprint
from bitgen.fleet.answering import answer_of
from bitgen.fleet.bounds import Machine
from bitgen.fleet.messages import Answer, Request, code_digest, label_of
from bitgen.measure import Job, MachinePeak, Measurement, Race, RaceJob, Status
from bitgen.spec import KernelSpec, Shape

REPEATS = 3


def fingerprints(spec: KernelSpec) -> Fingerprint:
    return Fingerprint("zen4 made up 0", "none 0", spec.name, "none")


def machine_of(name: str, cpu: str, threads: int = 2) -> Machine:
    """A machine of a kind of CPU of configs/targets.yaml."""
    known, isas = target_cpu(cpu), load_isas()
    return Machine(name, label_of(known, isas), code_digest(), threads, known, isas)


def _share(*parts: object) -> float:
    """0 to 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def _sleep(seconds: float) -> None:
    """As time.sleep, which libfaketime breaks where the monotonic clock is a true one."""
    select.select([], [], [], seconds)


def true_ns(spec: KernelSpec, shape: Shape, n: int) -> float:
    """A landscape: every knob's value adds its part, and so does each kernel by itself."""
    knobs = sum(0.15 * _share(spec.family, name, value) for name, value in spec.schedule)
    own = 0.05 * _share(spec.name, shape.name)
    base = {"i2s": 1.0, "t5": 1.05}.get(spec.family, 1.15)
    return shape.m * shape.k * n * 1e-3 * base * (1 + knobs + own)


@dataclass
class FakeMachine:
    """A `Measurer`. ``factor``: how much slower it is than the first one of its family.

    Times are true ones with the noise of a round, which hits all kernels of a request alike, and of each
    kernel (``noise``, a standard deviation of logarithms), drawn by the request and by ``seed``. ``taste``:
    how much kernels differ from machine to machine. ``sleep_s`` a kernel; one that took ``hangs_s`` more has
    hung.
    """

    factor: float = 1.0
    noise: float = 0.01
    taste: float = 0.0
    hiccups: float = 0.0
    seed: object = ""
    sleep_s: float = 0.0
    hangs_s: float = math.inf
    asked: list[str] = field(default_factory=list)

    def measure(self, jobs: Sequence[Job]) -> Iterator[Measurement]:
        for job in jobs:
            self.asked.append(job.spec.name)
            began = time.monotonic()
            _sleep(self.sleep_s)
            if time.monotonic() - began > self.sleep_s + self.hangs_s:
                yield Measurement(job, Status.TIMEOUT, f"not done after {self.sleep_s + self.hangs_s:g} s")
                continue
            key = ("measure", job.spec.name, job.against and job.against.name, job.shape.name, job.n)
            names = [job.spec, *([job.against] if job.against and job.against != job.spec else [])]
            times = self._rounds(key, names, job.shape, job.n, REPEATS)
            yield Measurement(job, Status.OK, "", times[0], times[1] if len(times) > 1 else ())

    def race(self, job: RaceJob) -> Race:
        _sleep(self.sleep_s * len(job.specs))
        key = ("race", job.seed, job.shape.name, job.n, tuple(spec.name for spec in job.specs))
        times = self._rounds(key, job.specs, job.shape, job.n, job.rounds)
        return Race(dict(zip(job.specs, times, strict=True)))

    def machine_peak(self, threads: int, isas: Sequence[str]) -> MachinePeak:
        # No kernel comes near: nothing ends a search but its space. On all threads, where it is calibrated, a
        # machine looks like its family whatever its factor, or it would be set aside as slow.
        slow = self.factor if threads == 1 else 1.0
        return MachinePeak(threads, {"4 streams": 2.0**24 / slow}, dict.fromkeys(isas, 2.0**30 / slow))

    def close(self) -> None:
        """There is nothing to give back."""

    def _rounds(
        self, key: object, specs: Sequence[KernelSpec], shape: Shape, n: int, rounds: int
    ) -> list[tuple[float, ...]]:
        draw = random.Random(repr((self.seed, key)))
        moments = [math.exp(draw.gauss(0, 0.05)) for _ in range(rounds)]
        found = []
        for spec in specs:
            own = random.Random(repr((self.seed, spec.name, shape.name, n))).gauss(0, self.taste)
            true = true_ns(spec, shape, n) * math.exp(own)
            found.append(
                tuple(
                    self.factor * true * moment * math.exp(draw.gauss(0, self.noise)) * self._hiccup(draw)
                    for moment in moments
                )
            )
        return found

    def _hiccup(self, draw: random.Random) -> float:
        return 1.5 if self.hiccups and draw.random() < self.hiccups else 1.0


class DirectExchange:
    """An `Exchange` in this process: a request is answered at once, by the machine that ``choose`` names."""

    def __init__(
        self,
        machines: Mapping[str, FakeMachine],
        choose: Callable[[Request, Sequence[str]], str] = lambda request, names: min(names),  # noqa: ARG005
    ) -> None:
        self.machines = machines
        self.asked: list[tuple[Request, str]] = []
        self._choose = choose
        self._answers: dict[str, Answer] = {}

    def ask(self, request: Request, apart_from: str = "") -> Future[Answer]:
        names = [name for name in self.machines if name != apart_from] or list(self.machines)
        future: Future[Answer] = Future()
        if request.key not in self._answers:
            name = self._choose(request, names)
            self.asked.append((request, name))
            answer = answer_of(request, name, self.machines[name], fingerprints)
            answer.check(request)
            self._answers[request.key] = answer
        future.set_result(self._answers[request.key])
        return future


def main() -> None:
    from bitgen.errors import BitgenError
    from bitgen.fleet.database import find_database
    from bitgen.fleet.outbox import Outbox
    from bitgen.fleet.worker import Settings, Worker

    parser = argparse.ArgumentParser()
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--cpu", default="zen4")
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--hangs", type=float, default=math.inf)
    parser.add_argument("--outbox", type=Path, required=True)
    parser.add_argument("--idle", type=float)
    args = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    worker = Worker(
        find_database(args.dsn),
        machine_of(args.name, args.cpu),
        lambda: FakeMachine(args.factor, sleep_s=args.sleep, hangs_s=args.hangs),
        fingerprints,
        Outbox(args.outbox),
        "none",
        Settings(max_load=1.0, idle_s=args.idle),
        say,
    )
    try:
        worker.run()
    except BitgenError as error:
        say(error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
