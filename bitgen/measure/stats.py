"""Is it faster, or is it noise? The two paired tests over times that were taken in the same rounds.

Times are multiplied by disturbances, so both look at log(candidate / baseline): a moment that is slow for
both cancels. `EarlyStopping` is sequential and ends the timing of a candidate that has lost; `p_faster` is
exact and decides between kernels that ran to the end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bitgen.errors import BitgenError

T = TypeVar("T", bound=Hashable)

# A pair or two know nothing of their noise: _PRIOR degrees of freedom of the usual one (a standard deviation
# of the logarithms) are mixed in. One pair stops what is 14 % slower, two quiet ones what is 7 % slower,
# three what is 5 % slower; a disturbed one among them stops nothing.
_NOISE, _PRIOR, _T, _MARGIN = 0.05, 3, 3.0, 0.02

# 2 * sum of ranks of 60 rounds is 3660: the exact distribution takes about 10 ms. More rounds are cut.
_MAX_PAIRS = 60


@dataclass(frozen=True)
class EarlyStopping:
    """A candidate is pruned as soon as its pairs say with confidence that it gains less than 2 %.

    With d_i = log(candidate_i / baseline_i) of r pairs, it has lost when r >= ``min_pairs`` and

        mean(d) + margin >= t * sqrt(s2 / r)
        s2 = (prior * noise^2 + sum of (d_i - mean(d))^2) / (prior + r - 1)

    Only the candidate's own pairs count, so the decision is the same whoever is timed beside it, and also
    when a search that was killed is taken up again.
    """

    min_pairs: int = 1

    def __post_init__(self) -> None:
        if self.min_pairs < 1:
            raise BitgenError(f"early stopping needs at least 1 pair, not {self.min_pairs}")

    def should_prune(self, times: Sequence[float], baseline: Sequence[float]) -> bool:
        """Whether the pairs so far say that the candidate is slower."""
        d = [math.log(t / b) for t, b in zip(times, baseline, strict=False)]
        if len(d) < self.min_pairs:
            return False
        mean = statistics.fmean(d)
        spread = sum((x - mean) ** 2 for x in d)
        s2 = (_PRIOR * _NOISE**2 + spread) / (_PRIOR + len(d) - 1)
        return mean + _MARGIN >= _T * math.sqrt(s2 / len(d))

    def pairs(self, times: Sequence[float], baseline: Sequence[float]) -> int:
        """How many of the pairs are timed before the candidate is pruned; all of them when it stays."""
        counts = range(self.min_pairs, len(times))
        return next((r for r in counts if self.should_prune(times[:r], baseline[:r])), len(times))


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


def select(
    rounds: Mapping[T, Sequence[float]], baseline: T | None, alpha: float, min_gain: float, margin: float
) -> T:
    """The best of ``rounds``: the fastest one that beats the baseline, else the baseline.

    One that is faster by ``margin`` needs no proof: where noise hides such a gain, what is there already has
    no more to say for itself. Without a baseline among them there is nothing to beat, and the least median is
    the best.
    """
    by_time = sorted(rounds, key=lambda entrant: statistics.median(rounds[entrant]))
    if baseline is None or baseline not in rounds:
        return by_time[0]
    faster = by_time[: by_time.index(baseline)]
    held = rounds[baseline]

    def wins(times: Sequence[float]) -> bool:
        return ratio(times, held) <= 1 - margin or beats(times, held, alpha, min_gain)

    return next((challenger for challenger in faster if wins(rounds[challenger])), baseline)


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """The median of times / reference over the common rounds; below 1 is faster."""
    return statistics.median(t / r for t, r in zip(times, reference, strict=False))


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The distribution-free interval of the median: from the k-th smallest to the k-th largest of n values.

    k is the largest with 2 * P(Binomial(n, 1/2) < k) <= 1 - confidence; None where there is none (n < 6 for
    0.95).
    """
    ordered, n = sorted(values), len(values)
    below, k = 0, 0
    while k < n and 2 * (below + math.comb(n, k)) <= (1 - confidence) * 2**n:
        below += math.comb(n, k)
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None


def _doubled_ranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value, so that the mean rank of a tie is a whole number."""
    ordered = sorted(values)
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for position, value in enumerate(ordered, start=1):
        first.setdefault(value, position)
        last[value] = position
    return [first[value] + last[value] for value in values]
