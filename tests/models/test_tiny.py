"""The model that ships: it speaks, and what it says is what PyTorch computed when it was trained.

models/tiny.json was written by tools/train_tiny.py together with the model.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libraries
import numpy as np
import pytest
from step_levels import LEVELS

from bitgen.bundle import KernelEntry
from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cli import main
from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError
from bitgen.formats.open import open_model, shipped_model
from bitgen.inference.perplexity import perplexity
from bitgen.llm import LLM
from bitgen.paths import models_dir
from bitgen.spec import REGIMES, Layout

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
FIGURES: dict[str, Any] = json.loads((models_dir() / "tiny.json").read_text())
GREEDY: list[dict[str, Any]] = FIGURES["greedy"]
HELD_OUT = (Path(__file__).parents[1] / "data" / "tiny-heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_cache(bitgen_home: Path) -> None:
    """Packed weights go to an empty cache."""


def test_it_is_found_by_its_name() -> None:
    assert shipped_model("tiny") == models_dir() / "tiny.gguf"
    assert open_model("tiny").path == models_dir() / "tiny.gguf"


@pytest.mark.parametrize("name", ["huge", "tiny.gguf", "./tiny", "../models/tiny", ""])
def test_nothing_else_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shipped_model(name) is None
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitgenError):
        open_model(name)


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").write_bytes(b"something else")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BitgenError, match="tiny"):
        open_model("tiny")


def test_it_is_small_and_ternary() -> None:
    model = open_model("tiny")
    assert model.path.stat().st_size <= 4_000_000
    matrices = [t for t in model.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    assert {t.type for t in matrices} == {"i2_s"}
    assert len(matrices) == 7 * model.config.layers
    assert {t.type for t in model.tensors if t not in matrices} == {"f16", "f32"}
    assert (model.config.architecture, model.config.activation) == ("bitnet-b1.58", "relu2")


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("level", LEVELS)
def test_run_prints_the_recorded_text(
    level: str,
    threads: str,
    level_library: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    library = str(level_library(level))
    for each in GREEDY:
        argv = ["run", "--model", "tiny", "--library", library, "-t", threads, "--temp", "0", "--no-perf"]
        assert main([*argv, "-p", each["prompt"], "-n", str(len(each["tokens"]))]) == 0
        assert capsys.readouterr().out == each["prompt"] + each["text"] + "\n"


def test_a_bundle_computes_the_logits_of_a_tuned_library(universal_library: Path, tmp_path: Path) -> None:
    """Other schedules, another layout of the weights, a step for the model's sizes: the same bits."""
    cpu, config = detect_cpu(), open_model("tiny").config
    layout = Layout("i2s", 32)
    choices = [
        KernelEntry(libraries.spec_for(layout, regime, shape, cpu), shape, 2)
        for shape in config.shapes
        for regime in REGIMES
    ]
    toolchain, target = libraries.toolchain_of(), Target.of(cpu)
    tuned = write_library(choices, toolchain, tmp_path, "tuned", target, check=False)
    logits = []
    for library in (tuned, universal_library):
        with LLM("tiny", library=library, threads=2) as llm:
            assert llm.table is not None
            assert (llm.table.layout_name(config.shapes[0]) == layout.name) == (library == tuned)
            logits.append([llm.logits(GREEDY[0]["ids"][:n]) for n in (1, 3, len(GREEDY[0]["ids"]))])
    assert all(np.array_equal(*each) for each in zip(*logits, strict=True))


@pytest.fixture
def llm(level_library: Callable[[str], Path]) -> Iterator[LLM]:
    """As exact as it gets: keys and values in float32, like PyTorch's."""
    with LLM("tiny", library=level_library(BEST), threads=2, kv="f32") as llm:
        yield llm


def test_the_tokenizer_in_the_file_is_the_one_it_was_trained_with(llm: LLM) -> None:
    for each in GREEDY:
        assert llm.tokenizer.encode(each["prompt"]) == each["ids"]


def test_the_likeliest_tokens_are_pytorchs(llm: LLM) -> None:
    for each in GREEDY:
        generation = llm.generate(each["ids"], max_tokens=len(each["tokens"]), temperature=0, ignore_end=True)
        "".join(generation)
        assert generation.tokens == each["tokens"]


def test_perplexity_of_held_out_text_is_pytorchs(llm: LLM) -> None:
    recorded = FIGURES["heldout"]
    *_, result = perplexity(llm, HELD_OUT, recorded["context"])
    assert result.tokens == recorded["tokens"]
    # Both compute exact integer sums from float32 activations; they differ where an activation lies so close
    # to the middle of two int8 values that another order of a float32 sum rounds it the other way. That moves
    # likelihoods as often up as down (measured: 4.4e-5 of the perplexity).
    assert math.isclose(result.value, recorded["perplexity"], rel_tol=5e-4)


def test_what_the_tool_trains_is_what_bitgen_runs(
    tmp_path: Path, level_library: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a second: folder and GGUF file are the same model, and PyTorch's perplexity is bitgen's."""
    for needed in ("torch", "safetensors"):
        pytest.importorskip(needed, reason=f"tools/train_tiny.py needs {needed}")
    path = Path(__file__).parents[2] / "tools" / "train_tiny.py"
    spec = importlib.util.spec_from_file_location("train_tiny", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_tiny", tool)  # dataclasses look their module up
    spec.loader.exec_module(tool)
    monkeypatch.setattr(tool, "HELD_OUT_EVERY", 4)
    (tmp_path / "text.txt").write_text(HELD_OUT.replace("\n", "\n\n"), encoding="utf-8")
    out = tmp_path / "model"
    tool.main(["--text", str(tmp_path / "text.txt"), "--out", str(out), "--minutes", "0.02", "--layers", "1"])
    figures = json.loads((out / "figures.json").read_text())
    assert figures["training"]["steps"] >= 1
    library = level_library(BEST)
    for model in (out, out / "tiny.gguf"):
        with LLM(model, library=library, threads=2, kv="f32") as llm:
            *_, result = perplexity(llm, (out / "heldout.txt").read_text(), figures["heldout"]["context"])
        assert math.isclose(result.value, figures["heldout"]["perplexity"], rel_tol=5e-4)


def test_it_predicts_english(llm: LLM) -> None:
    """Far better than chance (the size of the vocabulary), and better than the text reversed."""
    *_, forward = perplexity(llm, HELD_OUT, 512, most=4)
    words = HELD_OUT.split(" ")
    *_, backward = perplexity(llm, " ".join(reversed(words)), 512, most=4)
    assert forward.value < llm.config.vocab / 20
    assert forward.value < backward.value / 4
