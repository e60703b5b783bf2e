"""Attention to a window: the bits of the exact model, transformers' logits, whatever way a text goes in."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import exact_logits
from feeding import feed, ids_of
from model_files import plain_model, tokenizer_json, write_folder, write_model
from model_files import small_config as file_config
from numpy.typing import NDArray
from reference_model import TIE, logits_of, small_config
from step_levels import LEVELS
from torch_models import floats_of, run, run_in_groups

from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import BitgenError, FileError
from bitgen.formats.config import ModelConfig
from bitgen.formats.convert import convert, gguf_metadata
from bitgen.formats.gguf import U32
from bitgen.formats.inspect import facts
from bitgen.formats.open import open_model
from bitgen.formats.weights import Weights
from bitgen.inference.engine import Engine
from bitgen.inference.synthetic import random_weights
from bitgen.inference.weight_cache import named_matrices
from bitgen.llm import LLM
from bitgen.runtime import KernelTable

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
NOISE = 1e-4  # standard deviations of logits, as in test_transformers


def sliding(*windows: int, **changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"context": 600, "layers": len(windows), "vocab": 61, "hidden": 64, "ffn": 80}
    return small_config(windows=windows, **{**sizes, **changes})


# ---- The numbers ----


# One key, less than a block, a block and a chunk and one around, more than the text; all keys in a layer.
@pytest.mark.parametrize("windows", [(1, 15), (16, 0), (0, 17), (127, 128), (129, 290), (700, 40)])
def test_logits_are_what_the_formulas_say(tables: Any, windows: tuple[int, ...]) -> None:
    config = sliding(*windows)
    weights, ids = random_weights(config, 1), ids_of(config, 300)
    steps: dict[str, Any] = {}
    expected = exact_logits(weights, ids, "f32", steps)
    got = feed(Engine(weights, tables(), kv="f32"), ids)
    assert np.array_equal(got, expected)
    formulas = logits_of(weights, ids, given=steps)
    assert np.abs(got - formulas).max() < 1e-5 * np.abs(formulas).max()
    whole = exact_logits(random_weights(replace(config, windows=()), 1), ids, "f32")
    first = min(window for window in windows if window)
    assert np.array_equal(got[:first], whole[:first])
    assert (first >= 300) or not np.array_equal(got, whole)


@cache
def exact_model(kv: str) -> tuple[Weights, list[int], NDArray[np.float32]]:
    config = sliding(30, 150, head_dim=40, kv_heads=1)
    weights, ids = random_weights(config, 2), ids_of(config, 290)
    return weights, ids, exact_logits(weights, ids, kv)


@pytest.mark.parametrize("kv", ["f16", "f32", "q8", "q4"])
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_same_bits(tables: Any, level: str, kv: Any) -> None:
    weights, ids, expected = exact_model(kv)
    assert np.array_equal(feed(Engine(weights, tables(level), kv=kv), ids), expected)


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_neither_threads_nor_cuts_change_a_bit(tables: Any, heads: int) -> None:
    """With fewer key heads than threads a step cuts the keys that are seen in spans, and merges chunks."""
    config = sliding(20, 0, 300, heads=6, kv_heads=heads, head_dim=100, layers=3)
    weights, ids = random_weights(config, 3), ids_of(config, 560)
    alone = feed(Engine(weights, tables(threads=1)), ids)
    for threads, cuts in (
        (1, [1] * 560),
        (2, [560]),
        (3, [380, 1, 1, 2, 15, 1, 16, 144]),
        (7, [540, *[1] * 20]),
    ):
        engine = Engine(weights, tables(threads=threads))
        assert np.array_equal(feed(engine, ids, cuts), alone), (threads, cuts)


def test_texts_in_a_batch_and_prefixes_have_windows_of_their_own(tables: Any) -> None:
    config = sliding(40, 200)
    weights, ids, other = random_weights(config, 4), ids_of(config, 400), ids_of(config, 90, 5)
    whole = feed(Engine(weights, tables()), ids)
    fork = feed(Engine(weights, tables()), ids[:250] + other)[250:]
    engine = Engine(weights, tables(), max_batch=3)
    feed(engine, ids, [300, 100])
    engine.copy(0, 1, 250)
    kept = engine.cached(1)
    assert np.array_equal(feed(engine, other, [50, 1, 39], sequence=1), fork)
    engine.truncate(0, 250)
    assert np.array_equal(feed(engine, other), fork)
    engine.restore(2, 250, kept)  # as a prompt cache does
    tokens = np.array([ids[250], other[0]], np.int32)
    engine.truncate(1, 250)
    both = engine.forward(tokens, np.full(2, 250, np.int32), np.array([2, 1], np.int32), np.ones(2, bool))
    assert np.array_equal(both, [whole[250], fork[0]])


def test_a_window_as_long_as_the_context_is_none(tables: Any) -> None:
    config = sliding(600, 900)
    weights, ids = random_weights(config, 6), ids_of(config, 300)
    without = random_weights(replace(config, windows=()), 6)
    assert np.array_equal(feed(Engine(weights, tables()), ids), feed(Engine(without, tables()), ids))


def test_a_window_that_is_none_is_refused(tables: Any) -> None:
    for windows in ((1,), (1, 2, 3), (5, -1)):
        with pytest.raises(FileError, match="windows must be 2 numbers of positions, one a layer"):
            small_config(windows=windows)
    engine = Engine(random_weights(sliding(5), 0), tables())
    engine._model.layer[0].window = -1
    with pytest.raises(BitgenError, match="the dimensions, types or pointers of a model do not fit"):
        feed(engine, [1])


def test_drafts_change_no_text(tables: Any, tmp_path: Path) -> None:
    """Longer than the window, with drafts from the text so far and from a model, and without."""
    model = plain_model(file_config("llama", vocab=97, context=400, windows=(24, 24)))
    path = write_model(tmp_path / "m.gguf", model)
    prompt = np.random.default_rng(1).integers(0, 90, 50).tolist() * 2
    texts = []
    for draft, options in ((None, {}), (None, {"lookup": True}), (path, {})):
        with LLM(path, library=tables().path.parent, threads=2, draft=draft) as llm:
            assert llm.config.windows == (24, 24)
            made = llm.generate(prompt, max_tokens=120, ignore_end=True, temperature=0.7, seed=3, **options)
            texts.append("".join(made))
    assert texts[0]
    assert texts == [texts[0]] * 3


# ---- transformers ----


def against_transformers(oracle: Any, weights: Weights, table: KernelTable, n: int) -> None:
    """With bitgen's int8 activations in place of the oracle's floats: the same logits but for noise."""
    ids = ids_of(weights.config, n)
    steps: dict[str, NDArray[np.int8]] = {}
    expected = exact_logits(weights, ids, "f32", steps)
    assert np.array_equal(feed(Engine(weights, table, kv="f32", context=n), ids), expected)
    groups = {name: weights.group_of(matrix) for name, matrix in named_matrices(weights).items()}
    same, farthest = run_in_groups(oracle, ids, groups, steps)
    deviation = run(oracle, ids).logits.std()
    assert farthest < TIE
    assert np.abs(expected - same).max() / deviation < NOISE


@pytest.mark.parametrize("form", ["hf", "gguf"])
@pytest.mark.parametrize(
    ("architecture", "windows"),
    [("llama", (40, 40)), ("qwen3", (0, 40)), ("qwen3", (150, 0, 150)), ("qwen3", (7, 7))],
)
def test_it_is_what_transformers_runs(
    tables: Any, tmp_path: Path, architecture: str, windows: tuple[int, ...], form: str
) -> None:
    """Mistral: all layers; Qwen3: those that `layer_types` names. Saved by transformers, opened here."""
    sizes: dict[str, Any] = {
        "hidden": 128,
        "ffn": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "vocab": 97,
    }
    config = file_config(
        architecture, **sizes, layers=len(windows), context=400, windows=windows, tied_head=False
    )
    plain = plain_model(config)
    plain.scale = {key: 0.1 * scale for key, scale in plain.scale.items()}  # else one key has all the weight
    made = open_model(write_model(tmp_path / "made.gguf", plain)).weights
    oracle = floats_of(made)
    folder = tmp_path / "hf"
    oracle.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(97)))
    path = convert(folder, tmp_path / "m.gguf").path if form == "gguf" else folder
    weights = open_model(path).weights
    assert weights.config.windows == windows
    against_transformers(oracle, weights, tables(), 320)


# ---- Files ----

OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
WINDOW: dict[str, Any] = {"sliding_window": 20}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
# What config.json says, of two layers and 64 positions: the class, the keys, the windows.
HF: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "Mistral": ("llama", "MistralForCausalLM", WINDOW, (20, 20)),
    "Mistral without": ("llama", "MistralForCausalLM", {"sliding_window": None}, ()),
    "Mistral, its default of 4096": (
        "llama",
        "MistralForCausalLM",
        {"max_position_embeddings": 8192},
        (4096,) * 2,
    ),
    "Mistral, as long as the context": ("llama", "MistralForCausalLM", {"sliding_window": 64}, ()),
    "Llama knows none": ("llama", "LlamaForCausalLM", WINDOW, ()),
    "Qwen3, not used": ("qwen3", "Qwen3ForCausalLM", {**WINDOW, "use_sliding_window": False}, ()),
    "Qwen3, not said": ("qwen3", "Qwen3ForCausalLM", WINDOW, ()),
    "Qwen3, later layers": (
        "qwen3",
        "Qwen3ForCausalLM",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
        (0, 20),
    ),
    "Qwen3, its default of 28 layers": (
        "qwen3",
        "Qwen3ForCausalLM",
        {**WINDOW, "use_sliding_window": True},
        (),
    ),
    "Qwen3, all": (
        "qwen3",
        "Qwen3ForCausalLM",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 0},
        (20, 20),
    ),
    "Qwen3, by kinds": (
        "qwen3",
        "Qwen3ForCausalLM",
        {**WINDOW, "use_sliding_window": True, **KINDS},
        (20, 0),
    ),
}


@pytest.mark.parametrize("name", HF)
def test_windows_of_config_json(tmp_path: Path, name: str) -> None:
    architecture, hf_class, keys, windows = HF[name]
    model = plain_model(file_config(architecture))
    changes = {"architectures": [hf_class], **keys}
    opened = open_model(write_folder(tmp_path / "m", model, "packed", OFFLINE, changes)).config
    assert opened.windows == windows
    if windows:  # as transformers reads the same keys
        transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
        config = getattr(transformers, hf_class.replace("ForCausalLM", "Config"))(
            num_hidden_layers=2, **{k: v for k, v in changes.items() if k != "architectures"}
        )
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * 2
        assert config.sliding_window == max(windows)
        assert [kind == "sliding_attention" for kind in kinds] == [window > 0 for window in windows]


@pytest.mark.parametrize(
    "kinds", [["full_attention"], ["full_attention", "chunked_attention"], "all", [[], 1]]
)
def test_kinds_of_layers_that_are_none_are_refused(tmp_path: Path, kinds: Any) -> None:
    changes = {**WINDOW, "use_sliding_window": True, "layer_types": kinds}
    folder = write_folder(tmp_path / "m", plain_model(file_config("qwen3")), "packed", OFFLINE, changes)
    with pytest.raises(FileError, match="layer_types is not 2 of full_attention and sliding_attention"):
        open_model(folder)


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"sliding_window": U32(20)}, (20, 20)),
        ({"sliding_window": U32(64)}, ()),
        ({"sliding_window": U32(0)}, ()),
        ({"sliding_window": U32(20), "sliding_window_pattern": np.array([True, True])}, (20, 20)),
        ({"sliding_window": U32(20), "sliding_window_pattern": np.array([False, True])}, (0, 20)),
    ],
)
def test_windows_of_a_gguf_file(tmp_path: Path, keys: dict[str, Any], windows: tuple[int, ...]) -> None:
    model = plain_model(file_config("llama"))
    metadata = {f"llama.attention.{key}": value for key, value in keys.items()}
    opened = open_model(write_model(tmp_path / "m.gguf", model, metadata=metadata)).config
    assert opened.windows == windows


@pytest.mark.parametrize("windows", [(), (20, 20), (0, 20)])
def test_a_converted_file_keeps_its_windows(tmp_path: Path, windows: tuple[int, ...]) -> None:
    path = write_model(tmp_path / "m.gguf", plain_model(file_config("llama", windows=windows)))
    assert open_model(path).config.windows == windows
    again = convert(path, tmp_path / "again.gguf", "tq2_0" if not windows else "f16").path
    assert open_model(again).config.windows == windows


def test_windows_of_two_lengths_fit_into_no_gguf_file() -> None:
    with pytest.raises(FileError, match="a GGUF file holds one length of windows, not 10, 20"):
        gguf_metadata(file_config("llama", windows=(10, 20)), "llama", None)


@pytest.mark.parametrize("layers", [1 << 24, 1 << 62])
def test_layers_that_are_not_there_take_no_memory(tmp_path: Path, layers: int) -> None:
    """A window for each of them would: they are counted in a file before anything is made of them."""
    model = plain_model(file_config("llama"))
    metadata = {"llama.block_count": layers, "llama.attention.sliding_window": U32(20)}
    changes = {"architectures": ["MistralForCausalLM"], **WINDOW, "num_hidden_layers": layers}
    for path in (
        write_model(tmp_path / "m.gguf", model, metadata=metadata),
        write_folder(tmp_path / "m", model, "packed", OFFLINE, changes),
    ):
        with pytest.raises(FileError, match=r"layers must be at most|is missing"):
            open_model(path)


def test_inspect_says_how_far_attention_sees(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", plain_model(file_config("llama", windows=(0, 20))))
    assert (
        facts(open_model(path))["windows"] == "20 positions in 1 of 2 layers, all positions in 1 of 2 layers"
    )
    assert "windows" not in facts(
        open_model(write_model(tmp_path / "n.gguf", plain_model(file_config("llama"))))
    )
