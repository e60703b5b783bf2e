"""From logits to the next token: the same seed gives the same text, on every machine.

In order: bias, mask, penalties, top-k, top-p, min-p, temperature, sample. Everything after the logits is
double precision in one fixed order: exp is our own (`exp`), sums run from left to right, over tokens in the
order of their ids or, where top-k or top-p sorted them, of their logits, equals by id. The random number is a
function of the seed and the position in the sequence alone, so a token does not depend on how many were
computed at once.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import UsageError
from bitgen.inference.wants import Best, Chosen, Floats, Logits, Mask, is_allowed, unpack_mask

Doubles: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int32]
Places: TypeAlias = NDArray[np.intp]

# ln 2 in two parts: k * _LN2_HIGH is exact for |k| < 2^20 (the high part ends in 21 zero bits).
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_LOG2_E = float.fromhex("0x1.71547652b82fep+0")
# Taylor's series of exp to r^13 / 13!: for |r| <= ln 2 / 2 the next term is below 2^-57.
_COEFFICIENTS = tuple(1 / math.factorial(i) for i in range(13, -1, -1))
_GROUP = 64  # logits of which a search looks at the largest first
_LOWEST = -700.0  # exp of less counts as 0
_BEST_MAX = 512  # candidates; more of them are all logits
BIASES_MAX = 1000

SAMPLING_VERSION = 1  # goes up when the same logits and seed give another token than before


def exp(x: Doubles) -> Doubles:
    """e^x for x <= 700, within 2 units in the last place; 0 below -700. Multiplications and additions only.

    numpy's own exp differs between machines in the last bit.
    """
    x = np.asarray(x, np.float64)
    clipped = np.maximum(x, _LOWEST)
    k = np.rint(clipped * _LOG2_E)
    r = (clipped - k * _LN2_HIGH) - k * _LN2_LOW
    p = np.full_like(r, _COEFFICIENTS[0])
    # In place: a vocabulary of doubles does not stay in L2 beside copies.
    for coefficient in _COEFFICIENTS[1:]:
        np.multiply(p, r, out=p)
        np.add(p, coefficient, out=p)
    return np.where(x < _LOWEST, 0.0, np.ldexp(p, k.astype(np.int64)))


def total(values: Doubles) -> float:
    """The sum from left to right; numpy's own sum has another order on another machine."""
    return float(np.add.accumulate(values)[-1]) if values.size else 0.0


def log_softmax_at(logits: Floats, i: int) -> float:
    """Log of the probability of token ``i``."""
    x = logits.astype(np.float64)
    top = float(x.max())
    return float(x[i]) - top - math.log(total(exp(x - top)))


@dataclass(frozen=True)
class Score:
    """The log-probability of a token, and the likeliest tokens in its place with theirs, falling."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]


def score_of(logits: Floats, token: int, k: int) -> Score:
    """What the model thought of ``token`` before any sampling; logits float32 (vocab), ``k`` best tokens."""
    x = logits.astype(np.float64)
    top = float(x.max())
    rest = math.log(total(exp(x - top)))
    places = _sorted_top(x, min(k, len(x))) if k else ()
    best = tuple((int(i), float(x[i]) - top - rest) for i in places)
    return Score(token, float(x[token]) - top - rest, best)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are llama.cpp's.

    ``temperature`` 0 takes the most likely token (of equals the one with the lowest id); ``top_k`` 0 keeps
    all; ``top_p`` 1 and ``min_p`` 0 keep all. ``repeat_penalty`` 1, ``frequency_penalty`` 0 and
    ``presence_penalty`` 0 penalise nothing; they look at the last ``repeat_last_n`` tokens of prompt and
    text, -1: at all. ``logit_bias`` are pairs of a token and what is added to its logit. ``seed`` None means
    one that nobody knows.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("temperature", "0 or more", math.isfinite(self.temperature) and self.temperature >= 0),
            ("top_k", "0 or more", self.top_k >= 0),
            ("top_p", "between 0 and 1", 0 <= self.top_p <= 1),
            ("min_p", "between 0 and 1", 0 <= self.min_p <= 1),
            (
                "repeat_penalty",
                "greater than 0",
                math.isfinite(self.repeat_penalty) and self.repeat_penalty > 0,
            ),
            ("repeat_last_n", "-1 or more", self.repeat_last_n >= -1),
            ("frequency_penalty", "between -2 and 2", -2 <= self.frequency_penalty <= 2),
            ("presence_penalty", "between -2 and 2", -2 <= self.presence_penalty <= 2),
            ("seed", "between 0 and 2^64 - 1", self.seed is None or 0 <= self.seed < 1 << 64),
        )
        for name, wanted, holds in rules:
            if not holds:
                raise UsageError(f"{name} must be {wanted}, not {getattr(self, name)}")
        if len(self.logit_bias) > BIASES_MAX:
            raise UsageError(f"logit_bias has {BIASES_MAX} tokens at most, not {len(self.logit_bias)}")
        for token, bias in self.logit_bias:
            if not -100 <= bias <= 100:
                raise UsageError(f"logit_bias must be between -100 and 100, not {bias} (token {token})")

    @property
    def penalises(self) -> bool:
        """Whether tokens of the text so far count."""
        neutral = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty) == (1, 0, 0)
        return self.repeat_last_n != 0 and not neutral


GREEDY = Sampling(temperature=0, seed=0)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for each seed and position: splitmix64, 53 bits."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


class Sampler:
    """Chooses tokens by one `Sampling`; ``seed`` is its seed, or one made up where it has none.

    It keeps no state between two calls.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(32) if sampling.seed is None else sampling.seed

    def want(self, text: Sequence[int], vocab: int, allowed: Mask | None = None) -> Best | Logits:
        """What to ask of the row before the next token: no more than decides it.

        ``allowed`` are the tokens that it may be; None: all.
        """
        s = self.sampling
        k = 1 if s.temperature == 0 else s.top_k
        recent = self._recent(text)
        most = k + 1 + len(recent)  # one more tells that some are left out, which fixes the order of sums
        if k == 0 or most > min(_BEST_MAX, vocab):
            return Logits()
        return Best(most, allowed, dict(s.logit_bias), sorted(recent))

    def take(
        self, answer: Floats | Chosen, text: Sequence[int], position: int, allowed: Mask | None = None
    ) -> int:
        """The next token, from what `want` asked for, or from all logits."""
        s = self.sampling
        if isinstance(answer, Chosen):
            ids, logits = answer.ids, answer.logits
            extra = [
                (token, logit)
                for token, logit in zip(sorted(self._recent(text)), answer.named, strict=True)
                if is_allowed(allowed, token) and token not in ids
            ]
            if extra:
                ids = np.concatenate([ids, np.array([token for token, _ in extra], np.int32)])
                logits = np.concatenate([logits, np.array([logit for _, logit in extra], np.float32)])
            return self.choose(ids, logits, text, position)
        logits = answer
        if s.logit_bias:
            logits = logits.copy()
            for token, bias in dict(s.logit_bias).items():  # as `want` has it: the last one of a token
                logits[token] += np.float32(bias)
        if allowed is None:
            return self.choose(None, logits, text, position)
        places = np.flatnonzero(unpack_mask(allowed, len(logits))).astype(np.int32)
        return self.choose(places, logits[places], text, position)

    def choose(self, ids: Ids | None, logits: Floats, text: Sequence[int], position: int) -> int:
        """The next token, after bias and mask.

        ``ids`` int32 (n) names the candidates, each once, in any order; None: the whole vocabulary.
        ``logits`` float32 (n), not NaN, are theirs; ``text`` the tokens so far, for the penalties;
        ``position`` the number of tokens already sampled.
        """
        s = self.sampling
        if ids is not None:
            order = np.argsort(ids)
            ids, logits = ids[order], logits[order]
        logits = self._penalised(ids, logits, text)
        if s.temperature == 0:
            place = int(np.argmax(logits))
        else:
            places, x = self._nucleus(*self._most_likely(logits))
            top = x.max()
            if s.min_p > 0:
                kept = exp(x - top) >= s.min_p
                places, x = places[kept], x[kept]
            sums = np.add.accumulate(exp((x - top) / s.temperature))
            wanted = uniform(self.seed, position) * sums[-1]
            place = int(places[min(int(np.searchsorted(sums, wanted, side="right")), len(places) - 1)])
        return place if ids is None else int(ids[place])

    def _recent(self, text: Sequence[int]) -> Counter[int]:
        """How often each token that is penalised is there."""
        s = self.sampling
        if not s.penalises:
            return Counter()
        return Counter(text if s.repeat_last_n < 0 else text[-s.repeat_last_n :])

    def _penalised(self, ids: Ids | None, logits: Floats, text: Sequence[int]) -> Floats:
        """Positive logits of recent tokens divided, negative ones multiplied by the repeat penalty.

        Then the presence penalty is taken off, and the frequency penalty times the count of the token.
        """
        s = self.sampling
        recent = self._recent(text)
        if not recent:
            return logits
        tokens = np.array(sorted(recent), np.int64)  # np.unique would import numpy.ma: 20 ms
        counts = np.array([recent[token] for token in tokens.tolist()], np.float32)
        if ids is None:
            known = (tokens >= 0) & (tokens < len(logits))
            places = tokens[known]
        else:
            found = np.minimum(np.searchsorted(ids, tokens), len(ids) - 1)
            known = ids[found] == tokens
            places = found[known]
        penalty = np.float32(s.repeat_penalty)
        logits = logits.copy()
        x = np.where(logits[places] <= 0, logits[places] * penalty, logits[places] / penalty)
        if s.frequency_penalty or s.presence_penalty:
            x -= counts[known] * np.float32(s.frequency_penalty) + np.float32(s.presence_penalty)
        logits[places] = x
        return logits

    def _most_likely(self, logits: Floats) -> tuple[Places, Doubles]:
        """The places of the top_k logits, sorted, and these; all by id where top_k leaves out none."""
        k = self.sampling.top_k
        if 0 < k < len(logits):
            places = _sorted_top(logits, k)
            return places, logits[places].astype(np.float64)
        return np.arange(len(logits)), logits.astype(np.float64)

    def _nucleus(self, places: Places, x: Doubles) -> tuple[Places, Doubles]:
        """The fewest of the likeliest that together reach top_p of the whole, sorted."""
        if self.sampling.top_p >= 1:
            return places, x
        top = x.max()
        bound = self.sampling.top_p * total(exp(x - top))
        count = 0
        while count < len(x):
            count = min(len(x), max(256, 8 * count))  # few are enough as a rule, and all take long to sort
            order = _sorted_top(x, count)
            reached = np.add.accumulate(exp(x[order] - top)) >= bound
            if reached.any():
                order = order[: int(np.argmax(reached)) + 1]
                break
        return places[order], x[order]


def _sorted_top(x: Floats | Doubles, k: int) -> Places:
    """The places of the k largest of x, the largest first, of equals the first one first."""
    places = np.arange(len(x)) if k >= len(x) else _top(x, k)
    sorted_places: Places = places[np.argsort(-x[places], kind="stable")]
    return sorted_places


def _top(x: Floats | Doubles, k: int) -> Places:
    """The places of the k largest of x, in order; of equals the first ones. 0 < k < len(x)."""
    # Each of k groups has an element no less than the k-th largest maximum of a group: the k largest elements
    # are not below it. A look at all and partitions of few: 0.2 to 0.4 of the time of a partition of all.
    count = len(x) // _GROUP
    near = np.arange(len(x))
    if k < count:
        near = np.flatnonzero(x >= _largest(x[: _GROUP * count].reshape(_GROUP, count).max(axis=0), k))
    # Which of equal elements a partition moves depends on the machine; the k-th value does not.
    bound = _largest(x[near], k)
    above, equal = near[x[near] > bound], near[x[near] == bound]
    top: Places = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    return top


def _largest(x: Floats | Doubles, k: int) -> np.floating[Any]:
    """The k-th largest."""
    value: np.floating[Any] = np.partition(x, len(x) - k)[len(x) - k]
    return value
