# ruff: noqa: ARG001, ARG005 - a fake takes the arguments of what it stands for
from __future__ import annotations

import mmap
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import dot, exact_logits
from feeding import feed, ids_of
from model_files import grouped_model, write_model
from reference_model import logits_of, random_dense, small_config
from step_levels import LEVELS

from bitgen.abi import DENSE_TYPES, STAGES
from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.formats.config import ModelConfig, ModelPreset, load_models
from bitgen.formats.open import open_model
from bitgen.formats.quants import DENSE
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.weights import DenseMatrix, Weights
from bitgen.inference import weight_cache as packed
from bitgen.inference.engine import PREFILL, Engine, inverse_frequencies
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.packed_file import cache_entries, check_cache, clear_cache
from bitgen.inference.synthetic import random_weights
from bitgen.inference.weight_cache import PackedLayer, find_groups, pack_model
from bitgen.progress import Progress
from bitgen.runtime import KernelTable

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name

# Every architecture there is, with sizes that no block divides.
CONFIGS = {
    "silu, sub-norms, hidden 100": small_config(),
    "relu2, heads of 96": small_config(hidden=130, head_dim=96, heads=6, kv_heads=2, activation="relu2"),
    "no sub-norms, heads of 100, one key head": small_config(
        sub_norms=False, tied_head=False, head_dim=100, heads=5, kv_heads=1, layers=1
    ),
    "norms of q and k, heads of 52": small_config(
        sub_norms=False, qk_norm=True, head_dim=52, heads=3, kv_heads=1, norm_eps=1e-6, layers=1
    ),
    "groups of 128, a ternary head": small_config(
        sub_norms=False,
        qk_norm=True,
        group=128,
        hidden=256,
        ffn=300,
        head_dim=40,
        heads=5,
        kv_heads=1,
        layers=1,
    ),
    "groups of 64, sub-norms": small_config(group=64, activation="relu2", layers=1),
    "codes of 4 bits with offsets": small_config(
        sub_norms=False,
        weights="q4m",
        group=32,
        hidden=96,
        ffn=100,
        head_dim=32,
        heads=3,
        kv_heads=1,
        layers=1,
    ),
    "values of 4-bit codes": small_config(
        sub_norms=False,
        weights="t4",
        group=32,
        hidden=100,
        ffn=64,
        head_dim=32,
        heads=3,
        kv_heads=3,
        layers=1,
    ),
    "values of 4-bit codes in groups of 16": small_config(
        sub_norms=False,
        weights="t4",
        group=16,
        hidden=72,
        ffn=64,
        head_dim=24,
        heads=3,
        kv_heads=3,
        layers=1,
    ),
    "values of 3-bit codes": small_config(
        sub_norms=False,
        weights="t3",
        group=64,
        hidden=100,
        ffn=64,
        head_dim=32,
        heads=3,
        kv_heads=3,
        layers=1,
    ),
    "norms of the input of each matrix": small_config(
        qk_norm=True, input_norms=True, head_dim=52, heads=3, kv_heads=1, norm_eps=1e-6
    ),
    "bits, their head too": small_config(
        sub_norms=False,
        weights="q1",
        group=128,
        hidden=256,
        ffn=300,
        head_dim=40,
        heads=5,
        kv_heads=1,
        layers=1,
    ),
    "heads of 64, ragged ffn": small_config(hidden=64, ffn=5460 // 12, head_dim=64, heads=3, kv_heads=3),
}


# ---- The numbers ----


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_are_what_the_formulas_say(tables: Any, config: ModelConfig) -> None:
    weights = random_weights(config, 1)
    ids = ids_of(config, 60)
    check_formulas(weights, ids, feed(Engine(weights, tables(), kv="f32"), ids))


def check_formulas(weights: Weights, ids: list[int], logits: Any) -> None:
    """Of an f32 cache: the bits of the exact model, which the formulas in float64 give up to float32 noise.

    Where both round an activation that lies between two int8 values is no noise: the formulas follow it, and
    say whether it lies there.
    """
    steps: dict[str, Any] = {}
    assert np.array_equal(logits, exact_logits(weights, ids, "f32", steps))
    expected = logits_of(weights, ids, given=steps)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@cache
def exact_model(name: str, kv: Any, activations: str | None = None) -> tuple[Any, list[int], Any]:
    """Weights, a text and its logits bit for bit."""
    weights = random_weights(CONFIGS[name], 2)
    n = 140 if kv == "f16" else 40  # more than one chunk of keys, where it costs most
    ids = ids_of(CONFIGS[name], n)
    return weights, ids, exact_logits(weights, ids, kv, activations=activations)


# Every architecture with the cache that is usual, a few with the others: those are the attention's alone.
KV_CONFIGS = ("silu, sub-norms, hidden 100", "relu2, heads of 96", "no sub-norms, heads of 100, one key head")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("config", "kv"),
    [
        pytest.param(name, kv, marks=[] if kv == "f16" or name in KV_CONFIGS else [pytest.mark.deep])
        for name in CONFIGS
        for kv in ("f16", "f32", "q8", "q4")
    ],
)
def test_every_level_gives_the_bits_of_the_exact_model(tables: Any, config: str, kv: Any, level: str) -> None:
    table = tables(level)
    weights, ids, expected = exact_model(config, kv)
    assert np.array_equal(feed(Engine(weights, table, kv=kv), ids), expected)


GROUPED = "groups of 128, a ternary head"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("config", ["silu, sub-norms, hidden 100", "groups of 64, sub-norms", GROUPED])
def test_int16_has_bits_of_its_own_on_every_level(tables: Any, config: str, level: str) -> None:
    weights, ids, expected = exact_model(config, "f32", "int16")
    engine = Engine(weights, tables(level), kv="f32", activations="int16")
    assert engine.activations == "int16"
    assert np.array_equal(feed(engine, ids), expected)


@pytest.mark.parametrize("activations", ["int8", "int16"])
@pytest.mark.parametrize("config", ["silu, sub-norms, hidden 100", GROUPED])
def test_one_mode_whatever_way_a_text_is_computed(tables: Any, config: str, activations: Any) -> None:
    """At once, token by token, in parts, and behind a prefix that another text computed."""
    weights = random_weights(CONFIGS[config], 5)
    ids = ids_of(CONFIGS[config], 60)
    whole = feed(Engine(weights, tables(threads=1), activations=activations), ids)
    for threads, cuts in ((1, [1] * 60), (2, [60]), (2, [1] * 60), (3, [2, 8, 9, 16, 25])):
        engine = Engine(weights, tables(threads=threads), activations=activations, max_batch=2)
        assert np.array_equal(feed(engine, ids, cuts), whole), (threads, cuts)
        engine.copy(0, 1)
        engine.truncate(1, 33)
        assert np.array_equal(feed(engine, ids[33:], [10, 1, 16], sequence=1), whole[33:])


@pytest.mark.parametrize("config", ["silu, sub-norms, hidden 100", GROUPED])
def test_int16_is_near_the_model_that_rounds_nothing(tables: Any, config: str) -> None:
    weights = random_weights(CONFIGS[config], 6)
    ids = ids_of(CONFIGS[config], 40)
    floats = logits_of(weights, ids, rounds=False)
    off = {
        mode: np.abs(feed(Engine(weights, tables(), kv="f32", activations=mode), ids) - floats).std()
        for mode in ("int8", "int16")
    }
    assert off["int16"] < off["int8"] / 50
    assert off["int16"] < 1e-3 * floats.std()


@pytest.mark.parametrize("preset", load_models(), ids=lambda preset: preset.name)
def test_every_presets_architecture_small_and_ragged(tables: Any, preset: ModelPreset) -> None:
    """The preset's heads, groups and norms; hidden 100, and a ragged ffn (1.3B's own, 5460)."""
    ffn = preset.ffn if preset.ffn % 16 else preset.ffn * 100 // preset.hidden - 1
    group = preset.heads // preset.kv_heads
    config = replace(preset, layers=2, context=64, hidden=100, ffn=ffn, heads=2 * group, kv_heads=2, vocab=97)
    weights = random_weights(config, 12)
    ids = ids_of(config, 20)
    check_formulas(weights, ids, feed(Engine(weights, tables(), kv="f32"), ids))


@pytest.mark.parametrize("level", LEVELS)
def test_neither_threads_nor_cuts_change_a_bit(tables: Any, level: str) -> None:
    config = small_config(kv_heads=1, layers=1)
    weights = random_weights(config, 3)
    ids = ids_of(config, 150)
    whole = feed(Engine(weights, tables(level, 1)), ids)
    for threads, cuts in (
        (1, [1] * 150),
        (2, [150]),
        (2, [1] * 150),
        (3, [2, 5, 16, 17, 110]),
        (2, [149, 1]),
    ):
        engine = Engine(weights, tables(level, threads))
        assert np.array_equal(feed(engine, ids, cuts), whole), (threads, cuts)


@pytest.mark.parametrize("kv", ["f16", "f32", "q8", "q4"])
@pytest.mark.parametrize("heads", [1, 2])
def test_threads_that_share_a_head_change_no_bit(tables: Any, kv: Any, heads: int) -> None:
    """With fewer key heads than threads a step cuts the keys in spans and merges their chunks."""
    config = small_config(heads=6, kv_heads=heads, head_dim=100, context=1000)
    weights = random_weights(config, 11)
    texts = ids_of(config, 900), ids_of(config, 300, seed=4)
    level = "scalar" if kv in ("q8", "q4") and heads == 2 else BEST  # scalar takes 3 s
    alone = [feed(Engine(weights, tables(level, 1), kv=kv), text) for text in texts]
    for threads in (2, 3, 7):
        engine = Engine(weights, tables(threads=threads), kv=kv, max_batch=2)
        cuts = [380, 1, 1, 2, 15, 1, 16, 484]
        assert np.array_equal(feed(engine, texts[0], cuts), alone[0])
        feed(engine, texts[1][:-1], sequence=1)
        engine.truncate(0, 700)
        tokens, positions, sequences = np.array([[texts[0][700], texts[1][-1]], [700, 299], [0, 1]], np.int32)
        logits = engine.forward(tokens, positions, sequences, np.ones(2, bool))
        assert np.array_equal(logits, [alone[0][700], alone[1][-1]])


def test_a_text_longer_than_a_step_is_cut_inside(tables: Any) -> None:
    config = small_config(context=PREFILL + 100, layers=1)
    weights = random_weights(config, 4)
    ids = ids_of(config, PREFILL + 90)
    whole = feed(Engine(weights, tables()), ids)
    assert whole.shape == (PREFILL + 90, config.vocab)
    assert np.array_equal(feed(Engine(weights, tables()), ids, [300, 290 + 12]), whole)


def test_a_wide_model_runs_in_parts(tables: Any) -> None:
    """2 x 8200 outputs of gate and up: parts of 127 tokens."""
    config = small_config(hidden=64, ffn=8200, vocab=40)
    weights = random_weights(config, 4)
    ids = ids_of(config, 256)
    arguments = np.array(ids, np.int32), np.arange(256, dtype=np.int32), np.zeros(256, np.int32)
    one_by_one = feed(Engine(weights, tables()), ids, [1] * 256)
    rng = np.random.default_rng(0)
    for wanted in (np.ones(256, bool), np.arange(256) == 255, rng.random(256) < 0.1, np.arange(256) < 3):
        engine = Engine(weights, tables())
        assert np.array_equal(engine.forward(*arguments, wanted), one_by_one[wanted])


def test_sequences_in_a_batch_do_not_see_each_other(tables: Any) -> None:
    config = small_config()
    weights = random_weights(config, 5)
    texts = [ids_of(config, n, seed=n) for n in (30, 17, 44)]
    alone = [feed(Engine(weights, tables()), text) for text in texts]
    engine = Engine(weights, tables(), max_batch=3)
    rows: list[list[Any]] = [[], [], []]
    rng = np.random.default_rng(0)
    while any(engine.lengths[s] < len(text) for s, text in enumerate(texts)):
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for s in rng.permutation(3):
            at = engine.lengths[s]
            part = texts[s][at : at + int(rng.integers(0, 6))]
            tokens += part
            positions += range(at, at + len(part))
            sequences += [s] * len(part)
        if not tokens:
            continue
        wanted = np.ones(len(tokens), bool)
        token, position, sequence = np.array([tokens, positions, sequences], np.int32)
        logits = engine.forward(token, position, sequence, wanted)
        for row, s in zip(logits, sequences, strict=True):
            rows[s].append(row)
    for made, expected in zip(rows, alone, strict=True):
        assert np.array_equal(np.stack(made), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sequence_that_stands_in_two_places_sees_itself(tables: Any, threads: int) -> None:
    """Threads take sequences apart only where each stands in one place of a step."""
    config = small_config()
    weights = random_weights(config, 5)
    texts = [ids_of(config, n, seed=n) for n in (40, 33)]
    alone = [feed(Engine(weights, tables(threads=1)), text) for text in texts]
    for order in ([0, 1, 0, 1, 0], [0, 0, 1, 0], [0, 1], [1, 0, 0, 0]):
        engine = Engine(weights, tables(threads=threads), max_batch=2)
        for s, text in enumerate(texts):
            feed(engine, text[:30], sequence=s)
        position = [30 + order[:i].count(s) for i, s in enumerate(order)]
        token = [texts[s][at] for s, at in zip(order, position, strict=True)]
        tokens, positions, sequences = np.array([token, position, order], np.int32)
        logits = engine.forward(tokens, positions, sequences, np.ones(len(order), bool))
        expected = [alone[s][at] for s, at in zip(order, position, strict=True)]
        assert np.array_equal(logits, expected), order


def test_only_the_logits_that_are_wanted(tables: Any) -> None:
    config = small_config()
    weights = random_weights(config, 6)
    ids = ids_of(config, 40)
    whole = feed(Engine(weights, tables()), ids)
    wanted = np.random.default_rng(1).random(40) < 0.3
    engine = Engine(weights, tables())
    arguments = np.array(ids, np.int32), np.arange(40, dtype=np.int32), np.zeros(40, np.int32)
    assert np.array_equal(engine.forward(*arguments, wanted), whole[wanted])
    engine.truncate(0, 0)
    none = engine.forward(*arguments, np.zeros(40, bool))
    assert none.shape == (0, config.vocab)
    assert np.array_equal(feed(engine, [1, 2]), feed(full_engine(weights, tables(), ids), [1, 2]))


def full_engine(weights: Weights, table: KernelTable, ids: list[int]) -> Engine:
    engine = Engine(weights, table)
    feed(engine, ids)
    return engine


@pytest.mark.parametrize("kv", ["f16", "f32", "q8", "q4"])
def test_what_is_truncated_or_copied_is_as_if_computed(tables: Any, kv: Any) -> None:
    config = small_config()
    weights = random_weights(config, 7)
    first, other = ids_of(config, 50), ids_of(config, 20, seed=9)
    engine = Engine(weights, tables(), kv=kv, max_batch=2)
    feed(engine, first)
    engine.truncate(0, 33)
    assert engine.lengths == [33, 0]
    expected = feed(Engine(weights, tables(), kv=kv), first[:33] + other)[33:]
    feed(engine, ids_of(config, 10), sequence=1)
    engine.copy(0, 1)
    assert engine.lengths == [33, 33]
    assert np.array_equal(feed(engine, other, sequence=1), expected)
    assert np.array_equal(feed(engine, other), expected)


def test_memory_that_was_given_back_is_computed_anew(tables: Any) -> None:
    config = small_config(context=600)
    weights = random_weights(config, 7)
    whole = Engine(weights, tables()).sequence_bytes(600)
    engine = Engine(weights, tables(), capacity=Capacity(parallel=2, parked=3, bytes=whole + 1))
    assert (engine.max_batch, engine.memory.cache) == (5, whole + 1)
    text, other = ids_of(config, 400), ids_of(config, 30, seed=9)
    expected = feed(Engine(weights, tables()), text)
    for _ in range(2):
        assert np.array_equal(feed(engine, text, sequence=4), expected)
        feed(engine, other, sequence=3)
        engine.release(4, 0)
        assert engine.lengths == [0, 0, 0, 30, 0]
        engine.truncate(3, 0)
    assert np.array_equal(feed(engine, text, sequence=4), expected)
    engine.release(4, 200)
    engine.copy(4, 0, 150)
    assert engine.lengths == [150, 0, 0, 0, 200]
    assert np.array_equal(feed(engine, text[150:], sequence=0), expected[150:])
    assert np.array_equal(feed(engine, text[200:], sequence=4), expected[200:])
    with pytest.raises(UsageError, match="hold no text of 600 positions"):
        Engine(weights, tables(), capacity=Capacity(parallel=2, bytes=whole - 1))
    assert Engine(weights, tables(), capacity=Capacity(parallel=2)).memory.cache == 2 * whole


def test_rope_is_numpys_to_the_last_bit(tables: Any) -> None:
    config = small_config(head_dim=64, rope_theta=500000.0, context=3000)
    factors = np.linspace(1, 8, 32).astype(np.float32)
    scaled = inverse_frequencies(replace(config, rope_factors=tuple(factors.tolist())))
    frequencies = inverse_frequencies(config)
    assert np.allclose(frequencies, 500000.0 ** (-np.arange(32) / 32), rtol=2e-7)
    assert np.array_equal(scaled, frequencies / factors)
    ffi, lib, _ = tables().native
    table = np.empty((3000, 64), np.float32)
    pointer = ffi.from_buffer("float[]", table)
    assert lib.bitgen_rope(ffi.from_buffer("float[]", frequencies), 32, 0, 3000, pointer) == 0
    angle = (np.arange(3000, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    assert np.array_equal(table, expected)


# ---- Heads and embeddings ----


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", [t for t in DENSE_TYPES if t != "i8"])
def test_heads_and_embeddings_of_every_format(tables: Any, level: str, kind: str) -> None:
    hidden = 256 if DENSE[kind].block > 1 else 100
    config = small_config(hidden=hidden, vocab=75, layers=1)
    dense = random_dense(kind, 75, hidden)
    plain = replace(random_weights(config, 8), embedding=DenseMatrix.of(dense.rows(0, 75)))
    ids = ids_of(config, 39)
    expected = feed(Engine(plain, tables("scalar", 1)), ids)
    stored = replace(plain, embedding=dense)
    for cuts in ([39], [1, 2, 3, 4, 5, 24]):
        assert np.array_equal(feed(Engine(stored, tables(level)), ids, cuts), expected)


def test_an_embedding_no_step_reads_is_gathered_outside(tables: Any) -> None:
    config = small_config(hidden=256, vocab=75, layers=1, tied_head=False)
    dense = random_dense("q4_k", 75, 256)
    weights = random_weights(config, 8)
    ids = ids_of(config, 10)
    plain = feed(Engine(replace(weights, embedding=DenseMatrix.of(dense.rows(0, 75))), tables()), ids)
    assert np.array_equal(feed(Engine(replace(weights, embedding=dense), tables()), ids), plain)
    with pytest.raises(BitgenError, match="q4_k, which no LM head can be"):
        Engine(replace(weights, embedding=dense, lm_head=dense), tables())


@pytest.mark.parametrize("level", LEVELS)
def test_the_int8_head_is_what_it_says(tables: Any, level: str) -> None:
    config = small_config(vocab=133)
    weights = random_weights(config, 9)
    ids = ids_of(config, 21)
    engine = Engine(weights, tables(level), head="q8")
    w = weights.output.rows(0, 133)
    scale = np.float32(1) / (np.float32(127) / np.abs(w).max(axis=1))
    q = np.rint(w * (np.float32(127) / np.abs(w).max(axis=1))[:, None]).astype(np.float32)
    x = final_rows(weights, ids, tables(level))
    logits = feed(engine, ids)
    assert np.array_equal(logits, np.stack([dot(q, row) * scale for row in x]))
    error = np.sqrt(np.square(w - q * scale[:, None]).sum() / np.square(w).sum())
    assert engine.head_error == pytest.approx(error, rel=1e-4)
    exact = feed(Engine(weights, tables(level)), ids)
    assert 0 < np.abs(logits - exact).max() < 10 * error * np.abs(exact).max()


def final_rows(weights: Weights, ids: list[int], table: KernelTable) -> Any:
    """What the head reads: the logits of a head that is the identity."""
    config = replace(weights.config, vocab=weights.config.hidden, tied_head=False)
    identity = DenseMatrix.of(np.eye(config.hidden, dtype=np.float32))
    tokens = np.array(ids)
    # Tokens beyond the smaller vocabulary: their rows go in under other names.
    names, where = np.unique(tokens, return_inverse=True)
    table_of = np.zeros((config.hidden, config.hidden), np.float32)
    table_of[: len(names)] = weights.embedding.gather(names)
    changed = replace(weights, config=config, embedding=DenseMatrix.of(table_of), lm_head=identity)
    return feed(Engine(changed, table), where.tolist())


# ---- Errors ----


def test_what_is_wrong_is_said(tables: Any) -> None:
    config = small_config(context=32)
    weights = random_weights(config, 1)
    engine = Engine(weights, tables(), context=20, max_batch=2)
    one = np.array([1], np.int32)
    zero, wanted = np.array([0], np.int32), np.array([True])

    def refuses(message: str, *arguments: Any) -> None:
        with pytest.raises(BitgenError, match=message):
            engine.forward(*arguments)
        assert engine.lengths == [0, 0]

    refuses("token 97 is not in the vocabulary of 97", np.array([97], np.int32), zero, zero, wanted)
    refuses("token -1", np.array([-1], np.int32), zero, zero, wanted)
    refuses("position 1 of sequence 0 is not its next one, 0", one, one, zero, wanted)
    refuses("sequence 2 is not one of 2", one, zero, np.array([2], np.int32), wanted)
    refuses("as many", one, zero, zero, np.ones(2, bool))
    refuses("as many", one[:0], zero[:0], zero[:0], wanted[:0])
    many = np.zeros(21, np.int32)
    refuses("context of 20 positions is full", many, np.arange(21, dtype=np.int32), many, np.ones(21, bool))
    for arguments, message in (
        ({"context": 33}, "context must be 1 to 32 positions, not 33"),
        ({"context": 0}, "context must be"),
        ({"max_batch": 0}, "max_batch must be"),
        ({"kv": "f64"}, "kv must be f16, f32, q8 or q4"),
        ({"head": "q4"}, "head auto, full, screened or q8"),
    ):
        with pytest.raises(BitgenError, match=message):
            Engine(weights, tables(), **arguments)
    with pytest.raises(BitgenError, match="sequence 5"):
        engine.truncate(5, 0)
    with pytest.raises(BitgenError, match="length must be"):
        engine.truncate(0, 21)
    with pytest.raises(BitgenError, match="sequence -1"):
        engine.copy(0, -1)


def spoilt_rows(matrix: DenseMatrix, value: float) -> Any:
    """A head whose last logit is ``value`` or NaN."""
    rows = matrix.rows(0, matrix.shape[0]).astype(np.float32)
    rows[-1] = value
    return rows


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("where", ["norm", "embedding", "final", "sub-norm", "head NaN", "head inf"])
def test_what_is_not_finite_is_an_error_and_the_engine_lives_on(tables: Any, where: str, group: int) -> None:
    config = small_config(tied_head=False, group=group)
    weights = random_weights(config, 1)
    layer = weights.layers[1]
    huge = np.full(config.hidden, 3e38, np.float32)
    endless = np.full(config.ffn, np.inf, np.float32)
    spoilt = {
        "norm": replace(weights, layers=(weights.layers[0], replace(layer, ffn_norm=huge))),
        "final": replace(weights, final_norm=huge * np.float32(np.nan)),
        "sub-norm": replace(weights, layers=(weights.layers[0], replace(layer, ffn_sub_norm=endless))),
        "head NaN": replace(weights, lm_head=DenseMatrix.of(spoilt_rows(weights.output, np.nan))),
        "head inf": replace(weights, lm_head=DenseMatrix.of(spoilt_rows(weights.output, np.inf))),
        "embedding": replace(
            weights,
            embedding=DenseMatrix.of(
                np.where(np.arange(97)[:, None] == 5, np.float32(np.inf), weights.embedding.rows(0, 97))
            ),
        ),
    }[where]  # fmt: skip
    engine = Engine(spoilt, tables())
    for _ in range(2):
        with pytest.raises(BitgenError, match="NaN or infinity"):
            feed(engine, [1, 5, 2])
        assert engine.lengths == [0]
    if where == "embedding":
        assert np.array_equal(feed(engine, [1, 2]), feed(Engine(weights, tables()), [1, 2]))


def test_the_step_checks_its_model(tables: Any) -> None:
    """Each error of the C interface, from a model that is right but for one field."""
    weights = random_weights(small_config(), 1)
    ffi, lib, context = tables().native

    def code(change: Callable[[Any, Any], None]) -> int:
        engine = Engine(weights, tables())
        engine._fill_rope(10)
        arrays = [np.zeros(1, np.int32) for _ in range(3)]
        logits, row = np.empty(97, np.float32), ffi.new("struct bitgen_row *")
        row.want, row.out = lib.BITGEN_WANT_LOGITS, ffi.from_buffer("float[]", logits)
        call = ffi.new("struct bitgen_tokens *")
        call.size, call.row_size, call.n = ffi.sizeof(call[0]), ffi.sizeof(row[0]), 1
        call.token, call.position, call.sequence = (ffi.from_buffer("int32_t[]", a) for a in arrays)
        call.row = row
        change(engine._model, call)
        return int(lib.bitgen_step(context, engine._model, call, ffi.NULL))

    def field(name: str, value: Any) -> Callable[[Any, Any], None]:
        return lambda model, call: setattr(call if hasattr(call, name) else model, name, value)

    assert code(lambda model, call: None) == lib.BITGEN_OK
    for name in ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "context", "sequences"):
        for value in (0, -1, 1 << 40):
            assert code(field(name, value)) == lib.BITGEN_ERROR_MODEL, name
    for name, value in (
        ("head_dim", 25),
        ("kv_heads", 3),
        ("activation", 2),
        ("kv_type", 4),
        ("kv_type", -1),
    ):
        assert code(field(name, value)) == lib.BITGEN_ERROR_MODEL, name
    for name in ("final_norm", "rope", "cache", "layer", "token", "position", "sequence", "row"):
        assert code(field(name, ffi.NULL)) == lib.BITGEN_ERROR_NULL, name
    assert code(field("cache", ffi.cast("void *", 8))) == lib.BITGEN_ERROR_ALIGNMENT
    assert code(field("n", 0)) == lib.BITGEN_ERROR_SHAPE
    wrong = np.array([97], np.int32)
    for name in ("token", "position", "sequence"):
        too_large = np.array([{"token": 97, "position": 256, "sequence": 1}[name]], np.int32)
        for each in (too_large, -wrong):
            assert code(field(name, ffi.from_buffer("int32_t[]", each))) == lib.BITGEN_ERROR_TOKENS

    def head(name: str, value: Any) -> Callable[[Any, Any], None]:
        return lambda model, call: setattr(model.head, name, value)

    def layer(matrix: str, name: str, value: Any) -> Callable[[Any, Any], None]:
        return lambda model, call: setattr(getattr(model.layer[1], matrix), name, value)

    assert code(head("type", 8)) == lib.BITGEN_ERROR_MODEL
    assert code(head("type", DENSE_TYPES["q8_0"])) == lib.BITGEN_ERROR_MODEL  # 100 columns are no blocks
    assert code(head("type", DENSE_TYPES["i8"])) == lib.BITGEN_ERROR_NULL  # no scales
    assert code(head("row_bytes", 199)) == lib.BITGEN_ERROR_MODEL
    assert code(head("row_bytes", 1 << 40)) == lib.BITGEN_ERROR_MODEL
    assert code(head("data", ffi.NULL)) == lib.BITGEN_ERROR_NULL
    assert code(layer("down", "packed", ffi.NULL)) == lib.BITGEN_ERROR_NULL
    assert code(layer("o", "scale", ffi.NULL)) == lib.BITGEN_ERROR_NULL
    assert code(layer("o", "scale_count", 3)) == lib.BITGEN_ERROR_SCALE_COUNT
    engine = Engine(weights, tables())
    other = engine._model.layer[0].o.packed
    assert code(layer("down", "packed", other)) == lib.BITGEN_ERROR_SHAPE


def test_the_step_checks_groups_and_a_ternary_head(tables: Any) -> None:
    """Wrong groups are an error, and so are logits of a ternary head that are not finite."""
    config = CONFIGS["groups of 128, a ternary head"]
    weights = random_weights(config, 1)
    engine = Engine(weights, tables())
    expected = feed(engine, [1, 2])
    engine.truncate(0, 0)
    for matrix in (engine._model.layer[0].o, engine._model.lm_head):
        matrix.group = 64
        with pytest.raises(BitgenError):
            feed(engine, [1])
        matrix.group = 128
    assert np.array_equal(feed(engine, [1, 2]), expected)
    huge = replace(weights, final_norm=np.full(config.hidden, 3e38, np.float32))
    with pytest.raises(BitgenError, match="NaN or infinity"):
        feed(Engine(huge, tables()), [1])
    q8 = Engine(weights, tables(), head="q8")
    assert q8.memory.weights < engine.memory.weights + 97 * (256 + 4)
    assert np.abs(feed(q8, [1, 2]) - expected).max() < 0.05 * expected.std()


@pytest.mark.parametrize("kind", ["q2_0", "tq1_0", "f16"])
def test_files_with_groups_run(tables: Any, tmp_path: Path, kind: str, bitgen_home: Path) -> None:
    """The bits of the exact model, packed and then mapped; how the scales lie is found once."""
    path = write_model(tmp_path / "m.gguf", grouped_model(group=256 if kind == "tq1_0" else 128), kind)
    model = open_model(path)
    ids = ids_of(model.config, 9)
    expected = exact_logits(model.weights, ids)
    for _ in range(2):
        assert np.array_equal(
            feed(Engine(open_model(path).weights, tables(), fingerprint="abc"), ids), expected
        )
    assert len(cache_entries()) == 2
    screened = Engine(model.weights, tables(), head="screened")  # floats that are ternary are not screened
    assert np.array_equal(feed(screened, ids), expected)
    assert not screened.screens


@pytest.mark.parametrize("level", ["scalar", BEST])
def test_portable_kernels_are_told_of(tables: Any, level: str) -> None:
    """Where a library has none of the CPU's level for a model's groups, and has for others: they are slow."""

    def told(config: str) -> list[str]:
        said: list[Progress] = []
        weights = random_weights(CONFIGS[config])
        Engine(weights, tables(level), context=8, progress=said.append).close()
        return [one.text for one in said if one.lasting]

    assert told("silu, sub-norms, hidden 100") == []
    assert told("groups of 128, a ternary head") == []
    assert told("bits, their head too") == []
    for config, kind, group in (
        ("groups of 64, sub-norms", "ternary", 64),
        ("values of 4-bit codes in groups of 16", "t4", 16),
    ):
        slow = f"has no {level} ones for {kind} weights in groups of {group};"
        assert all(slow in text for text in told(config))
        assert len(told(config)) == (level != "scalar")


def test_a_layer_with_some_of_its_own_matrices_is_an_error(tables: Any) -> None:
    config = small_config(qk_norm=True, input_norms=True)
    engine = Engine(random_weights(config, 1), tables())
    assert engine.weights.config.layer_matmuls[1].role == "k"
    for role in ("k", "up"):
        matrix = getattr(engine._model.layer[1], role)
        packed, matrix.packed = matrix.packed, engine._ffi.NULL
        with pytest.raises(BitgenError, match="a pointer is NULL"):
            feed(engine, [1, 2])
        engine.truncate(0, 0)
        matrix.packed = packed
    assert np.isfinite(feed(engine, [1, 2])).all()


def test_a_busy_table_and_a_closed_engine_say_so(tables: Any) -> None:
    engine = Engine(random_weights(small_config(), 1), tables())
    engine.close()
    with pytest.raises(BitgenError):
        feed(engine, [1])


# ---- Memory and the cache of packed weights ----


def packed_layers(weights: Weights, table: KernelTable) -> tuple[PackedLayer, ...]:
    return pack_model(weights, table, find_groups(weights)).layers


def test_the_plan_is_what_is_allocated(tables: Any) -> None:
    config = small_config(vocab=300, context=500)
    weights = random_weights(config, 1)
    sizes = {}
    for kv in ("f16", "f32", "q8", "q4"):
        engine = Engine(weights, tables(), kv=kv, max_batch=3, context=400)
        c = config
        chunks = 4  # of 128 positions: 400, rounded up
        heads = 3 * c.layers * 2 * c.kv_heads
        values = heads * chunks * 128 * c.head_dim
        sizes[kv] = engine.memory.cache
        scales = heads * chunks * 128 * 4
        groups = heads * chunks * 128 * -(-c.head_dim // 32)
        four_bits = values // 4 + groups * 16 // 2 + groups * 2  # half of `heads` are those of keys
        expected = {"f16": 2 * values, "f32": 4 * values, "q8": values + scales, "q4": four_bits}[kv]
        assert expected <= sizes[kv] <= expected + heads * chunks * 1152 + 64
        packed_size = sum(m.data.size for layer in packed_layers(weights, tables()) for m in layer.values())
        scale_bytes = sum(m.shape.m * 4 for layer in weights.layers for m in layer.matrices)
        assert engine.memory.weights == packed_size + scale_bytes
        assert engine.memory_bytes == engine.memory.total > engine.memory.cache + engine.memory.weights
    q8 = Engine(weights, tables(), head="q8")
    exact = Engine(weights, tables())
    assert q8.memory.weights - exact.memory.weights == 300 * (100 + 12)  # rows, scales, bounds, norms


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import numpy as np
from bitgen.inference.engine import Engine
from bitgen.inference.synthetic import random_weights
from bitgen.runtime import load
from reference_model import small_config

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096

config = small_config(
    hidden=512, ffn=2048, layers=6, heads=8, kv_heads=8, head_dim=64, vocab=64, context=2048
)
weights = random_weights(config)
with load({library!r}, 2) as table:
    before = resident()
    engine = Engine(weights, table, context=2048, fingerprint=None)
    n = 2000
    one = np.zeros(n, np.int32)
    engine.forward(one, np.arange(n, dtype=np.int32), one, np.arange(n) == n - 1)
    print(resident() - before, engine.memory_bytes)
"""


def test_a_process_grows_by_what_was_planned(tables: Any) -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("there is no /proc to read the resident memory from")
    tests = str(Path(__file__).parents[1] / "support")
    library = str(tables().path)
    program = MEASURE.format(tests=tests, library=library)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, planned = map(int, done.stdout.split())
    assert grown < 1.1 * planned + (6 << 20), (grown, planned)  # Python's own objects, decoded slabs
    assert grown > 0.5 * planned, "the plan must not be padded"


def counted(weights: Weights) -> tuple[Weights, list[int]]:
    """The same weights, and a list that gets the rows of every read."""
    reads: list[int] = []

    def counting(matrix: TernaryMatrix) -> TernaryMatrix:
        def decode(begin: int, end: int) -> Any:
            reads.append(end - begin)
            return matrix.rows(begin, end)

        return TernaryMatrix(matrix.name, matrix.shape, decode, lambda: matrix.scale)

    layers = tuple(
        replace(
            each,
            qkv=counting(each.qkv),
            o=counting(each.o),
            gate_up=counting(each.gate_up),
            down=counting(each.down),
        )
        for each in weights.layers
    )
    return replace(weights, layers=layers), reads


def test_weights_are_packed_once_and_mapped_then(tables: Any, bitgen_home: Path) -> None:
    weights, reads = counted(random_weights(small_config(name="tiny"), 1))
    ids = ids_of(weights.config, 9)
    seen: list[Progress] = []
    expected = feed(Engine(weights, tables(), head="q8"), ids)
    assert reads
    assert not cache_entries()
    first = Engine(weights, tables(), head="q8", fingerprint="abc", progress=seen.append)
    total = sum(m.shape.m * m.shape.k for layer in weights.layers for m in layer.matrices)
    packed = sum(first.table.packed_bytes(m.shape) for layer in weights.layers for m in layer.matrices)
    done = [(each.done, each.total) for each in seen]
    assert (packed, packed) in done
    assert done[-1] == (9700.0, 9700.0)
    assert len(cache_entries()) == 2
    assert {entry.model for entry in cache_entries()} == {"tiny"}
    assert all(bitgen_home in entry.path.parents for entry in cache_entries())
    reads.clear()
    second = Engine(weights, tables(), head="q8", fingerprint="abc")
    assert not reads
    assert np.array_equal(feed(first, ids), expected)
    assert np.array_equal(feed(second, ids), expected)
    assert second.head_error == first.head_error > 0
    Engine(weights, tables(), fingerprint="abd")
    assert reads
    assert len(cache_entries()) == 3
    freed = clear_cache()
    assert freed > total / 4
    assert not cache_entries()
    assert np.array_equal(feed(second, [1]), feed(first, [1]))  # mapped files live on


def test_a_damaged_cache_is_made_again(tables: Any, bitgen_home: Path) -> None:
    weights = random_weights(small_config(layers=1), 1)
    ids = ids_of(weights.config, 5)
    expected = feed(Engine(weights, tables(), fingerprint="x"), ids)
    (entry,) = cache_entries()
    whole = entry.path.read_bytes()
    rng = np.random.default_rng(0)
    damages = [whole[:n] for n in (0, 1, 23, 24, 64, len(whole) // 2, len(whole) - 1)]
    for at in [0, 3, 8, 40, len(whole) - 1, len(whole) - 10, *rng.integers(len(whole) - 500, len(whole), 60)]:
        damages.append(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
    for damaged in damages:
        entry.path.write_bytes(damaged)
        made = feed(Engine(weights, tables(), fingerprint="x"), ids)
        assert made.shape == expected.shape
        if len(damaged) != len(whole):
            assert np.array_equal(made, expected)
            assert entry.path.read_bytes() == whole


def test_what_does_not_fit_into_memory_is_refused_before_any_work(
    tables: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(small_config(layers=1), 1)
    memory = Engine(weights, tables()).memory
    monkeypatch.setattr("bitgen.inference.engine.pack_model", None)  # whoever packs first fails otherwise
    monkeypatch.setattr("bitgen.inference.memory.available_memory", lambda: memory.total - 1)
    refused = r"^too little memory: .* \(packed weights 0, KV cache \d+, work \d+\), "
    for fingerprint in (None, "x"):  # a step reads mapped weights as it reads others
        with pytest.raises(BitgenError, match=refused):
            Engine(weights, tables(), fingerprint=fingerprint)
    monkeypatch.setattr("bitgen.inference.memory.available_memory", lambda: memory.cache + memory.work - 1)
    with pytest.raises(BitgenError, match=refused):
        Engine(weights, tables(), fingerprint="x", from_disk=True)


def test_the_cache_can_be_checked_whole(tables: Any, bitgen_home: Path) -> None:
    weights = random_weights(small_config(layers=1), 1)
    for fingerprint in ("x", "y"):
        Engine(weights, tables(), fingerprint=fingerprint)
    assert check_cache() == []
    first, second = cache_entries()
    data = bytearray(first.path.read_bytes())
    data[100] ^= 1  # weights, which a start does not look at
    first.path.write_bytes(data)
    assert check_cache() == [first]
    assert cache_entries() == [second]
    second.path.write_bytes(data[:-1])
    (cut,) = check_cache()
    assert (cut.path, cut.model) == (second.path, "")
    assert cache_entries() == []


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tables: Any, bitgen_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(small_config(layers=1), 1)
    ids = ids_of(weights.config, 5)
    expected = feed(Engine(weights, tables()), ids)
    blocked = bitgen_home.parent / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("BITGEN_HOME", str(blocked))
    assert np.array_equal(feed(Engine(weights, tables(), fingerprint="x"), ids), expected)
    monkeypatch.setenv("BITGEN_HOME", str(bitgen_home))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # as a disk that is full
    try:
        assert np.array_equal(feed(Engine(weights, tables(), fingerprint="x"), ids), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((bitgen_home / "cache" / "packed").iterdir())


def test_errors_of_the_model_file_pass_through_the_cache(tables: Any, bitgen_home: Path) -> None:
    weights = random_weights(small_config(layers=1), 1)

    def broken(begin: int, end: int) -> Any:
        raise BitgenError("the file is damaged here")

    o = weights.layers[0].o
    bad = replace(weights.layers[0], o=TernaryMatrix("o", o.shape, broken, lambda: o.scale))
    with pytest.raises(BitgenError, match="damaged here"):
        Engine(replace(weights, layers=(bad,)), tables(), fingerprint="x")
    assert not list((bitgen_home / "cache" / "packed").iterdir())


def test_matrices_go_in_slabs(tables: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of 256 rows: packed weights are those of the whole matrix."""
    config = small_config(ffn=700, layers=1)
    weights = random_weights(config, 1)
    whole = packed_layers(weights, tables())
    monkeypatch.setattr(packed, "_SLAB", 1)
    counting, reads = counted(weights)
    pieces = packed_layers(counting, tables())
    assert max(reads) == 256
    for a, b in zip(whole, pieces, strict=True):
        assert a.keys() == b.keys() == {"qkv", "o", "gate_up", "down"}
        assert all(np.array_equal(a[name].data, b[name].data) for name in a)


def test_pages_of_a_model_file_are_let_go(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("there is no /proc to read the resident memory from")
    file = tmp_path / "model"
    file.write_bytes(bytes(range(256)) * (1 << 14))

    def resident() -> int:
        text = Path("/proc/self/smaps").read_text().partition(str(file))[2]
        return int(text.partition("Rss:")[2].split()[0])

    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapped, np.uint8)[5:].reshape(-1, 1)
    assert data.sum() > 0
    assert resident() >= 4096
    packed.release_pages(data)
    assert resident() == 0
    assert data[0, 0] == 5
    packed.release_pages(np.zeros(3, np.uint8))  # nothing to let go


def test_times_are_told_a_stage(tables: Any) -> None:
    engine = Engine(random_weights(small_config(), 1), tables())
    feed(engine, [1, 2, 3])
    times = engine.times_ns
    assert tuple(times) == STAGES
    assert all(ns > 0 for ns in times.values())
    engine.reset_times()
    assert not any(engine.times_ns.values())
