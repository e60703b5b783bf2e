"""Drafts of a small model on fake engines: the same text, and drafts only where they pay."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest
from serving import FakeEngine, fake_llm

from bitgen.inference.draft_model import DraftModel
from bitgen.inference.sampling import Sampling
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Request


class Small(FakeEngine):
    """Of ``wrong`` of the rows the logits are others; a pass takes ``pass_s``."""

    def __init__(self, wrong: float = 0.0, pass_s: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self.wrong, self.pass_s = wrong, pass_s

    def forward(self, tokens: Any, positions: Any, sequences: Any, outputs: Any) -> Any:
        self.clock.now += self.pass_s
        answers = super().forward(tokens, positions, sequences, outputs)
        seed = zlib.crc32(np.array(self.cache[sequences[-1]], "<i4").tobytes())
        if self.wrong > np.random.default_rng(seed).random() and not isinstance(outputs, np.ndarray):
            for answer in answers:
                if answer is not None:
                    answer.ids[:] = answer.ids[::-1].copy()
        return answers


def house(small: Small | None, pass_s: float = 0.0, batch: int = 4) -> Scheduler:
    engine = Small(pass_s=pass_s, batch=batch, context=512)
    scheduler = fake_llm(engine, None).scheduler
    if small is not None:
        small.clock = engine.clock
        scheduler.drafts = DraftModel(Scheduler(small, clock=engine.clock))
    return scheduler


def request(i: int = 0, tokens: int = 60) -> Request:
    prompt = tuple(259 + (i + j) % 29 for j in range(5 + 9 * i))
    return Request(prompt, tokens, Sampling(temperature=(0, 0.8)[i % 2], seed=i), ignore_end=True)


def texts(scheduler: Scheduler, requests: list[Request]) -> list[str]:
    return scheduler.texts(requests)


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("context", [512, 40])
def test_a_text_is_the_same_with_any_drafts(wrong: float, context: int) -> None:
    requests = [request(i) for i in range(6)]
    scheduler = house(Small(wrong, 0.01, batch=4, context=context), pass_s=1.0)
    assert texts(scheduler, requests) == texts(house(None), requests)
    timings = scheduler.timings
    assert timings.drafted > 10
    share = timings.accepted / timings.drafted
    assert share == 1 if not wrong else share < 0.9


def test_drafts_go_on_where_they_pay_and_end_where_they_do_not() -> None:
    for pass_s, wrong, pays in ((0.01, 0.1, True), (0.01, 1.0, False), (1.5, 0.0, False)):
        scheduler = house(Small(wrong, pass_s, batch=1, context=512), pass_s=1.0, batch=1)
        texts(scheduler, [request(1, tokens=200)])  # until all lengths were tried
        before, started = scheduler.timings.drafted, scheduler.clock()
        texts(scheduler, [request(1, tokens=200)])
        pace = (scheduler.clock() - started) / 200
        assert (scheduler.timings.drafted - before > 60) == pays
        assert pace < 0.45 if pays else pace < 1.15


def test_a_long_prompt_is_read_in_parts_while_the_text_goes_on() -> None:
    small = Small(batch=1, context=512, token_s=0.02)  # 64 tokens are a part
    scheduler = house(small, pass_s=5.0, batch=1)
    long = Request(tuple(259 + j % 29 for j in range(400)), 40, Sampling(seed=1), ignore_end=True)
    assert texts(scheduler, [long]) == texts(house(None, batch=1), [long])
    assert max(count for _, count in small.passes) <= 128
    assert scheduler.timings.accepted > 5
