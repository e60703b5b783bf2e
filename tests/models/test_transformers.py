"""Checkpoints that transformers writes, read here: the same integers in every BitLinear, the same logits.

Running free, both sides take float32 sums in their own order, so an activation that lies next to the middle
of two int8 values may be rounded to either. Three runs tell that from an error: bitgen's, PyTorch's, and
PyTorch's with bitgen's int8 activations in place of its own. The last two differ by the other roundings
alone, which bounds what those may change; the first and the last by the noise of float32 alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import exact_logits
from model_files import GROUP, grouped_model, plain_model, small_config, tokenizer_json, write_model
from numpy.typing import NDArray
from reference_model import TIE, logits_of
from torch_models import (
    ARCHITECTURES,
    Run,
    embedding_model,
    floats_of,
    linears,
    model_of,
    own_step_name,
    random_model,
    run,
    run_embedding,
    run_in_groups,
    save,
    save_embedding,
    scaled,
    states_of,
    step_name,
    torch,
)

from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.formats.convert import convert
from bitgen.formats.gguf import read_gguf
from bitgen.formats.matrices import ternary_matrix
from bitgen.formats.open import open_model
from bitgen.formats.ternary import encode_blocks
from bitgen.formats.weights import Weights
from bitgen.inference import divergence
from bitgen.inference.engine import Engine
from bitgen.inference.perplexity import perplexity
from bitgen.inference.weight_cache import named_matrices
from bitgen.llm import LLM
from bitgen.paths import models_dir
from bitgen.reference import quantize_activations
from bitgen.runtime import Activations, KernelTable, load
from bitgen.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
IDS = [1, 17, 3, 80, 80, 5, 41, 0, 63, 22]
TEXT = np.random.default_rng(5).integers(0, 97, 64).tolist()
HELD_OUT = (Path(__file__).parents[1] / "data" / "tiny-heldout.txt").read_text(encoding="utf-8")
FIGURES = json.loads((models_dir() / "tiny.json").read_text())
# The most that was measured over the models below: 1.1e-5, and 1.1e-4 of TIE's int8 step.
NOISE = 1e-4  # standard deviations of the logits that the same activations leave


@pytest.fixture(autouse=True)
def _own_cache(bitgen_home: Path) -> None:
    """Packed weights go to an empty cache."""


@pytest.fixture(scope="module")
def table(level_library: Callable[[str], Path]) -> Iterator[KernelTable]:
    with load(level_library(BEST), 2) as table:
        yield table


@pytest.mark.parametrize("preset", ["2B-4T", "8B"])
@pytest.mark.parametrize("form", ["master", "bitlinear", "autobitlinear"])
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_the_integers_are_equal(
    tmp_path: Path, table: KernelTable, preset: str, form: str, container: str
) -> None:
    model = random_model(preset)
    path = save(model, tmp_path, form)
    if container == "gguf":
        (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
        convert(tmp_path, tmp_path / "m.gguf")
        path = tmp_path / "m.gguf"
    weights = open_model(path).weights
    expected = run(model, IDS)
    matrices = linears(weights)
    assert set(expected.inputs) == set(matrices)
    for name, x in expected.inputs.items():
        xq, w = np.rint(scaled(x)).astype(np.int8), oracle_ternary(model, name)
        rows = matrices[name].rows(0, matrices[name].shape.m)
        assert np.array_equal(rows, w), name
        assert np.array_equal(quantize_activations(x)[0], xq), name
        acc = xq.astype(np.int64) @ w.astype(np.int64).T
        assert np.array_equal(table.linear(rows, 1.0).accumulate(xq), acc), name
    got = logits_of(weights, IDS)
    # The reference is float64: an activation that lies between two integers may round the other way.
    assert np.abs(got - expected.logits).max() < 0.02 * expected.logits.std()
    assert np.array_equal(got.argmax(axis=1), expected.logits.argmax(axis=1))


def oracle_ternary(model: Any, name: str) -> NDArray[np.int8]:
    """The weights of a linear layer as AutoBitLinear rounds them."""
    weight = model.get_submodule(name).weight.detach()
    s = 1.0 / weight.abs().mean().clamp(min=1e-5)
    rounded: NDArray[np.int8] = (weight * s).round().clamp(-1, 1).to(torch.int8).numpy()
    return rounded


# ---- Running free ----


@dataclass(frozen=True)
class Comparison:
    """bitgen and the oracle over one text."""

    activations: int
    different: int  # int8 activations that are not equal, each run with its own
    tie: float  # the farthest any of bitgen's was from where the oracle rounds, in int8 steps
    noise: float  # largest difference of logits with the same activations, in standard deviations
    off: float  # the same with each its own
    decided: int  # tokens whose gap between the two likeliest is larger than what the roundings imply
    equal: int  # of those, the ones that both find likeliest
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.different} of {self.activations} activations round differently, all within "
            f"{self.tie:.1e} of a tie; logits {self.off:.1e} apart, {self.noise:.1e} without those; "
            f"{self.equal} of {self.decided} decided tokens equal ({self.tokens} in all)"
        )


def compare(
    model: Any,
    weights: Weights,
    ids: list[int],
    table: KernelTable,
    run: Callable[..., Run] = run,
    step_name: Callable[[str], str] = step_name,
) -> Comparison:
    n = len(ids)
    engine = Engine(weights, table, kv="f32", context=n)
    positions, none = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    got = engine.forward(np.array(ids, np.int32), positions, none, np.ones(n, bool))
    # The model in numpy that the engine equals bit for bit tells what the engine multiplied.
    steps: dict[str, NDArray[np.int8]] = {}
    assert np.array_equal(exact_logits(weights, ids, "f32", steps), got)
    free, same = run(model, ids), run(model, ids, steps)
    inputs = {step_name(name): (x, same.inputs[name]) for name, x in free.inputs.items()}
    different = sum(int((np.rint(scaled(x)) != steps[step]).sum()) for step, (x, _) in inputs.items())
    ties = [np.abs(scaled(x) - steps[step]).max() - 0.5 for step, (_, x) in inputs.items()]
    moved = same.logits - free.logits
    deviation = float(free.logits.std())
    # What the difference of two logits of a token can have moved by: the roundings, and noise on both.
    bound = moved.max(axis=1) - moved.min(axis=1) + 2 * NOISE * deviation
    second, first = np.sort(free.logits, axis=1)[:, -2:].T
    decided = first - second > bound
    equal = got.argmax(axis=1) == free.logits.argmax(axis=1)
    return Comparison(
        activations=sum(steps[step].size for step in inputs),
        different=different,
        tie=max(0.0, *map(float, ties)),
        noise=float(np.abs(got - same.logits).max()) / deviation,
        off=float(np.abs(got - free.logits).max()) / deviation,
        decided=int(decided.sum()),
        equal=int((equal & decided).sum()),
        tokens=n,
    )


def check(found: Comparison) -> None:
    print(found)
    assert found.tie < TIE, "an activation is wrong, not rounded the other way"
    assert found.noise < NOISE, "the logits differ by more than the roundings imply"
    assert found.equal == found.decided
    assert found.decided > found.tokens / 2, "the comparison must say something"


@pytest.mark.parametrize("preset", ARCHITECTURES)
def test_running_free_only_ties_round_differently(
    preset: str, tmp_path: Path, table: KernelTable, record_property: Callable[[str, object], None]
) -> None:
    model = random_model(preset)
    found = compare(model, open_model(save(model, tmp_path, "master")).weights, TEXT, table)
    record_property("oracle", f"{preset}: {found}")
    check(found)


@pytest.mark.parametrize("tied", [True, False])
def test_groups_are_those_of_qwen3_in_floats(
    tied: bool, tmp_path: Path, table: KernelTable, record_property: Callable[[str, object], None]
) -> None:
    """A model as Ternary Bonsai's, in its file type, against transformers on the unpacked weights.

    With bitgen's int8 activations in place of floats the logits are the same up to noise, and each of these
    is what PyTorch's activation rounds to; with floats they differ by what the rounding costs.
    """
    model = grouped_model(layers=2, tied_head=tied)
    weights = open_model(write_model(tmp_path / "m.gguf", model, "ptq1_0")).weights
    record_property("oracle", f"groups, tied {tied}: {against_floats(weights, table, most=1e-3)}")


def against_floats(
    weights: Weights, table: KernelTable, most: float, activations: Activations = "int8"
) -> str:
    """A model that was not trained to round activations, against transformers on its weights as floats.

    ``most``: the KL divergence that rounding them may cost.
    """
    oracle, ids = floats_of(weights), np.random.default_rng(5).integers(0, weights.config.vocab, 64).tolist()
    n = len(ids)
    positions, none = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    engine = Engine(weights, table, kv="f32", context=n, activations=activations)
    got = engine.forward(np.array(ids, np.int32), positions, none, np.ones(n, bool))
    free = run(oracle, ids).logits
    compared = divergence.Comparison()
    for expected, row in zip(free, got, strict=True):
        compared.add(expected, row)
    found = compared.result
    assert found.mean < most
    assert found.same_top > 0.9  # random weights: the likeliest tokens are close
    steps: dict[str, NDArray[np.int8]] = {}
    assert np.array_equal(exact_logits(weights, ids, "f32", steps, activations), got)
    if activations == "int16":
        return f"{activations}: {found}"
    groups = {name: weights.group_of(matrix) for name, matrix in named_matrices(weights).items()}
    same, farthest = run_in_groups(oracle, ids, groups, steps)
    noise = float(np.abs(got - same).max() / free.std())
    assert farthest < TIE
    assert noise < NOISE
    return f"noise {noise:.1e}, farthest {farthest:.1e}, {found}"


@pytest.mark.parametrize("kind", ["f16", "tq1_0", "tq2_0"])
def test_shards_are_those_of_llama_in_floats(
    kind: str, tmp_path: Path, table: KernelTable, record_property: Callable[[str, object], None]
) -> None:
    """TriLM's: trained on several devices, each with a scale for its part of a matrix, f16.

    Rows of q, k, v, gate and up are cut, and columns of o and down: the first have a scale a row here, the
    others run in groups of 128. Three devices, as widths of the 190M model are cut into parts of 256 and 512.
    """
    weights = open_model(sharded_file(tmp_path / "m.gguf", kind)).weights
    config, layer = weights.config, weights.layers[0]
    assert (config.architecture, config.group) == ("llama", 0)
    assert [weights.group_of(matrix) for matrix in layer.matrices] == [0, 128, 0, 128]
    assert len(set(layer.qkv.scale.tolist())) == 9
    assert [len(set(one.scales(0, 1)[0])) for one in (layer.o, layer.down)] == [3, 3]
    record_property("oracle", f"shards, {kind}: {against_floats(weights, table, most=1e-2)}")
    if kind == "f16":
        found = against_floats(weights, table, most=1e-5, activations="int16")
        record_property("oracle", f"shards, {found}")


def sharded_file(path: Path, kind: str, shards: int = 3) -> Path:
    """A small TriLM: llama, as many heads for keys as for queries, a head of its own."""
    sizes = {"hidden": 768, "ffn": 1536, "heads": 12, "kv_heads": 12, "head_dim": 64, "vocab": 300}
    model, rng = plain_model(small_config("llama", **sizes, layers=1)), np.random.default_rng(9)
    for key, w in model.w.items():
        scales = rng.uniform(0.02, 0.06, shards).astype(np.float16).astype(np.float32)
        m, k = w.shape
        if key.endswith(("attn_output", "ffn_down")):
            model.scale[key] = np.broadcast_to(np.repeat(scales, k // GROUP // shards), (m, k // GROUP))
        else:
            model.scale[key] = np.broadcast_to(np.repeat(scales, m // shards)[:, None], (m, k // GROUP))
    return write_model(path, model, kind)


def test_a_matrix_of_the_largest_trilm() -> None:
    """3.9B's: down is 3072 x 9216, o 3072 x 3072, on six devices. Codes and scales of each part are kept."""
    rng, m = np.random.default_rng(2), 48  # of 3072 rows
    for k in (9216, 3072):
        w = rng.integers(-1, 2, (m, k), dtype=np.int8)
        shards = rng.uniform(0.02, 0.06, 6).astype(np.float16).astype(np.float32)
        blocks = np.broadcast_to(np.repeat(shards, k // 6 // 256), (m, k // 256))
        values = (w * np.repeat(shards, k // 6)).astype("<f2").view(np.uint8)
        stored = {"f16": values} | {kind: encode_blocks(kind, w, blocks) for kind in ("tq1_0", "tq2_0")}
        for kind, data in stored.items():
            matrix = ternary_matrix("w", kind, (m, k), data.reshape(-1))
            assert matrix.group == 256, kind
            assert np.array_equal(matrix.rows(0, m), w), kind
            assert np.array_equal(matrix.scales(0, m), blocks), kind


@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_bitnet_embedding_is_what_transformers_runs(
    container: str, tmp_path: Path, table: KernelTable, record_property: Callable[[str, object], None]
) -> None:
    """Qwen3 whose linear layers norm their input once more, each by itself: states, then vectors."""
    model = embedding_model()
    path = save_embedding(model, tmp_path / "hf")
    end: dict[str, Any] = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ends = {  # as Qwen3's models of vectors append the end of a text
        "type": "TemplateProcessing",
        "single": [first, end],
        "pair": [first, end, second, end],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [96], "tokens": ["</s>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps({**tokenizer_json(97), "post_processor": ends}))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    if container == "gguf":
        path = convert(path, tmp_path / "m.gguf").path
        types = {name: info.type for name, info in read_gguf(path).tensors.items() if name.startswith("blk.")}
        assert sorted(set(types.values())) == ["f32", "i2_s"]
        assert types["blk.1.ffn_down_norm_in.weight"] == "f32"
    weights = open_model(path).weights
    config = weights.config
    assert (config.architecture, config.group, config.tied_head) == ("bitnet-embedding", 0, True)
    assert [one.role for one in config.layer_matmuls] == ["q", "k", "v", "o", "gate", "up", "down"]
    found = compare(model, weights, TEXT, table, run_embedding, own_step_name)
    record_property("oracle", f"BitNet-embedding, {container}: {found}")
    check(found)
    with LLM(path, library=table.path.parent, threads=2, kv="f32") as llm:
        texts = ["abc", "theland", "a"]
        vectors = list(llm.embed(texts))
        for text, vector in zip(texts, vectors, strict=True):
            ids = llm.tokenizer.encode(text)
            assert ids[-1] == llm.tokenizer.eos
            state = states_of(model, ids)[-1].astype(np.float64)
            # Activations that round the other way move a random model's states; NOISE is without those.
            assert float(vector @ (state / np.linalg.norm(state))) > 0.999


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Weights, Tokenizer]:
    """The model that ships, as transformers runs it: weights that mean something."""
    opened = open_model("tiny")
    return model_of(opened.weights), opened.weights, Tokenizer(opened.tokenizer_data)


def test_running_free_over_text(
    tiny: Any, table: KernelTable, record_property: Callable[[str, object], None]
) -> None:
    model, weights, tokenizer = tiny
    found = compare(model, weights, tokenizer.encode(HELD_OUT)[:64], table)
    record_property("oracle", f"tiny: {found}")
    check(found)


def test_what_the_tiny_model_says_is_what_transformers_says(tiny: Any) -> None:
    """The texts that test_tiny.py holds bitgen to were recorded by the program that trained the model."""
    model, _, _ = tiny
    for each in FIGURES["greedy"]:
        ids, tokens = each["ids"], each["tokens"]
        likeliest = run(model, ids + tokens).logits.argmax(axis=1)
        assert likeliest[len(ids) - 1 : -1].tolist() == tokens


def test_perplexity_of_the_tiny_model_is_that_of_transformers(tiny: Any, table: KernelTable) -> None:
    """llama.cpp's windows, written down once more: no overlap, the second half of each is predicted."""
    model, _, tokenizer = tiny
    assert not tokenizer.add_bos, "no window begins with another token than the text's"
    ids, size, most = tokenizer.encode(HELD_OUT), 512, 4
    nll: list[float] = []
    for begin in range(0, min(len(ids) // size, most) * size, size):
        window = ids[begin : begin + size]
        rows = run(model, window).logits[size // 2 : size - 1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        likelihood = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
        nll += [-row[target] for row, target in zip(likelihood, window[size // 2 + 1 :], strict=True)]
    with LLM("tiny", library=table.path.parent, threads=2, kv="f32") as llm:
        *_, result = perplexity(llm, HELD_OUT, size, most=most)
    assert result.tokens == len(nll) == most * 255
    assert math.isclose(result.value, math.exp(np.mean(nll)), rel_tol=5e-4)
