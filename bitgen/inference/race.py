"""Race the libraries that a CPU runs against each other: the honest answer to which is the fastest here."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from bitgen.bundle import Bundle
from bitgen.bundle.measured import Measured
from bitgen.cpu import detect_cpu
from bitgen.runtime import Floats, Linear, load
from bitgen.spec import Shape

BUDGET_S = 0.2
_TOKENS = (1, 32)  # a step of decoding, and a piece of a prompt
_SHAPES = 2
_LARGEST = 1 << 25  # weights of a shape that is raced, so that preparing it takes no longer than the race
_ANY = Shape(3200, 3200)  # where the bundles have no shape of their own


def race(bundles: Sequence[Bundle], *, budget_s: float = BUDGET_S, threads: int | None = None) -> Measured:
    """Time the same multiplications with each bundle's library, in turns, for ``budget_s`` in all.

    A library's time is the sum of its medians over shapes and numbers of tokens. BitgenError of a library
    that cannot be opened.
    """
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        tables = [stack.enter_context(load(bundle.path, threads)) for bundle in bundles]
        work = []
        for shape in _shapes(bundles):
            w = rng.integers(-1, 2, (shape.m, shape.k), np.int8)
            layers = [table.linear(w, 1.0) for table in tables]
            work += [(layers, rng.standard_normal((n, shape.k)).astype(np.float32)) for n in _TOKENS]
        times = [_in_turns(layers, x, budget_s / len(work)) for layers, x in work]
    digests = [bundle.manifest.files[bundle.manifest.library] for bundle in bundles]
    return Measured(
        detect_cpu().model_name, dict(zip(digests, map(sum, zip(*times, strict=True)), strict=True))
    )


def _shapes(bundles: Sequence[Bundle]) -> list[Shape]:
    """The shapes that most bundles have kernels for, small ones first among equals."""
    each = [{kernel.shape for kernel in bundle.manifest.kernels if kernel.shape} for bundle in bundles]
    counts = Counter(shape for shapes in each for shape in shapes if shape.m * shape.k <= _LARGEST)
    return sorted(counts, key=lambda shape: (-counts[shape], shape.m * shape.k))[:_SHAPES] or [_ANY]


def _in_turns(layers: Sequence[Linear], x: Floats, budget_s: float) -> list[float]:
    """The median nanoseconds of each layer: calls one after the other, in an order that turns."""
    for layer in layers:
        layer(x)
    times: list[list[int]] = [[] for _ in layers]
    order = list(range(len(layers)))
    ends = time.perf_counter() + budget_s
    while time.perf_counter() < ends or not times[0]:
        for i in order:
            began = time.perf_counter_ns()
            layers[i](x)
            times[i].append(time.perf_counter_ns() - began)
        order.append(order.pop(0))
    return [statistics.median(own) for own in times]
