"""Requests in, events out: who runs, who waits, who leaves."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_model import ReferenceEngine, logits_of
from text_models import piece_data, small_llm, weights

import bitgen
from bitgen.errors import BitgenError, UsageError
from bitgen.inference.passes import Row
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Request, Sequence
from bitgen.tokenizer.tokenizer import Tokenizer

PACKAGE = Path(bitgen.__file__).parent
PROMPTS = ("the end and the other", "a", "on a hand", "an end")
OPTIONS: dict[str, Any] = {"max_tokens": 6, "temperature": 2.0, "seed": 5}


def scheduler_with(batch: int) -> Scheduler:
    return Scheduler(ReferenceEngine(weights(), max_batch=batch), Tokenizer(piece_data()))


def requests() -> list[Request]:
    return [small_llm().request(prompt, **OPTIONS) for prompt in PROMPTS]


def expected() -> list[str]:
    return ["".join(small_llm().generate(prompt, **OPTIONS)) for prompt in PROMPTS]


def finished(scheduler: Scheduler, sequences: list[Sequence]) -> list[str]:
    """Step until all have ended; the text of each, put together from events."""
    texts = {id(sequence): "" for sequence in sequences}
    while any(sequence.finish is None for sequence in sequences):
        events = scheduler.step()
        assert events, "a step with work to do did nothing"
        for event in events:
            texts[id(event.sequence)] += event.text
    return [texts[id(sequence)] for sequence in sequences]


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_request_may_come_at_any_time(batch: int) -> None:
    scheduler, waiting = scheduler_with(batch), requests()
    sequences = [scheduler.submit(waiting.pop(0))]
    texts = {id(sequences[0]): ""}
    while waiting or any(sequence.finish is None for sequence in sequences):
        for event in scheduler.step():
            texts[id(event.sequence)] += event.text
        if waiting:
            sequences.append(scheduler.submit(waiting.pop(0)))
            texts[id(sequences[-1])] = ""
    assert [texts[id(sequence)] for sequence in sequences] == expected()
    assert [sequence.text for sequence in sequences] == expected()
    assert scheduler.step() == []


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_cancelled_sequence_makes_room_and_may_come_back(steps: int) -> None:
    scheduler = scheduler_with(2)
    sequences = [scheduler.submit(request) for request in requests()]
    for _ in range(steps):
        scheduler.step()
    gone = sequences[0]
    scheduler.cancel(gone)
    scheduler.cancel(gone)  # it is not in: nothing happens
    others = finished(scheduler, sequences[1:])
    assert (gone.finish, others[-1]) == (None, expected()[-1])
    assert [sequence.text for sequence in sequences[1:]] == expected()[1:]
    scheduler.resume(gone)
    while gone.finish is None:
        scheduler.step()
    assert gone.text == expected()[0]


def test_what_cannot_run_is_refused_when_it_is_submitted() -> None:
    scheduler = scheduler_with(1)
    with pytest.raises(UsageError, match="the prompt is empty"):
        scheduler.submit(Request(()))
    with pytest.raises(UsageError, match="the prompt has 300 tokens and the context holds 256"):
        scheduler.submit(Request((5,) * 300))
    with pytest.raises(BitgenError, match="has no tokenizer"):
        Scheduler(ReferenceEngine(weights())).submit(Request((5,)))
    assert scheduler.step() == []


def test_plain_tokens_need_no_tokenizer() -> None:
    scheduler = Scheduler(ReferenceEngine(weights(), max_batch=2))
    logits = scheduler.forward([Row(1, [5, 6, 7]), Row(0, [8], [False])])
    assert np.array_equal(logits, logits_of(weights(), [5, 6, 7]))
    scheduler.clear()
    assert np.array_equal(scheduler.forward([Row(1, [5])]), logits_of(weights(), [5]))


def test_what_another_scheduler_left_is_forgotten() -> None:
    engine = ReferenceEngine(weights(), max_batch=2)
    for tokens in ([5, 6, 7], [8, 9]):
        assert np.array_equal(Scheduler(engine).forward([Row(0, tokens)]), logits_of(weights(), tokens))


def test_nobody_else_calls_the_engine() -> None:
    """The engine runs in passes.py, its cache is changed in slots.py too, and nowhere else."""
    callers, calls = set(), ("forward", "truncate", "release", "copy", "restore")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and function.attr in calls:
                owner = ast.unparse(function.value)
                if owner.rpartition(".")[2] == "engine":
                    callers.add((path.name, function.attr))
    assert callers == {
        ("passes.py", "forward"),
        ("passes.py", "truncate"),
        *(("slots.py", name) for name in calls if name != "forward"),
    }
