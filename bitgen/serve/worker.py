"""The one thread that owns the scheduler and its engine; everybody else exchanges messages with it.

The event loop hands in jobs and cancels them; between two steps the thread looks at what came, and hands what
a step made back in one call. Jobs wait here in one queue for each owner (API key), which take turns.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from bitgen.energy import IDLE, Meter, Spent
from bitgen.errors import BitgenError
from bitgen.inference.sampling import Score
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Finish, Request
from bitgen.inference.sequence import Sequence as Running
from bitgen.inference.wants import Floats
from bitgen.serve.log import say

Ended: TypeAlias = "Finish | Literal['cancelled', 'error']"
_IDS = itertools.count(1)
_REREAD_S = 5.0  # an idle worker wakes so often, for a meter that must not miss its counter's wrap


class Update(NamedTuple):
    """What a step did to a job: new text, tokens and scores, and maybe why it ended."""

    job: Job
    text: str = ""
    tokens: Sequence[int] = ()
    scores: Sequence[Score] = ()
    finish: Ended | None = None
    error: str = ""
    first: bool = False  # of its job; the job itself may be further when this is read


@dataclass(eq=False)
class Job:
    """One text to be made. ``deliver`` is called in the event loop's thread with its updates.

    The times are seconds of the worker's clock, None before: submitted, given a slot, first token, ended.
    """

    request: Request
    deliver: Callable[[Update], None]
    index: int = 0  # of the choice it becomes
    id: int = field(default_factory=lambda: next(_IDS))
    submitted: float | None = None
    started: float | None = None
    first: float | None = None
    ended: float | None = None
    seed: int | None = None
    stop: str | None = None  # the stop text that ended it
    vector: Floats | None = None  # of the prompt, where that was asked for
    computed: int = 0  # tokens of the prompt that were not reused
    sampled: int = 0  # tokens

    @property
    def reused(self) -> int:
        """Tokens of the prompt that the KV cache held."""
        return max(0, len(self.request.prompt) - self.computed) if self.first is not None else 0


@dataclass(frozen=True)
class Snapshot:
    """What the worker was doing after its last turn."""

    running: tuple[tuple[int, int, int], ...] = ()  # job, positions, tokens sampled
    waiting: int = 0
    kv_bytes: int = 0  # of keys and values, parked texts included
    steps: int = 0
    step_s: float = 0.0
    prompt_s: float = 0.0
    spent: Mapping[str, Spent] = field(default_factory=dict)  # joules by phase, where they are measured


class Worker:
    """Runs jobs on a scheduler.

    ``post(call)`` runs ``call`` in the event loop's thread, in order. `submit`, `cancel` and `stop` may be
    called from any thread; `turn` and `run` belong to the worker's. ``meter`` becomes the scheduler's.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        post: Callable[[Callable[[], None]], object],
        clock: Callable[[], float] = time.perf_counter,
        meter: Meter | None = None,
    ) -> None:
        self.meter = scheduler.meter = meter
        self.snapshot = Snapshot()
        self.clock = clock
        self.thread = threading.Thread(target=self.run, name="bitgen-engine", daemon=True)
        self._scheduler = scheduler
        self._post = post
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._waiting: dict[str, deque[Job]] = {}  # by owner; the first one is next
        self._running: dict[Job, Running] = {}
        self._seen: dict[Job, int] = {}  # scores that were delivered
        self._stopped = False

    def submit(self, job: Job) -> None:
        job.submitted = self.clock()
        self._inbox.put(("submit", job))

    def cancel(self, job: Job) -> None:
        """Take a job out before the next step; its last update says so. Nothing if it has ended."""
        self._inbox.put(("cancel", job))

    def stop(self) -> None:
        self._inbox.put(("stop", None))

    @property
    def idle(self) -> bool:
        return not self._running and not self._waiting and self._inbox.empty()

    def run(self) -> None:
        """Take turns until `stop`; an idle worker sleeps."""
        while not self._stopped:
            self.turn(wait=True)

    def turn(self, *, wait: bool = False) -> None:
        """Look at what came, make one step, hand back what it made."""
        updates = self._receive(wait and not self._running and not self._waiting)
        if self._stopped:
            return
        updates += self._admit()
        if self._running:
            try:
                updates += self._step()
            except Exception as error:  # whatever it was, the thread goes on for the next request
                updates += self._fail(error)
        self._publish()
        if updates:
            self._post(lambda: _deliver(updates))

    def _receive(self, wait: bool) -> list[Update]:
        updates: list[Update] = []
        if wait and self.meter is not None:
            self.meter.enter(IDLE)
        while True:
            try:
                what, job = self._inbox.get(wait, None if self.meter is None else _REREAD_S)
            except queue.Empty:
                return updates
            wait = False
            if job is None:
                self._stopped = True
            elif what == "submit":
                self._waiting.setdefault(job.request.owner, deque()).append(job)
            elif self._take_out(job):
                updates.append(self._end(job, "cancelled"))

    def _take_out(self, job: Job) -> bool:
        sequence = self._running.pop(job, None)
        if sequence is not None:
            self._scheduler.cancel(sequence)
            return True
        line = self._waiting.get(job.request.owner, ())
        if job not in line:
            return False
        self._waiting[job.request.owner].remove(job)
        if not line:
            del self._waiting[job.request.owner]
        return True

    def _admit(self) -> list[Update]:
        """Let those in who have a slot and memory, from the queues of the owners in turn.

        One that does not fit yet keeps its turn, and all others wait: it is not passed over for ever.
        """
        refused = []
        while self._waiting:
            owner, line = next(iter(self._waiting.items()))
            if not self._scheduler.admits(line[0].request):
                break
            job = line.popleft()
            del self._waiting[owner]
            if line:
                self._waiting[owner] = line  # behind the others
            try:
                sequence = self._scheduler.submit(job.request)
            except BitgenError as error:
                refused.append(self._end(job, "error")._replace(error=error.message))
                continue
            job.started, job.seed = self.clock(), sequence.seed
            self._running[job] = sequence
        return refused

    def _step(self) -> list[Update]:
        jobs = {sequence: job for job, sequence in self._running.items()}
        events = self._scheduler.step()
        now = self.clock()
        updates = []
        for sequence, text in events:
            job = jobs[sequence]
            first = job.first is None
            if first:
                job.first, job.computed = now, sequence.computed
            tokens = sequence.tokens[job.sampled :]
            job.sampled = len(sequence.tokens)
            seen = self._seen.get(job, 0)
            scores = sequence.scores[seen:]
            self._seen[job] = seen + len(scores)
            if sequence.finish is None:
                updates.append(Update(job, text, tokens, scores, first=first))
                continue
            del self._running[job]
            job.stop, job.vector = sequence.stopped_by, sequence.vector
            ended = self._end(job, sequence.finish)._replace(error=sequence.error)
            updates.append(ended._replace(text=text, tokens=tokens, scores=scores, first=first))
        return updates

    def _fail(self, error: Exception) -> list[Update]:
        """End all that run: which of them it was cannot be told."""
        failed = list(self._running)
        self._running.clear()
        self._scheduler.clear()
        message = error.message if isinstance(error, BitgenError) else f"{type(error).__name__} in the engine"
        say(f"a step failed: {message}")
        return [self._end(job, "error")._replace(error=message) for job in failed]

    def _end(self, job: Job, finish: Ended) -> Update:
        job.ended = self.clock()
        self._seen.pop(job, None)
        return Update(job, finish=finish)

    def _publish(self) -> None:
        timings = self._scheduler.timings
        running = tuple(
            (job.id, len(sequence.request.prompt) + len(sequence.tokens), len(sequence.tokens))
            for job, sequence in self._running.items()
        )
        waiting = sum(map(len, self._waiting.values()))
        spent = {} if self.meter is None else self.meter.spent
        self.snapshot = Snapshot(
            running,
            waiting,
            self._scheduler.kv_bytes,
            timings.steps,
            timings.step_s,
            timings.prompt_s,
            spent,
        )


def _deliver(updates: Sequence[Update]) -> None:
    for update in updates:
        update.job.deliver(update)
