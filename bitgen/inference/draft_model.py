"""Drafts by a smaller model of the same vocabulary: speculative decoding.

The small model samples what may come next with the seed and the position of the large one, so that the same
random numbers meet similar probabilities; the large model checks all of it in one forward pass. Its own
tokens are the text, whatever was drafted. How many tokens are drafted is chosen by what was measured
(`bitgen.inference.draft_length`), and may be none.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from bitgen.inference.draft_length import Checked, DraftLength, MeanTime
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Sequence

_LACKING = 2  # tokens that a draft lacks at most where the one before was right: read as it begins


class DraftModel:
    """Drafts for the sequences of a scheduler, as many at once as the small engine has slots."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lengths = DraftLength()
        self._read_s = MeanTime()  # a token that is read
        self._reading_s = 0.0  # of the step that is being made
        self._behind = False  # in this step a sequence got no draft because its text is still being read
        # Slots of the large engine, which may have more, and those here that follow them; the last used last.
        self._following: dict[int, int] = {}

    def length(self, running: int, room: int) -> int:
        """How many tokens to draft for each of the ``running`` sequences, ``room`` at most."""
        return self._lengths.choose(running, room)

    def learn(self, running: int, drafted: int, seconds: float, checked: Items[tuple[int, int]]) -> None:
        """What a step took that checked so many tokens, and of each draft how many are known, and right."""
        self._lengths.learn(running, drafted, seconds - self._reading_s, [Checked(*each) for each in checked])
        if not self._behind:
            self._lengths.tried()
        self._reading_s, self._behind = 0.0, False

    def draft(self, slot: int, sequence: Sequence, most: int) -> list[int]:
        """Up to ``most`` tokens; none while the small model reads the text, or where that would not pay."""
        most = min(most, self._scheduler.engine.context - len(sequence.whole))
        if most <= 0:
            return []
        own = self._own(slot)
        if not self._caught_up(own, sequence.whole):
            return []
        started = self._scheduler.clock()
        vocab, tokens = self._scheduler.engine.config.vocab, list[int]()
        while len(tokens) < most:
            answer = self._scheduler.ask(own, [*sequence.whole, *tokens], sequence.want(vocab, tokens))
            token = sequence.guess(answer, tokens)
            tokens.append(token)
            if sequence.would_end(token):
                break
        self._lengths.token_s.add((self._scheduler.clock() - started) / len(tokens))
        return tokens

    def _caught_up(self, own: int, tokens: Items[int]) -> bool:
        """Whether a slot holds nearly all of a text; else a part of it is read, if it may take so long."""
        lacking = self._scheduler.lacking(own, tokens)
        if lacking <= _LACKING:
            return True
        first = not self._lengths.token_s.count  # until something was drafted nobody knows what it brings
        if not first and not self._lengths.affords(lacking * self._read_s.seconds):
            return False
        started = self._scheduler.clock()
        left = self._scheduler.catch_up(own, tokens)
        seconds = self._scheduler.clock() - started
        self._reading_s += seconds
        self._read_s.add(seconds / (lacking - left))
        if not first:
            self._lengths.spend(seconds)
        self._behind = self._behind or left > _LACKING
        return left <= _LACKING

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
