"""The loop that makes tokens: prompts in, pieces of text out, one or many sequences at once.

`Generator` keeps what the sequences of an engine hold, so a prompt that starts like the last one costs only
its new part. Every sequence draws its tokens by itself, from logits that do not depend on what else is
computed: a text is the same alone, in a batch, and with speculation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import UsageError
from bitgen.formats.config import ModelConfig
from bitgen.inference.sequence import ROWS, Answer, Request
from bitgen.tokenizer.tokenizer import Tokenizer

Progress: TypeAlias = Callable[[int, int], None]  # prompt tokens done, of how many

_CHUNK = 512  # prompt tokens a step at most; Ctrl-C and progress are seen between steps
# What a step of a prompt may take. Another step reads the weights again: 1.5 % of 128 tokens of a 3B.
_CHUNK_S = 1.5
_CHUNK_MIN = 64  # below this the kernels for many tokens do not pay
_LOGITS_BYTES = 1 << 26  # of a part of the logits of a text
_SHARED_MIN = 16  # a common start of two prompts that is shorter than this is computed twice


class Engine(Protocol):
    """What runs the model: bitgen.inference.engine, or a stand-in."""

    @property
    def config(self) -> ModelConfig: ...

    context: int  # positions of a sequence
    max_batch: int  # sequences

    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.bool_],
    ) -> NDArray[np.float32]: ...

    def truncate(self, sequence: int, length: int) -> None: ...

    def copy(self, source: int, target: int) -> None: ...


@dataclass
class Timings:
    """Seconds and counts of what ran, to be added up."""

    load_s: float = 0.0
    prompt_tokens: int = 0  # computed; tokens that the cache held are not among them
    prompt_s: float = 0.0
    steps: int = 0
    step_tokens: int = 0  # tokens that came out of steps after the prompt
    step_s: float = 0.0
    drawn: int = 0
    sample_s: float = 0.0
    guessed: int = 0
    guessed_right: int = 0


class Generator:
    """Runs requests on an engine, from one thread.

    Runs may be interleaved: one that goes on after another has used the engine computes again what it lost.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.timings = Timings()
        self._held: list[list[int]] = [[] for _ in range(engine.max_batch)]  # tokens of each sequence
        # Ctrl-C may come amid a step, a copy or a truncation; the engine then may hold more than is written
        # down here, never less.
        self._unsure = False
        self._turn = 0  # counts the changes between runs
        self._token_s: float | None = None  # what a token of the last long part took

    def run(
        self, requests: Sequence[Request], progress: Progress | None = None
    ) -> Iterator[tuple[Answer, str]]:
        """Yield each answer with its next piece of text; the last one of an answer has ``finish`` set.

        As many run at once as the engine has sequences; a request that ends makes room for the next.
        UsageError when a prompt is empty or longer than the context.
        """
        for request in requests:
            self.check(request.prompt)
        waiting = [Answer(i, request, self.tokenizer) for i, request in enumerate(requests)]
        waiting.reverse()
        running: dict[int, Answer] = {}
        turn = self._take_turn()
        while waiting or running:
            if turn != self._turn:
                turn = self._take_turn()
                for slot, answer in running.items():
                    self._compute(slot, answer.whole[:-1])
            if waiting and len(running) < self.engine.max_batch:
                pieces = [self._start(waiting.pop(), running, progress)]
            else:
                pieces = self._step(running)
            for slot in [slot for slot, answer in running.items() if answer.finish]:
                del running[slot]
            yield from pieces

    def logits(self, ids: Sequence[int], first: int = 0) -> Iterator[NDArray[np.float32]]:
        """Logits of a text from the token ``first`` on, in parts float32 (some tokens, vocab)."""
        self.check(ids)
        self._forget(0, 0)
        turn = self._take_turn()
        most = max(32, min(_CHUNK, _LOGITS_BYTES // (4 * self.engine.config.vocab)))
        at = 0
        while at < len(ids):
            if turn != self._turn:
                turn = self._take_turn()
                self._compute(0, ids[:at])
            part = ids[at : at + min(most, self._chunk())]
            logits = self._forward([(0, part, [at + i >= first for i in range(len(part))])])
            at += len(part)
            if len(logits):
                yield logits

    def check(self, prompt: Sequence[int]) -> None:
        """BitgenError when a prompt cannot be computed."""
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) > self.engine.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.engine.context}: "
                "shorten it or ask for a larger context (-c)",
            )

    def _take_turn(self) -> int:
        self._turn += 1
        return self._turn

    # ---- Prompts ----

    def _slot(self, prompt: Sequence[int], running: Collection[int]) -> int:
        """A free sequence, the one that already holds most of the prompt.

        Where a sequence in use holds much more of it, the free one becomes a copy of that.
        """
        common = [_common(held, prompt) for held in self._held]
        slot = max((i for i in range(len(common)) if i not in running), key=common.__getitem__)
        best = max(range(len(common)), key=common.__getitem__)
        if common[best] >= common[slot] + _SHARED_MIN:
            self._forget(slot, 0)
            self._unsure = True
            self.engine.copy(best, slot)
            self._held[slot] = list(self._held[best])
        return slot

    def _start(
        self, answer: Answer, running: dict[int, Answer], progress: Progress | None
    ) -> tuple[Answer, str]:
        """Compute the prompt of an answer and draw its first token."""
        prompt = answer.request.prompt
        slot = self._slot(prompt, running)
        running[slot] = answer
        started = time.perf_counter()
        computed, logits = self._compute(slot, prompt, progress, wanted=True)
        self.timings.prompt_tokens += computed
        self.timings.prompt_s += time.perf_counter() - started
        return answer, self._draw(answer, logits[0])

    def _compute(
        self, slot: int, tokens: Sequence[int], progress: Progress | None = None, *, wanted: bool = False
    ) -> tuple[int, NDArray[np.float32]]:
        """Make a sequence hold ``tokens`` and nothing else; how many had to be computed.

        With ``wanted`` also the logits (1, vocab) after the last of them.
        """
        known = min(_common(self._held[slot], tokens), len(tokens) - (1 if wanted else 0))
        self._forget(slot, known)
        logits = np.empty((0, 0), np.float32)
        at = known
        while at < len(tokens):
            if progress:
                progress(at, len(tokens))
            part = tokens[at : at + self._chunk()]
            at += len(part)
            last = wanted and at == len(tokens)
            logits = self._forward([(slot, part, [False] * (len(part) - 1) + [last])])
        if progress:
            progress(len(tokens), len(tokens))
        return len(tokens) - known, logits

    def _chunk(self) -> int:
        """How many prompt tokens to compute at once, so that Ctrl-C is soon seen."""
        if self._token_s is None:
            return 2 * _CHUNK_MIN
        return min(_CHUNK, max(1, int(_CHUNK_S / self._token_s / _CHUNK_MIN)) * _CHUNK_MIN)

    # ---- Steps ----

    def _step(self, running: dict[int, Answer]) -> list[tuple[Answer, str]]:
        """One token, or several guessed right, for every running answer."""
        started = time.perf_counter()
        room = max(0, ROWS // len(running) - 1)
        rows = []
        for slot, answer in running.items():
            spare = self.engine.context - len(answer.whole)
            rows.append((slot, [answer.whole[-1], *answer.guess(min(room, spare))], None))
        logits = self._forward(rows)
        self.timings.steps += 1
        self.timings.step_s += time.perf_counter() - started
        result, at = [], 0
        for slot, fed, _ in rows:
            answer = running[slot]
            pieces = []
            for row, guess in enumerate([*fed[1:], None]):
                pieces.append(self._draw(answer, logits[at + row]))
                if answer.finish or answer.whole[-1] != guess:
                    break
            at += len(fed)
            self.timings.step_tokens += len(pieces)
            if len(fed) > 1:
                answer.learn(len(fed) - 1, len(pieces) - 1)
                self.timings.guessed += len(fed) - 1
                self.timings.guessed_right += len(pieces) - 1
                self._forget(slot, len(answer.whole) - 1)
            result.append((answer, "".join(pieces)))
        return result

    def _draw(self, answer: Answer, logits: NDArray[np.float32]) -> str:
        started = time.perf_counter()
        _, piece = answer.draw(logits, self.engine.context)
        self.timings.drawn += 1
        self.timings.sample_s += time.perf_counter() - started
        return piece

    def _forward(
        self, rows: Sequence[tuple[int, Sequence[int], Sequence[bool] | None]]
    ) -> NDArray[np.float32]:
        """One step: for each sequence its next tokens, and which of them get logits (None: all)."""
        tokens = [token for _, part, _ in rows for token in part]
        positions = [len(self._held[slot]) + i for slot, part, _ in rows for i in range(len(part))]
        sequences = [slot for slot, part, _ in rows for _ in part]
        wanted = [flag for _, part, flags in rows for flag in (flags or [True] * len(part))]
        if self._unsure:
            for slot, held in enumerate(self._held):
                self.engine.truncate(slot, len(held))
        self._unsure = True
        started = time.perf_counter()
        logits = self.engine.forward(
            np.array(tokens, np.int32),
            np.array(positions, np.int32),
            np.array(sequences, np.int32),
            np.array(wanted, np.bool_),
        )
        for slot, part, _ in rows:
            self._held[slot] += part
        self._unsure = False
        if len(tokens) >= _CHUNK_MIN:
            self._token_s = max(1e-9, (time.perf_counter() - started) / len(tokens))
        return logits

    def _forget(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence."""
        if length < len(self._held[slot]):
            self._unsure = True
            del self._held[slot][length:]
            self.engine.truncate(slot, length)


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two texts have in common at their start."""
    most = min(len(held), len(prompt))
    if list(held[:most]) == list(prompt[:most]):
        return most
    return next(i for i in range(most) if held[i] != prompt[i])
