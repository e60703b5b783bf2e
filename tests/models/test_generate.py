from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import tokenizer_json
from reference_model import ReferenceEngine, logits_of, small_config
from text_models import SPACE, piece_data, small_llm, weights
from wanted import answers_wants

from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats.config import ModelConfig
from bitgen.inference.chat_template import BUILT_IN, knows_thinking, render_chat
from bitgen.inference.conversation import Conversation
from bitgen.inference.divergence import Divergence, LogitsWriter, read_logits
from bitgen.inference.drafts import PromptLookupDrafter
from bitgen.inference.memory import Memory
from bitgen.inference.perplexity import ModelReference, perplexity
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import StopFilter
from bitgen.llm import LLM
from bitgen.progress import Progress
from bitgen.tokenizer.data import TokenizerData
from bitgen.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

PROMPTS = ("the end and the other", "a", "on a hand there the the the the the", "an end")
TOKENIZER = Tokenizer(piece_data())


@dataclass
class Scripted:
    """An engine that always continues with the same tokens: position p is followed by script[p + 1]."""

    script: Sequence[int]
    context: int = 64
    max_batch: int = 1
    calls: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)
    config: ModelConfig = field(default_factory=lambda: small_config(vocab=len(piece_data().tokens)))
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0))
    head_bytes: int = 0
    head_error: float = 0.0

    @answers_wants
    def forward(self, tokens: Any, positions: Any, sequences: Any, outputs: Any) -> Any:
        self.calls.append(len(tokens))
        logits = np.zeros((int(outputs.sum()), self.config.vocab), np.float32)
        for row, position in enumerate(np.asarray(positions)[np.asarray(outputs)]):
            logits[row, self.script[(position + 1) % len(self.script)]] = 50
        for position, sequence in zip(positions, sequences, strict=True):
            assert position == self.lengths.get(sequence, 0) < self.context
            self.lengths[int(sequence)] = int(position) + 1
        return logits

    def truncate(self, sequence: int, length: int) -> None:
        assert length <= self.lengths.get(sequence, 0)
        self.lengths[sequence] = length

    def release(self, sequence: int, length: int) -> None:
        self.truncate(sequence, length)

    def sequence_bytes(self, positions: int) -> int:
        return positions

    def copy(self, source: int, target: int, length: int) -> None:
        assert length <= self.lengths[source]
        self.lengths[target] = length

    def cached(self, sequence: int) -> bytes:
        return bytes(self.lengths.get(sequence, 0))

    def restore(self, sequence: int, length: int, data: bytes) -> None:
        assert len(data) == length
        self.lengths[sequence] = length

    def close(self) -> None:
        pass


def scripted(text: str, *, context: int = 64, **changes: Any) -> LLM:
    """A model that says ``text``; it is prompted with its first token."""
    tokenizer = Tokenizer(piece_data(**changes))
    engine = Scripted(tokenizer.encode(text), context=context)
    return LLM.over(engine, engine.config, piece_data(**changes))


def texts(llm: LLM, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[str]:
    """Each prompt alone."""
    return ["".join(llm.generate(prompt, **options)) for prompt in prompts]


# ---- The same text ----


@pytest.mark.parametrize("temperature", [0.0, 0.8, 3.0])
def test_a_text_is_the_same_alone_in_a_batch_and_with_guesses(temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "temperature": temperature, "seed": 7, "top_k": 20}
    alone = texts(small_llm(batch=1), **options)
    assert len(set(alone)) > 1
    for batch in (1, 2, 4):
        assert small_llm(batch=batch).generate(PROMPTS, **options) == alone
        assert small_llm(batch=batch).generate(PROMPTS, lookup=True, **options) == alone
    assert texts(small_llm(), lookup=True, **options) == alone


def test_seeds_make_texts_differ_and_repeat() -> None:
    llm = small_llm()
    first, again, other = (texts(llm, max_tokens=12, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    generation = llm.generate("a", max_tokens=8, temperature=2.0)
    text = "".join(generation)
    assert generation.seed is not None
    assert texts(llm, ["a"], max_tokens=8, temperature=2.0, seed=generation.seed) == [text]


def test_pieces_add_up_to_the_text_and_its_tokens() -> None:
    llm = small_llm()
    generation = llm.generate("the", max_tokens=20, temperature=3.0, seed=3)
    assert generation.text == ""
    assert generation.finish is None
    pieces = list(generation)
    assert "".join(pieces) == generation.text
    assert len(generation.tokens) == 20
    stream = llm.tokenizer.stream()
    assert "".join([stream.feed(i) for i in generation.tokens] + [stream.close()]) == generation.text


def test_token_ids_are_prompts_too() -> None:
    llm = small_llm()
    ids = llm.tokenizer.encode("the end")
    options = {"max_tokens": 6, "seed": 0}
    assert "".join(llm.generate(ids, **options)) == "".join(llm.generate("the end", **options))
    assert llm.generate([ids, ids], **options) == texts(llm, ["the end"] * 2, **options)
    nothing: list[str] = []
    assert llm.generate(nothing, **options) == []


# ---- How it ends ----


def test_an_answer_ends_where_the_model_ends_it() -> None:
    llm = scripted("the end</s>and more")
    generation = llm.generate([1], max_tokens=50, temperature=0)
    assert "".join(generation) == " the end"
    assert generation.finish == "end"
    assert generation.tokens[-1] == 2


def test_an_end_that_is_ignored_prints_nothing() -> None:
    generation = scripted("the</s>and").generate([1], max_tokens=4, temperature=0, ignore_end=True)
    assert "".join(generation).startswith(" the and")
    assert generation.finish == "length"


def test_an_answer_has_as_many_tokens_as_asked_for() -> None:
    generation = scripted("the end").generate([1], max_tokens=2, temperature=0)
    assert len("".join(generation)) > 0
    assert (generation.finish, len(generation.tokens)) == ("length", 2)


@pytest.mark.parametrize("lookup", [False, True])
def test_an_answer_ends_when_the_context_is_full(lookup: bool) -> None:
    llm = scripted("the the the the the the", context=20)
    generation = llm.generate([1, 5, 6], max_tokens=None, temperature=0, ignore_end=True, lookup=lookup)
    assert "".join(generation)
    assert generation.finish == "context"
    assert len(generation.tokens) == 18  # 3 + 17 fill 20 positions, and the last of them says what comes next


@pytest.mark.parametrize("stop", ["end", ["x", "the end"], ["d and", "end"], "e e"])
@pytest.mark.parametrize("lookup", [False, True])
def test_an_answer_ends_before_a_stop_text(stop: str | list[str], lookup: bool) -> None:
    generation = scripted("the end and the end").generate(
        [1], max_tokens=30, temperature=0, stop=stop, lookup=lookup
    )
    text = "".join(generation)
    stops = [stop] if isinstance(stop, str) else stop
    whole = " the end and the end"
    assert text == whole[: min((whole.find(s) + len(s), whole.find(s)) for s in stops if s in whole)[1]]
    assert text == generation.text
    assert generation.finish == "stop"


def test_what_was_held_back_for_a_stop_text_comes_when_the_model_ends() -> None:
    generation = scripted("the en</s>").generate([1], max_tokens=30, temperature=0, stop="end")
    assert "".join(generation) == generation.text == " the en"


@settings(max_examples=300, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_filter_does_not_depend_on_how_a_text_is_cut(text: str, stops: list[str], data: Any) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    stop = StopFilter(stops)
    shown = "".join(stop.feed(part) for part in parts)
    if not stop.stopped:
        shown += stop.close()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert shown == (text[: min(ends)[1]] if ends else text)
    assert stop.stopped == bool(ends)


# ---- What is computed ----


def test_a_prompt_that_starts_like_the_last_one_costs_only_its_new_part() -> None:
    llm = small_llm(batch=1)
    engine = llm.engine
    assert isinstance(engine, ReferenceEngine)
    first = llm.tokenizer.encode("the end and the other end")
    list(llm.generate(first, max_tokens=1, seed=0))
    engine.calls.clear()
    longer = [*first, *llm.tokenizer.encode("on and on", special=False)]
    text = "".join(llm.generate(longer, max_tokens=4, seed=0))
    assert engine.calls[0] == len(longer) - len(first)
    assert text == "".join(small_llm().generate(longer, max_tokens=4, seed=0))
    engine.calls.clear()
    list(llm.generate(first, max_tokens=1, seed=0))
    assert engine.calls == [1]  # all but the last token, whose logits are needed


def test_prompts_of_a_batch_that_start_alike_compute_it_once() -> None:
    llm = small_llm(batch=3)
    engine = llm.engine
    assert isinstance(engine, ReferenceEngine)
    start = "the end and the other end on and on and on"
    prompts = [f"{start}{rest}" for rest in (" the", " a", " he")]
    together = llm.generate(prompts, max_tokens=6, seed=1)
    prefills = [n for n in engine.calls if n > 3]
    assert len(prefills) == 1
    assert together == texts(small_llm(), prompts, max_tokens=6, seed=1)


def test_long_prompts_are_computed_in_parts_with_progress() -> None:
    engine = Scripted([5], context=2000)
    llm = LLM.over(engine, engine.config, piece_data())
    seen: list[Progress] = []
    request = llm.request([5] * 1100, max_tokens=1)
    list(llm.scheduler.run([request], seen.append))
    assert engine.calls == [128, 512, 460]
    assert [(each.done, each.total) for each in seen] == [(0, 1100), (128, 1100), (640, 1100), (1100, 1100)]


@pytest.mark.parametrize(
    ("token_s", "parts"), [(0.01, [128] * 5), (0.02, [128, *[64] * 8]), (9, [128, *[64] * 8])]
)
def test_parts_of_a_prompt_take_a_second_or_so(token_s: float, parts: list[int]) -> None:
    engine = Scripted([5], context=2000)
    llm = LLM.over(engine, engine.config, piece_data())
    scheduler = Scheduler(engine, llm.tokenizer, clock=lambda: token_s * sum(engine.calls))
    list(scheduler.run([llm.request([5] * 640, max_tokens=1)]))
    assert engine.calls == parts


def test_guesses_save_steps_where_a_text_repeats_itself() -> None:
    text = "the end and " * 6
    counts = []
    for lookup in (False, True):
        llm = scripted(text, context=200)
        prompt = TOKENIZER.encode(text)[:20]
        generation = llm.generate(prompt, max_tokens=40, temperature=0, lookup=lookup, ignore_end=True)
        counts.append(("".join(generation), llm.timings.steps))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] == 39
    assert counts[1][1] < 15
    assert llm.timings.accepted > 20


def test_a_guess_is_what_followed_the_last_time() -> None:
    tokens = [1, 2, 3, 4, 5, 9, 2, 3]
    assert PromptLookupDrafter(tokens).draft(tokens, 3) == [4, 5, 9]
    assert PromptLookupDrafter(tokens).draft(tokens, 0) == []
    assert PromptLookupDrafter([1, 2, 3]).draft([1, 2, 3], 3) == []
    tokens = [7, 2, 3, 1, 8, 2, 3, 5, 7, 2, 3]  # three tokens that match count more than the latest two
    assert PromptLookupDrafter(tokens).draft(tokens, 1) == [1]
    tokens = [9, 5, 6, 7, 5, 6, 7, 5, 6]  # what repeats itself goes on
    assert PromptLookupDrafter(tokens).draft(tokens, 7) == [7, 5, 6, 7, 5, 6, 7]


class Interrupted(ReferenceEngine):
    """Ctrl-C in the middle of some steps."""

    when: int | None = None

    def forward(self, *arguments: Any) -> Any:
        logits = super().forward(*arguments)
        if self.when is not None and len(self.calls) == self.when:
            raise KeyboardInterrupt
        return logits


@pytest.mark.parametrize("when", [1, 2, 5])
def test_after_ctrl_c_the_next_answer_is_right(when: int) -> None:
    model = weights()
    engine = Interrupted(model)
    llm = LLM.over(engine, model.config, piece_data())
    engine.when = when
    with pytest.raises(KeyboardInterrupt):
        list(llm.generate("the end and", max_tokens=20, seed=0))
    engine.when = None
    assert texts(llm, max_tokens=8, seed=0) == texts(small_llm(), max_tokens=8, seed=0)


class InterruptedCopy(ReferenceEngine):
    """Ctrl-C when a sequence has just become another's copy."""

    def copy(self, source: int, target: int, length: int) -> None:
        super().copy(source, target, length)
        raise KeyboardInterrupt


def test_after_ctrl_c_amid_a_copy_the_next_answer_is_right() -> None:
    model, held = weights(), PROMPTS[2:]
    llm = LLM.over(InterruptedCopy(model, max_batch=2), model.config, piece_data())
    options = {"max_tokens": 8, "temperature": 2.0, "seed": 0}
    llm.generate(held, **options)
    start = "the end and the other end on and on and on"
    with pytest.raises(KeyboardInterrupt):
        llm.generate([f"{start} the", f"{start} a"], **options)
    assert texts(llm, held, **options) == texts(small_llm(), held, **options)


@pytest.mark.parametrize("batch", [1, 2])
def test_answers_that_are_read_in_turns_do_not_mix(batch: int) -> None:
    llm = small_llm(batch=batch)
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 2.0, "seed": 5, "lookup": True}
    expected = texts(small_llm(), **options)
    found = ["" for _ in PROMPTS]
    generations = [llm.generate(prompt, **options) for prompt in PROMPTS]
    for _ in range(12):
        for i, generation in enumerate(generations):
            found[i] += next(generation, "")
        llm.logits([5, 6, 7])
    assert found == expected
    parts = llm.logit_parts([5] * 40)
    assert "".join(llm.generate(PROMPTS[0], **options)) == expected[0]
    assert np.array_equal(np.concatenate(list(parts)), llm.logits([5] * 40))


def test_an_answer_that_nobody_reads_on_does_no_harm() -> None:
    llm = small_llm()
    next(llm.generate("the end and", max_tokens=20, seed=0))
    assert texts(llm, max_tokens=8, seed=0) == texts(small_llm(), max_tokens=8, seed=0)


def test_logits_come_in_parts_that_are_not_large(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = small_llm()
    ids = llm.tokenizer.encode("the end and the other end on and on and on and the other hand and the end")
    assert len(ids) > 33
    whole = llm.logits(ids)
    monkeypatch.setattr("bitgen.inference.passes._LOGITS_BYTES", 1)
    assert [len(part) for part in llm.logit_parts(ids)] == [32, len(ids) - 32]
    assert np.array_equal(llm.logits(ids), whole)
    assert llm.logits(ids, len(ids)).shape == (0, llm.config.vocab)


def test_logits_are_those_of_the_whole_text() -> None:
    llm = small_llm()
    ids = llm.tokenizer.encode("the end and the other")
    assert np.array_equal(llm.logits(ids), logits_of(weights(), ids))
    assert np.array_equal(llm.logits(ids, 3), logits_of(weights(), ids)[3:])
    assert llm.logits(ids).dtype == np.float32


# ---- What does not fit ----


def test_prompts_that_do_not_fit_are_refused() -> None:
    llm = small_llm(context=16)
    with pytest.raises(BitgenError, match="the prompt has 17 tokens and the context holds 16: shorten it"):
        llm.generate([5] * 17)
    assert len("".join(llm.generate([5] * 16, max_tokens=9, temperature=0))) > 0
    with pytest.raises(BitgenError, match="the prompt is empty"):
        llm.generate([[]])
    with pytest.raises(BitgenError, match="the prompt has 17 tokens"):
        llm.generate([[5], [5] * 17])


def test_a_text_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(BitgenError, match="the text is not UTF-8 at character 4"):
        small_llm().generate("the \udcff end")


def test_an_empty_text_starts_with_bos() -> None:
    for changes in ({}, {"add_bos": False}):
        llm = LLM.over(ReferenceEngine(weights()), weights().config, piece_data(**changes))
        assert llm.request("").prompt == (1,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more"),
        ({"temp": 1}, "unknown option temp; there are max_tokens, .*temperature"),
        ({"temperature": -1}, "temperature must be 0 or more"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BitgenError, match=message):
        small_llm().generate("a", **options)


@pytest.mark.parametrize("ids", [[-1], [5, 10**6]])
def test_tokens_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(BitgenError, match="outside the model's vocabulary"):
        small_llm().generate(ids)


@pytest.mark.parametrize("prompt", [5, None, object()])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(BitgenError, match="a prompt is a text, token ids, or a list of these, not"):
        small_llm().generate(prompt)


@pytest.mark.parametrize("ids", ["abc", [1.5], [None]])
def test_what_are_no_token_ids_is_refused(ids: Any) -> None:
    with pytest.raises(BitgenError, match="token ids must be integers"):
        small_llm().logits(ids)


# ---- Perplexity ----


@pytest.mark.parametrize("add_bos", [True, False])
def test_perplexity_is_over_the_second_halves_of_windows(add_bos: bool) -> None:
    text = "the end and the other end of the hand in the sand " * 4
    llm = LLM.over(ReferenceEngine(weights()), weights().config, piece_data(add_bos=add_bos))
    ids = llm.tokenizer.encode(text)
    nlls = []
    for start in range(0, len(ids) - 31, 32):
        window = ids[start : start + 32]
        logits = logits_of(weights(), [1, *window[1:]] if add_bos else window).astype(np.float64)
        for position in range(16, 31):
            row = logits[position]
            nlls.append(math.log(np.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]])
    *_, result = perplexity(llm, text, 32)
    assert result.tokens == len(nlls) == result.windows * 15
    assert math.isclose(result.value, math.exp(np.mean(nlls)), rel_tol=1e-9)
    deviation = math.sqrt((np.mean(np.square(nlls)) - np.mean(nlls) ** 2) / (len(nlls) - 1))
    assert math.isclose(result.error, deviation * result.value, rel_tol=1e-9)
    assert [r.windows for r in perplexity(llm, text, 32, 2)] == [1, 2]


def test_windows_start_with_the_bos_of_a_post_processor() -> None:
    """A folder says it in tokenizer.json alone, the GGUF file made of it with a flag: one perplexity."""
    tokenizer = {
        **tokenizer_json(11),
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [9], "tokens": ["<s>"]}},
        },
    }
    values = []
    for add_bos in (None, True):
        data = TokenizerData(json=json.dumps(tokenizer), bos=9, eos=10, add_bos=add_bos)
        llm = LLM.over(ReferenceEngine(weights()), weights().config, data)
        *_, result = perplexity(llm, "abcdefghcabdbacd" * 8, 16)
        values.append(result.value)
    assert values[0] == values[1]


def test_a_text_shorter_than_two_windows_has_no_perplexity() -> None:
    with pytest.raises(BitgenError, match="two windows of 64 are the least"):
        next(perplexity(small_llm(), "the end", 64))
    with pytest.raises(BitgenError, match="fit into the context of 256"):
        next(perplexity(small_llm(), "the end", 999))
    with pytest.raises(BitgenError, match="the windows must be 1 or more, not 0"):
        next(perplexity(small_llm(), "the end", 64, 0))


# ---- The distance to another model ----


def test_divergence_is_that_of_the_formula(tmp_path: Path) -> None:
    """KL(P || Q) = sum of P log(P / Q), P of the reference: of a model that runs, and of its file."""
    text = "the end and the other end of the hand in the sand " * 3
    llm, other = small_llm(seed=1), small_llm(seed=0)
    with LogitsWriter(tmp_path / "m.logits") as writer:
        *_, saved = perplexity(other, text, 32, save=writer)
    assert saved.divergence is None
    assert [p.name for p in tmp_path.iterdir()] == ["m.logits"]
    *_, result = perplexity(llm, text, 32, against=ModelReference(other, "other"))
    *_, again = perplexity(llm, text, 32, against=read_logits(tmp_path / "m.logits"))
    assert again == result
    values, same = [], []
    ids = llm.tokenizer.encode(text)
    for start in range(0, len(ids) - 31, 32):
        window = [1, *ids[start + 1 : start + 32]]
        p, q = (logits_of(weights(seed), window)[16:31].astype(np.float64) for seed in (0, 1))
        p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (p, q))
        values += (p * np.log(p / q)).sum(axis=1).tolist()
        same += (p.argmax(axis=1) == q.argmax(axis=1)).tolist()
    assert result.divergence is not None
    assert len(values) == result.tokens
    assert math.isclose(result.divergence.mean, np.mean(values), rel_tol=1e-9)
    assert math.isclose(result.divergence.error, np.std(values) / math.sqrt(len(values) - 1), rel_tol=1e-9)
    assert result.divergence.same_top == np.mean(same)
    *_, none = perplexity(other, text, 32, against=read_logits(tmp_path / "m.logits"))
    assert none.divergence == Divergence(0.0, 0.0, 1.0)


def test_logits_of_something_else_are_refused(tmp_path: Path) -> None:
    text = "the end and the other end of the hand in the sand " * 3
    path = tmp_path / "m.logits"
    with LogitsWriter(path) as writer:
        list(perplexity(small_llm(), text, 32, save=writer))
    for changed, context, what in (
        (text, 16, "another context: 32, not 16"),
        (text.replace("sand", "hand"), 32, "another text, another number of windows"),
    ):
        with pytest.raises(FileError, match=what):
            next(perplexity(small_llm(), changed, context, against=read_logits(path)))
    content = path.read_bytes()
    for length in (0, 7, 15, 40, 200, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(FileError):
            read_logits(path)
    path.write_bytes(content.replace(b'"rows": 15', b'"rows": -1'))
    with pytest.raises(FileError, match="is damaged"):
        read_logits(path)


def test_an_interrupted_file_of_logits_is_not_there(tmp_path: Path) -> None:
    with LogitsWriter(tmp_path / "m.logits") as writer:
        next(perplexity(small_llm(), "the end and the other end of the hand " * 3, 32, save=writer))
    assert not list(tmp_path.iterdir())


# ---- Chat ----

BITNET_2B = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | "
    "capitalize + ': '+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = "
    "bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ 'Assistant: ' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hi "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            BITNET_2B,
            "<s>System: Be brief.<|eot_id|>User: Hi<|eot_id|>Assistant: Hello<|eot_id|>User: Bye<|eot_id|>"
            "Assistant: ",
        ),
        (
            BUILT_IN["chatml"],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi <|im_end|>\n"
            "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
        ),
        (BUILT_IN["plain"], "Be brief.\n\nUser:  Hi \nAssistant: Hello\nUser: Bye\nAssistant:"),
        ("{%- for m in messages %}\n  {%- if loop.last %}{{ m | tojson }}{% endif %}\n{% endfor %}\n", None),
        ("{{ strftime_now('%Y')[:2] }}{{ nothing }}", "20"),
        ("{% for m in messages %}{% break %}{% endfor %}{{ messages | length }}", "4"),
        (
            "{% for m in messages %}{%- generation %}{{ m.content | trim }}|{%- endgeneration %}{% endfor %}",
            "Be brief.|Hi|Hello|Bye|",
        ),
        (
            "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
            '{"a":1,"b":"\\u00e9"}',
        ),
        ("{{ ['é'] | tojson(ensure_ascii=False) }}", '["é"]'),
    ],
)
def test_templates_render_as_hugging_face_renders_them(template: str, expected: str | None) -> None:
    text = render_chat(template, TALK, bos="<s>", eos="</s>")
    assert text == (expected if expected is not None else '{"role": "user", "content": "Bye"}')


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system messages') }}", "refuses: no system messages"),
        ("{% if %}", "fails: "),
        ("{{ messages[9].content.x }}", "fails: "),
        ("{{ 1 / 0 }}", "fails: "),
        ("{{ ''.__class__.__mro__ }}", "fails: "),
        ("{{ messages.append(1) }}", "fails: "),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "runs away"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "runs away"),
        ("{{ 'a' * 9999999999 }}", "makes a text that is too long"),
        ("{{ [1] * 99999999 }}", "makes a text that is too long"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "too long",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
            "too long",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}"
            "{% endset %}{% endfor %}",
            "too long",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x.replace('a', n.x) %}"
            "{% endfor %}",
            "too long",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x | replace('a', n.x) %}"
            "{% endfor %}",
            "too long",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = [n.x, n.x] | join('-') %}"
            "{% endfor %}",
            "too long",
        ),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = '-'.join([n.x, n.x]) %}"
            "{% endfor %}",
            "too long",
        ),
        ("{{ 9 ** 999999999 }}", "numbers that are too large"),
        ("{{ '%999999999d' % 1 }}", "formats with %"),
        ("{{ 'x'.ljust(999999999) }}", "calls ljust, which is not allowed"),
        ("{{ '{:>999999999}'.format(1) }}", "calls format, which is not allowed"),
        ("{% for i in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}", "too long"),
    ],
)
def test_templates_that_are_wrong_or_hostile_are_one_clear_error(template: str, message: str) -> None:
    with pytest.raises(BitgenError, match=f"the chat template.*{message}"):
        render_chat(template, TALK)


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "robot", "content": ""}], ["hi"]])
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(BitgenError, match="message"):
        render_chat(BUILT_IN["plain"], messages)


THINKS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    "<assistant>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("thinking", "end"), [(None, "<assistant>"), (True, "<assistant>"), (False, "</think>")]
)
def test_thinking_is_what_the_template_is_told(thinking: bool | None, end: str) -> None:
    assert knows_thinking(THINKS)
    assert not knows_thinking(BUILT_IN["chatml"])
    assert render_chat(THINKS, TALK, thinking=thinking).endswith(end)
    llm = small_llm()
    llm.template, llm.thinking = THINKS, thinking
    assert llm.chat_prompt(TALK) == llm.tokenizer.encode(render_chat(THINKS, TALK, thinking=thinking))


def test_a_chat_prompt_starts_with_one_bos() -> None:
    for template in ("{{ bos_token }}hi", "hi"):
        llm = small_llm(chat_template=template)
        ids = llm.chat_prompt(TALK)
        assert ids.count(1) == 1
        assert ids[0] == 1


def test_a_model_without_a_template_gets_the_one_of_its_vocabulary() -> None:
    tokens = piece_data().tokens
    assert small_llm().template_text == BUILT_IN["plain"]
    chatml = ("<|im_start|>", "<|im_end|>", *tokens[2:])
    assert small_llm(tokens=chatml).template_text == BUILT_IN["chatml"]


def test_a_plain_chat_ends_where_the_model_speaks_for_the_user() -> None:
    spoken = "x the end\nUser: and"
    llm = scripted(spoken)
    ids = TOKENIZER.encode(spoken)
    generation = llm.answer(ids[:3], temperature=0)
    assert "".join(generation).strip() == "the end"
    assert generation.finish == "stop"


def test_a_conversation_computes_only_what_is_new() -> None:
    llm = small_llm(batch=1)
    engine = llm.engine
    assert isinstance(engine, ReferenceEngine)
    talk = Conversation(llm, "be an end", max_tokens=5, seed=0, temperature=0.0)
    for text in ("the end", "and then"):
        engine.calls.clear()
        answer = talk.say(text)
        list(answer)
        talk.heard(answer)
    whole = len(llm.chat_prompt(talk.messages[:-1]))
    assert engine.calls[0] < whole / 2
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    fresh = small_llm().chat(talk.messages[:-1], max_tokens=5, temperature=0.0)
    assert talk.messages[-1]["content"] == "".join(fresh)


def test_a_full_context_forgets_the_oldest_turns_and_never_the_system_message() -> None:
    llm = small_llm(context=100)
    talk = Conversation(llm, "be", max_tokens=4, seed=0)
    for number in range(8):
        answer = talk.say(f"the end and {number}")
        list(answer)
        talk.heard(answer)
        assert len(llm.chat_prompt(talk.messages)) <= 100
    assert talk.forgotten > 0
    assert talk.forgotten % 2 == 0
    assert talk.messages[0] == {"role": "system", "content": "be"}
    assert talk.messages[1]["role"] == "user"
    talk.clear()
    assert [m["role"] for m in talk.messages] == ["system"]
    assert talk.forgotten == 0


def test_a_message_that_alone_is_too_long_leaves_the_conversation_as_it_was() -> None:
    talk = Conversation(small_llm(context=60), max_tokens=4, seed=0)
    answer = talk.say("the end")
    list(answer)
    talk.heard(answer)
    before = list(talk.messages)
    with pytest.raises(BitgenError, match=r"the message has .* tokens and the context holds 60"):
        talk.say("zzz " * 60)
    assert talk.messages == before


def test_an_answer_that_was_stopped_at_once_takes_its_question_along() -> None:
    talk = Conversation(small_llm())
    answer = talk.say("the end")  # nothing is read: Ctrl-C came first
    talk.heard(answer)
    assert talk.messages == []
    assert SPACE not in answer.text


def test_a_text_follows_a_schema_with_and_without_end() -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (the extra json)")
    llm = small_llm()
    options: dict[str, Any] = {"schema": {"enum": ["the", "an"]}, "seed": 3, "ignore_end": True}
    assert "".join(llm.generate("the", **options)) in ('"the"', '"an"')
    with pytest.raises(UsageError, match="a JSON schema is an object, not list"):
        llm.generate("the", schema=[])
    with pytest.raises(UsageError, match=r'cannot be used: failed to compile JSON schema: Un.* \["not"\]$'):
        llm.generate("the", schema={"not": {}})
