"""Jobs in, texts out: whatever arrives, leaves or waits, each text is the one its request gets alone."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import FakeEngine, fake_llm

from bitgen.errors import BitgenError, UsageError
from bitgen.inference.draft_model import DraftModel
from bitgen.inference.embedding import embed
from bitgen.inference.grammar import Grammar
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.sampling import Sampling
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Request
from bitgen.serve.worker import Job, Update, Worker

LETTERS = range(262, 280)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    """Prompts of one seed start alike."""
    rng = random.Random(seed)
    return tuple(rng.choice(LETTERS) for _ in range(length))


def request(length: int = 8, text: int = 0, seed: int = 1, tokens: int | None = 6, **changes: Any) -> Request:
    options = changes.pop("options", {})
    sampling = Sampling(temperature=changes.pop("temperature", 1.0), seed=seed, **options)
    return Request(prompt(length, text), max_tokens=tokens, sampling=sampling, **changes)


class House:
    """A worker that is turned by hand."""

    def __init__(
        self,
        batch: int = 2,
        token_s: float = 0.0,
        max_stall_s: float = 0.25,
        *,
        drafts: bool = False,
        capacity: Capacity | None = None,
    ) -> None:
        self.engine = FakeEngine(batch, token_s=token_s, capacity=capacity)
        self.scheduler = fake_llm(self.engine, max_stall_s).scheduler
        if drafts:  # right ones, as far as its short context goes
            small = FakeEngine(batch, context=64, token_s=token_s / 4)
            small.clock = self.engine.clock
            reader = Scheduler(small, max_stall_s=max_stall_s, clock=small.clock)
            self.scheduler.drafts = DraftModel(reader)
        self.worker = Worker(self.scheduler, lambda call: call(), self.engine.clock)
        self.texts: dict[Job, str] = {}
        self.ends: dict[Job, str] = {}
        self.order: list[Job] = []

    def submit(self, wanted: Request) -> Job:
        def deliver(update: Update) -> None:
            assert update.job not in self.ends, "an update after the last"
            if update.tokens and not self.texts[update.job]:
                self.order.append(update.job)
            self.texts[update.job] += update.text
            if update.finish is not None:
                self.ends[update.job] = update.finish

        job = Job(wanted, deliver)
        self.texts[job] = ""
        self.worker.submit(job)
        return job

    def finish(self) -> None:
        for _ in range(10_000):
            if self.worker.idle:
                break
            self.worker.turn()
        assert self.worker.idle
        assert self.scheduler.idle
        assert not self.worker._seen
        assert set(self.ends) == set(self.texts)


def alone(wanted: Request) -> str:
    house = House(1)
    job = house.submit(wanted)
    house.finish()
    return house.texts[job]


def grammars() -> list[Grammar | None]:
    """None, and one of JSON where llguidance is installed."""
    if importlib.util.find_spec("llguidance") is None:
        return [None]
    properties = {"to": {"enum": ["the", "an"]}, "often": {"type": "integer", "minimum": 0, "maximum": 99}}
    schema = {"type": "object", "properties": properties, "required": ["to", "often"]}
    return [
        None,
        None,
        fake_llm(FakeEngine()).grammars.json_schema({**schema, "additionalProperties": False}),
    ]


requests = st.builds(
    request,
    length=st.sampled_from([1, 3, 17, 40, 90, 250]),
    text=st.integers(0, 1),
    seed=st.integers(0, 2),
    tokens=st.integers(1, 12),
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.sampled_from([(), ("e",), ("th", "a n")]),
    lookup=st.booleans(),
    owner=st.sampled_from(["", "a", "b"]),
    logprobs=st.sampled_from([None, 2]),
    score_prompt=st.booleans(),
    ignore_end=st.booleans(),
    grammar=st.sampled_from(grammars()),
    options=st.sampled_from(
        [
            {},
            {"top_k": 0, "logit_bias": ((263, 5.0),)},
            {"repeat_penalty": 1.5, "presence_penalty": 0.5, "repeat_last_n": -1},
        ]
    ),
)
vectors = st.builds(
    request,
    length=st.sampled_from([1, 17, 90, 250]),
    text=st.integers(0, 1),
    tokens=st.just(0),
    owner=st.sampled_from(["", "a"]),
    pooling=st.sampled_from(["last", "mean"]),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), requests),
        st.tuples(st.just("submit"), vectors),
        st.tuples(st.just("turn"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    max_size=30,
)


WHOLE = FakeEngine().sequence_bytes(256)  # bytes of a text of the whole context
capacities = st.builds(
    Capacity,
    parallel=st.integers(1, 4),
    parked=st.integers(0, 3),
    pinned=st.integers(0, 1),
    bytes=st.sampled_from([None, WHOLE, WHOLE + 300, 2 * WHOLE]),
    shared=st.booleans(),
)


loads: dict[str, st.SearchStrategy[Any]] = {
    "actions": actions,
    "capacity": capacities,
    "token_s": st.sampled_from([0.0, 0.004, 0.02]),
    "drafts": st.booleans(),
    "mixed": st.booleans(),
}


@settings(max_examples=100)
@given(**loads)
def test_a_text_does_not_depend_on_the_load(**load: Any) -> None:
    check_load(**load)


@pytest.mark.deep
@settings(max_examples=5000)
@given(**loads)
def test_a_text_does_not_depend_on_any_of_many_loads(**load: Any) -> None:
    check_load(**load)


def check_load(actions: list[Any], capacity: Capacity, token_s: float, drafts: bool, mixed: bool) -> None:
    """Arrivals, cancels, evictions, shared prefixes, drafts, grammars and parts of any size are invisible.

    And at no time keys and values take more bytes than they may (`FakeEngine.forward`).
    """
    house = House(capacity.parallel, token_s, drafts=drafts, capacity=capacity)
    house.scheduler.mixed = mixed
    if capacity.pinned and capacity.bytes != WHOLE:
        house.scheduler.pin(prompt(30, 0))
    jobs: list[Job] = []
    cancelled: set[Job] = set()
    for what, value in actions:
        if what == "submit":
            jobs.append(house.submit(value))
        elif what == "turn":
            for _ in range(value):
                house.worker.turn()
        elif jobs:
            job = jobs[value % len(jobs)]
            cancelled.add(job)
            house.worker.cancel(job)
    house.finish()
    for job in jobs:
        expected = alone(job.request)
        if house.ends[job] == "cancelled":
            assert job in cancelled
            assert expected.startswith(house.texts[job])
        else:
            assert house.texts[job] == expected
            if pooling := job.request.pooling:
                (vector,) = embed(Scheduler(FakeEngine(1)), [job.request.prompt], pooling)
                assert job.vector is not None
                assert job.vector.tolist() == vector.tolist()


def test_the_fake_engine_notices_a_wrong_cache() -> None:
    """What the property test is worth: a prefix of another text changes what comes."""
    assert alone(request(40, text=0)) != alone(request(40, text=1))


@pytest.mark.parametrize("queued", [False, True])
def test_a_cancel_frees_within_one_turn(queued: bool) -> None:
    house = House(1)
    first = house.submit(request(tokens=50, ignore_end=True))
    second = house.submit(request(tokens=3, ignore_end=True))
    house.worker.turn()
    gone, stays = (second, first) if queued else (first, second)
    house.worker.cancel(gone)
    house.worker.turn()
    assert house.ends[gone] == "cancelled"
    assert len(house.worker.snapshot.running) == 1
    house.finish()
    assert house.ends[stays] == "length"
    assert house.texts[stays] == alone(stays.request)


def test_a_long_prompt_delays_a_running_text_by_max_stall_and_a_step() -> None:
    stall, token_s = 0.25, 0.004
    house = House(2, token_s, stall)
    house.submit(request(4, tokens=100, ignore_end=True))
    for _ in range(3):
        house.worker.turn()
    house.submit(request(250, text=1, tokens=2, ignore_end=True))
    before = house.engine.clock.now
    longest = 0.0
    while not house.worker.idle:
        house.worker.turn()
        longest = max(longest, house.engine.clock.now - before)
        before = house.engine.clock.now
    parts = [tokens for _, tokens in house.engine.passes if tokens > 2]
    assert sum(parts) == 254
    assert len(parts) > 4
    assert longest <= stall + 2 * token_s + 1e-9


@pytest.mark.parametrize("parts", range(1, 6))
def test_a_short_prompt_waits_for_one_part_of_a_long_one(parts: int) -> None:
    token_s = 0.01
    house = House(2, token_s, max_stall_s=0.25)
    house.submit(request(250, text=1, tokens=2, ignore_end=True))
    for _ in range(parts):  # the last of them is the one that is computed when it comes
        house.worker.turn()
    short = house.submit(request(20, tokens=2, ignore_end=True))
    house.finish()
    assert house.order[0] is short
    assert short.first is not None
    assert short.submitted is not None
    assert short.first - short.submitted <= 20 * token_s + 1e-9


def test_a_long_prompt_is_not_passed_over_for_ever() -> None:
    house = House(2, token_s=0.01, max_stall_s=0.25)
    long = house.submit(request(250, text=1, tokens=2, ignore_end=True))
    for seed in range(60):
        house.submit(request(20, text=2 + seed, tokens=1))
    house.finish()
    assert house.order.index(long) < 40


def test_mixed_passes_read_the_weights_less_often() -> None:
    passes, texts = [], []
    for mixed in (False, True):
        house = House(2, token_s=0.004)
        house.scheduler.mixed = mixed
        jobs = [house.submit(request(4, tokens=40, ignore_end=True))]
        for _ in range(3):
            house.worker.turn()
        jobs.append(house.submit(request(250, text=1, tokens=2, ignore_end=True)))
        house.finish()
        passes.append(len(house.engine.passes))
        texts.append([house.texts[job] for job in jobs])
    assert texts[0] == texts[1]
    assert passes[1] < passes[0]


def test_owners_take_turns() -> None:
    house = House(1)
    greedy = [house.submit(request(owner="a", tokens=1)) for _ in range(5)]
    modest = house.submit(request(owner="b", tokens=1))
    house.finish()
    assert house.order.index(modest) == 1
    assert [job for job in house.order if job is not modest] == greedy


def test_a_prefix_is_reused_within_one_owner_only() -> None:
    house = House(2)
    first = house.submit(request(90, owner="a"))
    house.finish()
    again, other = house.submit(request(90, owner="a")), house.submit(request(90, owner="b"))
    house.finish()
    assert [job.reused for job in (first, again, other)] == [0, 89, 0]


def test_a_shorter_prompt_copies_its_part_of_one_that_runs() -> None:
    house = House(2)
    long = house.submit(request(90, tokens=40, ignore_end=True))
    for _ in range(12):
        house.worker.turn()
    short = house.submit(request(40))
    house.finish()
    assert short.reused == 39
    assert [house.texts[job] for job in (long, short)] == [alone(job.request) for job in (long, short)]


# ---- Memory ----


def most_at_once(house: House) -> int:
    """Finish; the most texts that had memory at the same time."""
    most = 0
    while not house.worker.idle:
        house.worker.turn()
        most = max(most, len(house.worker.snapshot.running))
    house.finish()
    return most


def test_what_cannot_be_held_waits_for_its_turn() -> None:
    house = House(capacity=Capacity(parallel=4, bytes=2 * WHOLE + 100))
    jobs = [house.submit(request(40, text=i, tokens=None)) for i in range(5)]  # each may fill its context
    assert most_at_once(house) == 2
    assert house.order == jobs
    assert set(house.ends.values()) <= {"end", "context"}
    assert [house.texts[job] for job in jobs] == [alone(job.request) for job in jobs]


def test_short_texts_run_side_by_side_where_long_ones_could_not() -> None:
    house = House(capacity=Capacity(parallel=64, bytes=2 * WHOLE))
    jobs = [house.submit(request(3, seed=i, tokens=5, ignore_end=True)) for i in range(80)]
    assert most_at_once(house) == 64
    assert house.texts[jobs[-1]] == alone(jobs[-1].request)


def test_one_that_is_too_long_for_now_is_not_passed_over() -> None:
    house = House(capacity=Capacity(parallel=4, bytes=WHOLE))
    first = house.submit(request(40, tokens=20, ignore_end=True))
    long, short = house.submit(request(40, text=1, tokens=None)), house.submit(request(4, text=2))
    house.finish()
    assert house.order == [first, long, short]


def test_texts_that_ended_are_kept_until_their_memory_is_needed() -> None:
    house = House(capacity=Capacity(parallel=1, parked=3, bytes=WHOLE))
    for text in range(4):  # 60 positions each: all four are 240 of 256
        house.submit(request(55, text=text, tokens=5, ignore_end=True))
        house.finish()
    held = house.engine.written_bytes
    again = [house.submit(request(50, text=text, tokens=5, ignore_end=True)) for text in (3, 0)]
    house.finish()
    assert [job.reused for job in again] == [49, 49]
    large = house.submit(request(100, text=9, tokens=5, ignore_end=True))
    house.finish()
    kept = [house.submit(request(50, text=text, tokens=5, ignore_end=True)) for text in (0, 1)]
    house.finish()
    assert (large.reused, kept[0].reused, kept[1].reused) == (0, 49, 0)  # the two oldest were given up
    assert max(held, house.engine.written_bytes) <= WHOLE


def test_a_text_that_branches_off_leaves_the_other_one_whole() -> None:
    house = House(capacity=Capacity(parallel=1, parked=1))
    start = prompt(90, 0)
    for other in (prompt(20, 1), prompt(20, 2), prompt(20, 1)):
        job = house.submit(Request(start + other, 4, Sampling(seed=1), ignore_end=True))
        house.finish()
    assert job.reused == 109


def test_starts_are_shared_between_owners_where_that_is_asked_for() -> None:
    house = House(capacity=Capacity(parallel=2, shared=True))
    house.submit(request(90, owner="a"))
    house.finish()
    other = house.submit(request(90, owner="b"))
    house.finish()
    assert other.reused == 89


def test_what_is_pinned_serves_all_owners_and_stays() -> None:
    house = House(capacity=Capacity(parallel=1, pinned=1, bytes=WHOLE + 600))
    house.scheduler.pin(prompt(64, 0))
    for text in range(1, 4):
        house.submit(request(200, text=text))
        house.finish()
    jobs = [house.submit(request(90, owner=owner)) for owner in ("a", "b")]
    house.finish()
    assert [job.reused for job in jobs] == [64, 64]
    assert [house.texts[job] for job in jobs] == [alone(job.request) for job in jobs]
    assert [each.owner for each in house.scheduler.held()] == ["b"]
    house.scheduler.clear()
    later = house.submit(request(90))
    house.finish()
    assert later.reused == 64
    with pytest.raises(UsageError, match="there are 1 slots for what is pinned"):
        house.scheduler.pin(prompt(64, 5))
    tight = House(capacity=Capacity(parallel=1, pinned=1, bytes=WHOLE + 600))
    with pytest.raises(UsageError, match="hold no text of 256 positions"):
        tight.scheduler.pin(prompt(100, 0))


def test_texts_of_one_prompt_compute_it_once() -> None:
    house = House(4)
    jobs = [house.submit(request(90, seed=seed)) for seed in range(4)]
    house.finish()
    assert sum(job.computed for job in jobs) == 90 + 3
    assert len({house.texts[job] for job in jobs}) == 4


def test_log_probabilities_are_of_the_prompt_too_and_do_not_depend_on_parts() -> None:
    found = []
    for token_s in (0.0, 0.02):  # in one part, and in many
        house = House(1, token_s)
        scores: list[Any] = []
        wanted = request(90, logprobs=2, score_prompt=True, ignore_end=True)

        def deliver(update: Update, scores: list[Any] = scores) -> None:
            scores.extend(update.scores)

        job = Job(wanted, deliver)
        house.worker.submit(job)
        while not house.worker.idle:
            house.worker.turn()
        assert [score.token for score in scores[:89]] == list(wanted.prompt[1:])
        assert len(scores) == 89 + 6
        found.append(scores)
    assert found[0] == found[1]


def test_a_step_that_fails_ends_those_that_run_and_no_others() -> None:
    house = House(1)
    first, second = house.submit(request()), house.submit(request(tokens=2, ignore_end=True))

    def fail() -> None:
        house.engine.before = lambda: None
        raise BitgenError("infinity in the logits")

    house.engine.before = fail
    house.finish()
    assert [house.ends[job] for job in (first, second)] == ["error", "length"]
    assert house.texts[second] == alone(second.request)


@pytest.mark.slow
def test_nothing_is_left_of_ten_thousand_requests() -> None:
    house = House(4)
    rng = random.Random(5)
    for i in range(10_000):
        job = house.submit(request(rng.choice([1, 5]), seed=i, tokens=1))
        if i % 3 == 0:
            house.worker.cancel(job)
        if i % 4 == 0:
            house.worker.turn()
    house.finish()
    assert len(house.ends) == 10_000
    assert not house.worker._running
    assert not house.worker._waiting
