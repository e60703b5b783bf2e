"""Files whose matrices have a scale for each group of weights: Ternary Bonsai's, and what else there is."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_files import (
    Plain,
    gguf_metadata,
    grouped_model,
    plain_model,
    refused,
    small_config,
    tensor,
    ternary_tensors,
    values_of,
    write_folder,
    write_model,
)

from bitgen.errors import BitgenError, FileError
from bitgen.formats.convert import convert
from bitgen.formats.gguf import NewTensor, read_gguf, write_gguf
from bitgen.formats.inspect import facts
from bitgen.formats.matrices import ternary_matrix
from bitgen.formats.model_file import ModelFile
from bitgen.formats.open import open_model
from bitgen.formats.ternary import TERNARY, dequantize_blocks, encode_blocks
from bitgen.inference.opening import config_of_kernels

LOSSLESS = ("q2_0", "pq2_0", "ptq1_0", "f16")  # they hold all codes and scales of groups of 128


def check(model: Plain, opened: ModelFile) -> None:
    """The codes, the scales, and the values of embedding and head are those of ``model``."""
    config = opened.config
    assert (config.architecture, config.qk_norm, config.head_dim) == ("qwen3", True, 128)
    assert config.tied_head == (model.head is None)
    for index, layer in enumerate(opened.weights.layers):
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        for name, matrix in zip(names, layer.split(config).values(), strict=True):
            w, scale = (where[f"blk.{index}.{name}"] for where in (model.w, model.scale))
            assert np.array_equal(matrix.rows(0, len(w)), w), name
            assert np.array_equal(matrix.scales(0, len(w), 128), scale), name
        assert layer.q_norm is not None
        assert layer.k_norm is not None
        assert np.array_equal(layer.q_norm, model.vectors[f"blk.{index}.attn_q_norm.weight"])
        assert np.array_equal(layer.k_norm, model.vectors[f"blk.{index}.attn_k_norm.weight"])
    assert np.array_equal(opened.weights.embedding.rows(0, config.vocab), model.embedding)
    ids = np.array([5, 0, config.vocab - 1])
    assert np.array_equal(opened.weights.embedding.gather(ids), model.embedding[ids])
    if model.head is not None:
        assert np.array_equal(opened.weights.output.rows(0, config.vocab), model.head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["q2_0", "q2_0@128", "pq2_0", "ptq1_0", "f16", "f32"])
def test_every_type_with_groups_of_128(tmp_path: Path, kind: str, tied: bool) -> None:
    model = grouped_model(tied_head=tied)
    opened = open_model(write_model(tmp_path / "m.gguf", model, kind))
    check(model, opened)
    assert facts(opened)["groups"] == "128 weights along k share a scale, or fewer"
    assert opened.weights.layers[0].down.group == 128
    assert opened.weights.layers[0].qkv.group == 128
    assert opened.weights.embedding.is_ternary == (kind not in ("f16", "f32"))


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_groups_of_256(tmp_path: Path, kind: str) -> None:
    model = grouped_model(group=256)
    opened = open_model(write_model(tmp_path / "m.gguf", model, kind))
    check(model, opened)
    down = opened.weights.layers[0].down
    assert (down.group, down.kernel_group) == (256, 128), "every library has kernels for 128"
    assert opened.weights.group_of(down) == 128


@pytest.mark.usefixtures("bitgen_home")
def test_groups_that_not_every_library_serves_are_those_its_kernels_are_for(tmp_path: Path) -> None:
    """Where one matrix has groups of 64, the library is asked to have kernels for those too."""
    model = grouped_model()
    path = write_model(tmp_path / "128.gguf", model, "q2_0")
    assert config_of_kernels(open_model(path)) == open_model(path).config
    w = model.w.pop("blk.0.ffn_down")
    scales = np.random.default_rng(5).uniform(0.1, 1, (len(w), w.shape[1] // 64)).astype(np.float32)
    data = encode_blocks("q2_0", w, scales)
    other = tensor("blk.0.ffn_down.weight", data, TERNARY["q2_0"].id, (len(w), w.shape[1]))
    mixed = open_model(write_model(tmp_path / "64.gguf", model, "q2_0", more=[other]))
    for _ in range(2):  # found, then remembered
        assert config_of_kernels(mixed) == replace(mixed.config, group=64)


def test_unpacked_safetensors(tmp_path: Path) -> None:
    """Values of f16, as published; the groups are found."""
    model = grouped_model()
    folder = write_folder(tmp_path / "m", model, "groups")
    check(model, open_model(folder))


def test_the_head_is_ternary_where_its_rows_are(tmp_path: Path) -> None:
    model = grouped_model(tied_head=False)
    assert model.head is not None
    for kind in ("pq2_0", "f16"):
        head = open_model(write_model(tmp_path / "m.gguf", model, kind)).weights.ternary_head
        assert head is not None
        assert head.group == 128
        assert np.array_equal(head.values(0, 259), model.head)
    model.w.pop("output")
    model.head[::50, 7] = 0.123
    assert open_model(write_model(tmp_path / "m.gguf", model, "f16")).weights.ternary_head is None


def test_bitlinear_layers_keep_one_scale_a_token(tmp_path: Path) -> None:
    model = plain_model(small_config("qwen3", hidden=128, ffn=256, head_dim=32))
    assert open_model(write_model(tmp_path / "a.gguf", model, "i2_s")).config.group == 0
    assert open_model(write_model(tmp_path / "b.gguf", model, "f16+scale")).config.group == 128
    quantization = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    assert open_model(write_folder(tmp_path / "c", model, "packed", quantization)).config.group == 0


def test_a_binary_model(tmp_path: Path) -> None:
    model = grouped_model()
    for key, w in model.w.items():
        model.w[key] = np.where(w == 0, np.int8(1), w)
    model.embedding = values_of(model, "token_embd")
    opened = open_model(write_model(tmp_path / "m.gguf", model, "q1_0"))
    check(model, opened)
    head = opened.weights.ternary_head
    assert head is not None
    assert (opened.config.weights, opened.config.group) == ("q1", 128)
    assert {one.weights for one in (*opened.weights.layers[0].matrices, head)} == {"q1"}
    # Where matrices of another type are beside them all of it runs as ternary.
    key = "blk.0.ffn_down"
    other = ternary_tensors(key, model.w.pop(key), model.scale[key], "pq2_0")
    mixed = open_model(write_model(tmp_path / "n.gguf", model, "q1_0", more=other))
    assert mixed.config.weights == "ternary"
    assert {one.weights for one in mixed.weights.layers[0].matrices} == {"ternary"}


def test_bits_under_a_scale_of_zero_stay_as_they_are() -> None:
    """A row whose other scales agree has no scale of its own: a bit cannot say 0."""
    for scales, group in (([[1, 0], [2, 2]], 128), ([[3, 3], [0, 0]], 128), ([[3, 3], [2, 2]], 0)):
        data = encode_blocks("q1_0", np.ones((2, 256), np.int8), np.array(scales, np.float32))
        expected = dequantize_blocks("q1_0", data, 256, "w")
        for binary in (True, False):
            matrix = ternary_matrix("w", "q1_0", (2, 256), data, binary=binary)
            assert matrix.group == (group if binary else 0)
            assert np.array_equal(matrix.values(0, 2), expected)
        codes = ternary_matrix("w", "q1_0", (2, 256), data, binary=True).coded(0, 2, 128)
        values = (2 * codes.codes.astype(np.int8) - 1) * np.repeat(codes.scales, 128, axis=1)
        assert np.array_equal(values, expected)


def test_a_scale_of_zero_and_the_smallest_subnormal(tmp_path: Path) -> None:
    model = grouped_model()
    model.scale["blk.0.ffn_up"][3] = 0, 2.0**-24
    opened = open_model(write_model(tmp_path / "m.gguf", model, "ptq1_0"))
    up = opened.weights.layers[0].split(opened.config)["up"]
    assert np.array_equal(up.values(0, 512), values_of(model, "blk.0.ffn_up"))
    assert np.array_equal(up.rows(3, 4), model.w["blk.0.ffn_up"][3:4])  # the codes as they are


def test_the_fourth_code_is_refused_where_it_is_read(tmp_path: Path) -> None:
    model = grouped_model()
    path = write_model(tmp_path / "m.gguf", model, "pq2_0")
    file = read_gguf(path)
    content = bytearray(path.read_bytes())
    content[file.tensors["blk.0.ffn_down.weight"].offset + 2] |= 3
    path.write_bytes(content)
    layer = open_model(path).weights.layers[0]
    layer.qkv.rows(0, layer.qkv.shape.m)
    with pytest.raises(FileError, match=r"blk\.0\.ffn_down\.weight holds the code 3, which is \+2 times"):
        layer.down.rows(0, 256)
    again = open_model(convert(path, tmp_path / "out.gguf", "table4").path)
    assert (again.config.weights, again.config.group) == ("t4", 128)
    down = again.weights.layers[0].down.values(0, 256)
    expected = values_of(model, "blk.0.ffn_down")
    expected[0, 0] = 2 * model.scale["blk.0.ffn_down"][0, 0]
    assert np.array_equal(down, expected)


# ---- the three layouts of type 42 ----


def of_type_42(path: Path, layouts: list[str], k: int = 1024, m: int = 4) -> Path:
    tensors: list[NewTensor] = []
    for i, layout in enumerate(layouts):
        zeros = np.zeros((m, TERNARY[layout].row_bytes(k)), np.uint8)
        tensors.append(tensor(f"t{i}", zeros, 42, (m, k)))
    write_gguf(path, gguf_metadata(small_config()), tensors)
    return path


@pytest.mark.parametrize("layout", ["q2_0", "pq2_0", "stq1_0"])
@pytest.mark.parametrize("count", [1, 3])
def test_type_42_is_told_by_the_spans_of_its_tensors(tmp_path: Path, layout: str, count: int) -> None:
    path = of_type_42(tmp_path / "m.gguf", [layout] * count)
    tensors = read_gguf(path).tensors.values()
    assert {t.type for t in tensors} == {layout}
    assert {t.size for t in tensors} == {4 * TERNARY[layout].row_bytes(1024)}
    content = path.read_bytes()  # without the padding behind the last tensor
    last = list(tensors)[-1]
    assert last.size is not None
    path.write_bytes(content[: last.offset + last.size])
    assert read_gguf(path).tensors[last.name].type == layout
    path.write_bytes(content[: last.offset + last.size - 1])
    assert "cannot be told" in refused(path)


@pytest.mark.parametrize(
    ("layouts", "k", "what"),
    [
        (
            ["q2_0", "stq1_0"],
            1024,
            "none of them fits all of its 2 tensors (t0 has 4096 weights in 1152 bytes)",
        ),
        (["q2_0"], 128, "more than one fits all of its 1 tensors"),
    ],
)
def test_type_42_that_cannot_be_told_is_refused(
    tmp_path: Path, layouts: list[str], k: int, what: str
) -> None:
    message = refused(of_type_42(tmp_path / "m.gguf", layouts, k, m=4 if k > 128 else 1))
    assert what in message
    assert "Q2_0 (blocks of 64), PQ2_0 (blocks of 128), STQ1_0 (blocks of 256)" in message


# ---- what is refused by name ----


def test_a_norm_that_qwen3_has_not_is_refused(tmp_path: Path) -> None:
    """BitNet-embedding is told by its norm of q's input; a file with some of its norms is neither model."""
    model = plain_model(small_config("qwen3"))
    model.vectors["blk.1.ffn_down_norm_in.weight"] = np.ones(20, np.float32)
    message = refused(write_model(tmp_path / "m.gguf", model))
    assert "'blk.1.ffn_down_norm_in.weight' (1 such) belongs to no qwen3 model" in message
    model = plain_model(small_config("bitnet-embedding"))
    del model.vectors["blk.1.ffn_down_norm_in.weight"]
    message = refused(write_model(tmp_path / "m.gguf", model))
    assert "the tensor blk.1.ffn_down_norm_in.weight is missing" in message


def test_floats_that_are_no_groups_are_refused(tmp_path: Path) -> None:
    model = grouped_model()
    path = write_model(tmp_path / "m.gguf", model, "f16")
    content = bytearray(path.read_bytes())
    at = read_gguf(path).tensors["blk.0.attn_k.weight"].offset
    content[at : at + 512] = np.linspace(0.1, 0.2, 256).astype("<f2").tobytes()
    path.write_bytes(content)
    with pytest.raises(BitgenError, match=r"blk\.0\.attn_k\.weight \(f16\) is not ternary"):
        _ = open_model(path).weights.layers[0].qkv.group


# ---- there and back ----


def test_conversion_keeps_codes_and_scales(tmp_path: Path) -> None:
    """From every type to every other, in a chain that ends where it began."""
    model = grouped_model(tied_head=False)
    path = write_model(tmp_path / "0.gguf", model, "pq2_0")
    pairs = [kind for pair in itertools.permutations(LOSSLESS, 2) for kind in pair]
    chain = [kind for kind, _ in itertools.groupby(pairs)]
    for i, kind in enumerate([*chain, "pq2_0"], start=1):
        written = convert(path, tmp_path / f"{i}.gguf", kind)
        assert set(written.counts) == {kind, "f32"}
        path = written.path
        check(model, open_model(path))
    first, last = (read_gguf(p) for p in (tmp_path / "0.gguf", path))
    for name, info in first.tensors.items():
        assert np.array_equal(first.bytes_of(info), last.bytes_of(last.tensors[name])), name


def test_a_folder_becomes_a_file_with_a_ternary_embedding(tmp_path: Path) -> None:
    model = grouped_model()
    folder = write_folder(tmp_path / "m", model, "groups")
    written = convert(folder, tmp_path / "m.gguf", "ptq1_0")
    assert set(written.counts) == {"ptq1_0", "f32"}
    check(model, open_model(written.path))


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("i2_s", "it has a scale for each 128 weights, and that type one a tensor"),
        ("tq2_0", "scales differ within a block of 256 weights"),
        ("q1_0", "holds zeros, for which Q1_0 has no code"),
        ("stq1_0", "scales differ within a block of 256 weights"),
    ],
)
def test_what_would_lose_something_is_refused(tmp_path: Path, kind: str, what: str) -> None:
    path = write_model(tmp_path / "a.gguf", grouped_model(), "pq2_0")
    with pytest.raises(FileError, match=what):
        convert(path, tmp_path / "b.gguf", kind)
    assert not list(tmp_path.glob("b*"))


def test_equal_scales_go_into_larger_blocks(tmp_path: Path) -> None:
    model = grouped_model(group=256)
    path = write_model(tmp_path / "a.gguf", model, "pq2_0")
    for kind in ("tq1_0", "tq2_0", "q2_0"):
        check(model, open_model(convert(path, tmp_path / f"{kind}.gguf", kind).path))


def test_a_scale_that_is_no_half_float_is_refused(tmp_path: Path) -> None:
    model = grouped_model()
    model.scale["blk.0.ffn_gate"] *= np.float32(1.001)
    path = write_model(tmp_path / "a.gguf", model, "f32")
    with pytest.raises(FileError, match=r"blk\.0\.ffn_gate\.weight cannot be PQ2_0 .*: a scale of it is no"):
        convert(path, tmp_path / "b.gguf", "pq2_0")
