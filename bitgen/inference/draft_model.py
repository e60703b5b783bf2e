"""Drafts by a smaller model of the same vocabulary: speculative decoding.

The small model samples what may come next with the seed and the position of the large one, so that the same
random numbers meet similar probabilities; the large model checks all of it in one forward pass. Its own
tokens are the text, whatever was drafted. How many tokens are drafted is measured while texts are made: the
number whose tokens take the least time wins, and that may be none.
"""

from __future__ import annotations

from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Sequence

_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12)  # of drafts
_TRIALS = 3  # steps with each, before they are compared
_RETRY = 64  # every so many steps another length is tried again
_FORGET = 0.9  # what a step leaves of the measurements before it


class DraftModel:
    """Drafts for the sequences of a scheduler, as many at once as the small engine has slots."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._measured: dict[tuple[int, int], tuple[int, float, float]] = {}  # steps, seconds, tokens
        self._steps = 0
        # Slots of the large engine, which may have more, and those here that follow them; the last used last.
        self._following: dict[int, int] = {}

    def length(self, running: int, room: int) -> int:
        """How many tokens to draft for each of the ``running`` sequences, ``room`` at most."""
        lengths = [length for length in _LENGTHS if length <= room]
        self._steps += 1
        if self._steps % _RETRY == 0:
            return lengths[self._steps // _RETRY % len(lengths)]
        for length in lengths:
            if self._measured.get((running, length), (0, 0.0, 0.0))[0] < _TRIALS:
                return length
        return min(lengths, key=lambda length: self._pace(running, length))

    def learn(self, running: int, length: int, seconds: float, tokens: int) -> None:
        """What a step took, drafts included, and how many tokens came of it."""
        steps, before, made = self._measured.get((running, length), (0, 0.0, 0.0))
        self._measured[running, length] = steps + 1, _FORGET * before + seconds, _FORGET * made + tokens

    def _pace(self, running: int, length: int) -> float:
        """Seconds a token."""
        _, seconds, tokens = self._measured[running, length]
        return seconds / tokens

    def draft(self, slot: int, sequence: Sequence, most: int) -> list[int] | None:
        """Up to ``most`` tokens; None while the small model reads the prompt."""
        most = min(most, self._scheduler.engine.context - len(sequence.whole))
        if most <= 0:
            return []
        own = self._own(slot)
        if not self._scheduler.catch_up(own, sequence.whole):
            return None
        vocab, tokens = self._scheduler.engine.config.vocab, list[int]()
        while len(tokens) < most:
            answer = self._scheduler.ask(own, [*sequence.whole, *tokens], sequence.want(vocab, tokens))
            token = sequence.guess(answer, tokens)
            tokens.append(token)
            if sequence.would_end(token):
                break
        return tokens

    def _own(self, slot: int) -> int:
        """The slot that follows ``slot`` of the large engine: its own, a free one, or the longest unused."""
        following = self._following
        if slot not in following:
            room = len(following) < self._scheduler.engine.max_batch
            following[slot] = len(following) if room else following.pop(next(iter(following)))
        following[slot] = following.pop(slot)
        return following[slot]

    def limit_stall(self, seconds: float) -> None:
        """Read prompts in parts that take no longer."""
        self._scheduler.max_stall_s = seconds

    def close(self) -> None:
        self._scheduler.engine.close()
