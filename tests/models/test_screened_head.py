"""A screened head gives the bits of the whole head: the best tokens, their logits, those of named tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_model import small_config

from bitgen.cpu import Isa, accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError
from bitgen.formats.open import open_model
from bitgen.formats.weights import DenseMatrix, Weights
from bitgen.inference import engine, memory, weight_cache
from bitgen.inference.engine import Engine, Head
from bitgen.inference.synthetic import random_weights
from bitgen.inference.wants import Best, Hidden, Logits, Nothing, Want, pack_mask
from bitgen.llm import LLM
from bitgen.paths import models_dir
from bitgen.runtime import KernelTable, load

LEVELS = accepted_isas(detect_cpu(), load_isas())
LEVEL = LEVELS[0].name
VOCAB, HIDDEN, N = 3001, 96, 8
RNG = np.random.default_rng(5)
PLAIN = RNG.standard_normal((VOCAB, HIDDEN)).astype(np.float16)


def last_bits() -> Any:
    """Copies of one row whose weights differ in the last bits of a half: int8 rows cannot tell them apart."""
    bits = np.tile(PLAIN[0].view(np.uint16), (VOCAB, 1))
    return (bits ^ RNG.integers(0, 4, bits.shape).astype(np.uint16)).view(np.float16)


def outliers() -> Any:
    """One weight of each row so large that its scale leaves a few values for the others."""
    rows = PLAIN.copy()
    rows[np.arange(VOCAB), RNG.integers(0, HIDDEN, VOCAB)] = 60000
    return rows


HEADS: dict[str, Any] = {
    "random": PLAIN,
    "rows that int8 cannot tell apart": last_bits(),
    "outliers": outliers(),
    "equal rows": np.tile(PLAIN[:7], (VOCAB // 7 + 1, 1))[:VOCAB],
    "zero rows": PLAIN * (np.arange(VOCAB) % 3 == 0)[:, None].astype(np.float16),
    "all zero": np.zeros_like(PLAIN),
    "subnormal": (PLAIN * 2.0**-24).astype(np.float16),
    "f32": PLAIN.astype(np.float32) * np.float32(1 / 3),
}
MASK = pack_mask(np.arange(VOCAB) % 3 == 1)
WANTS: dict[str, list[Want]] = {
    "greedy": [Best(1)] * N,
    "top 40": [Best(40)] * N,
    "as many as screens serve": [Best(VOCAB // 16)] * N,
    "too many for a screen": [Best(VOCAB // 16 + 1), Best(VOCAB)] * (N // 2),
    "named": [Best(0, named=(3, 2999, 3)), Best(5, named=(7,))] * (N // 2),
    "allowed": [Best(40, allowed=MASK), Best(3, allowed=pack_mask(np.arange(VOCAB) == 4))] * (N // 2),
    "bias": [
        Best(9, bias={4: 100.0, 7: -100.0, 3000: 50.5}, named=(4, 8)),
        Best(20, bias=dict.fromkeys(range(100), 1e30)),
        Best(20, bias={5: 1e-30, 6: 0.001}, allowed=MASK, named=(5,)),
        Best(2, bias=dict.fromkeys(range(1, 90), -1e5)),
    ]
    * (N // 4),
    "all kinds": [Best(3), Logits(), Best(3), Nothing(), Hidden(), Best(VOCAB), Best(2), Best(1)],
}


@pytest.fixture(scope="module")
def table(level_library: Callable[[str], Path]) -> Iterator[KernelTable]:
    with load(level_library(LEVEL), 2) as table:
        yield table


def weights_of(head: Any) -> Weights:
    config = small_config(tied_head=False, vocab=VOCAB, hidden=HIDDEN, layers=1)
    return replace(random_weights(config, 3), lm_head=DenseMatrix.of(head))


def answers_of(engine: Engine, wants: Any) -> list[Any]:
    ids = np.random.default_rng(1).integers(0, VOCAB, N).astype(np.int32)
    answers: list[Any] = engine.forward(ids, np.arange(N, dtype=np.int32), np.zeros(N, np.int32), wants)
    return answers


def bits(answer: Any) -> Any:
    if answer is None or isinstance(answer, np.ndarray):
        return None if answer is None else answer.tobytes()
    return [part.tobytes() for part in (answer.ids, answer.logits, answer.named)]


@pytest.mark.parametrize("wants", WANTS)
@pytest.mark.parametrize("head", HEADS)
def test_the_bits_are_those_of_the_whole_head(head: str, wants: str, table: KernelTable) -> None:
    weights = weights_of(HEADS[head])
    screened = Engine(weights, table, head="screened")
    assert screened.screens
    whole = answers_of(Engine(weights, table), WANTS[wants])
    assert list(map(bits, answers_of(screened, WANTS[wants]))) == list(map(bits, whole))


@pytest.mark.parametrize("outlier", [30, 30000])
@pytest.mark.parametrize("weight", [0, 3])
@pytest.mark.parametrize("in_planes", [True, False])
@pytest.mark.parametrize("wants", ["top 40", "named", "all kinds"])
def test_states_that_planes_hold_badly(
    wants: str, in_planes: bool, weight: int, outlier: int, level_library: Callable[[str], Path]
) -> None:
    """One number of the state is so large that its chunk of columns needs two planes, the other one.

    The head, which int8 holds exactly, ignores it or not; 30,000 leaves about three values of int16 for the
    others of its chunk. On the best level whose screen takes planes, and the best whose screen takes floats.
    """

    def suits(isa: Isa) -> bool:
        return isa.native_dot4 == in_planes and not isa.generic

    level = next((isa.name for isa in LEVELS if suits(isa)), None)
    if level is None:
        pytest.skip(f"this CPU has no level with{'' if in_planes else 'out'} an instruction for dot products")
    head = RNG.integers(-126, 127, PLAIN.shape).astype(np.float16)
    head[:, 0], head[:, 1] = weight * (np.arange(VOCAB) % 2), 127
    weights = weights_of(head)
    final_norm = np.ones(HIDDEN, np.float32)
    final_norm[0] = outlier
    weights = replace(weights, final_norm=final_norm)
    with load(level_library(level), 2) as table:
        whole = answers_of(Engine(weights, table), WANTS[wants])
        screened = answers_of(Engine(weights, table, head="screened"), WANTS[wants])
    assert list(map(bits, screened)) == list(map(bits, whole))


def test_rows_that_cannot_be_the_best_are_not_read(table: KernelTable) -> None:
    weights = weights_of(PLAIN)
    expected = answers_of(Engine(weights, table), [Best(1)] * N)
    logits = answers_of(Engine(weights, table), [Logits()] * N)
    screened = Engine(weights, table, head="screened")
    far = np.max(logits, axis=0) < min(float(each.max()) for each in logits) * 0.5
    assert far.sum() > VOCAB // 2
    weights.output.data[far] = 0xFF  # NaN: whoever reads a row of these gets an error
    assert list(map(bits, answers_of(screened, [Best(1)] * N))) == list(map(bits, expected))
    screened.truncate(0, 0)
    with pytest.raises(BitgenError, match="NaN or infinity"):
        answers_of(screened, [Logits()] * N)


def test_the_bound_is_one(table: KernelTable) -> None:
    """Of every head: the logits of the head and of its int8 rows are no further apart than it says."""
    for head in HEADS.values():
        weights = weights_of(head)
        whole, near = (
            np.array(answers_of(Engine(weights, table, head=kind), [Logits()] * N), np.float64)
            for kind in ("full", "q8")
        )
        states = np.array(answers_of(Engine(weights, table), [Hidden()] * N), np.float64)
        small = weight_cache.quantize_lm_head(weights.output, table)
        most = np.linalg.norm(states, axis=1)[:, None] * small.bound + 1e-30
        assert (np.abs(whole - near) <= most).all()
        rows = small.data * small.scale[:, None].astype(np.float64)
        assert (np.linalg.norm(rows, axis=1) <= small.norm).all()


def test_without_a_bound_it_is_wrong(table: KernelTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "_at_least", lambda values: np.zeros(len(values), np.float32))
    weights = weights_of(HEADS["rows that int8 cannot tell apart"])
    wants = WANTS["top 40"]
    whole = answers_of(Engine(weights, table), wants)
    assert list(map(bits, answers_of(Engine(weights, table, head="screened"), wants))) != list(
        map(bits, whole)
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "defaults": {},
    "hot": {"temperature": 2.0, "top_p": 1.0, "min_p": 0.0},
    "cold": {"temperature": 0.2, "top_k": 5},
    "top-p": {"top_k": 100, "top_p": 0.5, "min_p": 0.0},
    "min-p": {"top_k": 100, "top_p": 1.0, "min_p": 0.2},
    "all candidates": {"top_k": 0, "top_p": 0.9},
    "repeat penalty": {"repeat_penalty": 1.3, "repeat_last_n": -1},
    "frequency and presence": {"frequency_penalty": 0.7, "presence_penalty": 0.7},
    "bias": {"logit_bias": {7: 4.0, 11: -100.0, 2000: 1.5}},
}
FILES = ("tiny", "random")


@pytest.mark.parametrize("tokens", [20, pytest.param(1000, marks=pytest.mark.deep)])
@pytest.mark.parametrize("file", FILES)
def test_texts_are_the_same_at_every_setting(
    file: str, tokens: int, level_library: Callable[[str], Path], table: KernelTable
) -> None:
    """Of a trained model and one whose tokens are nearly equally likely: ``tokens`` at each setting."""
    heads: tuple[Head, ...] = ("full", "screened")
    texts = []
    for head in heads:
        if file == "random":
            llm = random_llm(table, head)
        else:
            llm = LLM(models_dir() / f"{file}.gguf", library=level_library(LEVEL), threads=2, head=head)
        assert isinstance(llm.engine, Engine)
        assert llm.engine.screens == (head == "screened")
        texts.append([tokens_of(llm, options, tokens) for options in SETTINGS.values()])
        llm.close()
    assert texts[0] == texts[1]
    assert sum(map(len, texts[0])) == tokens * len(SETTINGS)


def random_llm(table: KernelTable, head: Head) -> LLM:
    """Random weights, and the tokenizer of the tiny model."""
    tiny = open_model(models_dir() / "tiny.gguf")
    config = small_config(tied_head=False, vocab=tiny.config.vocab, hidden=HIDDEN, layers=1, context=512)
    return LLM.over(Engine(random_weights(config, 3), table, head=head), config, tiny.tokenizer_data)


def tokens_of(llm: LLM, options: Mapping[str, Any], count: int) -> list[int]:
    """``count`` tokens, in texts of at most 200 that begin and are drawn differently."""
    found: list[int] = []
    while len(found) < count:
        most = min(200, count - len(found))
        prompt = [1 + len(found) % 97, 300, 40]
        seed = {"seed": len(found), **options}
        generation = llm.generate(prompt, max_tokens=most, ignore_end=True, **seed)
        for _ in generation:
            pass
        found += generation.tokens
    return found


def test_a_head_of_few_bits_is_read_whole(table: KernelTable) -> None:
    weights = weights_of(PLAIN)
    small = replace(
        weights, lm_head=replace(weights.output, type="q8_0", data=np.zeros((VOCAB, 102), np.uint8))
    )
    assert not Engine(small, table, head="screened").screens
    assert not Engine(weights, table, head="exact").screens, "another word for full"
    with pytest.raises(BitgenError, match="head auto, full, screened or q8"):
        Engine(weights, table, head="best")  # type: ignore[arg-type]


def test_a_large_head_is_screened_where_memory_allows(
    table: KernelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(PLAIN)
    assert not Engine(weights, table, head="auto").screens, "it stays in the caches"
    monkeypatch.setattr(engine, "_SCREENED_BYTES", weights.output.data.nbytes)
    assert Engine(weights, table, head="auto").screens
    whole = Engine(weights, table, head="full").memory.total
    monkeypatch.setattr(memory, "available_memory", lambda: whole)
    assert not Engine(weights, table, head="auto").screens, "memory is there for one of them"
    with pytest.raises(BitgenError, match="too little memory"):
        Engine(weights, table, head="screened")
