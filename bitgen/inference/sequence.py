"""One answer as it runs: what was asked, the text so far, where it ends, and what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.inference.sampling import Sampler, Sampling
from bitgen.tokenizer.tokenizer import Tokenizer

Finish: TypeAlias = Literal["end", "stop", "length", "context"]

ROWS = 16  # tokens a step while decoding: the kernels for small batches end here


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    ``max_tokens`` None goes on until the model ends or the context is full. The answer ends before the first
    of the ``stop`` texts. ``lookup`` guesses tokens from the text so far and checks several in one step.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    lookup: bool = False


class Answer:
    """One request as it runs: its tokens and its text so far, and why it ended (``finish``, None before)."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer) -> None:
        self.index = index
        self.request = request
        self.tokens: list[int] = []  # drawn, the token that ended it included
        self.text = ""
        self.finish: Finish | None = None
        self._sampler = Sampler(request.sampling)
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._stop = StopFilter(request.stop)
        self._guesser = Guesser(request.prompt) if request.lookup else None
        self._whole = list(request.prompt)

    @property
    def seed(self) -> int:
        """The seed it was drawn with."""
        return self._sampler.seed

    @property
    def whole(self) -> list[int]:
        """The prompt and what was drawn; the last token has not been computed yet."""
        return self._whole

    def guess(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next."""
        request = self.request
        if self._guesser is None:
            return []
        if request.max_tokens is not None:
            most = min(most, request.max_tokens - len(self.tokens) - 1)
        return self._guesser.guess(self._whole, most)

    def learn(self, guessed: int, right: int) -> None:
        if self._guesser is not None:
            self._guesser.learn(guessed, right)

    def draw(self, logits: NDArray[np.float32], context: int) -> tuple[int, str]:
        """Draw the next token; returns it and the text that is ready to be shown."""
        token = self._sampler.choose(logits, self._whole, len(self.tokens))
        self.tokens.append(token)
        self._whole.append(token)
        if self._guesser is not None:
            self._guesser.add(self._whole)
        if token in self._tokenizer.end_ids and not self.request.ignore_end:
            return token, self._end("end")
        piece = self._stop.feed(self._stream.feed(token))
        if self._stop.stopped:
            self.finish = "stop"
        elif self.request.max_tokens is not None and len(self.tokens) >= self.request.max_tokens:
            piece += self._end("length")
        elif len(self._whole) > context:
            piece += self._end("context")
        self.text += piece
        return token, piece

    def _end(self, finish: Finish) -> str:
        rest = self._stop.feed(self._stream.close()) + self._stop.close()
        self.finish = finish
        if finish == "end":
            self.text += rest
        return rest


class StopFilter:
    """Lets text through up to the stop text that is complete first; holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """The part of the text so far that is certain to come before a stop text."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        # The stop text that is complete first, so that it does not matter how the text was cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        keep = max(self._overlap(stop) for stop in self._stops)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def close(self) -> str:
        """What was held back and became no stop text."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text start the stop text."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(stop[:n])), 0)


class Guesser:
    """Prompt lookup: where the last few tokens stood before, what followed them may follow again."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens -> where the next one stands
        self._here: dict[int, int | None] = {}  # length of the run of tokens -> the same for the current end
        self._most = 8
        for end in range(1, len(tokens) + 1):
            self._add(tokens, end)

    def add(self, tokens: Sequence[int]) -> None:
        """A token was appended to ``tokens``."""
        self._add(tokens, len(tokens))

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the last time, for the longest run that is known, and over again where that ends."""
        most = min(most, self._most)
        at = self._here.get(3)
        if at is None:
            at = self._here.get(2)
        if at is None or most <= 0:
            return []
        guess = list(tokens[at : at + most])
        period = len(tokens) - at
        while len(guess) < most:
            guess.append(guess[-period])
        return guess

    def learn(self, guessed: int, right: int) -> None:
        """Guess more while guesses are right, fewer when they are not: a wrong guess costs a row."""
        self._most = min(ROWS - 1, 2 * guessed) if right == guessed else max(2, right + 1)

    def _add(self, tokens: Sequence[int], end: int) -> None:
        for size in (3, 2):
            if end >= size:
                run = tuple(tokens[end - size : end])
                self._here[size] = self._after.get(run)
                self._after[run] = end
