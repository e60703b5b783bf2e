"""Models whose matrices have weights of 4 bits: their types in GGUF files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import exact_logits
from model_files import interleave, plain_model, refused, shape_of, small_config, tensor, write_model
from reference_model import TIE

from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import FileError
from bitgen.formats.code_rows import code_floats, common_kind
from bitgen.formats.coded import CODED, FP4, UE4M3, coded_matrix, decode_codes
from bitgen.formats.config import ModelConfig
from bitgen.formats.convert import convert
from bitgen.formats.gguf import NewTensor, read_gguf
from bitgen.formats.inspect import facts
from bitgen.formats.open import open_model
from bitgen.formats.quants import DENSE, IQ4_NL, OTHER
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.inference.engine import Engine
from bitgen.reference import are_halves
from bitgen.runtime import load
from bitgen.spec import EVERY_FAMILY, Shape

pytestmark = pytest.mark.slow

BEST = accepted_isas(detect_cpu(), load_isas())[0].name
TYPES = tuple(CODED)
IDS = {name: (DENSE.get(name) or OTHER[name]).id for name in TYPES}
SIZES = {"hidden": 64, "ffn": 192, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 300, "layers": 2}


def random_blocks(kind: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Bytes of a matrix: every code, scales and offsets near those of trained weights."""
    rng, size = np.random.default_rng((seed, rows, cols)), CODED[kind].block_bytes
    data = rng.integers(0, 256, (rows, cols // CODED[kind].block, size), dtype=np.uint8)
    if kind == "mxfp4":
        data[..., 0] = rng.integers(118, 124, data.shape[:2])
    elif kind == "nvfp4":
        data[..., :4] = rng.integers(0, 40, (*data.shape[:2], 4))
    else:
        scale = rng.uniform(-0.02, 0.02, data.shape[:2]) / (16 if kind == "iq4_nl" else 1)
        data[..., :2] = scale.astype("<f2")[..., None].view(np.uint8)
    if kind == "q4_1":
        data[..., 2:4] = rng.uniform(-0.2, 0.2, data.shape[:2]).astype("<f2")[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def coded_config(**changes: Any) -> ModelConfig:
    return small_config("llama", **{**SIZES, "context": 128, **changes})


def write_coded(
    path: Path,
    kinds: Mapping[str, str] | str,
    config: ModelConfig | None = None,
    more: tuple[NewTensor, ...] = (),
) -> tuple[Path, dict[str, np.ndarray]]:
    """A llama file; ``kinds``: the type of each matrix, or of all. Also the values of its matrices."""
    model, tensors, values = plain_model(config or coded_config()), list(more), {}
    c = model.config
    for i, key in enumerate(model.w):
        name = key.rpartition(".")[2]
        kind = kinds if isinstance(kinds, str) else kinds.get(name, "q4_0")
        rows, cols = shape_of(c, name)
        data = random_blocks(kind, rows, cols, i)
        codes = decode_codes(kind, data, cols)
        values[key] = code_floats(codes, CODED[kind].group, EVERY_FAMILY[CODED[kind].kind].bias)
        order: Any = np.arange(rows)[:, None]
        if name in ("attn_q", "attn_k"):
            order = interleave(order, c.heads if name == "attn_q" else c.kv_heads)
        tensors.append(tensor(f"{key}.weight", data[order[:, 0]], IDS[kind], (rows, cols)))
    model.w = {}
    return write_model(path, model, more=tensors), values


# ---- the types


@pytest.mark.parametrize("kind", TYPES)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="the gguf package is the oracle")
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    data = random_blocks(kind, 5, 192)
    rows = decode_codes(kind, data, 192)
    expected = quants.dequantize(data, gguf.GGMLQuantizationType(IDS[kind]))
    bias = EVERY_FAMILY[CODED[kind].kind].bias
    np.testing.assert_array_equal(code_floats(rows, CODED[kind].group, bias), expected)


def test_scales_of_powers_of_two() -> None:
    """E8M0: 2^(e - 127), halved because the values are doubled; the least is a subnormal."""
    data = np.zeros((3, 17), np.uint8)
    data[:, 0] = 0, 127, 254
    rows = decode_codes("mxfp4", data, 32)
    assert rows.scales[:, 0].tolist() == [2.0**-128, 0.5, 2.0**126]
    assert rows.tables is not None
    assert rows.tables.tolist() == [list(FP4)]


def test_scales_of_8_bits() -> None:
    """UE4M3 as the gguf package has it, all 128 of it; bytes with a sign bit are no scales."""
    nvfp4 = pytest.importorskip("gguf.quants", reason="the gguf package is the oracle").NVFP4
    np.testing.assert_array_equal(UE4M3[:128], nvfp4.ue4m3_to_fp32(np.arange(128, dtype=np.uint8)))
    assert np.isnan(UE4M3[128:]).all()
    assert np.array_equal(UE4M3[:127], np.unique(UE4M3[:127])), "they rise, so that encoding finds them"
    assert are_halves(UE4M3[:128])


def test_where_the_codes_of_nvfp4_lie() -> None:
    """Byte 8 s + j behind four scales: weight 16 s + j in the low nibble, 16 s + j + 8 in the high one."""
    data = np.zeros((1, 36), np.uint8)
    data[0, :4] = 0x38, 0x40, 0x01, 0x7E  # 1, 2, 2^-9, 448; halved
    data[0, 4 + 8 + 3] = 0x9F  # 15 is -12 (doubled -6), 9 is -1
    rows = decode_codes("nvfp4", data, 64)
    assert rows.scales.tolist() == [[0.5, 1.0, 2.0**-10, 224.0]]
    assert (rows.codes[0, 19], rows.codes[0, 27]) == (15, 9)
    assert np.count_nonzero(rows.codes) == 2
    values = code_floats(rows, 16, 0)
    assert (values[0, 19], values[0, 27]) == (-12, -1)


# ---- files


@pytest.mark.parametrize("kind", TYPES)
def test_a_file_of_one_type(tmp_path: Path, kind: str) -> None:
    path, values = write_coded(tmp_path / "m.gguf", kind)
    opened = open_model(path)
    config = opened.config
    assert (config.weights, config.group) == (CODED[kind].kind, CODED[kind].group)
    assert facts(opened)["groups"].startswith(f"{CODED[kind].group} weights")
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate"}
    names |= {"up": "ffn_up", "down": "ffn_down"}
    for i, layer in enumerate(opened.weights.layers):
        for role, matrix in layer.split(config).items():
            np.testing.assert_array_equal(matrix.values(0, matrix.shape.m), values[f"blk.{i}.{names[role]}"])
    with pytest.raises(FileError, match="weights of 4 bits: TQ2_0 holds ternary ones"):
        convert(path, tmp_path / "out.gguf", "tq2_0")


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        ({"ffn_down": "q4_1"}, "q4m"),
        ({"attn_v": "q4_1", "attn_k": "q4_0"}, "q4m"),
        ({"ffn_down": "iq4_nl"}, "t4"),
        ({"attn_q": "iq4_nl", "attn_v": "mxfp4"}, "t4"),
    ],
)
def test_types_that_one_kind_holds(
    tmp_path: Path, level_library: Callable[[str], Path], kinds: dict[str, str], common: str
) -> None:
    """Q4_0 beside Q4_1 or beside types by table, and several tables in one stack of rows."""
    path, values = write_coded(tmp_path / "m.gguf", kinds)
    opened = open_model(path)
    assert opened.config.weights == common
    layer = opened.weights.layers[1]
    expected = np.concatenate([values[f"blk.1.attn_{name}"] for name in "qkv"])
    # Q4_0 in Q4M is d q - 8 d in place of d (q - 8): the same number, rounded where 8 d is larger.
    np.testing.assert_allclose(layer.qkv.values(0, layer.qkv.shape.m), expected, rtol=0, atol=1e-7)
    ids = [1, 260, 13, 99, 4, 4, 270]
    with load(level_library(BEST), 1) as table:
        engine = Engine(opened.weights, table, context=64, kv="f32")
        where = np.arange(len(ids), dtype=np.int32)
        got = engine.forward(
            np.array(ids, np.int32), where, np.zeros(len(ids), np.int32), np.ones(len(ids), bool)
        )
    np.testing.assert_array_equal(got, exact_logits(opened.weights, ids, "f32"))


def test_what_is_refused(tmp_path: Path) -> None:
    path, _ = write_coded(tmp_path / "a.gguf", {"attn_q": "q4_1", "ffn_down": "iq4_nl"})
    assert "weights of Q4, Q4M and T4 in one model are not supported" in refused(path).replace(
        " and Q4M", ", Q4M"
    )
    path, _ = write_coded(tmp_path / "b.gguf", {"attn_q": "nvfp4", "ffn_down": "mxfp4"})
    assert "some matrices are in groups of 16 weights (NVFP4), some of 32" in refused(path)
    factor = tensor("blk.0.ffn_up.scale", np.ones(2, np.float32))
    path, _ = write_coded(tmp_path / "c.gguf", "nvfp4", more=(factor,))
    assert "blk.0.ffn_up.scale has the shape 2" in refused(path)
    own = tensor("blk.0.ffn_up.input_scale", np.ones(1, np.float32))
    path, _ = write_coded(tmp_path / "d.gguf", "q4_0", more=(own,))
    assert "'blk.0.ffn_up.input_scale' (1 such) belongs to no llama model" in refused(path)
    with pytest.raises(FileError, match="weights of Q4M and T4 in one model"):
        common_kind(["q4m", "t4"])


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "q4_1"])
def test_a_model_is_that_of_transformers(
    tmp_path: Path, level_library: Callable[[str], Path], kind: str
) -> None:
    """Of LlamaForCausalLM on the values that the gguf package reads, given bitgen's int8 activations."""
    oracles = pytest.importorskip("torch_models", reason="transformers is the oracle")
    path, values = write_coded(tmp_path / "m.gguf", kind)
    weights = open_model(path).weights
    oracle, ids = oracles.floats_of(weights), np.random.default_rng(1).integers(0, 300, 40).tolist()
    for i in range(weights.config.layers):
        stored = oracle.get_submodule(f"model.layers.{i}.mlp.down_proj").weight.detach().numpy()
        np.testing.assert_array_equal(stored, values[f"blk.{i}.ffn_down"])
    steps: dict[str, np.ndarray] = {}
    expected = exact_logits(weights, ids, "f32", steps)
    with load(level_library(BEST), 1) as table:
        engine = Engine(weights, table, context=64, kv="f32")
        where, none = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32)
        got = engine.forward(np.array(ids, np.int32), where, none, np.ones(len(ids), bool))
    np.testing.assert_array_equal(got, expected)
    groups = dict.fromkeys(steps, CODED[kind].group)
    same, farthest = oracles.run_in_groups(oracle, ids, groups, steps)
    assert farthest < TIE
    assert np.abs(got - same).max() < 1e-4 * same.std()


@pytest.mark.parametrize("kind", ["nvfp4", "q4_1"])
def test_a_scale_of_all_of_a_matrix(tmp_path: Path, level_library: Callable[[str], Path], kind: str) -> None:
    """NVFP4's second level, a float: it joins the scales of groups, which are no half floats then.

    What activations would be rounded to in 4 bits, `input_scale`, is left out: they are int8 here.
    """
    names = ("blk.0.attn_k", "blk.0.ffn_down", "blk.1.ffn_up")
    more = [tensor(f"{name}.scale", np.array([1 / 3], np.float32)) for name in names]
    if kind == "nvfp4":
        more += [tensor(f"{name}.input_scale", np.array([7], np.float32)) for name in names]
    path, values = write_coded(tmp_path / "m.gguf", kind, more=tuple(more))
    weights = open_model(path).weights
    found = [layer.split(weights.config) for layer in weights.layers]
    for matrix, name in ((found[0]["k"], names[0]), (found[0]["down"], names[1]), (found[1]["up"], names[2])):
        expected = values[name] * np.float32(1 / 3)
        np.testing.assert_allclose(matrix.values(0, matrix.shape.m), expected, rtol=1e-6, atol=1e-7)
    ids = [1, 260, 13, 99]
    with load(level_library(BEST), 1) as table:
        engine = Engine(weights, table, context=64, kv="f32")
        where, none = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32)
        got = engine.forward(np.array(ids, np.int32), where, none, np.ones(len(ids), bool))
    np.testing.assert_array_equal(got, exact_logits(weights, ids, "f32"))
    with pytest.raises(FileError, match="a scale of it is no"):
        convert(path, tmp_path / "out.gguf", kind)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    """Also where the reader of the file knows no size, because id 39 has two meanings."""
    for kind in ("q4_1", "mxfp4", "nvfp4"):
        path, _ = write_coded(tmp_path / "m.gguf", kind)
        content = path.read_bytes()
        last = max(read_gguf(path).tensors.values(), key=lambda t: t.offset)
        path.write_bytes(content[: last.offset - 7000])
        assert "damaged" in refused(path)


@pytest.mark.parametrize("kind", ["q5_0", "q8_0", "q6_k"])
def test_other_types_of_matrices_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    t = DENSE.get(kind) or OTHER[kind]
    model = plain_model(coded_config(hidden=256, ffn=256))
    tensors = []
    for key in model.w:
        name = key.rpartition(".")[2]
        rows, cols = shape_of(model.config, name)
        used = t if name == "ffn_down" else DENSE["q4_0"]
        data = np.zeros((rows, used.row_bytes(cols)), np.uint8)
        tensors.append(tensor(f"{key}.weight", data, used.id, (rows, cols)))
    model.w = {}
    message = refused(write_model(tmp_path / "m.gguf", model, more=tensors))
    assert "blk.0.attn_q.weight is stored as Q4_0 and blk.0.ffn_down.weight as " + kind.upper() in message
    assert "Q4_0, Q4_1, IQ4_NL, MXFP4, NVFP4" in message


def test_a_scale_with_a_sign_is_none() -> None:
    data = random_blocks("nvfp4", 4, 64)
    data[2, 1] = 0xB8
    with pytest.raises(FileError, match="w: a scale is NaN or infinite; the file is damaged"):
        coded_matrix("w", "nvfp4", (4, 64), data).coded(0, 4)


def test_a_damaged_scale_is_found_when_weights_are_packed() -> None:
    data = random_blocks("q4_1", 4, 32)
    data[2, 2:4] = np.array([np.nan], "<f2").view(np.uint8)
    matrix = CodedMatrix.make("w", Shape(4, 32), "q4m", 32, lambda b, e: decode_codes("q4_1", data[b:e], 32))
    with pytest.raises(FileError, match="w: a scale is NaN or infinite"):
        matrix.coded(0, 4)


def test_the_table_of_iq4_nl() -> None:
    assert len(set(IQ4_NL)) == 16
    assert max(map(abs, IQ4_NL)) == 127


# ---- from one type to another


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("q4_0", ("q4_1", "q4_0")),
        ("q4_0", ("table4", "q4_0")),
        ("iq4_nl", ("table4", "iq4_nl")),
        ("mxfp4", ("table4", "mxfp4")),
        ("nvfp4", ("table4", "nvfp4")),
        ("mxfp4", ("nvfp4", "table4")),
        ("q4_1", ("q4_1",)),
        ({"attn_q": "iq4_nl", "ffn_up": "mxfp4"}, ("table4",)),
    ],
)
def test_conversion_keeps_every_weight(tmp_path: Path, source: Any, targets: tuple[str, ...]) -> None:
    """Through each type in turn, and back into the first: the same values, and of one type the same bytes."""
    path, _ = write_coded(tmp_path / "m.gguf", source)
    before = open_model(path).weights
    last = path
    for i, kind in enumerate(targets):
        last = convert(last, tmp_path / f"{i}.gguf", kind).path
        after = open_model(last).weights
        for x, y in zip(before.layers, after.layers, strict=True):
            for a, b in zip(x.matrices, y.matrices, strict=True):
                # The offset -8 d in place of the bias 8 is rounded once more.
                bound = 1e-7 if kind == "q4_1" and source == "q4_0" else 0
                np.testing.assert_allclose(b.values(0, b.shape.m), a.values(0, a.shape.m), rtol=0, atol=bound)
    if targets[-1] == source:
        one, other = read_gguf(path), read_gguf(last)
        for name, info in one.tensors.items():
            if info.size is not None:
                assert np.array_equal(one.bytes_of(info), other.bytes_of(other.tensors[name])), name


def test_conversion_that_would_lose_something_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for source, kind, message in (
        ("q4_0", "iq4_nl", "blk.0.attn_q.weight cannot be IQ4_NL without loss: its values are evenly spaced"),
        ("q4_1", "q4_0", "its offsets are not -8 times its scales"),
        ("q4_1", "table4", "Q4M weights are no T4 ones"),
        ("iq4_nl", "mxfp4", "its table has other values"),
        ("mxfp4", "q4_0", "its table has other values"),
        ("mxfp4", "q4_1", "its table has other values"),
        ("nvfp4", "mxfp4", "it has groups of 16"),
        ("iq4_nl", "nvfp4", "its table has other values"),
    ):
        path, _ = write_coded(tmp_path / "m.gguf", source)
        with pytest.raises(FileError, match=re.escape(message)):
            convert(path, out, kind)
    ternary = write_model(tmp_path / "t.gguf", plain_model(coded_config()))
    for kind in ("q4_0", "table4"):
        with pytest.raises(FileError, match="has no weights of 4 bits, of which"):
            convert(ternary, out, kind)
    assert not list(tmp_path.glob("out*"))
