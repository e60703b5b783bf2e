"""Time a model as llama-bench does: prompts of random tokens, then steps of one token a sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bitgen.inference.scheduler import EngineProtocol, Row, Scheduler
from bitgen.inference.wants import Best
from bitgen.progress import Progress, Report


@dataclass(frozen=True)
class Run:
    """One test, repeated: ``seconds`` for ``tokens`` tokens each time, all sequences together."""

    test: str  # pp512, tg128, tg128 @ d4096
    batch: int
    threads: int
    tokens: int
    seconds: tuple[float, ...]

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
    progress: Report | None = None,
) -> Iterator[Run]:
    """Time ``pp<N>`` for each of ``prompts`` and ``tg<N>`` for each of ``steps`` and ``batches``.

    Each behind each of ``depths`` tokens that the KV cache holds already, ``@ d<N>`` in the test's name. Each
    test runs once before it is timed. Tokens are random, and nothing is sampled. A step gives all logits, or
    with ``choose`` the best token alone, as greedy text needs.
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
        seconds = []
        for repeat in range(repeats + 1):
            if progress:
                title = f"{test}, {batch} at once, {threads} threads"
                progress(Progress(title, index * (repeats + 1) + repeat, len(behind) * (repeats + 1), "runs"))
            scheduler.clear(keep=depth)
            tokens = rng.integers(0, engine.config.vocab, (n, batch), dtype=np.int32).tolist()
            run = _prompt if test.startswith("pp") else _choices if choose else _steps
            started = time.perf_counter()
            run(scheduler, tokens)
            seconds.append(time.perf_counter() - started)
        yield Run(test, batch, threads, n * batch, tuple(seconds[1:]))


def _prompt(scheduler: Scheduler, tokens: list[list[int]]) -> None:
    last = [False] * (len(tokens) - 1) + [True]
    scheduler.forward([Row(0, [token for (token,) in tokens], last)])


def _steps(scheduler: Scheduler, tokens: list[list[int]]) -> None:
    for step in tokens:
        scheduler.forward([Row(slot, [token]) for slot, token in enumerate(step)])


def _choices(scheduler: Scheduler, tokens: list[list[int]]) -> None:
    for step in tokens:
        scheduler.answers([Row(slot, [token]) for slot, token in enumerate(step)], [Best(1)] * len(step))
