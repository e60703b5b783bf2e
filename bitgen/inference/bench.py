"""Time a model as llama-bench does: prompts of random tokens, then steps of one token a sequence."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bitgen.formats.config import ModelConfig
from bitgen.inference.scheduler import Engine


@dataclass(frozen=True)
class Run:
    """One test, repeated: ``seconds`` for ``tokens`` tokens each time, all sequences together."""

    test: str  # pp512, tg128
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
    engine: Engine,
    threads: int,
    *,
    prompts: Sequence[int],
    steps: Sequence[int],
    batches: Sequence[int] = (1,),
    repeats: int = 5,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Run]:
    """Time ``pp<N>`` for each of ``prompts`` and ``tg<N>`` for each of ``steps`` and ``batches``.

    Each test runs once before it is timed. Tokens are random, and nothing is sampled.
    """
    rng = np.random.default_rng(0)
    tests = [(f"pp{n}", 1, n) for n in prompts] + [(f"tg{n}", batch, n) for n in steps for batch in batches]
    for test, batch, n in tests:
        seconds = []
        for repeat in range(repeats + 1):
            if progress:
                progress(f"{test}, {batch} at once, {threads} threads: {repeat} of {repeats}")
            for sequence in range(batch):
                engine.truncate(sequence, 0)
            tokens = rng.integers(0, engine.config.vocab, (n, batch), dtype=np.int32)
            run = _prompt if test.startswith("pp") else _steps
            started = time.perf_counter()
            run(engine, tokens)
            seconds.append(time.perf_counter() - started)
        yield Run(test, batch, threads, n * batch, tuple(seconds[1:]))


def _prompt(engine: Engine, tokens: np.ndarray[tuple[int, int], np.dtype[np.int32]]) -> None:
    n = len(tokens)
    outputs = np.zeros(n, np.bool_)
    outputs[-1] = True
    engine.forward(tokens[:, 0], np.arange(n, dtype=np.int32), np.zeros(n, np.int32), outputs)


def _steps(engine: Engine, tokens: np.ndarray[tuple[int, int], np.dtype[np.int32]]) -> None:
    n, batch = tokens.shape
    sequences, outputs = np.arange(batch, dtype=np.int32), np.ones(batch, np.bool_)
    for position in range(n):
        engine.forward(tokens[position], np.full(batch, position, np.int32), sequences, outputs)


def parameters(config: ModelConfig) -> int:
    """Weights of all matrices, embedding and head once where they are one."""
    layer = config.hidden * (2 * config.q_rows + 2 * config.kv_rows) + 3 * config.hidden * config.ffn
    return config.layers * layer + config.vocab * config.hidden * (1 if config.tied_head else 2)
