"""The loop that makes tokens: requests in, events out, one or many sequences at once.

::

    scheduler = Scheduler(engine, tokenizer)
    sequence = scheduler.submit(request)
    while sequence.finish is None:
        for event in scheduler.step():
            print(event.text, end="")

The scheduler is the only caller of the engine, by way of `Passes`. It keeps what the engine's KV cache holds,
so a prompt that starts like the last one costs only its new part. Every sequence samples its tokens by
itself, from logits that do not depend on what else is computed: a text is the same alone, in a batch, and
with drafts.

Prompts are computed whole, one after the other, while the sequences that run wait; with `max_stall_s` set
they are computed in parts that take no longer, a step of all that run between two parts.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bitgen.errors import BitgenError
from bitgen.formats.config import Floats
from bitgen.inference import FEW
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.passes import PART_MIN, Passes, Row
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.sequence import Request, Sequence
from bitgen.inference.wants import Chosen, Logits, Nothing, Want
from bitgen.progress import Progress, Report
from bitgen.tokenizer.tokenizer import Tokenizer

_PASSED_OVER_MAX = 3  # parts of shorter prompts in a row, before the prompt that came first has one


class Event(NamedTuple):
    """What a step did to a sequence: the next piece of its text, maybe empty, and maybe its ``finish``."""

    sequence: Sequence
    text: str


class Drafts(Protocol):
    """Who drafts for all sequences: `bitgen.inference.draft_model.DraftModel`."""

    def length(self, running: int, room: int) -> int: ...

    def draft(self, slot: int, sequence: Sequence, most: int) -> list[int]: ...

    def learn(self, running: int, drafted: int, seconds: float, checked: Items[tuple[int, int]]) -> None: ...


class Phases(Protocol):
    """Who wants to know what is computed, from now on: `bitgen.energy.Meter`."""

    def enter(self, phase: str | None) -> None: ...


class _Batch(NamedTuple):
    """The rows of a decode step, and what they want."""

    running: Mapping[int, Sequence]
    rows: Items[Row]
    wants: Items[Want]
    started: float

    @property
    def tokens(self) -> int:
        return len(self.wants)


class _Part(NamedTuple):
    """A part of a prompt: what its tokens want, and whether the prompt ends with it."""

    sequence: Sequence
    row: Row
    wants: Items[Want]
    behind: Items[int]  # the tokens that follow each of its own: what its logits are scored by, if at all
    last: bool


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


class Scheduler(Passes):
    """Runs sequences on an engine, from one thread.

    As many run at once as the engine has slots, or as ``capacity`` says; the others wait in the order in
    which they came. Without a tokenizer it computes plain tokens only (`Passes`). ``max_stall_s`` None
    computes prompts whole.
    """

    def __init__(
        self,
        engine: EngineProtocol,
        tokenizer: Tokenizer | None = None,
        *,
        capacity: Capacity | None = None,
        max_stall_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(engine, capacity, max_stall_s, clock)
        self.timings = Timings()
        self.mixed = False  # a part of a prompt and the step of those that run are one forward pass
        self.drafts: Drafts | None = None
        self.meter: Phases | None = None
        self._tokenizer = tokenizer
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # slot -> sequence
        self._passed_over = 0  # parts in a row that were not of the prompt that came first

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
        if self._next_fits():
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
    def parallel(self) -> int:
        """How many sequences run at once at most."""
        return self._slots.parallel

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache that are in use, parked sequences included."""
        return self._slots.held_bytes

    def admits(self, request: Request) -> bool:
        """Whether a request could run now, beside those that run and those that wait."""
        inside = [sequence.request for sequence in (*self._running.values(), *self._waiting)]
        return len(inside) < self.parallel and self._slots.fit(inside, request)

    def _next_fits(self) -> bool:
        if not self._waiting or len(self._running) >= self.parallel:
            return False
        running = (sequence.request for sequence in self._running.values())
        return self._slots.fit(running, self._waiting[0].request)

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

    def _enter(self, phase: str | None) -> None:
        if self.meter is not None:
            self.meter.enter(phase)

    def suspend(self) -> None:
        self._only(())

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
        while self._next_fits():
            self._place(self._waiting.popleft())
        ready = {slot: each for slot, each in self._running.items() if not self._lacking(slot)}
        if self.mixed and ready and len(ready) < len(self._running) and self.drafts is None:
            events = self._both(ready, self._next_prompt())
            self._drop_finished()
            return events
        events = self._decode(ready) if ready else []
        self._drop_finished()
        if any(map(self._lacking, self._running)):
            events += self._fill(self._next_prompt())
            self._drop_finished()
        return events

    def _next_prompt(self) -> int:
        """The slot whose prompt gets the next part: the shortest rest, and at times the one that came first.

        That one waits for three parts of others at most, and a short prompt for one part of a long one.
        """
        lacking = [slot for slot in self._running if self._lacking(slot)]  # in the order in which they came
        shortest = min(lacking, key=self._lacking)
        chosen = lacking[0] if self._passed_over >= _PASSED_OVER_MAX else shortest
        self._passed_over = 0 if chosen == lacking[0] else self._passed_over + 1
        return chosen

    def _drop_finished(self) -> None:
        self._running = {slot: each for slot, each in self._running.items() if each.finish is None}

    def _place(self, sequence: Sequence) -> int:
        if not sequence.tokens:  # cancelled in its prompt, maybe: that starts over
            sequence.computed = 0
            sequence.scores.clear()
            sequence.states.clear()
        return self._slots.place(sequence, self._running)

    def _lacking(self, slot: int) -> int:
        """How many tokens a running sequence has before one that it decodes; 0 when it decodes."""
        sequence = self._running[slot]
        lacking = len(sequence.whole) - len(self._slots.tokens[slot])
        return lacking - 1 if sequence.tokens else lacking

    def _fill(self, slot: int) -> list[Event]:
        """Compute a part of a prompt, and sample the first token after its last part."""
        self._enter("prompt")
        started = self.clock()
        part = self._part(slot)
        if part is None:
            return []
        answers = self.answers([part.row], part.wants)
        return self._filled(part, answers, self.clock() - started)

    def _part(self, slot: int, beside: int = 0) -> _Part | None:
        """The next part of a prompt, ``beside`` so many other tokens; None where another slot had the rest.

        A sequence that was cancelled and resumed has tokens: what it lost is computed again.
        """
        sequence = self._running[slot]
        fresh, scored = not sequence.tokens, sequence.request.score_prompt and not sequence.tokens
        self._slots.share(slot, sequence)
        tokens = sequence.whole if fresh else sequence.whole[:-1]
        at = len(self._slots.tokens[slot])
        if at >= len(tokens):
            return None
        if fresh and sequence.progress:
            sequence.progress(Progress("reading the prompt", at, len(tokens), "tokens"))
        size = max(PART_MIN, self._chunk() - beside)
        if scored:
            size = min(size, self._logits_most())
        part = tokens[at : at + size]
        last = fresh and at + len(part) == len(tokens)
        wants: list[Want] = [Logits() if scored else Nothing()] * len(part)
        if sequence.request.pooling:
            wants = sequence.wants_of(len(part), last)
        elif last and not scored:
            wants[-1] = sequence.want(self.engine.config.vocab)
        behind = tokens[at + 1 : at + len(part) + 1] if scored else []
        return _Part(sequence, Row(slot, part), wants, behind, last)

    def _filled(self, part: _Part, answers: Items[Any], seconds: float) -> list[Event]:
        """What came of a part of a prompt, which took ``seconds``."""
        sequence, tokens = part.sequence, part.row.tokens
        for row, token in zip(answers, part.behind, strict=False):
            sequence.score(row, token)
        if sequence.tokens:
            return []
        sequence.computed += len(tokens)
        self.timings.prompt_tokens += len(tokens)
        self.timings.prompt_s += seconds
        if sequence.request.pooling:
            sequence.states += [state for state in answers if state is not None]
        if not part.last:
            return []
        if sequence.request.pooling:
            sequence.point()
            return [Event(sequence, "")]
        if sequence.progress:
            whole = len(sequence.whole)
            sequence.progress(Progress("reading the prompt", whole, whole, "tokens"))
        return [Event(sequence, self._sample(sequence, answers[-1]))]

    def _both(self, running: Mapping[int, Sequence], slot: int) -> list[Event]:
        """A step of the ``running`` sequences and a part of a prompt: the weights are read once for both."""
        part = self._part(slot, len(running))
        if part is None:
            return self._decode(running)
        batch = self._batch(running)
        self._enter("decode")
        answers = self.answers([*batch.rows, part.row], [*batch.wants, *part.wants])
        seconds = self.clock() - batch.started
        share = batch.tokens / len(answers)
        events = self._decoded(batch, answers[: batch.tokens], share * seconds)
        return events + self._filled(part, answers[batch.tokens :], (1 - share) * seconds)

    def _decode(self, running: Mapping[int, Sequence]) -> list[Event]:
        """One token, or several of a draft that are accepted, for every one of the ``running`` sequences."""
        self._enter("decode")
        batch = self._batch(running)
        answers = self.answers(batch.rows, batch.wants)
        return self._decoded(batch, answers, self.clock() - batch.started)

    def _batch(self, running: Mapping[int, Sequence]) -> _Batch:
        """The last token of each sequence, and drafts of those that follow."""
        started = self.clock()
        room = max(0, FEW // len(running) - 1)
        length = self.drafts.length(len(running), room) if self.drafts else 0
        rows, wants = [], []
        for slot, sequence in running.items():
            most = sequence.room(min(room, self.engine.context - len(sequence.whole)))
            if self.drafts is None or sequence.drafts_itself:
                draft = sequence.draft(most)
            else:
                draft = self.drafts.draft(slot, sequence, min(length, most)) if length else []
            rows.append(Row(slot, [sequence.whole[-1], *draft]))
            wants += [sequence.want(self.engine.config.vocab, draft[:i]) for i in range(len(draft) + 1)]
        return _Batch(running, rows, wants, started)

    def _decoded(self, batch: _Batch, answers: Items[Any], seconds: float) -> list[Event]:
        """Sample what comes behind the rows of a step that took ``seconds``, as far as drafts were right."""
        self.timings.steps += 1
        self.timings.step_s += seconds
        events, at, drafted, checked = [], 0, 0, []
        for slot, fed, _ in batch.rows:
            sequence = batch.running[slot]
            pieces = []
            for row, draft in enumerate([*fed[1:], None]):
                pieces.append(self._sample(sequence, answers[at + row]))
                if sequence.finish or sequence.whole[-1] != draft:
                    break
            at += len(fed)
            self.timings.step_tokens += len(pieces)
            if len(fed) > 1:
                sequence.learn(len(fed) - 1, len(pieces) - 1)
                if not sequence.drafts_itself:
                    drafted += len(fed) - 1
                    checked.append((len(pieces) - 1 if sequence.finish else len(fed) - 1, len(pieces) - 1))
                self.timings.drafted += len(fed) - 1
                self.timings.accepted += len(pieces) - 1
                self._slots.forget(slot, len(sequence.whole) - 1)
            events.append(Event(sequence, "".join(pieces)))
        if self.drafts:
            self.drafts.learn(len(batch.running), drafted, self.clock() - batch.started, checked)
        return events

    def _sample(self, sequence: Sequence, answer: Floats | Chosen) -> str:
        started = self.clock()
        piece = sequence.sample(answer, self.engine.context)
        self.timings.sampled += 1
        self.timings.sample_s += self.clock() - started
        return piece
