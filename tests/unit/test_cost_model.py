"""The model of costs of benchmarks/cost_model.py: what it learns from one space, and says of another."""

from __future__ import annotations

import math
from itertools import product

import pytest
from cost_model import FIRST, Place, learn, starts, winner
from search_study import Log

from bitgen.cpu import target_cpu
from bitgen.spec import KernelSpec, Layout, Schedule, Shape

HERE = Place(target_cpu("zen4"), 3200)
# What each value costs; the product of them is a kernel's time.
COSTS = {
    "streams": {1: 1.3, 2: 1.0, 4: 1.1},
    "accumulators": {1: 1.05, 2: 1.2, 4: 1.0},
    "prefetch": {0: 1.25, 4096: 1.0, 6144: 1.02},
}
HINT = ("prefetch_hint", 0)


def kernel(values: tuple[int, ...], *more: tuple[str, int]) -> KernelSpec:
    streams, accumulators, prefetch = values
    knobs = {"streams": streams, "nr": 1, "accumulators": accumulators, "widen_every": 0, "unroll": 1}
    schedule = Schedule("direct", (*knobs.items(), ("prefetch", prefetch), *more))
    return KernelSpec("i2s", "avx512_vbmi", "n1", Layout("i2s", 16), schedule)


def cost(spec: KernelSpec) -> float:
    return math.prod(COSTS[knob][spec.schedule[knob]] for knob in COSTS)


SPACE = [kernel(values) for values in product(*COSTS.values())]


def test_what_was_not_measured_is_ordered_by_what_was() -> None:
    hidden = SPACE[::4]
    model = learn([(HERE, {spec: 1e6 * cost(spec) for spec in SPACE if spec not in hidden})])
    said = sorted(hidden, key=lambda spec: model.cost(spec, HERE))
    assert said[0] == min(hidden, key=cost)
    assert said[-1] == max(hidden, key=cost)


def test_only_ratios_within_a_space_count() -> None:
    """A machine that is twice as fast teaches the same."""
    one, two = ({spec: unit * cost(spec) for spec in SPACE} for unit in (1e6, 2e6))
    once, scaled = learn([(HERE, one)]), learn([(HERE, two)])
    for spec in SPACE:
        assert once.cost(spec, HERE) == pytest.approx(scaled.cost(spec, HERE), abs=1e-9)


def test_nothing_is_said_of_an_algorithm_that_was_never_timed() -> None:
    model = learn([(HERE, {spec: cost(spec) for spec in SPACE})])
    knobs = {"mr": 64, "nr": 4, "mc": 64, "kc": 960, "widen_every": 0, "unroll": 1}
    panel = KernelSpec(
        "i2s", "avx512_vbmi", "large", Layout("i2s", 16), Schedule("panel", tuple(knobs.items()))
    )
    assert model.cost(panel, HERE) == 0


def test_a_winner_is_found_again_where_a_knob_came_or_went() -> None:
    best = min(SPACE, key=cost)
    log = Log(Shape(3200, 3200), 1, 1, tuple(SPACE), (tuple(map(cost, SPACE)),))
    assert winner(log, SPACE) == best
    with_hint = [kernel(values, HINT) for values in product(*COSTS.values())]
    assert winner(log, with_hint).schedule.knobs == (*best.schedule.knobs, HINT)
    longer = Log(log.shape, 1, 1, tuple(with_hint), log.rounds_ns)
    assert winner(longer, SPACE) == best


def test_a_search_starts_from_winners_and_the_model_or_from_neither() -> None:
    log = Log(Shape(3200, 3200), 1, 1, tuple(SPACE), (tuple(map(cost, SPACE)),))
    ordered = SPACE[::-1]
    found = list(starts(ordered, [log, log]).values())
    best, first = min(SPACE, key=cost), ordered[:FIRST]
    assert found == [[], [best], first, [best, *first]]
