"""How many tokens to draft: as many as make the most tokens a second by what was measured, maybe none.

A step with drafts of n tokens makes 1 + a1 + a1 a2 + ... + a1 ... an tokens of a text, where ai is the share
of drafts with i - 1 right tokens whose next one is right too. That is divided by what such a step takes,
drafting included. Both are measured while texts are made; what is not known yet is taken to be as good as it
can be, so that it is tried.

An account keeps drafts from costing more than they bring, whatever was measured: what a step saved beside
plain steps is credit, what it lost and what reading prompts took is debt, and one percent of all time is
granted. Where the account is empty nothing is drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

LENGTHS = (1, 2, 3, 4, 6, 8, 12)
SHARE = 0.01  # of all time that drafts may lose
START, _MOST = 4, 256  # plain steps: what drafts may lose at the start, and the credit at most
TRIAL_EVERY = 64  # steps: one is drafted for where drafts do not pay, and one is plain where they do
_LEAST = 1.02  # what drafts have to gain
_PLAIN = 3  # plain steps before the first draft
_FORGET = 0.97  # what a step leaves of the drafts before it
_FORGET_USUAL = 0.98  # what a draft leaves of those before it, in the usual share of right first tokens
_PRIOR, _PRIOR_WEIGHT = 0.5, 8  # that share at the start, and how many drafts it is worth
_USUAL_WEIGHT = 4  # what the usual share is worth, and for the next places that of the place before
_OLD = 1024  # steps after which a time has to be measured again
_RECENT = 8  # times that a mean is about


class Checked(NamedTuple):
    """What came of a draft: how many tokens were found right or wrong, and how many right."""

    tried: int
    right: int


class MeanTime:
    """Seconds on average, of the last few; one that stands out counts as twice the mean."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.count = 0
        self.at = 0  # the step of the last one

    def add(self, seconds: float, at: int = 0) -> None:
        if self.count:
            seconds = min(seconds, 2 * self.seconds)
        self.count += 1
        self.seconds += (seconds - self.seconds) / min(self.count, _RECENT)
        self.at = at


class _Share:
    """How often tokens are right; what is older counts less."""

    def __init__(self) -> None:
        self._tried = self._right = 0.0

    def forget(self, left: float) -> None:
        self._tried *= left
        self._right *= left

    def add(self, right: bool) -> None:
        self._tried += 1
        self._right += right

    def given(self, prior: float, weight: float) -> float:
        """The share, where ``prior`` counts as so many tokens."""
        return (self._right + weight * prior) / (self._tried + weight)


class DraftLength:
    """Chooses the length of the drafts of all sequences that run."""

    def __init__(self) -> None:
        self.token_s = MeanTime()  # of drafting one token
        self._times: dict[tuple[int, int], MeanTime] = {}  # of steps, by sequences and tokens drafted
        self._shares = [_Share() for _ in range(LENGTHS[-1])]  # by place in the draft, those before it right
        self._usual = _Share()  # of the first token, over a longer time
        self._ended: set[int] = set()  # the numbers of sequences for which drafts did not pay
        self._steps = 0
        self._next_trial = TRIAL_EVERY
        self._due = False  # a trial was asked for
        self._credit: float | None = None  # None until a plain step is known

    def choose(self, running: int, room: int) -> int:
        """How many tokens to draft for each of the ``running`` sequences, ``room`` at most."""
        lengths = [length for length in LENGTHS if length <= room]
        plain = self._time(running, 0)
        if not lengths or plain.count < _PLAIN or not self.affords(0.0):
            return 0
        pace = partial(self._pace, running)
        self._due = due = self._steps >= self._next_trial
        if running not in self._ended:
            best = min(lengths, key=pace)
            if _LEAST * pace(best) < plain.seconds:
                return 0 if due else best
            self._ended.add(running)
        useful = [n for n in lengths if self._step_s(running, n) < (n + 1) * plain.seconds]
        if not due or not useful:
            return 0
        trial = min(useful, key=pace)
        return trial if self.affords(self._step_s(running, trial) - plain.seconds) else 0

    def affords(self, seconds: float) -> bool:
        """Whether the account has so much."""
        return self._credit is not None and seconds <= self._credit

    def spend(self, seconds: float) -> None:
        """Take what reading a prompt took from the account."""
        self._credit = (self._credit or 0.0) - seconds

    def learn(self, running: int, drafted: int, seconds: float, checked: Sequence[Checked]) -> None:
        """What a step took that checked so many tokens, drafting included but not reading; and its drafts."""
        self._steps += 1
        self._count(checked)
        plain, saved = self._time(running, 0), 0.0
        self._time(running, drafted).add(seconds, self._steps)
        if drafted:
            self._ended.discard(running)
            saved = (1 + sum(draft.right for draft in checked) / running) * plain.seconds - seconds
        if self._credit is None:
            self._credit = START * plain.seconds if plain.count >= _PLAIN else None
        else:
            self._credit = min(self._credit + saved + SHARE * seconds, _MOST * plain.seconds)

    def tried(self) -> None:
        """The trial that was due is over."""
        if self._due:
            self._next_trial = self._steps + TRIAL_EVERY

    def _count(self, checked: Sequence[Checked]) -> None:
        for share in self._shares:
            share.forget(_FORGET)
        for tried, right in checked:
            for place in range(min(tried, right + 1)):
                self._shares[place].add(place < right)
            if tried:
                self._usual.forget(_FORGET_USUAL)
                self._usual.add(right > 0)

    def _pace(self, running: int, length: int) -> float:
        """Seconds of a step for each of the tokens that a sequence gets by it."""
        tokens, alive, share = 1.0, 1.0, self._usual.given(_PRIOR, _PRIOR_WEIGHT)
        for counted in self._shares[:length]:
            share = counted.given(share, _USUAL_WEIGHT)
            alive *= share
            tokens += alive
        return self._step_s(running, length) / tokens

    def _step_s(self, running: int, length: int) -> float:
        """What a step takes with drafts of a length; at the least, where that was not measured."""
        if length > 1 and not self.token_s.count:
            return math.inf
        drafted = running * length
        known = next(n for n in range(drafted, -1, -1) if n == 0 or self._time(running, n).count)
        return self._time(running, known).seconds + (drafted - known) * self.token_s.seconds

    def _time(self, running: int, drafted: int) -> MeanTime:
        found = self._times.get((running, drafted))
        if found is None or (found.count and self._steps - found.at > _OLD):
            found = self._times[running, drafted] = MeanTime()
        return found
