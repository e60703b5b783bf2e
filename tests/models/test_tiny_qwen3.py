"""The Qwen3 with groups that ships: what PyTorch computed with float activations, and how far the modes are.

models/tiny_qwen3.json was written by tools/train_tiny_qwen3.py together with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from step_levels import LEVELS

from bitgen.cli import main
from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import FileError
from bitgen.formats.open import open_model
from bitgen.inference.perplexity import ModelReference, perplexity
from bitgen.llm import LLM
from bitgen.paths import models_dir

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
FIGURES: dict[str, Any] = json.loads((models_dir() / "tiny_qwen3.json").read_text())
HELD_OUT = (Path(__file__).parents[1] / "data" / "tiny-heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_cache(bitgen_home: Path) -> None:
    """Packed weights go to an empty cache."""


def test_it_is_small_and_all_of_it_is_ternary_in_groups() -> None:
    model = open_model("tiny_qwen3")
    assert model.path.stat().st_size < 2_000_000
    assert {t.type for t in model.tensors if len(t.shape) == 2} == {"ptq1_0"}
    assert (model.config.architecture, model.config.group, model.config.tied_head) == ("qwen3", 128, True)
    assert model.weights.ternary_head is not None


# How far the perplexity of held-out text may be from PyTorch's, which rounds no activation: for int16 float32
# sums in another order, for int8 also half a step of 1 / 127 of a group's largest. It is 3.8e-7 and 1.1e-6.
BOUNDS = {"int16": 2e-6, "int8": 1e-5}


@pytest.mark.parametrize("activations", BOUNDS)
def test_perplexity_is_pytorchs(activations: Any, level_library: Callable[[str], Path]) -> None:
    recorded = FIGURES["heldout"]
    library = level_library(BEST)
    with LLM("tiny_qwen3", library=library, threads=2, kv="f32", activations=activations) as llm:
        *_, result = perplexity(llm, HELD_OUT, recorded["context"])
    assert result.tokens == recorded["tokens"]
    assert math.isclose(result.value, recorded["perplexity"], rel_tol=BOUNDS[activations])


@pytest.mark.parametrize("level", LEVELS)
def test_run_prints_pytorchs_text(
    level: str, level_library: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--model", "tiny_qwen3", "--library", str(level_library(level)), "--temp", "0"]
    for each in FIGURES["greedy"]:
        more = ["-p", each["prompt"], "-n", str(len(each["tokens"])), "--no-perf", "--ignore-eos"]
        assert main([*argv, "--activations", "int16", *more]) == 0
        assert capsys.readouterr().out == each["prompt"] + each["text"] + "\n"


def test_int16_is_far_nearer_to_the_floats_than_int8(level_library: Callable[[str], Path]) -> None:
    """By the divergence from int16: that of int8 is what its rounding costs."""
    library = level_library(BEST)
    with (
        LLM("tiny_qwen3", library=library, threads=2, activations="int8") as llm,
        LLM("tiny_qwen3", library=library, threads=2, activations="int16") as other,
    ):
        assert llm.precision == ("kv f16",)
        assert other.precision == ("kv f16", "int16")
        *_, result = perplexity(llm, HELD_OUT, 512, most=2, against=ModelReference(other, "int16"))
    assert result.divergence is not None
    assert 1e-6 < result.divergence.mean < 1e-2
    assert result.divergence.same_top > 0.95


def test_a_prompt_cache_is_of_one_mode(level_library: Callable[[str], Path], tmp_path: Path) -> None:
    library, path = level_library(BEST), tmp_path / "cache"
    with LLM("tiny_qwen3", library=library, threads=1, activations="int16") as llm:
        text = "".join(llm.generate("In the beginning", max_tokens=4, temperature=0, ignore_end=True))
        llm.save_cache(path)
        llm.load_cache(path)
        again = llm.generate("In the beginning", max_tokens=4, temperature=0, ignore_end=True)
        assert "".join(again) == text
    refusal = pytest.raises(FileError, match="another model, version, --kv or --activations")
    with LLM("tiny_qwen3", library=library, threads=1, activations="int8") as llm, refusal:
        llm.load_cache(path)
