"""The loop that makes tokens: requests in, events out, one or many sequences at once.

::

    scheduler = Scheduler(engine, tokenizer)
    sequence = scheduler.submit(request)
    while sequence.finish is None:
        for event in scheduler.step():
            print(event.text, end="")

The scheduler is the only caller of the engine. It keeps what the engine's KV cache holds, so a prompt that
starts like the last one costs only its new part. Every sequence samples its tokens by itself, from logits
that do not depend on what else is computed: a text is the same alone, in a batch, and with drafts.

Prompts are computed whole, one after the other, while the sequences that run wait; with `max_stall_s` set
they are computed in parts that take no longer, a step of all that run between two parts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats.config import Floats, ModelConfig
from bitgen.inference import FEW
from bitgen.inference.engine import Memory
from bitgen.inference.sequence import Request, Sequence
from bitgen.inference.wants import Answer, Chosen, Logits, Nothing, Want
from bitgen.progress import Progress, Report
from bitgen.tokenizer.tokenizer import Tokenizer

_CHUNK = 512  # prompt tokens a forward pass at most; Ctrl-C and progress are seen between passes
# What a pass of a prompt may take. Another one reads the weights again: 1.5 % of 128 tokens of a 3B.
_CHUNK_S = 1.5
_CHUNK_MIN = 64  # below this the kernels for many tokens do not pay
_PART_MIN = 16  # tokens of a part at least, however long they take: the kernels for few tokens end here
_OLDEST_EVERY = 4  # of so many parts one is of the prompt that came first, the others of the shortest
_LOGITS_BYTES = 1 << 26  # of a part of the logits of a text
_SHARED_MIN = 16  # a common start of two prompts that is shorter than this is computed twice


Ints: TypeAlias = NDArray[np.int32]


class EngineProtocol(Protocol):
    """What runs the model: `bitgen.inference.engine.Engine`, or a stand-in."""

    @property
    def config(self) -> ModelConfig: ...

    context: int  # positions of a sequence
    max_batch: int  # sequences

    @overload
    def forward(self, tokens: Ints, positions: Ints, sequences: Ints, wants: NDArray[np.bool_]) -> Floats: ...

    @overload
    def forward(self, tokens: Ints, positions: Ints, sequences: Ints, wants: Items[Want]) -> list[Answer]: ...

    def truncate(self, sequence: int, length: int) -> None: ...

    def copy(self, source: int, target: int) -> None: ...

    def cached(self, sequence: int) -> bytes: ...

    def restore(self, sequence: int, length: int, data: bytes) -> None: ...

    @property
    def memory(self) -> Memory: ...

    @property
    def head_bytes(self) -> int: ...

    head_error: float

    def close(self) -> None: ...


class Event(NamedTuple):
    """What a step did to a sequence: the next piece of its text, maybe empty, and maybe its ``finish``."""

    sequence: Sequence
    text: str


class Drafts(Protocol):
    """Who drafts for all sequences: `bitgen.inference.draft_model.DraftModel`."""

    def length(self, running: int, room: int) -> int: ...

    def draft(self, slot: int, sequence: Sequence, most: int) -> list[int] | None: ...

    def learn(self, running: int, length: int, seconds: float, tokens: int) -> None: ...


class Phases(Protocol):
    """Who wants to know what is computed, from now on: `bitgen.energy.Meter`."""

    def enter(self, phase: str | None) -> None: ...


class Held(NamedTuple):
    """What a slot of the KV cache holds: whose request computed it, the tokens, and their bytes."""

    owner: str
    tokens: Items[int]
    data: bytes


class Row(NamedTuple):
    """The next tokens of the sequence in a slot of the KV cache, and which of them get logits (None: all)."""

    slot: int
    tokens: Items[int]
    wanted: Items[bool] | None = None


@dataclass
class Timings:
    """Seconds and counts of what ran, to be added up."""

    load_s: float = 0.0
    prompt_tokens: int = 0  # computed; tokens that the KV cache held are not among them
    prompt_s: float = 0.0
    steps: int = 0
    step_tokens: int = 0  # tokens that came out of steps after the prompt
    step_s: float = 0.0
    sampled: int = 0
    sample_s: float = 0.0
    drafted: int = 0
    accepted: int = 0


class Scheduler:
    """Runs sequences on an engine, from one thread.

    As many run at once as the engine has slots; the others wait in the order in which they came. Without a
    tokenizer it computes plain tokens only (`forward`, `score`). ``max_stall_s`` None computes prompts whole.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        tokenizer: Tokenizer | None = None,
        *,
        max_stall_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = engine
        self.timings = Timings()
        self.max_stall_s = max_stall_s
        self.drafts: Drafts | None = None
        self.meter: Phases | None = None
        self._clock = clock
        self._tokenizer = tokenizer
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # slot -> sequence
        self._held: list[list[int]] = [[] for _ in range(engine.max_batch)]  # tokens of each slot
        self._owner = [""] * engine.max_batch  # whose request computed them
        self._used = [0] * engine.max_batch  # when a slot was last given away, in placements
        self._placed = 0
        self._parts = 0
        # The engine may hold more than is written down here, never less: what another scheduler left, and
        # what a Ctrl-C in the middle of a pass, a copy or a truncation leaves.
        self._unsure = True
        self._token_s: float | None = None  # what a token of the last long part took

    # ---- Sequences ----

    def submit(self, request: Request, progress: Report | None = None) -> Sequence:
        """A sequence that waits for its turn. UsageError when its prompt is empty or does not fit."""
        if self._tokenizer is None:
            raise BitgenError("this scheduler has no tokenizer: it computes plain tokens only")
        self.check(request.prompt)
        sequence = Sequence(request, self._tokenizer, progress)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """Take a sequence out; what it was goes on when `resume` puts it back. No error if it is not in."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._running = {slot: other for slot, other in self._running.items() if other is not sequence}

    def resume(self, sequence: Sequence) -> None:
        """Put a sequence that was cancelled in front of those that wait."""
        self._waiting.appendleft(sequence)

    def step(self) -> list[Event]:
        """The prompt of the next sequence that waits, or else the next token of all that run.

        With ``max_stall_s``: the next token of all whose prompt is computed, then a part of another's prompt.
        """
        if self.max_stall_s is not None:
            return self._interleaved()
        if self._waiting and len(self._running) < self.engine.max_batch:
            slot, events = self._place(self._waiting.popleft()), []
            while self._lacking(slot):
                events = self._fill(slot)
        else:
            events = self._decode(self._running) if self._running else []
        self._drop_finished()
        return events

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._running and not self._waiting

    @property
    def room(self) -> int:
        """How many more sequences could run now."""
        return self.engine.max_batch - len(self._running) - len(self._waiting)

    def run(self, requests: Items[Request], progress: Report | None = None) -> Iterator[Event]:
        """Submit all, and step until they are finished."""
        for request in requests:
            self.check(request.prompt)
        return self.drive([self.submit(request, progress) for request in requests])

    def drive(self, sequences: Items[Sequence]) -> Iterator[Event]:
        """Step until all of ``sequences`` are finished.

        Two of these may be interleaved: one that is asked for its next event makes the sequences of the other
        wait, and what they had in the KV cache may have to be computed again.
        """
        try:
            while any(sequence.finish is None for sequence in sequences):
                self._only(sequences)
                yield from self.step()
        finally:
            for sequence in sequences:
                self.cancel(sequence)
            if self.idle:
                self._enter(None)

    def texts(self, requests: Items[Request]) -> list[str]:
        """The whole texts of all requests, in their order."""
        for request in requests:
            self.check(request.prompt)
        mine = [self.submit(request) for request in requests]
        for _ in self.drive(mine):
            pass
        return [sequence.text for sequence in mine]

    def check(self, prompt: Items[int]) -> None:
        """UsageError when a prompt cannot be computed."""
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) > self.engine.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.engine.context}: "
                "shorten it or ask for a larger context (-c)",
            )

    def _enter(self, phase: str | None) -> None:
        if self.meter is not None:
            self.meter.enter(phase)

    def _only(self, wanted: Items[Sequence]) -> None:
        """Make all but the ``wanted`` sequences wait for their own run, and these go on."""
        inside = [*self._running.values(), *self._waiting]
        for sequence in inside:
            if sequence not in wanted:
                self.cancel(sequence)
        for sequence in reversed(wanted):
            if sequence.finish is None and sequence not in inside:
                self.resume(sequence)

    def _interleaved(self) -> list[Event]:
        while self._waiting and len(self._running) < self.engine.max_batch:
            self._place(self._waiting.popleft())
        ready = {slot: each for slot, each in self._running.items() if not self._lacking(slot)}
        events = self._decode(ready) if ready else []
        self._drop_finished()
        lacking = [slot for slot in self._running if self._lacking(slot)]  # in the order in which they came
        if lacking:
            self._parts += 1
            oldest = self._parts % _OLDEST_EVERY == 0
            events += self._fill(lacking[0] if oldest else min(lacking, key=self._lacking))
            self._drop_finished()
        return events

    def _drop_finished(self) -> None:
        self._running = {slot: each for slot, each in self._running.items() if each.finish is None}

    def _place(self, sequence: Sequence) -> int:
        """Give a sequence the free slot that holds most of its tokens, of equals the least recently used."""
        free = [slot for slot in range(len(self._held)) if slot not in self._running]
        slot = max(free, key=lambda slot: (self._common(slot, sequence), -self._used[slot]))
        self._placed += 1
        self._used[slot] = self._placed
        self._running[slot] = sequence
        if not sequence.tokens:  # cancelled in its prompt, maybe: that starts over
            sequence.computed = 0
            sequence.scores.clear()
        self._forget(slot, self._common(slot, sequence))
        self._owner[slot] = sequence.request.owner
        return slot

    def _common(self, slot: int, sequence: Sequence) -> int:
        """How many tokens that a slot holds spare a sequence their computation."""
        request = sequence.request
        if request.owner != self._owner[slot] or (request.score_prompt and not sequence.tokens):
            return 0
        most = len(sequence.whole) - 1  # the last token is computed for its logits
        return min(_common(self._held[slot], sequence.whole), most)

    def _lacking(self, slot: int) -> int:
        """How many tokens a running sequence has before one that it decodes; 0 when it decodes."""
        sequence = self._running[slot]
        lacking = len(sequence.whole) - len(self._held[slot])
        return lacking - 1 if sequence.tokens else lacking

    def _fill(self, slot: int) -> list[Event]:
        """Compute a part of a prompt, and sample the first token after its last part.

        A sequence that was cancelled and resumed has tokens: what it lost is computed again.
        """
        sequence = self._running[slot]
        fresh, scored = not sequence.tokens, sequence.request.score_prompt and not sequence.tokens
        self._enter("prompt")
        self._share(slot, sequence)
        started = self._clock()
        tokens = sequence.whole if fresh else sequence.whole[:-1]
        at = len(self._held[slot])
        if at >= len(tokens):  # it was shared
            return []
        if fresh and sequence.progress:
            sequence.progress(Progress("reading the prompt", at, len(tokens), "tokens"))
        size = min(self._chunk(), self._logits_most()) if scored else self._chunk()
        part = tokens[at : at + size]
        last = fresh and at + len(part) == len(tokens)
        wants: list[Want] = [Logits() if scored else Nothing()] * len(part)
        if last and not scored:
            wants[-1] = sequence.want(self.engine.config.vocab)
        answers = self.answers([Row(slot, part)], wants)
        if scored:
            for row, token in zip(answers, tokens[at + 1 : at + len(part) + 1], strict=False):
                sequence.score(row, token)
        if not fresh:
            return []
        sequence.computed += len(part)
        self.timings.prompt_tokens += len(part)
        self.timings.prompt_s += self._clock() - started
        if not last:
            return []
        if sequence.progress:
            sequence.progress(Progress("reading the prompt", len(tokens), len(tokens), "tokens"))
        return [Event(sequence, self._sample(sequence, answers[-1]))]

    def _share(self, slot: int, sequence: Sequence) -> None:
        """Where another slot holds much more of a sequence, make its slot a copy of that."""
        best = max(range(len(self._held)), key=lambda other: self._common(other, sequence))
        common = self._common(best, sequence)
        if common >= len(self._held[slot]) + _SHARED_MIN:
            self._copy(best, slot)
            self._forget(slot, common)

    def _copy(self, source: int, target: int) -> None:
        self._forget(target, 0)
        self._unsure = True
        self.engine.copy(source, target)
        self._held[target] = list(self._held[source])

    def _decode(self, running: Mapping[int, Sequence]) -> list[Event]:
        """One token, or several of a draft that are accepted, for every one of the ``running`` sequences."""
        self._enter("decode")
        started = self._clock()
        room = max(0, FEW // len(running) - 1)
        length = self.drafts.length(len(running), room) if self.drafts else 0
        reading = False
        rows, wants = [], []
        for slot, sequence in running.items():
            most = sequence.room(min(room, self.engine.context - len(sequence.whole)))
            if self.drafts is None or sequence.drafts_itself:
                draft = sequence.draft(most)
            else:
                found = self.drafts.draft(slot, sequence, min(length, most)) if length else []
                draft, reading = found or [], reading or found is None
            rows.append(Row(slot, [sequence.whole[-1], *draft]))
            wants += [sequence.want(self.engine.config.vocab, draft[:i]) for i in range(len(draft) + 1)]
        answers = self.answers(rows, wants)
        self.timings.steps += 1
        self.timings.step_s += self._clock() - started
        events, at, tokens = [], 0, self.timings.step_tokens
        for slot, fed, _ in rows:
            sequence = running[slot]
            pieces = []
            for row, drafted in enumerate([*fed[1:], None]):
                pieces.append(self._sample(sequence, answers[at + row]))
                if sequence.finish or sequence.whole[-1] != drafted:
                    break
            at += len(fed)
            self.timings.step_tokens += len(pieces)
            if len(fed) > 1:
                sequence.learn(len(fed) - 1, len(pieces) - 1)
                self.timings.drafted += len(fed) - 1
                self.timings.accepted += len(pieces) - 1
                self._forget(slot, len(sequence.whole) - 1)
            events.append(Event(sequence, "".join(pieces)))
        if self.drafts and not reading:
            made = self.timings.step_tokens - tokens
            self.drafts.learn(len(running), length, self._clock() - started, made)
        return events

    def _sample(self, sequence: Sequence, answer: Floats | Chosen) -> str:
        started = self._clock()
        piece = sequence.sample(answer, self.engine.context)
        self.timings.sampled += 1
        self.timings.sample_s += self._clock() - started
        return piece

    # ---- Plain tokens ----

    def catch_up(self, slot: int, tokens: Items[int]) -> bool:
        """Compute a part of ``tokens`` in a slot; whether all but one chunk of them are there."""
        lacking, size = self._rest(slot, tokens), self._chunk()
        if len(lacking) > size:
            self.forward([Row(slot, lacking[:size], [False] * size)])
        return len(lacking) <= size

    def ask(self, slot: int, tokens: Items[int], want: Want) -> Any:
        """What ``want`` gives at the end of ``tokens``, of which a slot lacks few."""
        part = self._rest(slot, tokens)
        return self.answers([Row(slot, part)], [*[Nothing()] * (len(part) - 1), want])[-1]

    def _rest(self, slot: int, tokens: Items[int]) -> Items[int]:
        """What a slot lacks of ``tokens``, at least the last; all else that it holds is forgotten."""
        self._forget(slot, min(_common(self._held[slot], tokens), len(tokens) - 1))
        return tokens[len(self._held[slot]) :]

    def hold(self, slot: int, tokens: Items[int]) -> None:
        """Make a slot hold ``tokens`` and nothing else; what any slot holds of them is not computed again.

        Sequences that run wait until their own run goes on.
        """
        self._only(())
        self._owner[slot] = ""
        best = max(range(len(self._held)), key=lambda other: _common(self._held[other], tokens))
        if _common(self._held[best], tokens) > _common(self._held[slot], tokens):  # a pass reads all weights
            self._copy(best, slot)
        self._compute(slot, tokens)

    def score(self, ids: Items[int], first: int = 0) -> Iterator[Floats]:
        """Logits of given tokens from the token ``first`` on, in parts float32 (some tokens, vocab).

        Sequences that run wait until their own run goes on.
        """
        self.check(ids)
        self._forget(0, 0)
        self._owner[0] = ""
        most = self._logits_most()
        at = 0
        while at < len(ids):
            self._only(())
            self._compute(0, ids[:at])  # nothing, unless another run had the slot
            part = ids[at : at + min(most, self._chunk())]
            logits = self.forward([Row(0, part, [at + i >= first for i in range(len(part))])])
            at += len(part)
            if len(logits):
                yield logits

    def clear(self, keep: int = 0) -> None:
        """Forget what each slot holds behind ``keep`` positions; sequences that run wait for theirs."""
        self._only(())
        for slot in range(self.engine.max_batch):
            self._forget(slot, keep)

    def forward(self, rows: Items[Row]) -> Floats:
        """One forward pass: logits float32 (wanted, vocab), in the order of ``rows`` and their tokens."""
        outputs = [flag for _, part, flags in rows for flag in (flags or [True] * len(part))]
        logits: Floats = self._run(rows, np.array(outputs, np.bool_))
        return logits

    def answers(self, rows: Items[Row], wants: Items[Want]) -> list[Any]:
        """The same for whatever each token wants: floats for `Logits`, `Chosen` for `Best`."""
        answers: list[Any] = self._run(rows, wants)
        return answers

    def _run(self, rows: Items[Row], wants: Any) -> Any:
        tokens = [token for _, part, _ in rows for token in part]
        positions = [len(self._held[slot]) + i for slot, part, _ in rows for i in range(len(part))]
        slots = [slot for slot, part, _ in rows for _ in part]
        if self._unsure:
            for slot, held in enumerate(self._held):
                self.engine.truncate(slot, len(held))
        self._unsure = True
        started = self._clock()
        answers = self.engine.forward(
            np.array(tokens, np.int32), np.array(positions, np.int32), np.array(slots, np.int32), wants
        )
        for slot, part, _ in rows:
            self._held[slot] += part
        self._unsure = False
        if len(tokens) >= (_CHUNK_MIN if self.max_stall_s is None else _PART_MIN):
            self._token_s = max(1e-9, (self._clock() - started) / len(tokens))
        return answers

    # ---- The KV cache ----

    def _compute(self, slot: int, tokens: Items[int]) -> None:
        """Make a slot hold ``tokens`` and nothing else."""
        self._forget(slot, _common(self._held[slot], tokens))
        while len(self._held[slot]) < len(tokens):
            at = len(self._held[slot])
            part = tokens[at : at + self._chunk()]
            self.forward([Row(slot, part, [False] * len(part))])

    def _chunk(self) -> int:
        """How many prompt tokens to compute at once, so that Ctrl-C or other sequences soon get a turn."""
        if self.max_stall_s is None:
            least, seconds, unknown = _CHUNK_MIN, _CHUNK_S, 2 * _CHUNK_MIN
        else:
            least, seconds, unknown = _PART_MIN, self.max_stall_s, _PART_MIN
        if self._token_s is None:
            return unknown
        most = int(min(_CHUNK, seconds / self._token_s))
        return max(least, most // _CHUNK_MIN * _CHUNK_MIN if most >= _CHUNK_MIN else most)

    def _logits_most(self) -> int:
        """How many tokens may have all of their logits at once."""
        return max(32, min(_CHUNK, _LOGITS_BYTES // (4 * self.engine.config.vocab)))

    def held(self) -> Iterator[Held]:
        """What the slots hold, the one that was used last first."""
        for slot in sorted(range(len(self._held)), key=lambda slot: -self._used[slot]):
            self.engine.truncate(slot, len(self._held[slot]))
            yield Held(self._owner[slot], tuple(self._held[slot]), self.engine.cached(slot))

    def restore(self, held: Items[Held]) -> None:
        """Fill the slots, as many as there are. FileError for what does not fit; nothing may run."""
        vocab, context = self.engine.config.vocab, self.engine.context
        for _, tokens, _ in held:
            if not all(0 <= token < vocab for token in tokens):
                raise FileError(f"tokens outside the vocabulary of {vocab}")
            if len(tokens) > context:
                raise FileError(f"{len(tokens)} positions do not fit into a context of {context}")
        for slot, (owner, tokens, data) in zip(range(self.engine.max_batch), held, strict=False):
            self._forget(slot, 0)
            self._unsure = True
            self.engine.restore(slot, len(tokens), data)
            self._held[slot], self._owner[slot] = list(tokens), owner

    def _forget(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of a slot."""
        if length < len(self._held[slot]):
            self._unsure = True
            del self._held[slot][length:]
            self.engine.truncate(slot, length)


def _common(held: Items[int], tokens: Items[int]) -> int:
    """How many tokens two texts have in common at their start."""
    most = min(len(held), len(tokens))
    if list(held[:most]) == list(tokens[:most]):
        return most
    return next(i for i in range(most) if held[i] != tokens[i])
