"""Time a model as llama-bench does: prompts of random tokens, then steps of one token a sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from bitgen.energy import Meter, Spent
from bitgen.inference.passes import Row
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.wants import Best
from bitgen.progress import Progress, Report

_SPAN_S = 3.0  # of work a reading of a meter is about, at least
_PHASE = "bench"


@dataclass(frozen=True)
class Run:
    """One test, repeated: ``seconds`` for ``tokens`` tokens each time, all sequences together.

    With a meter ``spans`` are joules over some of these runs each, ``span_tokens`` their tokens.
    """

    test: str  # pp512, tg128, tg128 @ d4096
    batch: int
    threads: int
    tokens: int
    seconds: tuple[float, ...]
    spans: tuple[Spent, ...] = ()
    span_tokens: tuple[int, ...] = ()

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of each repetition."""
        return [self.tokens / seconds for seconds in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.speeds)

    @property
    def deviation(self) -> float:
        """Standard deviation of a sample; 0 for one repetition."""
        return statistics.stdev(self.speeds) if len(self.seconds) > 1 else 0.0


def bench_engine(
    engine: EngineProtocol,
    threads: int,
    *,
    prompts: Sequence[int],
    steps: Sequence[int],
    batches: Sequence[int] = (1,),
    depths: Sequence[int] = (0,),
    choose: bool = False,
    repeats: int = 5,
    meter: Meter | None = None,
    progress: Report | None = None,
) -> Iterator[Run]:
    """Time ``pp<N>`` for each of ``prompts`` and ``tg<N>`` for each of ``steps`` and ``batches``.

    Each behind each of ``depths`` tokens that the KV cache holds already, ``@ d<N>`` in the test's name. Each
    test runs once before it is timed. Tokens are random, and nothing is sampled. A step gives all logits, or
    with ``choose`` the best token alone, as greedy text needs. With a ``meter`` a repetition goes on until it
    has taken three seconds.
    """
    rng, scheduler = np.random.default_rng(0), Scheduler(engine)
    tests = [(f"pp{n}", 1, n) for n in prompts] + [(f"tg{n}", batch, n) for n in steps for batch in batches]
    behind = [(f"{test} @ d{d}" if d else test, batch, n, d) for d in depths for test, batch, n in tests]
    for index, (test, batch, n, depth) in enumerate(behind):
        scheduler.clear()
        if depth:
            before = rng.integers(0, engine.config.vocab, (batch, depth)).tolist()
            for slot, tokens in enumerate(before):
                scheduler.forward([Row(slot, tokens, [False] * depth)])
        run = _prompt if test.startswith("pp") else _choices if choose else _steps
        timed = _Timed(partial(run, scheduler), meter)
        for repeat in range(repeats + 1):
            if progress:
                title = f"{test}, {batch} at once, {threads} threads"
                progress(Progress(title, index * (repeats + 1) + repeat, len(behind) * (repeats + 1), "runs"))

            def tokens(n: int = n, batch: int = batch, depth: int = depth) -> list[list[int]]:
                scheduler.clear(keep=depth)
                drawn: list[list[int]] = rng.integers(0, engine.config.vocab, (n, batch)).tolist()
                return drawn

            timed.repeat(tokens, warm_up=repeat == 0)
        runs = tuple(n * batch * count for count in timed.runs)
        yield Run(test, batch, threads, n * batch, tuple(timed.seconds), tuple(timed.spans), runs)


class _Timed:
    """The repetitions of a test: the seconds of each run, and with a meter what each repetition took."""

    def __init__(
        self, run: Callable[[list[list[int]], Callable[[], None]], None], meter: Meter | None
    ) -> None:
        self.seconds: list[float] = []
        self.spans: list[Spent] = []
        self.runs: list[int] = []  # of each span
        self._run, self._meter = run, meter

    def repeat(self, tokens: Callable[[], list[list[int]]], *, warm_up: bool) -> None:
        """Run once, or with a meter until three seconds have passed; a warm-up leaves no trace."""
        meter = None if warm_up else self._meter
        seconds: list[float] = []
        charge = partial(meter.enter, _PHASE) if meter else _nobody
        while not seconds or (meter and sum(seconds) < _SPAN_S):
            drawn = tokens()
            charge()
            started = time.perf_counter()
            self._run(drawn, charge)
            seconds.append(time.perf_counter() - started)
        if meter:
            meter.enter(None)
            if spent := meter.take(_PHASE):
                self.spans.append(spent)
                self.runs.append(len(seconds))
        if not warm_up:
            self.seconds += seconds


def _nobody() -> None:
    """No meter to be charged."""


def _prompt(scheduler: Scheduler, tokens: list[list[int]], charge: Callable[[], None]) -> None:
    del charge
    last = [False] * (len(tokens) - 1) + [True]
    scheduler.forward([Row(0, [token for (token,) in tokens], last)])


def _steps(scheduler: Scheduler, tokens: list[list[int]], charge: Callable[[], None]) -> None:
    for step in tokens:
        scheduler.forward([Row(slot, [token]) for slot, token in enumerate(step)])
        charge()


def _choices(scheduler: Scheduler, tokens: list[list[int]], charge: Callable[[], None]) -> None:
    for step in tokens:
        scheduler.answers([Row(slot, [token]) for slot, token in enumerate(step)], [Best(1)] * len(step))
        charge()
