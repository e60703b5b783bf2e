"""One sequence as it runs: what was asked, the text so far, where it ends, and what may come next."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from bitgen.errors import BitgenError
from bitgen.formats.pooling import Pooling
from bitgen.inference.directions import direction
from bitgen.inference.drafts import PromptLookupDrafter
from bitgen.inference.grammar import Grammar
from bitgen.inference.sampling import Sampler, Sampling, Score, score_of
from bitgen.inference.wants import Best, Chosen, Floats, Hidden, Logits, Mask, Nothing, Want, pack_mask
from bitgen.progress import Report
from bitgen.tokenizer.tokenizer import Tokenizer

Finish: TypeAlias = Literal["end", "stop", "length", "context", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    ``max_tokens`` None goes on until the model ends or the context is full. The answer ends before the first
    of the ``stop`` texts. ``lookup`` drafts tokens from the text so far, to check several in a forward pass.
    ``logprobs`` keeps the log-probability of every sampled token beside as many of the likeliest ones, and
    with ``score_prompt`` of the prompt's tokens too. A text with a ``grammar`` follows it, and ends where it
    is complete. Without one no token comes before ``min_tokens`` that would end it; ``stop_ids`` are more of
    these. The KV cache is shared within one ``owner``. With ``pooling`` the prompt gets a vector, no text.
    """

    prompt: tuple[int, ...]
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    lookup: bool = False
    logprobs: int | None = None
    score_prompt: bool = False
    grammar: Grammar | None = None
    min_tokens: int = 0
    stop_ids: frozenset[int] = frozenset()
    owner: str = ""
    pooling: Pooling | None = None


class Sequence:
    """One request as it runs: its tokens and its text so far, and why it ended (``finish``, None before).

    ``progress`` counts the tokens of its prompt as they are computed. ``error`` says why it failed by itself,
    which is no error of the others that run.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, progress: Report | None = None) -> None:
        self.request = request
        self.progress = progress
        self.tokens: list[int] = []  # sampled, the token that ended it included
        self.text = ""
        self.finish: Finish | None = None
        self.error = ""
        self.computed = 0  # tokens of the prompt that the KV cache did not hold
        self.scores: list[Score] = []  # of the prompt from its second token on, if asked for, and of `tokens`
        self.states: list[Floats] = []  # of the prompt's tokens that its vector is made of
        self.vector: Floats | None = None  # float32 (hidden), of length 1
        self.whole = list(request.prompt)  # and what was sampled; the last token has not been computed yet
        self._sampler = Sampler(request.sampling)
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._stop = StopFilter(request.stop)
        self._grammar = request.grammar.start() if request.grammar else None
        self._vocab = 0  # of the model, once a row was asked for
        self._allowed: Mask | None = None  # of the next token, once it was asked for
        self._drafter = PromptLookupDrafter(request.prompt) if request.lookup else None

    @property
    def seed(self) -> int:
        """The seed it is sampled with."""
        return self._sampler.seed

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended it."""
        return self._stop.stopped_by

    @property
    def drafts_itself(self) -> bool:
        """Whether its drafts come from its own text or grammar."""
        return self._grammar is not None or self._drafter is not None

    def room(self, most: int) -> int:
        """How many of ``most`` tokens a draft may have."""
        limit = self.request.max_tokens
        return max(0, most if limit is None else min(most, limit - len(self.tokens) - 1))

    def guess(self, answer: Floats | Chosen, drafted: Items[int]) -> int:
        """What it would sample behind ``drafted`` tokens, if these logits were its own model's."""
        return self._sampler.take(answer, [*self.whole, *drafted], len(self.tokens) + len(drafted))

    def would_end(self, token: int) -> bool:
        request = self.request
        return token in request.stop_ids or (token in self._tokenizer.end_ids and not request.ignore_end)

    def draft(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may come next."""
        if self._grammar is not None:
            return self._grammar.forced()[:most]
        return [] if self._drafter is None else self._drafter.draft(self.whole, most)

    def learn(self, drafted: int, accepted: int) -> None:
        if self._drafter is not None:
            self._drafter.learn(drafted, accepted)

    def wants_of(self, tokens: int, last: bool) -> list[Want]:
        """What so many tokens of its prompt have to give for its vector; ``last``: they are its last ones."""
        rest: Want = Hidden() if self.request.pooling == "mean" else Nothing()
        return [rest] * (tokens - 1) + [Hidden() if last else rest]

    def point(self) -> None:
        """Make its vector of the states, and end."""
        try:
            self.vector, self.finish = direction(self.states), "end"
        except BitgenError as error:
            self.error, self.finish = error.message, "error"

    def score(self, logits: Floats, token: int) -> None:
        """Keep what the model thought of ``token``, whatever the sampler makes of its logits."""
        self.scores.append(score_of(logits, token, self.request.logprobs or 0))

    def want(self, vocab: int, drafted: Items[int] = ()) -> Best | Logits:
        """What the row of the last token has to give, after ``drafted`` tokens that are not sure yet."""
        self._vocab = vocab
        mask = self._mask(drafted)
        if not drafted:
            self._allowed = mask
        if self.request.logprobs is not None:
            return Logits()
        return self._sampler.want([*self.whole, *drafted] if drafted else self.whole, vocab, mask)

    def _mask(self, drafted: Items[int] = ()) -> Mask | None:
        """The tokens that may come next; None for all, and when its grammar fails."""
        if self._grammar is None:
            early = len(self.tokens) + len(drafted) < self.request.min_tokens
            return self._without_ends() if early else None
        if self.error:
            return None
        if self._allowed is not None and not drafted:
            return self._allowed
        try:
            return self._grammar.allowed(drafted)
        except BitgenError as error:
            self.error = error.message
            return None

    def _without_ends(self) -> Mask:
        """All tokens but those that would end the text."""
        request = self.request
        ends = request.stop_ids | (frozenset() if request.ignore_end else self._tokenizer.end_ids)
        allowed = np.ones(self._vocab, np.bool_)
        allowed[[token for token in ends if token < self._vocab]] = False
        return pack_mask(allowed)

    def sample(self, answer: Floats | Chosen, context: int) -> str:
        """Sample the next token from what `want` asked for; the text that is ready to be shown."""
        mask = self._mask()
        if self.error:
            self.finish = "error"
            return ""
        token = self._sampler.take(answer, self.whole, len(self.tokens), mask)
        if self.request.logprobs is not None and not isinstance(answer, Chosen):
            self.score(answer, token)
        self.tokens.append(token)
        self.whole.append(token)
        if self._drafter is not None:
            self._drafter.add(self.whole)
        if self.would_end(token):
            return self._end("end")
        goes_on = self._grammar is None or self._follow(token)
        piece = self._stop.feed(self._stream.feed(token))
        if self._stop.stopped:
            self.finish = "stop"
        elif not goes_on:
            piece += self._end("error" if self.error else "stop")
        elif self.request.max_tokens is not None and len(self.tokens) >= self.request.max_tokens:
            piece += self._end("length")
        elif len(self.whole) > context:
            piece += self._end("context")
        self.text += piece
        return piece

    def _follow(self, token: int) -> bool:
        """Take a token into the grammar; False when the text ends with it."""
        self._allowed = None
        try:
            return self._grammar is not None and self._grammar.take(token)
        except BitgenError as error:
            self.error = error.message
            return False

    def _end(self, finish: Finish) -> str:
        last = self._stop.feed(self._stream.close()) + self._stop.close()
        self.finish = finish
        if finish == "end":
            self.text += last
        return last


class StopFilter:
    """Lets text through up to the stop text that is complete first; holds back what may become one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop text came."""
        return self.stopped_by is not None

    def feed(self, text: str) -> str:
        """The part of the text so far that is certain to come before a stop text."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        self._held += text
        # The stop text that is complete first, so that it does not matter how the text was cut into pieces.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            text, self._held = self._held[:at], ""
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
