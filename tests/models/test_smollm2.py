"""An ordinary llama with weights of 4 bits, SmolLM2-135M-Instruct: it answers, and its bits are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import libraries
import numpy as np
import pytest
from smollm2 import smollm2

from bitgen.formats.inspect import type_uses
from bitgen.formats.open import open_model
from bitgen.inference.engine import Engine
from bitgen.llm import LLM

pytestmark = pytest.mark.slow

QUESTION = [{"role": "user", "content": "Write one sentence about the moon."}]
ANSWER = (
    "The moon is a celestial body that orbits Earth, and it is a crucial astronomical object that supports "
    "our understanding of the universe and our place within it."
)
PROMPT = "Once upon a time there was"
TEXT = (
    " a small town nestled between two great mountains. The town was nestled between two great mountains, "
    "and the town was called Willow Creek.\n\nThe town was named"
)


@pytest.fixture(scope="module")
def model() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def llm(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """On the library that is built for it by itself."""
    home = libraries.share_cache(tmp_path_factory.mktemp("smollm2"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITGEN_HOME", str(home))
        with LLM(model, threads=2, context=512) as opened:
            yield opened


def test_what_the_file_holds(model: Path) -> None:
    opened = open_model(model)
    config = opened.config
    assert (config.architecture, config.weights, config.group) == ("llama", "q4m", 32)
    assert {use.type: use.tensors for use in type_uses(opened)} == {"q4_1": 210, "q8_0": 1, "f32": 61}


def test_it_runs_on_kernels_for_its_weights(llm: LLM) -> None:
    assert llm.table is not None
    used = {kernel.family for kernel in llm.table.kernels}
    assert "q4m" in used
    assert llm.table.path.parent.name.startswith("untuned-q4m-g32-")


def test_it_answers_in_a_chat(llm: LLM) -> None:
    assert "".join(llm.chat(QUESTION, max_tokens=40, temperature=0)) == ANSWER


def test_greedy_text(llm: LLM) -> None:
    """The same on every CPU, because the bits of logits are."""
    assert "".join(llm.generate(PROMPT, max_tokens=32, temperature=0)) == TEXT


def test_vectors_of_texts(llm: LLM) -> None:
    """Of length 1, the same bits in a batch and alone, and texts about the same thing are nearer."""
    texts = [
        "A cat sleeps on the sofa.",
        "A kitten naps on the couch.",
        "Interest rates rose by half a percent.",
    ]
    vectors = np.stack(list(llm.embed(texts, "mean")))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(next(llm.embed(texts[1:2], "mean")), vectors[1])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.02


def test_a_text_at_once_and_token_by_token(llm: LLM) -> None:
    engine = llm.engine
    assert isinstance(engine, Engine)
    ids = llm.tokenizer.encode("It was the best of times, it was the worst of times, it was the age")
    whole = llm.logits(ids)
    parts = []
    engine.truncate(0, 0)
    for at, token in enumerate(ids):
        one, where = np.array([token], np.int32), np.array([at], np.int32)
        parts.append(engine.forward(one, where, np.zeros(1, np.int32), np.ones(1, bool)))
    np.testing.assert_array_equal(np.concatenate(parts), whole)
