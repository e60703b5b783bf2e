"""When has a candidate lost? A sequential test on its times and the incumbent's of the same rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitgen.errors import BitgenError
from bitgen.measure.jobs import Job


@dataclass(frozen=True)
class DropRule:
    """A candidate leaves as soon as its pairs say with confidence that it gains less than ``margin``.

    With d_i = log(candidate_i / incumbent_i) of r pairs (a moment that is slow for both cancels), it has lost
    when r >= ``least`` and

        mean(d) + margin >= t * sqrt(s2 / r)
        s2 = (prior * noise^2 + sum of (d_i - mean(d))^2) / (prior + r - 1)

    A pair or two know nothing of their noise, so ``prior`` degrees of freedom of the ``noise`` that is usual
    (a standard deviation of d) are mixed in. One pair drops what is 14 % slower, two quiet ones what is 7 %
    slower, three what is 5 % slower; a disturbed one among them drops nobody. Only the candidate's own pairs
    count, so the decision is the same whoever is timed beside it, and also when a search that was killed is
    taken up again.
    """

    least: int = 1
    noise: float = 0.05
    prior: int = 3
    t: float = 3.0
    margin: float = 0.02

    def __post_init__(self) -> None:
        if self.least < 1 or self.noise <= 0 or self.prior < 1 or self.t <= 0:
            raise BitgenError("a drop rule needs least and prior of at least 1, noise and t above 0")

    def lost(self, times: Sequence[float], against: Sequence[float]) -> bool:
        """Whether the pairs so far say that the candidate is slower."""
        d = [math.log(t / a) for t, a in zip(times, against, strict=False)]
        if len(d) < self.least:
            return False
        mean = statistics.fmean(d)
        spread = sum((x - mean) ** 2 for x in d)
        s2 = (self.prior * self.noise**2 + spread) / (self.prior + len(d) - 1)
        return mean + self.margin >= self.t * math.sqrt(s2 / len(d))

    def pairs(self, times: Sequence[float], against: Sequence[float]) -> int:
        """How many of the pairs are timed before the candidate leaves; all of them when it stays."""
        return next(
            (r for r in range(self.least, len(times)) if self.lost(times[:r], against[:r])), len(times)
        )

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DropRule:
        return cls(**data)


def heats(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    """Jobs that follow each other, at most ``size``, cut where more than their kernels differs."""
    heat: list[Job] = []
    for job in jobs:
        if heat and (len(heat) == size or _occasion(job) != _occasion(heat[0])):
            yield heat
            heat = []
        heat.append(job)
    if heat:
        yield heat


def _occasion(job: Job) -> tuple[object, ...]:
    return (job.shape, job.n, job.threads, job.cold, job.spec.shape)
