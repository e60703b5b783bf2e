"""What a forward pass takes beside its ternary matrices: LM head, attention, norms, rotation, gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitgen.formats.config import ModelPreset
from bitgen.inference import FEW
from bitgen.inference.engine import Engine
from bitgen.inference.passes import Row
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.synthetic import random_weights
from bitgen.runtime import load

_CONTEXT = 512
_MATRICES = "matmul"  # of the stages of a forward pass
_ONCE = ("embed", "head")  # the other stages are of a layer
_LEAST_TOKENS = 32  # timed for each n


def non_matmul_cost(
    preset: ModelPreset, library: Path, threads: int, tokens: Sequence[int]
) -> Mapping[int, float]:
    """Nanoseconds a token outside ternary matrices, for each n of ``tokens`` at once on ``threads`` threads.

    Measured on one layer of random weights and the whole LM head in f16, and multiplied by the layers. Up to
    16 tokens each has logits (steps, drafts), of more only the last one (a prompt). Keys of a half full
    context of 512 are attended to at most.
    """
    weights = random_weights(replace(preset, layers=1, context=_CONTEXT))
    with load(library, threads) as table:
        engine = Engine(weights, table, context=_CONTEXT)
        try:
            return {n: _nanoseconds(engine, n, preset.layers) for n in tokens}
        finally:
            engine.close()


def _nanoseconds(engine: Engine, n: int, layers: int) -> float:
    tokens = np.random.default_rng(n).integers(0, engine.config.vocab, n).tolist()
    row = Row(0, tokens, [True] * n if n <= FEW else [False] * (n - 1) + [True])
    scheduler = Scheduler(engine)
    steps = -(-_LEAST_TOKENS // n)
    for warm in (True, False):
        engine.reset_times()
        for _ in range(1 if warm else steps):
            scheduler.clear()
            scheduler.forward([row])
    times = engine.times_ns
    heads = ("head",) if engine.weights.ternary_head is not None else ()  # a matrix, tuned with the others
    once = sum(times[stage] for stage in _ONCE if stage not in heads)
    a_layer = sum(time for stage, time in times.items() if stage not in (*_ONCE, _MATRICES))
    return (once + layers * a_layer) / (steps * n)
