"""How many tokens are drafted, on a clock of its own: where drafts pay as many as pay the most, else none."""

from __future__ import annotations

import random

import pytest

from bitgen.inference.draft_length import LENGTHS, SHARE, START, TRIAL_EVERY, Checked, DraftLength

ROW_S = 0.06  # what one more row costs a step, which takes 1 s
PROBABILITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def step_s(rows: int) -> float:
    return 1 + ROW_S * (rows - 1)


def gain(p: float, length: int, token_s: float, running: int = 1) -> float:
    """Of drafts that are right with the probability ``p``, against none."""
    tokens = sum(p**i for i in range(length + 1))
    took = step_s(running * (1 + length)) + running * length * token_s
    return tokens * step_s(running) / took


class Oracle:
    """A text, or several, whose drafts are right with the probability ``p``; seconds are counted."""

    def __init__(self, token_s: float, running: int = 1, seed: int = 0, read_s: float = 0.0) -> None:
        self.lengths = DraftLength()
        self.rng = random.Random(seed)
        self.token_s, self.read_s, self.running = token_s, read_s, running
        self.lacking = 0
        self.used: list[int] = []

    def run(self, p: float, steps: int) -> float:
        """The speed of so many steps, against plain ones."""
        seconds, tokens = 0.0, 0
        for _ in range(steps):
            took, made = self.step(p)
            seconds, tokens = seconds + took, tokens + made
        return tokens / self.running * step_s(self.running) / seconds

    def step(self, p: float) -> tuple[float, int]:
        running = self.running
        length = self.lengths.choose(running, 16 // running - 1)
        reading = self.read_s * self.lacking
        if not self.lengths.affords(reading):
            length = 0
        self.used.append(length)
        checked, seconds = [], step_s(running * (1 + length))
        if length:
            self.lacking = 0
            self.lengths.spend(reading)
            self.lengths.token_s.add(self.token_s)
            seconds += running * length * self.token_s
            for _ in range(running):
                wrong = (i for i in range(length) if self.rng.random() >= p)
                checked.append(Checked(length, next(wrong, length)))
        else:
            reading = 0.0
            self.lacking += 1
        self.lengths.learn(running, running * length, seconds, checked)
        self.lengths.tried()
        return seconds + reading, running + sum(draft.right for draft in checked)


@pytest.mark.parametrize("running", [1, 4])
@pytest.mark.parametrize("token_s", [0.05, 0.2, 0.5, 1.5])
def test_drafts_never_cost_more_than_one_percent_and_the_start(token_s: float, running: int) -> None:
    steps = 1000
    for p in PROBABILITIES:
        for seed in range(2):
            speed = Oracle(token_s, running, seed, read_s=0.02).run(p, steps)
            # A step more, since what a step costs is known when it is over.
            longest = max(step_s(16) + running * LENGTHS[-1] * token_s, 1.0)
            assert speed > 1 - SHARE - (START + longest) / steps, (p, seed)


@pytest.mark.parametrize("token_s", [0.05, 0.2, 0.5])
def test_the_length_that_pays_is_found(token_s: float) -> None:
    for p in PROBABILITIES:
        best = max(gain(p, length, token_s) for length in LENGTHS)
        for seed in range(2):
            oracle = Oracle(token_s, seed=seed)
            oracle.run(p, 500)
            speed = oracle.run(p, 1000)
            assert speed > 0.985, (p, seed)
            if best > 1.15:
                assert speed > 1 + 0.5 * (best - 1), (p, seed, best)


def test_drafts_that_do_not_pay_are_tried_in_one_step_of_64() -> None:
    oracle = Oracle(0.05)
    oracle.run(0.0, 6400)
    used = oracle.used[640:]
    assert 0 < sum(map(bool, used)) <= len(used) / TRIAL_EVERY


def test_drafts_that_could_not_pay_if_all_were_right_are_not_tried() -> None:
    oracle = Oracle(1.0)  # two tokens for two steps and a bit
    oracle.run(0.95, 100)
    before = len(oracle.used)
    oracle.run(0.95, 2000)
    assert not any(oracle.used[before:])


def test_a_text_that_changes_is_noticed() -> None:
    oracle = Oracle(0.2)
    assert oracle.run(0.9, 1000) > 1.8
    before = len(oracle.used)
    assert oracle.run(0.0, 1000) > 0.95
    assert sum(map(bool, oracle.used[before + 60 :])) < 60
    oracle.run(0.9, 1000)  # few trials: it may take a while
    assert oracle.run(0.9, 1000) > 1.8


def test_a_plain_step_is_measured_again_while_drafts_pay() -> None:
    oracle = Oracle(0.2)
    oracle.run(0.9, 200)
    before = len(oracle.used)
    oracle.run(0.9, 640)
    assert 8 <= oracle.used[before:].count(0) <= 12


def test_a_machine_that_becomes_slower_for_drafts_gets_none() -> None:
    oracle = Oracle(0.2)
    oracle.run(0.6, 500)
    oracle.token_s = 0.8
    assert oracle.run(0.6, 2000) > 0.97


def test_interruptions_are_no_reason_to_draft() -> None:
    """Every seventh step takes three times as long, of whatever kind it is."""
    oracle = Oracle(0.2, seed=1)
    plain = seconds = 0.0
    tokens = 0
    learn = oracle.lengths.learn

    def interrupted(running: int, drafted: int, took: float, checked: list[Checked]) -> None:
        learn(running, drafted, 3 * took if len(oracle.used) % 7 == 0 else took, checked)

    oracle.lengths.learn = interrupted  # type: ignore[assignment, method-assign]
    for i in range(3000):
        took, made = oracle.step(0.1)
        seconds += 3 * took if i % 7 == 0 else took
        plain += 9 / 7 * made
        tokens += made
    assert plain / seconds > 0.96
