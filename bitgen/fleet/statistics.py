"""What several machines say together, and which of them not to listen to.

A machine is a block: of a pair of kernels it gives the mean of log(new / old) over rounds in which both were
timed, with its variance. Blocks are pooled by random effects (DerSimonian and Laird 1986), because a kernel
may really gain more on one machine of a family than on another. Nanoseconds never leave their block.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OCCASIONS = 2  # that must agree before a committed winner changes
_Z = 1.96
# A machine this far below its family's median is not used, one this far above cannot be of the family.
SLOW, IMPOSSIBLE = 0.90, 1.5
# How far the ratio of two known kernels may be from the family's: caches and clocks differ by some per cent.
STRANGE = math.log(1.25)
_JURY = 3  # machines of a family before one can be called slow


@dataclass(frozen=True)
class Effect:
    """One machine's word on a pair of kernels: mean of log(new / old) in ``rounds`` rounds, its variance."""

    machine: str
    mean: float
    variance: float
    rounds: int

    @classmethod
    def of(cls, machine: str, new: Sequence[float], old: Sequence[float]) -> Effect:
        """From times of the same rounds, by medians: a hiccup in some rounds moves neither mean nor spread.

        The spread is 1.4826 times the median distance from the median, as of normal noise; the variance of a
        median is pi / 2 times that of a mean.
        """
        logs = [math.log(a / b) for a, b in zip(new, old, strict=False)]
        centre = statistics.median(logs)
        spread = 1.4826 * statistics.median(abs(x - centre) for x in logs) if len(logs) > 2 else math.inf
        return cls(machine, centre, math.pi / 2 * spread**2 / len(logs), len(logs))


@dataclass(frozen=True)
class Pooled:
    """All machines together: the gain exp(``mean``), its standard error, the spread between machines."""

    mean: float
    error: float
    between: float
    machines: int

    @property
    def high(self) -> float:
        """The upper end of the 95 % interval of the mean."""
        return self.mean + _Z * self.error


def pooled(effects: Sequence[Effect]) -> Pooled:
    """The random-effects mean of ``effects``, weights 1 / (variance + between).

    With weights w = 1 / variance, Q = sum of w (mean - fixed mean)^2 and C = sum w - sum w^2 / sum w, the
    variance between machines is max(0, (Q - (k - 1)) / C).
    """
    finite = [e for e in effects if math.isfinite(e.variance)]
    if not finite:
        return Pooled(0.0, math.inf, 0.0, 0)
    floor = 1e-12  # times of a replay may not vary at all
    variances = [max(e.variance, floor) for e in finite]
    weights = [1 / v for v in variances]
    total = sum(weights)
    fixed = sum(w * e.mean for w, e in zip(weights, finite, strict=True)) / total
    q = sum(w * (e.mean - fixed) ** 2 for w, e in zip(weights, finite, strict=True))
    c = total - sum(w * w for w in weights) / total
    between = max(0.0, (q - (len(finite) - 1)) / c) if c > 0 else 0.0
    weights = [1 / (v + between) for v in variances]
    mean = sum(w * e.mean for w, e in zip(weights, finite, strict=True)) / sum(weights)
    return Pooled(mean, math.sqrt(1 / sum(weights)), between, len(finite))


def may_replace(effects: Sequence[Effect], min_gain: float) -> bool:
    """Whether a new kernel takes the place of a committed one.

    `OCCASIONS` blocks at least, each of them faster, by ``min_gain`` together, and the pooled interval
    beyond no gain at all.
    """
    together = pooled(effects)
    agree = len(effects) >= OCCASIONS and all(effect.mean < 0 for effect in effects)
    return agree and together.mean <= math.log1p(-min_gain) and together.high < 0


# ---- machines that are set aside ----


@dataclass(frozen=True)
class Calibration:
    """What a machine says of itself before it takes jobs.

    ``dram_gbs`` and ``peak_gops``: the best of its peak on ``threads`` threads. ``ratio``: the time of one
    known kernel over that of another. ``busy`` and ``steal``: shares of its CPUs that others used meanwhile.
    """

    threads: int
    dram_gbs: float
    peak_gops: float
    ratio: float
    busy: float = 0.0
    steal: float = 0.0


def judge(calibrations: Mapping[str, Calibration]) -> dict[str, str]:
    """The machines of one family that should not be used, each with the reason.

    They are compared with the medians of those with as many threads, and only where there are three: of two
    that differ nobody knows which one is right.
    """
    found = {n: "its calibration cannot be read" for n, c in calibrations.items() if c.threads < 1}
    for threads in {c.threads for c in calibrations.values() if c.threads > 0}:
        alike = {name: c for name, c in calibrations.items() if c.threads == threads}
        if len(alike) < _JURY:
            continue
        for what, unit in (("dram_gbs", "GB/s"), ("peak_gops", "GOP/s")):
            usual = statistics.median(getattr(c, what) for c in alike.values())
            for name, calibration in alike.items():
                value = getattr(calibration, what)
                if not value >= SLOW * usual:
                    found.setdefault(name, f"slow: {value:.0f} {unit}, its family's median is {usual:.0f}")
                elif value > IMPOSSIBLE * usual:
                    found.setdefault(name, f"impossible: {value:.0f} {unit}, the median is {usual:.0f}")
        usual = statistics.median(math.log(c.ratio) for c in alike.values())
        for name, calibration in alike.items():
            if abs(math.log(calibration.ratio) - usual) > STRANGE:
                text = f"{calibration.ratio:.2f}, its family's median is {math.exp(usual):.2f}"
                found.setdefault(name, f"strange: two known kernels stand as {text}")
    return found
