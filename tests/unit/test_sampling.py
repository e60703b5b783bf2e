from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from wanted import best_of

from bitgen.errors import BitgenError
from bitgen.inference.sampling import (
    GREEDY,
    Sampler,
    Sampling,
    _sorted_top,
    exp,
    log_softmax_at,
    total,
    uniform,
)
from bitgen.inference.wants import Best, pack_mask

ALL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}  # nothing is left out


def draw(logits: Any, count: int = 1, text: Any = (), **options: Any) -> list[int]:
    """What is drawn at positions 0 .. count - 1, all from the same logits."""
    sampler = Sampler(Sampling(**{"seed": 0, **options}))
    values = np.asarray(logits, np.float32)
    return [sampler.choose(None, values, text, position) for position in range(count)]


@settings(max_examples=100, deadline=None)
@given(st.floats(-700, 700))
def test_exp_is_right_to_two_units_in_the_last_place(x: float) -> None:
    expected = math.exp(x)
    assert abs(float(exp(np.array(x))) - expected) <= 2 * math.ulp(expected)


def test_exp_at_its_edges() -> None:
    values = exp(np.array([0.0, -0.0, -700.0, -700.1, -1e9, -np.inf]))
    assert values[:2].tolist() == [1, 1]
    assert values[2] > 0
    assert values[3:].tolist() == [0, 0, 0]


def test_exp_has_the_bits_it_always_had() -> None:
    # The same on every machine, or a seed would not give the same text there.
    bits = [float(v).hex() for v in exp(np.array([-0.1, -1.0, -2.5, -20.0, -300.25]))]
    assert bits == [
        "0x1.cf46d99d52b3ap-1",
        "0x1.78b56362cef38p-2",
        "0x1.50385c094f425p-4",
        "0x1.1b48655f37267p-29",
        "0x1.c758233102acep-434",
    ]


def test_sums_run_from_left_to_right() -> None:
    values = np.array([1.0, 1e16, -1e16, 1.0] * 9)
    expected = 0.0
    for value in values:
        expected += value
    assert total(values) == expected
    assert total(np.array([])) == 0


def test_uniform_numbers_depend_on_seed_and_position_only() -> None:
    assert uniform(0, 0) == uniform(0, 0) != uniform(0, 1) != uniform(1, 0)
    # splitmix64 of seed 0 starts with 0xE220A8397B1DCDAF.
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) / 2**53
    numbers = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.02


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert Sampler(GREEDY).choose(None, np.array([1, 3, 3, 2], np.float32), (), 0) == 1


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    counts = Counter(draw(logits, 5000, **ALL))
    shares = [counts[i] / 5000 for i in range(4)]
    assert np.abs(np.array(shares) - [0.5, 0.25, 0.15, 0.1]).max() < 0.02


def test_temperature_sharpens_and_flattens() -> None:
    logits = [2.0, 0.0]
    cold, hot = (Counter(draw(logits, 5000, **{**ALL, "temperature": t}))[0] / 5000 for t in (0.5, 10.0))
    assert abs(cold - 1 / (1 + math.exp(-4))) < 0.02
    assert abs(hot - 1 / (1 + math.exp(-0.2))) < 0.02


def test_top_k_keeps_k_and_of_equals_the_first() -> None:
    logits = [0.0, 1.0, 1.0, 1.0, 2.0]
    assert set(draw(logits, 500, **{**ALL, "top_k": 3})) == {4, 1, 2}
    assert set(draw(logits, 500, **{**ALL, "top_k": 1})) == {4}
    assert set(draw(logits, 500, **{**ALL, "top_k": 99})) == {0, 1, 2, 3, 4}


def test_top_p_keeps_the_fewest_that_reach_p() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draw(logits, 500, **{**ALL, "top_p": 0.45})) == {0}
    assert set(draw(logits, 500, **{**ALL, "top_p": 0.6})) == {0, 1}
    assert set(draw(logits, 500, **{**ALL, "top_p": 0.9})) == {0, 1, 2}
    assert set(draw(logits, 500, **{**ALL, "top_p": 0.0})) == {0}


def test_min_p_drops_what_is_far_less_likely_than_the_likeliest() -> None:
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert set(draw(logits, 500, **{**ALL, "min_p": 0.5})) == {0, 1}
    assert set(draw(logits, 500, **{**ALL, "min_p": 1.0})) == {0}
    assert set(draw(logits, 2000, **{**ALL, "min_p": 0.09})) == {0, 1, 2, 3}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.floats(0.3, 1), st.floats(0, 0.5), st.floats(0.2, 3))
def test_a_draw_is_what_the_definition_says(seed: int, k: int, p: float, min_p: float, t: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, 50).astype(np.float32).round(1)  # with equals
    order = sorted(range(50), key=lambda i: (-float(logits[i]), i))[: k or 50]
    top = float(logits[order[0]])
    weights = [math.exp(float(logits[i]) - top) for i in order]
    kept, so_far = 0, 0.0
    while kept < len(order) and (kept == 0 or so_far < p * sum(weights) * (1 - 1e-12)):
        so_far += weights[kept]
        kept += 1
    order = [i for i, w in zip(order[:kept], weights, strict=False) if w >= min_p * (1 - 1e-12)]
    if p == 1 and k in (0, *range(50, 61)):  # nothing had to be sorted
        order.sort()
    weights = [math.exp((float(logits[i]) - top) / t) for i in order]
    u = uniform(seed, 3) * sum(weights)
    expected = next(
        (i for i, end in zip(order, np.cumsum(weights), strict=True) if u < end * (1 + 1e-12)), order[-1]
    )
    sampler = Sampler(Sampling(temperature=t, top_k=k, top_p=p, min_p=min_p, seed=seed))
    assert sampler.choose(None, logits, (), 3) == expected


def test_repetition_penalty_counts_recent_tokens_once() -> None:
    logits = [2.0, 1.5, -1.0, -1.2]
    options: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.5}
    assert draw(logits, text=[0, 0], **options) == [1]  # 2 / 1.5 < 1.5
    assert draw(logits, text=[0, 1], **options) == [0]
    assert draw(logits, text=[0, 3, 3], repeat_last_n=2, **options) == [0]
    assert draw(logits, text=[0, *[3] * 99], repeat_last_n=-1, **options) == [1]
    assert draw(logits, text=[0], repeat_last_n=0, **options) == [0]
    assert draw([-1.0, -1.2], text=[0], **options) == [1]  # negative logits move away from 0


def test_presence_counts_once_and_frequency_each_time_after_the_repeat_penalty() -> None:
    logits = [2.0, 1.5, -1.0]
    greedy: dict[str, Any] = {"temperature": 0.0}
    assert draw(logits, text=[0, 0], presence_penalty=0.4, **greedy) == [0]  # 2 - 0.4 > 1.5
    assert draw(logits, text=[0, 0], frequency_penalty=0.4, **greedy) == [1]  # 2 - 0.8 < 1.5
    assert draw(logits, text=[0, 0, 2], frequency_penalty=0.4, repeat_last_n=2, **greedy) == [0]
    assert draw(logits, text=[2], presence_penalty=-2.0, **greedy) == [0]  # -1 + 2 < 2
    assert draw(logits, text=[2, 2], frequency_penalty=-2.0, **greedy) == [2]
    assert draw([4.0, 1.1], text=[0], repeat_penalty=2.0, presence_penalty=1.0, **greedy) == [1]  # 4 / 2 - 1


def test_of_two_biases_of_a_token_the_last_counts_whatever_the_row_gives() -> None:
    logits = np.array([0, 5, 0, 0], np.float32)
    sampler = Sampler(Sampling(temperature=0, logit_bias=((2, 9.0), (2, 1.0))))
    want = sampler.want([], len(logits))
    assert isinstance(want, Best)
    assert sampler.take(best_of(logits, want), [], 0) == sampler.take(logits, [], 0) == 1


def test_a_bias_is_added_before_anything_else() -> None:
    logits = np.array([2.0, 1.5, -1.0, 0.0], np.float32)
    sampler = Sampler(Sampling(temperature=0, logit_bias=((2, 50.0), (0, -100.0))))
    assert sampler.take(logits, (), 0) == 2
    assert sampler.take(logits, (), 0, pack_mask(np.array([True, True, False, True]))) == 1
    halved = Sampler(Sampling(temperature=0, logit_bias=((2, 2.5),), repeat_penalty=2.0))
    assert halved.take(logits, [0, 1, 2], 0) == 0  # 2 / 2 against (-1 + 2.5) / 2


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.7, 1.5]),
    st.sampled_from([1, 3, 7, 59, 60, 80]),
    st.sampled_from([0.5, 0.9, 1.0]),
    st.sampled_from([{}, {"repeat_penalty": 1.7}, {"presence_penalty": -2.0}, {"frequency_penalty": 1.3}]),
    st.sampled_from([None, 1, 5, 40]),
)
def test_what_is_asked_of_a_row_decides_as_all_logits_do(
    seed: int, temperature: float, k: int, p: float, penalty: dict[str, float], count: int | None
) -> None:
    rng = np.random.default_rng(seed)
    logits = (2 * rng.standard_normal(60)).astype(np.float32).round(1)  # with equals
    text = rng.integers(0, 60, 9).tolist()
    allowed = (
        None if count is None else pack_mask(np.isin(np.arange(60), rng.choice(60, count, replace=False)))
    )
    bias = tuple((int(token), 3.0) for token in rng.choice(60, seed % 3, replace=False))
    options: dict[str, Any] = {"repeat_last_n": -1, "logit_bias": bias, **penalty}
    sampler = Sampler(Sampling(temperature, k, p, seed=seed, **options))
    want = sampler.want(text, 60, allowed)
    answer = best_of(logits, want) if isinstance(want, Best) else logits
    assert sampler.take(answer, text, 2, allowed) == sampler.take(logits, text, 2, allowed)
    assert isinstance(want, Best) == (k + 1 + len(sampler._recent(text)) <= 60 or temperature == 0)


def test_the_nucleus_of_a_large_vocabulary_is_that_of_all_tokens_sorted() -> None:
    rng = np.random.default_rng(1)
    for spread in (0.01, 1.0, 5.0):  # nearly all tokens, some, few
        logits = rng.normal(0, spread, 5000).astype(np.float32)
        weights = np.sort(np.exp(logits.astype(np.float64)))[::-1]
        count = int(np.argmax(np.cumsum(weights) >= 0.9 * weights.sum())) + 1
        sampler = Sampler(Sampling(top_k=0, top_p=0.9, min_p=0, seed=0))
        ids, x = sampler._nucleus(*sampler._most_likely(logits))
        assert ids.tolist() == np.argsort(-logits, kind="stable")[:count].tolist()
        assert np.array_equal(x, logits[ids])


@settings(max_examples=100, deadline=None)
@given(
    x=arrays(
        np.float32,
        st.integers(1, 400),
        elements=st.sampled_from([-np.inf, -1.5, 0.0, -0.0, 0.25, 3.0, np.inf]),
    ),
    k=st.integers(1, 400),
)
@example(x=np.zeros(200, np.float32), k=2)
@example(x=np.arange(200, dtype=np.float32) % 7, k=3)
def test_the_top_is_that_of_a_stable_sort(x: np.ndarray, k: int) -> None:
    assert _sorted_top(x, k).tolist() == np.argsort(-x, kind="stable")[:k].tolist()


def test_logits_are_not_changed() -> None:
    logits = np.arange(10, dtype=np.float32)
    kept = logits.copy()
    Sampler(Sampling(repeat_penalty=2.0, seed=1)).choose(None, logits, [9], 0)
    assert np.array_equal(logits, kept)


def test_a_seed_gives_the_same_draws_and_no_seed_others() -> None:
    logits = np.zeros(1000)
    assert draw(logits, 20, **ALL, seed=5) == draw(logits, 20, **ALL, seed=5)
    assert draw(logits, 20, **ALL, seed=5) != draw(logits, 20, **ALL, seed=6)
    assert draw(logits, 20, **ALL, seed=None) != draw(logits, 20, **ALL, seed=None)


def test_log_softmax_is_the_log_of_the_probability() -> None:
    logits = np.array([1.0, 2.0, 3.0], np.float32)
    expected = 2 - math.log(math.exp(1) + math.exp(2) + math.exp(3))
    assert abs(log_softmax_at(logits, 1) - expected) < 1e-15
    assert log_softmax_at(np.array([1e4, -1e4], np.float32), 1) == -2e4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be 0 or more, not -1"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"top_k": -1}, "top_k must be 0 or more"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1"),
        ({"min_p": -0.1}, "min_p must be between 0 and 1"),
        ({"repeat_penalty": 0}, "repeat_penalty must be greater than 0"),
        ({"repeat_last_n": -2}, "repeat_last_n must be -1 or more"),
        ({"seed": -1}, "seed must be between"),
        ({"presence_penalty": 2.5}, "presence_penalty must be between -2 and 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty must be between -2 and 2"),
        ({"logit_bias": ((3, 101.0),)}, r"logit_bias must be between -100 and 100, not 101.0 \(token 3\)"),
        ({"logit_bias": ((3, math.nan),)}, "logit_bias must be"),
        ({"logit_bias": ((3, 1.0),) * 1001}, "logit_bias has 1000 tokens at most"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BitgenError, match=message):
        Sampling(**options)


# ---- Named candidates ----


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {},
        ALL,
        {"top_k": 5, "top_p": 0.7},
        {"repeat_penalty": 1.5, "repeat_last_n": -1},
    ],
)
def test_all_ids_as_candidates_give_what_the_vocabulary_gives(options: dict[str, Any]) -> None:
    rng = np.random.default_rng(3)
    for seed in range(40):
        logits = rng.standard_normal(97).astype(np.float32).round(1)  # with equals
        order = rng.permutation(97).astype(np.int32)
        sampler, text = Sampler(Sampling(**{"seed": seed, **options})), [3, 96, 50, 200]
        whole = sampler.choose(None, logits, text, seed)
        assert sampler.choose(order, logits[order], text, seed) == whole


def test_only_candidates_are_chosen_and_only_they_are_penalised() -> None:
    ids = np.array([40, 7, 12], np.int32)
    logits = np.array([1.0, 1.5, 1.4], np.float32)
    assert Sampler(GREEDY).choose(ids, logits, (), 0) == 7
    penalised = Sampler(Sampling(temperature=0, repeat_penalty=2.0))
    assert penalised.choose(ids, logits, [7, 8, 99], 0) == 12
    found = {Sampler(Sampling(**{**ALL, "seed": seed})).choose(ids, logits, (), 0) for seed in range(99)}
    assert found == {7, 12, 40}
