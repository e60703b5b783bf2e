"""Is it faster, or is it noise? Paired comparison of times that were taken in the same interleaved rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T", bound=Hashable)

# 2 * sum of ranks of 60 rounds is 3660: the exact distribution takes about 10 ms. More rounds are cut.
_MAX_PAIRS = 60


def p_faster(challenger: Sequence[float], incumbent: Sequence[float]) -> float:
    """P(at least this much evidence that ``challenger`` is faster | both are equally fast).

    The exact one-sided Wilcoxon signed-rank test over log(challenger / incumbent) of each common round:
    times are multiplied by disturbances, so the logarithm makes them symmetric. Equal rounds are left out,
    ties share their mean rank. 1.0 when nothing differs.
    """
    pairs = list(zip(challenger, incumbent, strict=False))[:_MAX_PAIRS]
    logs = [math.log(c / i) for c, i in pairs if c != i]
    if not logs:
        return 1.0
    ranks = _doubled_ranks([abs(x) for x in logs])
    slower = sum(rank for rank, x in zip(ranks, logs, strict=True) if x > 0)
    # ways[w] = number of sign patterns whose positive ranks sum to w: each rank is positive or not.
    ways = [1]
    for rank in ranks:
        longer = ways + [0] * rank
        for w, count in enumerate(ways):
            longer[w + rank] += count
        ways = longer
    return sum(ways[: slower + 1]) / float(1 << len(ranks))


def beats(challenger: Sequence[float], incumbent: Sequence[float], alpha: float, min_gain: float) -> bool:
    """Whether ``challenger`` is faster by at least ``min_gain`` and the difference is no accident."""
    gain = 1 - ratio(challenger, incumbent)
    return gain >= min_gain and p_faster(challenger, incumbent) <= alpha


def crown(rounds: Mapping[T, Sequence[float]], incumbent: T | None, alpha: float, min_gain: float) -> T:
    """The winner among ``rounds``: the fastest one that beats the incumbent, else the incumbent.

    Without an incumbent among them there is nothing to defend, and the least median wins.
    """
    by_time = sorted(rounds, key=lambda entrant: statistics.median(rounds[entrant]))
    if incumbent is None or incumbent not in rounds:
        return by_time[0]
    faster = by_time[: by_time.index(incumbent)]
    held = rounds[incumbent]
    return next((c for c in faster if beats(rounds[c], held, alpha, min_gain)), incumbent)


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median of times / reference over the common rounds; below 1 is faster."""
    return statistics.median(t / r for t, r in zip(times, reference, strict=False))


def _doubled_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value, so that the mean rank of a tie is a whole number."""
    ordered = sorted(values)
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for position, value in enumerate(ordered, start=1):
        first.setdefault(value, position)
        last[value] = position
    return [first[value] + last[value] for value in values]
