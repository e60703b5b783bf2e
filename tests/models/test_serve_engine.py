"""The worker over the real engine on the tiny model, with little memory: texts as they are alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import built_library
from reference_model import small_config
from serving import VOCAB, running
from text_models import piece_data

from bitgen.inference.kv_memory import Capacity
from bitgen.inference.opening import open_engine
from bitgen.inference.sampling import Sampling
from bitgen.inference.sequence import Request
from bitgen.inference.synthetic import random_weights
from bitgen.llm import LLM
from bitgen.runtime import load
from bitgen.serve.worker import Job, Update, Worker

pytestmark = pytest.mark.slow

CONTEXT = 200
STARTS = ("In the beginning", "And Moses said unto the people, ", "In the beginning God created the heaven")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITGEN_HOME", str(tmp_path_factory.mktemp("home")))
        yield built_library(tmp_path_factory)


@pytest.fixture(scope="module")
def alone(library: Path) -> Iterator[LLM]:
    with LLM("tiny", library=library, threads=1, context=CONTEXT) as llm:
        yield llm


@pytest.fixture(scope="module")
def crowded(library: Path, alone: LLM) -> Iterator[LLM]:
    """Three texts at once, three more parked, and memory for one and a half whole ones."""
    whole = alone.engine.sequence_bytes(CONTEXT)
    capacity = Capacity(parallel=3, parked=3, bytes=whole * 3 // 2)
    with LLM("tiny", library=library, threads=1, context=CONTEXT, capacity=capacity) as llm:
        llm.limit_stall(0.002)
        yield llm


asked = st.tuples(
    st.sampled_from(STARTS),
    st.integers(0, 2),  # times that the start is said again
    st.integers(0, 2),  # the seed
    st.sampled_from([1, 6, 20, None]),
    st.booleans(),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), asked),
        st.tuples(st.just("turn"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
    ),
    max_size=14,
)


@settings(max_examples=40)
@given(actions=actions, mixed=st.booleans())
def test_a_text_of_the_tiny_model_does_not_depend_on_the_load(
    actions: list[Any], mixed: bool, alone: LLM, crowded: LLM
) -> None:
    check_load(actions, mixed, alone, crowded)


@pytest.mark.deep
@settings(max_examples=500)
@given(actions=actions, mixed=st.booleans())
def test_a_text_of_the_tiny_model_does_not_depend_on_any_of_many_loads(
    actions: list[Any], mixed: bool, alone: LLM, crowded: LLM
) -> None:
    check_load(actions, mixed, alone, crowded)


def check_load(actions: list[Any], mixed: bool, alone: LLM, crowded: LLM) -> None:
    texts: dict[Job, str] = {}
    ends: dict[Job, str] = {}

    def deliver(update: Update) -> None:
        texts[update.job] += update.text
        if update.finish is not None:
            ends[update.job] = update.finish

    crowded.scheduler.mixed = mixed
    worker = Worker(crowded.scheduler, lambda call: call())
    for what, value in actions:
        if what == "submit":
            start, again, seed, tokens, lookup = value
            sampling = Sampling(temperature=1.0, seed=seed)
            prompt = tuple(alone.tokenizer.encode(start + start * again))
            job = Job(Request(prompt, tokens, sampling, lookup=lookup), deliver)
            texts[job] = ""
            worker.submit(job)
        elif what == "turn":
            for _ in range(value):
                worker.turn()
        elif texts:
            worker.cancel(list(texts)[value % len(texts)])
    while not worker.idle:
        worker.turn()
        assert crowded.scheduler.kv_bytes <= crowded.memory[1]
    assert set(ends) == set(texts)
    for job, text in texts.items():
        (expected,) = alone.scheduler.texts([job.request])
        assert expected.startswith(text) if ends[job] == "cancelled" else text == expected


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_embed(pooling: Any, alone: LLM, crowded: LLM) -> None:
    texts = [start * 2 for start in STARTS]
    prompts = [tuple(alone.tokenizer.encode(text)) for text in texts]
    asked = [crowded.scheduler.submit(Request(prompt, 0, pooling=pooling)) for prompt in prompts]
    while not all(sequence.finish for sequence in asked):
        crowded.scheduler.step()
    for sequence, vector in zip(asked, alone.embed(texts, pooling), strict=True):
        assert sequence.vector is not None
        assert sequence.vector.tolist() == vector.tolist()


def test_a_pinned_system_prompt_is_not_computed_again(library: Path) -> None:
    capacity = Capacity(parallel=1, pinned=1)
    with LLM("tiny", library=library, threads=1, context=CONTEXT, capacity=capacity) as llm:
        tokens = llm.pin("Thou shalt answer in few words, and none of them shall be vain.")
        assert tokens > 16
        talk = [
            {"role": "system", "content": "Thou shalt answer in few words, and none of them shall be vain."},
            {"role": "user", "content": "Who was Moses?"},
        ]
        sequence = llm.scheduler.submit(llm.request(llm.chat_prompt(talk), max_tokens=4, seed=1))
        while sequence.finish is None:
            llm.scheduler.step()
        assert sequence.computed == len(sequence.request.prompt) - tokens


@pytest.mark.deep
def test_health_answers_within_50_ms_while_4000_tokens_are_computed(library: Path) -> None:
    config = small_config(
        hidden=512, ffn=1024, layers=8, heads=8, kv_heads=4, head_dim=64, vocab=VOCAB, context=4200
    )
    capacity = Capacity(parallel=2)

    async def ask(llm: LLM) -> tuple[int, float]:
        async with running(llm=llm) as client:
            body = {"prompt": [260 + i % 30 for i in range(4000)], "max_tokens": 1}
            task = asyncio.create_task(client.post("/v1/completions", body))
            asked, longest = 0, 0.0
            while not task.done():
                started = time.perf_counter()
                assert (await client.get("/health")).status == 200
                longest = max(longest, time.perf_counter() - started)
                asked += 1
                await asyncio.sleep(0.002)
            assert (await task).status == 200
            return asked, longest

    with load(library, 1) as table:
        engine = open_engine(random_weights(config), table, context=4200, capacity=capacity)
        llm = LLM.over(engine, config, piece_data())
        llm.limit_stall(0.25)
        asked, longest = asyncio.run(ask(llm))
        engine.close()
    assert asked > 50
    assert longest < 0.05
