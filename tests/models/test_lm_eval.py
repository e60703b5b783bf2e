"""lm-evaluation-harness over bitgen: the choices and likelihoods of its own `hf`, and each context once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Server
from serving import FakeEngine

from bitgen.errors import UsageError
from bitgen.inference.likelihood import likelihoods
from bitgen.inference.passes import Row
from bitgen.inference.scheduler import Scheduler

ROOT = Path(__file__).parents[2]
VERSES = (ROOT / "tests" / "data" / "tiny-heldout.txt").read_text(encoding="utf-8").splitlines()

# The tiny model against transformers in float32: an ending of six words differed by 0.021 nats at the most.
BOUND = 0.05


# ---- Likelihoods, on an engine whose logits depend on every token before ----


def plainly(engine: FakeEngine, context: list[int], ending: list[int]) -> tuple[float, bool]:
    scheduler = Scheduler(engine)
    rows = scheduler.forward([Row(0, [*context, *ending][:-1])])[len(context) - 1 :]
    wide = rows.astype(np.float64)
    wide -= np.log(np.exp(wide).sum(axis=1, keepdims=True))
    found = sum(row[token] for row, token in zip(wide, ending, strict=True))
    return float(found), bool((rows.argmax(axis=1) == ending).all())


def test_endings_are_scored_as_if_alone() -> None:
    rng = np.random.default_rng(3)
    engine = FakeEngine(batch=3, context=700)
    scheduler = Scheduler(engine)
    for length in (1, 2, 40, 300):
        context = rng.integers(262, 280, length).tolist()
        endings = [rng.integers(262, 280, size).tolist() for size in (3, 1, 9, 2, 400, 5, 30)]
        best = Scheduler(FakeEngine(batch=1, context=700))
        endings.append([int(best.forward([Row(0, context)])[-1].argmax())])
        found = list(likelihoods(scheduler, context, endings))
        expected = [plainly(FakeEngine(batch=1, context=700), context, ending) for ending in endings]
        assert [each.greedy for each in found] == [greedy for _, greedy in expected]
        assert found[-1].greedy
        for each, (logprob, _) in zip(found, expected, strict=True):
            assert each.logprob == pytest.approx(logprob, abs=1e-9)


def test_a_shared_context_is_computed_once() -> None:
    engine = FakeEngine(batch=4, context=256)
    scheduler = Scheduler(engine)
    shots = list(range(262, 280)) * 5
    for question in ([270, 271], [272, 273]):
        list(likelihoods(scheduler, [*shots, *question], [[262, 263], [264], [265, 266, 267], [268], [269]]))
    # 91 positions of the first context, 1 of the second, and the last token of a context with each ending.
    assert sum(tokens for _, tokens in engine.passes) == 91 + 1 + 2 * (2 + 1 + 3 + 1 + 1)


def test_an_ending_that_does_not_fit_is_refused() -> None:
    scheduler = Scheduler(FakeEngine(batch=2, context=16))
    with pytest.raises(UsageError, match="the context holds 16"):
        list(likelihoods(scheduler, [262] * 10, [[263], [263] * 8]))


# ---- The harness ----


def write_tasks(folder: Path) -> Path:
    """Tasks over held-out verses of the King James Bible: which end is true, whole texts, what follows."""
    rng = np.random.default_rng(7)
    long = [verse.split() for verse in VERSES if len(verse.split()) > 16][:24]
    choices = []
    for i, words in enumerate(long):
        others = rng.choice([n for n in range(len(long)) if n != i], 3, replace=False).tolist()
        ends = [" ".join(words[-6:]), *(" ".join(long[n][-6:]) for n in others)]
        label = int(rng.integers(4))
        ends[0], ends[label] = ends[label], ends[0]
        choices.append({"start": " ".join(words[:-6]), "ends": ends, "label": label})
    texts = [{"text": "\n".join(VERSES[i : i + 12])} for i in range(0, 36, 12)]
    for name, rows in (("choices", choices), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    common += "task: {task}\nfewshot_split: test\noutput_type: {kind}\n"
    parts = {
        "verse_end": "doc_to_text: '{{start}}'\ndoc_to_choice: '{{ends}}'\ndoc_to_target: label\n"
        "num_fewshot: 2\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n",
        "verses": "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: word_perplexity\n",
        "verse_next": "doc_to_text: '{{start}}'\ndoc_to_target: '{{ends[label]}}'\ngeneration_kwargs:\n"
        '  until: ["\\n", ","]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n',
    }
    kinds = {
        "verse_end": "multiple_choice",
        "verses": "loglikelihood_rolling",
        "verse_next": "generate_until",
    }
    for task, text in parts.items():
        file = folder / ("texts.jsonl" if task == "verses" else "choices.jsonl")
        (folder / f"{task}.yaml").write_text(common.format(file=file, task=task, kind=kinds[task]) + text)
    return folder


@pytest.fixture
def samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bitgen_home: Path
) -> Callable[..., dict[str, Any]]:
    """A function from a model to the samples of all tasks."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")
    import lm_eval
    from lm_eval.tasks import TaskManager

    assert bitgen_home
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(include_path=str(write_tasks(tmp_path)), include_defaults=False)

    def run(model: Any, limit: int | None = None) -> dict[str, Any]:
        done = lm_eval.simple_evaluate(
            model=model,
            tasks=["verse_end", "verses", "verse_next"],
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            limit=limit,
        )
        found: dict[str, Any] = done["samples"]
        return found

    return run


def own(bundle: Path, **options: Any) -> Any:
    from bitgen.lm_eval import BitgenLM

    return BitgenLM("tiny", library=str(bundle), threads=2, **options)


def answers(samples: list[dict[str, Any]]) -> list[Any]:
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.deep
def test_equal_choices_and_likelihoods(
    samples: Callable[..., dict[str, Any]], bundle: Path, record_property: Callable[[str, object], None]
) -> None:
    for name in ("torch", "transformers", "safetensors"):
        pytest.importorskip(name, reason=f"{name} is the oracle")
    import torch
    from lm_eval.models.huggingface import HFLM
    from torch_models import model_of, tokenizer_of

    from bitgen.formats.open import open_model

    ours_model = own(bundle, kv="f32", batch_size=4)
    theirs_model = HFLM(
        pretrained=model_of(open_model("tiny").weights),
        tokenizer=tokenizer_of(ours_model.llm.tokenizer.data),
        device="cpu",
        batch_size=4,
        max_length=512,
    )
    ours = samples(ours_model)
    with torch._dynamo.config.patch(disable=True):
        theirs = samples(theirs_model)
    worst, same = 0.0, 0
    for mine, other in zip(ours["verse_end"], theirs["verse_end"], strict=True):
        pairs = list(zip(mine["filtered_resps"], other["filtered_resps"], strict=True))
        worst = max(worst, *(abs(a - b) for (a, _), (b, _) in pairs))
        assert [g for (_, g), _ in pairs] == [g for _, (_, g) in pairs]
        same += mine["acc"] == other["acc"] and mine["acc_norm"] == other["acc_norm"]
    far = [
        abs(mine["filtered_resps"][0] - other["filtered_resps"][0]) / abs(other["filtered_resps"][0])
        for mine, other in zip(ours["verses"], theirs["verses"], strict=True)
    ]
    both = zip(answers(ours["verse_next"]), answers(theirs["verse_next"]), strict=True)
    texts = sum(mine == other for mine, other in both)
    found = (
        f"{same} choices and {texts} texts of 24 equal; endings {worst:.1e} nats apart, texts {max(far):.1e}"
    )
    print(found)
    assert worst < BOUND
    assert max(far) < 1e-3
    assert same == texts == len(ours["verse_end"]) == 24
    record_property("oracle", f"lm_eval: {found}")


@pytest.mark.deep
def test_a_server_gives_the_same(
    samples: Callable[..., dict[str, Any]], bundle: Path, tmp_path: Path
) -> None:
    """The harness' own `local-completions` asks `bitgen serve`: every number is the one of our class."""
    for name in ("aiohttp", "tenacity", "lm_eval"):
        pytest.importorskip(name, reason=f"{name} is not installed (the extras lm_eval and clients)")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    ours = samples(own(bundle, batch_size=1, max_length=500))
    with Server(bundle, tmp_path, "--parallel", "4") as server:
        url = f"{server.url}/v1/completions"
        # Its windows of long texts are two tokens shorter than it is told.
        theirs = samples(LocalCompletionsAPI(base_url=url, model="tiny", max_length=502, batch_size=4))
    for task in ours:
        assert answers(ours[task]) == answers(theirs[task])


@pytest.mark.deep
def test_batches_and_orders_change_no_bit(samples: Callable[..., dict[str, Any]], bundle: Path) -> None:
    alone, together = (samples(own(bundle, batch_size=size), limit=6) for size in (1, "auto"))
    for task in alone:
        assert answers(alone[task]) == answers(together[task])


@pytest.mark.slow
@pytest.mark.usefixtures("bitgen_home")
def test_the_example_is_a_task(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the guide has it: from a checkout, with the task's folder."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(include_path=str(ROOT / "examples" / "lm_eval"), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model=own(bundle), tasks=["verses"], task_manager=manager, bootstrap_iters=0, limit=6
    )
    assert 0.0 <= done["results"]["verses"]["acc,none"] <= 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("bitgen_home")
def test_texts_that_are_longer_than_the_context(bundle: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")
    from types import SimpleNamespace

    model = own(bundle, max_length=32)
    text = "\n".join(VERSES[:4])
    ids = model.tok_encode(text)
    assert len(ids) > 3 * 32
    (whole,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    assert math.isfinite(whole)
    assert whole < 0
    # A context that is too long loses its start, as the harness' own models have it.
    (cut,) = model.loglikelihood([SimpleNamespace(args=(text, " the end"))], disable_tqdm=True)
    ending = model.tok_encode(f"{text} the end")[len(ids) :]
    kept = (ids + ending)[-33:]
    expected = list(likelihoods(model.llm.scheduler, kept[: -len(ending)], [ending]))
    assert cut == (expected[0].logprob, expected[0].greedy)
    (empty,) = model.loglikelihood([SimpleNamespace(args=("", "In the beginning"))], disable_tqdm=True)
    assert empty[0] < 0
    model.llm.close()


@pytest.mark.slow
@pytest.mark.usefixtures("bitgen_home")
def test_chats_and_wrong_arguments(bundle: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (the extra lm-eval)")
    from types import SimpleNamespace

    for wrong, said in (({"dtype": "float16"}, "no argument dtype"), ({"device": "cuda"}, "runs on the CPU")):
        with pytest.raises(UsageError, match=said):
            own(bundle, **wrong)
    model = own(bundle, max_length=64, device="cuda:0")  # the default of the harness' command line
    talk = [{"role": "user", "content": "hello"}]
    prompt = model.apply_chat_template(talk)
    assert "hello" in prompt
    assert prompt.startswith(model.apply_chat_template(talk, add_generation_prompt=False))
    assert model.chat_template(True) == model.llm.template_text
    with pytest.raises(UsageError, match="no chat template"):
        model.chat_template("nobody's")
    with pytest.raises(UsageError, match="do not fit into 64 positions"):
        model.generate_until([SimpleNamespace(args=("x", {"max_gen_toks": 64}))], disable_tqdm=True)
    model.llm.close()
