"""What the rows of a forward pass want: each answer against numpy, from the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_model import small_config
from wanted import best_of

from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError, FileError
from bitgen.formats.config import ModelConfig
from bitgen.formats.weights import DenseMatrix, Weights
from bitgen.inference.engine import PREFILL, Engine, Kv
from bitgen.inference.synthetic import random_weights
from bitgen.inference.wants import Best, Chosen, Hidden, Logits, Nothing, Want, pack_mask
from bitgen.runtime import KernelTable, load

LEVEL = accepted_isas(detect_cpu(), load_isas())[0].name
N = 12


@pytest.fixture(scope="module")
def table(level_library: Callable[[str], Path]) -> Iterator[KernelTable]:
    with load(level_library(LEVEL), 2) as table:
        yield table


@pytest.fixture(scope="module")
def weights() -> Weights:
    """A head whose rows come twice, so that logits are equal in pairs: ids i and i + vocab / 2."""
    config = small_config(tied_head=False, vocab=150)
    made = random_weights(config, 3)
    rows = made.output.rows(0, 75)
    return replace(made, lm_head=DenseMatrix.of(np.concatenate([rows, rows])))


def run(weights: Weights, table: KernelTable, wants: Any, n: int = N) -> Any:
    ids = np.random.default_rng(1).integers(0, weights.config.vocab, n).astype(np.int32)
    positions, sequences = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    return Engine(weights, table).forward(ids, positions, sequences, wants)


@pytest.fixture(scope="module")
def logits(weights: Weights, table: KernelTable) -> Any:
    """Of all tokens, as they are asked for with a bool array."""
    return run(weights, table, np.ones(N, bool))


def few_allowed(vocab: int, *tokens: int) -> Any:
    allowed = np.zeros(vocab, bool)
    allowed[list(tokens)] = True
    return pack_mask(allowed)


BESTS = {
    "one": Best(1),
    "some": Best(10),
    "all": Best(150),
    "none but named": Best(0, named=(3, 149, 3)),
    "allowed": Best(7, allowed=pack_mask(np.arange(150) % 3 == 0)),
    "fewer allowed than asked for": Best(20, allowed=few_allowed(150, 0, 31, 32, 33, 149)),
    "none allowed": Best(4, allowed=pack_mask(np.zeros(150, bool)), named=(5,)),
    "bias": Best(9, bias={4: 100.0, 7: -100.0, 149: 50.5}, named=(4, 7, 8)),
    "bias, allowed, named": Best(
        5, allowed=pack_mask(np.arange(150) > 70), bias={2: 1e30, 100: -3.0, 80: 3.0}, named=(2, 100, 0)
    ),
    "equal by bias": Best(150, bias=dict.fromkeys(range(150), 1e30)),
}


@pytest.mark.parametrize("name", BESTS)
def test_the_best_are_those_of_numpy(weights: Weights, table: KernelTable, logits: Any, name: str) -> None:
    want = BESTS[name]
    for row, chosen in enumerate(run(weights, table, [want] * N)):
        expected = best_of(logits[row], want)
        assert np.array_equal(chosen.ids, expected.ids)
        assert np.array_equal(chosen.logits, expected.logits)
        assert np.array_equal(chosen.named, expected.named)


def test_equal_logits_go_to_the_lower_id(weights: Weights, table: KernelTable) -> None:
    (*_, chosen) = run(weights, table, [Nothing()] * (N - 1) + [Best(150)])
    pairs = chosen.ids.reshape(-1, 2)
    assert np.array_equal(pairs[:, 0] + 75, pairs[:, 1])
    assert np.array_equal(chosen.logits[::2], chosen.logits[1::2])


def test_the_hidden_state_is_what_the_head_reads(weights: Weights, table: KernelTable, logits: Any) -> None:
    """Through a head of float32 the logits follow from it, in the order of sums that the step documents."""
    for row, hidden in enumerate(run(weights, table, [Hidden()] * N)):
        assert hidden.shape == (weights.config.hidden,)
        exact = weights.output.rows(0, 150).astype(np.float64) @ hidden
        assert np.allclose(logits[row], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())


MIXED: list[Want] = [
    Nothing(),
    Logits(),
    Logits(),
    Hidden(),
    Best(3),
    Nothing(),
    Best(2, named=(1,)),
    Logits(),
    Hidden(),
    Best(4, allowed=pack_mask(np.arange(150) < 9)),
    Nothing(),
    Logits(),
]


@pytest.mark.parametrize("threads", [1, 3])
def test_every_row_gets_what_it_asked_for_whatever_the_others_ask(
    weights: Weights, logits: Any, threads: int, level_library: Callable[[str], Path]
) -> None:
    with load(level_library(LEVEL), threads) as table:
        hidden = run(weights, table, [Hidden()] * N)
        for row, (want, answer) in enumerate(zip(MIXED, run(weights, table, MIXED), strict=True)):
            if isinstance(want, Nothing):
                assert answer is None
            elif isinstance(want, Logits):
                assert np.array_equal(answer, logits[row])
            elif isinstance(want, Hidden):
                assert np.array_equal(answer, hidden[row])
            else:
                assert isinstance(answer, Chosen)
                assert np.array_equal(answer.ids, best_of(logits[row], want).ids)
                assert np.array_equal(answer.logits, best_of(logits[row], want).logits)


def test_one_at_a_time_or_all_at_once_the_bits_are_the_same(weights: Weights, table: KernelTable) -> None:
    ids = np.random.default_rng(1).integers(0, 150, N).astype(np.int32)
    wants: list[Want] = [Best(6, bias={9: 0.25}), Hidden()] * (N // 2)
    engine = Engine(weights, table)
    whole = run(weights, table, wants)
    for i in range(N):
        (alone,) = engine.forward(ids[i : i + 1], np.array([i], np.int32), np.zeros(1, np.int32), [wants[i]])
        if isinstance(alone, Chosen):
            assert np.array_equal(alone.ids, whole[i].ids)
            assert np.array_equal(alone.logits, whole[i].logits)
        else:
            assert alone is not None
            assert np.array_equal(alone, whole[i])


def test_answers_of_more_tokens_than_a_step_takes(table: KernelTable) -> None:
    config: ModelConfig = small_config(layers=1, context=2048)
    n = PREFILL + 40
    weights = random_weights(config, 2)
    wants: list[Want] = [Nothing()] * n
    wants[5], wants[PREFILL - 1], wants[PREFILL], wants[n - 1] = Logits(), Best(2), Hidden(), Logits()
    answers = run(weights, table, wants, n)
    expected = run(weights, table, np.array([isinstance(want, (Logits, Best)) for want in wants]), n)
    assert np.array_equal(answers[5], expected[0])
    assert np.array_equal(answers[PREFILL - 1].ids, best_of(expected[1], Best(2)).ids)
    assert answers[PREFILL].shape == (config.hidden,)
    assert np.array_equal(answers[n - 1], expected[2])
    assert sum(answer is not None for answer in answers) == 4


def test_a_list_of_flags_is_a_bool_array(weights: Weights, table: KernelTable, logits: Any) -> None:
    assert np.array_equal(run(weights, table, [i % 2 == 0 for i in range(N)]), logits[::2])


@pytest.mark.parametrize("want", [Hidden(), Logits(), Best(2), Best(0, named=(1,))])
def test_what_is_not_finite_is_found_for_every_want(weights: Weights, table: KernelTable, want: Want) -> None:
    spoilt = replace(weights, final_norm=weights.final_norm * np.float32(np.nan))
    with pytest.raises(BitgenError, match="NaN or infinity"):
        run(spoilt, table, [want] * N)


def test_a_spoilt_head_is_found_where_it_is_read(weights: Weights, table: KernelTable) -> None:
    rows = weights.output.rows(0, 150).copy()
    rows[140] = np.inf
    spoilt = replace(weights, lm_head=DenseMatrix.of(rows))
    with pytest.raises(BitgenError, match="NaN or infinity"):
        run(spoilt, table, [Best(1, allowed=pack_mask(np.arange(150) < 10))] * N)
    assert len(run(spoilt, table, [Hidden()] * N)) == N


@pytest.mark.parametrize(
    ("want", "message"),
    [
        (Best(-1), "k must be 0 to 150"),
        (Best(151), "k must be 0 to 150"),
        (Best(1, allowed=np.ones(4, np.uint32)), r"allowed must be uint32 \(5,\)"),
        (Best(1, allowed=np.ones(5, np.uint8)), r"allowed must be uint32 \(5,\)"),
        (Best(1, bias={150: 1.0}), "token 150 is not in the vocabulary of 150"),
        (Best(1, bias={3: float("nan")}), "a bias must be finite"),
        (Best(1, bias={3: 1e39}), "a bias must be finite"),
        (Best(1, named=(-1,)), "token -1 is not in the vocabulary"),
    ],
)
def test_wrong_wants_are_named(weights: Weights, table: KernelTable, want: Best, message: str) -> None:
    with pytest.raises(BitgenError, match=message):
        run(weights, table, [want] * N)
    with pytest.raises(BitgenError, match="must be as many"):
        run(weights, table, [Logits()])


def test_the_step_checks_rows_and_sizes(weights: Weights, table: KernelTable) -> None:
    """Each error code of the C interface, from a call that is right but for some fields."""
    ffi, lib, context = table.native

    def code(where: str = "row", **changes: Any) -> int:
        engine = Engine(weights, table)
        engine._fill_rope(10)
        zero = ffi.new("int32_t *")
        number, value, out = ffi.new("int32_t *", 7), ffi.new("float *", 1.0), ffi.new("float[]", 150)
        row, ids = ffi.new("struct bitgen_row *"), ffi.new("int32_t[]", 150)
        row.want, row.best, row.out, row.ids = lib.BITGEN_WANT_BEST, 5, out, ids
        row.bias_id, row.bias, row.bias_count = number, value, 1
        row.named, row.named_out, row.named_count = number, value, 1
        sizes = {"size": ffi.sizeof("struct bitgen_tokens"), "row_size": ffi.sizeof("struct bitgen_row")}
        fields = {"n": 1, "token": zero, "position": zero, "sequence": zero, "row": row}
        call = ffi.new("struct bitgen_tokens *", {**sizes, **fields})
        model = engine._model
        changed = {"row": row, "call": call, "model": model, "matrix": model.layer[0].o}[where]
        for name, new in changes.items():
            setattr(changed, name, new)
        made = int(lib.bitgen_step(context, model, call, ffi.NULL))
        assert made == lib.BITGEN_OK or not any(out)
        return made

    assert code() == lib.BITGEN_OK
    assert code(best=0, out=ffi.NULL, ids=ffi.NULL) == lib.BITGEN_OK
    for where, name in (("model", "size"), ("model", "layer_size"), ("call", "size"), ("call", "row_size")):
        for size in (0, 8, 1 << 20):
            assert code(where, **{name: size}) == lib.BITGEN_ERROR_STRUCT, name
    for name in ("out", "ids", "bias", "bias_id", "named", "named_out"):
        assert code(**{name: ffi.NULL}) == lib.BITGEN_ERROR_NULL, name
    for name, value in (("want", 4), ("want", -1), ("best", -1), ("best", 151)):
        assert code("row", **{name: value}) == lib.BITGEN_ERROR_ARGUMENT, name
    for name in ("bias_count", "named_count"):
        assert code("row", **{name: -1}) == lib.BITGEN_ERROR_ARGUMENT, name
    for wrong in (150, -1):
        token = ffi.new("int32_t *", wrong)
        assert code(bias_id=token) == lib.BITGEN_ERROR_TOKENS
        assert code(named=token) == lib.BITGEN_ERROR_TOKENS
    endless = ffi.new("float *", float("inf"))
    assert code(bias=endless) == lib.BITGEN_ERROR_ARGUMENT
    assert code("matrix", scale_type=1) == lib.BITGEN_ERROR_MODEL
    assert code("matrix", group=1) == lib.BITGEN_ERROR_SCALE_COUNT, "scales of groups lie among the weights"
    assert code("matrix", group=1, scale=ffi.NULL, scale_count=0) == lib.BITGEN_ERROR_MODEL


def test_work_memory_counts_what_is_chosen_from(weights: Weights, table: KernelTable) -> None:
    ffi, lib, context = table.native
    engine, size = Engine(weights, table), ffi.new("size_t *")

    def bytes_of(n: int, outputs: int, best: int) -> int:
        table.check(lib.bitgen_work_bytes(context, engine._model, n, outputs, best, size))
        return int(size[0])

    logits, bits = 4 * 150 * 4, 4 * 5 * 4  # a logit a token, and whether it is the head's own
    assert bytes_of(8, 8, 4) - bytes_of(8, 8, 0) == sum(-(-part // 64) * 64 for part in (logits, bits))
    for wrong in ((8, 9, 0), (8, 4, 5), (8, 8, -1)):
        assert lib.bitgen_work_bytes(context, engine._model, *wrong, size) == lib.BITGEN_ERROR_SHAPE


@pytest.mark.parametrize("kv", ["f16", "f32", "q8", "q4"])
def test_what_is_cached_goes_on_in_another_engine(weights: Weights, table: KernelTable, kv: Kv) -> None:
    """Another context, another sequence: the same logits, bit for bit."""
    n = 70
    ids = np.random.default_rng(2).integers(0, weights.config.vocab, n + 1).astype(np.int32)
    first = Engine(weights, table, context=100, kv=kv, max_batch=2)
    places, flags = np.arange(n, dtype=np.int32), np.zeros(n, bool)
    first.forward(ids[:n], places, np.full(n, 1, np.int32), flags)
    data = first.cached(1)
    second = Engine(weights, table, context=200, kv=kv, max_batch=3)
    second.restore(2, n, data)
    last = (ids[n:], np.array([n], np.int32))
    logits = [
        e.forward(*last, np.array([s], np.int32), np.ones(1, bool)) for e, s in ((first, 1), (second, 2))
    ]
    assert np.array_equal(logits[0], logits[1])
    for length, part in ((n, data[:-1]), (n + 64, data), (300, data), (0, b"")):
        with pytest.raises(FileError, match=r"do not fit|bytes, not"):
            second.restore(0, length, part)
