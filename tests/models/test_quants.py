from __future__ import annotations

import numpy as np
import pytest

from bitgen.errors import BitgenError
from bitgen.formats.gguf import BY_ID
from bitgen.formats.matrices import ternary_matrix
from bitgen.formats.quants import DENSE, dequantize
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.ternary import (
    TERNARY,
    absmean,
    block_scales,
    decode_blocks,
    decode_i2_s,
    encode_blocks,
    encode_i2_s,
    i2_s_bytes,
    ternary_of_floats,
)


def random_ternary(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, shape, dtype=np.int8)


# ---- heads and embeddings against the gguf package ----


@pytest.mark.parametrize("name", sorted(DENSE))
def test_every_byte_pattern_has_the_value_that_the_gguf_package_gives_it(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize as oracle

    data = np.random.default_rng(1).integers(0, 256, (40, DENSE[name].row_bytes(512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        kind = gguf.GGMLQuantizationType(DENSE[name].id)
        expected = data.view(np.float32) if name == "f32" else oracle(data, kind)
    assert np.array_equal(dequantize(name, data, 512), expected, equal_nan=True)


def test_type_numbers_and_sizes_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    for kind in gguf.GGMLQuantizationType:
        assert BY_ID[int(kind)].name == kind.name.lower()
        assert (BY_ID[int(kind)].block, BY_ID[int(kind)].block_bytes) == gguf.GGML_QUANT_SIZES[kind]


def test_columns_that_fill_no_block_are_refused() -> None:
    with pytest.raises(BitgenError, match="q8_0 holds blocks of 32: 100 columns"):
        DENSE["q8_0"].row_bytes(100)


# ---- I2_S ----


def test_i2_s_bytes_are_those_of_the_definition() -> None:
    w = random_ternary(256)
    codes = [int(v) + 1 for v in w]
    expected = []
    for block in range(2):
        c = codes[128 * block : 128 * block + 128]
        expected += [c[p] << 6 | c[32 + p] << 4 | c[64 + p] << 2 | c[96 + p] for p in range(32)]
    assert encode_i2_s(w).tolist() == expected
    assert i2_s_bytes(256) == 64 + 32


def test_i2_s_decodes_any_range_of_the_flattened_tensor() -> None:
    w = random_ternary(128 * 7)
    codes = encode_i2_s(w)
    for begin, end in ((0, 896), (1, 2), (127, 129), (100, 700), (895, 896), (128, 256)):
        assert np.array_equal(decode_i2_s(codes, begin, end, "w"), w[begin:end])


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_the_fourth_code_is_refused_in_every_field(shift: int) -> None:
    codes = encode_i2_s(random_ternary(256))
    codes[40] |= 3 << shift
    with pytest.raises(BitgenError, match="w holds codes that are not ternary"):
        decode_i2_s(codes, 0, 256, "w")
    decode_i2_s(codes, 0, 128, "w")  # the first block is whole


# ---- blocks with a scale ----


def blocks_of(kind: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Random weights that the type has codes for."""
    w = random_ternary(rows, cols, seed=seed)
    if kind == "q1_0":
        w[w == 0] = 1
    if kind == "stq1_0":  # of the weights 64 c + g + 16 p, p = 0..3, one is zero
        rng = np.random.default_rng(seed)
        sets = rng.choice(np.array([-1, 1], np.int8), (rows, cols // 64, 4, 16))
        np.put_along_axis(sets, rng.integers(0, 4, (rows, cols // 64, 1, 16)), 0, axis=2)
        w = sets.reshape(rows, cols)
    return w


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_block_bytes_are_those_of_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize as oracle_values
    from gguf.quants import quantize as oracle_bytes

    w = blocks_of(kind, 6, 768)
    scale = np.repeat(np.array([[0.5, 1, 2, 0.375, 1.5, 3]], np.float32).T, 3, axis=1)
    scale[1] *= 1, 2, 3
    w[2, 256:512] = 0  # a block of zeros has scale 0
    scale[2, 1] = 0
    ours = encode_blocks(kind, w, scale)
    values = w * np.repeat(scale, 256, axis=1)
    number = gguf.GGMLQuantizationType(TERNARY[kind].id)
    assert np.array_equal(ours, oracle_bytes(values, number))
    assert np.array_equal(oracle_values(ours, number), values)
    assert np.array_equal(decode_blocks(kind, ours, 768, "w"), w)
    assert np.array_equal(block_scales(kind, ours, 768), scale)


@pytest.mark.parametrize("kind", sorted(TERNARY))
def test_every_type_gives_back_its_codes_and_scales(kind: str) -> None:
    w = blocks_of(kind, 5, 512, seed=1)
    halves = np.random.default_rng(2).integers(0, 0x7C00, (5, 512 // TERNARY[kind].block), dtype=np.uint16)
    halves[0, :2] = 0, 1  # zero, and the smallest subnormal
    scale = halves.view(np.float16).astype(np.float32)
    data = encode_blocks(kind, w, scale)
    assert data.shape == (5, TERNARY[kind].row_bytes(512))
    assert np.array_equal(decode_blocks(kind, data, 512, "w"), w)
    assert np.array_equal(block_scales(kind, data, 512), scale)


def test_a_block_of_ptq1_0_written_by_another_program() -> None:
    """w_j = (((j^2 + 3 j + 7) div 5) mod 3) - 1, d = 1.5."""
    golden = "96c143c857061032 96c247d581828796 20212fa2b451d260 5fe4003e"
    j = np.arange(128)
    w = ((j * j + 3 * j + 7) // 5 % 3 - 1).astype(np.int8)[None]
    data = np.frombuffer(bytes.fromhex(golden), np.uint8)[None]
    assert np.array_equal(encode_blocks("ptq1_0", w, np.float32(1.5)), data)
    assert np.array_equal(decode_blocks("ptq1_0", data, 128, "w"), w)
    assert block_scales("ptq1_0", data, 128).tolist() == [[1.5]]


@pytest.mark.parametrize("kind", ["q2_0", "pq2_0"])
def test_q2_0_is_its_formula(kind: str) -> None:
    """f16 d, then w_j = ((byte[j / 4] >> 2 (j % 4)) & 3) - 1; the code 3 is refused, never another."""
    block = TERNARY[kind].block
    w = random_ternary(1, block)
    data = encode_blocks(kind, w, np.float32(-0.25))
    code = data[0, 2:]
    assert [int(code[j // 4] >> 2 * (j % 4) & 3) - 1 for j in range(block)] == w[0].tolist()
    assert block_scales(kind, data, block) == -0.25
    for field in range(4):
        damaged = data.copy()
        damaged[0, 9] |= 3 << 2 * field
        with pytest.raises(BitgenError, match="w holds the code 3, which is"):
            decode_blocks(kind, damaged, block, "w")


def test_q1_0_is_its_formula() -> None:
    """f16 d, then bit j % 8 of byte j / 8: 1 is +d, 0 is -d."""
    w = blocks_of("q1_0", 1, 128)
    data = encode_blocks("q1_0", w, np.float32(0.75))
    assert [2 * int(data[0, 2 + j // 8] >> j % 8 & 1) - 1 for j in range(128)] == w[0].tolist()
    assert block_scales("q1_0", data, 128) == 0.75


def test_stq1_0_is_its_table() -> None:
    """32 patterns, each with one zero; the sign negates; group g of a chunk of 64 has stride 16."""
    data = np.zeros((32, 42), np.uint8)
    for pattern in range(32):
        data[pattern, 0] = pattern & 15
        data[pattern, 32] = pattern >> 4
    w = decode_blocks("stq1_0", data, 256, "w")
    first = w[:, 0:64:16]
    assert len({tuple(row) for row in first.tolist()}) == 32
    assert ((first == 0).sum(axis=1) == 1).all()
    assert np.array_equal(first[16:], -first[:16])
    leading = [next(v for v in row if v) for row in first[:16].tolist()]
    assert leading == [1] * 16
    assert first[0].tolist() == [0, 1, 1, 1]  # 0xA9


@pytest.mark.parametrize(
    ("kind", "what"),
    [("q1_0", "holds zeros, for which Q1_0 has no code"), ("stq1_0", "not exactly one is zero")],
)
def test_weights_without_a_code_are_refused(kind: str, what: str) -> None:
    with pytest.raises(BitgenError, match=what):
        encode_blocks(kind, random_ternary(2, 256), np.float32(1))


def test_every_byte_of_tq1_0_decodes_as_the_gguf_package_does() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize as oracle_values

    data = np.random.default_rng(3).integers(0, 256, (64, 54), dtype=np.uint8)
    data[:, 52:] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    expected = oracle_values(data, gguf.GGMLQuantizationType.TQ1_0)
    assert np.array_equal(decode_blocks("tq1_0", data, 256, "w"), expected)


def test_tq2_0_refuses_the_fourth_code() -> None:
    data = encode_blocks("tq2_0", random_ternary(1, 256), np.float32(1))
    data[0, 5] = 0b11000000
    with pytest.raises(BitgenError, match="not ternary"):
        decode_blocks("tq2_0", data, 256, "w")


# ---- matrices: the coarsest groups that hold ----


def matrix_of(kind: str, w: np.ndarray, scale: np.ndarray) -> TernaryMatrix:
    return ternary_matrix("w", kind, w.shape, encode_blocks(kind, w, scale).reshape(-1))


@pytest.mark.parametrize("kind", ["tq2_0", "q2_0", "ptq1_0"])
def test_scales_of_blocks_are_one_a_row_where_they_are_equal(kind: str) -> None:
    block = TERNARY[kind].block
    w = random_ternary(6, 512)
    rows = np.array([1, 2, 0.5, 4, 0.25, 3], np.float32)
    scale = np.repeat(rows[:, None], 512 // block, axis=1)
    scale[1, 1] = 0  # makes zeros of its weights
    matrix = matrix_of(kind, w, scale)
    assert matrix.group == 0
    assert np.array_equal(matrix.scale, rows)
    assert np.array_equal(matrix.values(0, 6), w * np.repeat(scale, block, axis=1))
    scale[4, 0] = 7
    matrix = matrix_of(kind, w, scale)
    assert matrix.group == block
    assert np.array_equal(matrix.rows(1, 5), w[1:5])  # the codes as they are
    assert np.array_equal(matrix.scales(1, 5), scale[1:5])
    assert np.array_equal(matrix.values(0, 6), w * np.repeat(scale, block, axis=1))
    with pytest.raises(BitgenError, match=rf"w has a scale for each {block} weights, not one a row"):
        _ = matrix.scale


def test_equal_scales_of_blocks_of_64_make_groups_of_128() -> None:
    w = random_ternary(4, 256)
    pairs = np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    matrix = matrix_of("q2_0", w, np.repeat(pairs, 2, axis=1))
    assert matrix.group == 128
    assert np.array_equal(matrix.scales(0, 4), pairs)
    assert np.array_equal(matrix.scales(0, 4, 64), np.repeat(pairs, 2, axis=1))


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("group", [32, 128, 256])
def test_values_in_groups_are_found_or_refused(kind: str, group: int) -> None:
    w = random_ternary(8, 512)
    w[3, :group] = 0
    w[:, -1] = 1
    half = np.random.default_rng(4).uniform(0.01, 2, (8, 512 // group)).astype(np.float16)
    values = (w * np.repeat(half, group, axis=1)).astype({"f32": np.float32, "f16": np.float16}[kind])
    matrix = ternary_matrix("w", kind, w.shape, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    assert matrix.group == group
    assert np.array_equal(matrix.rows(0, 8), w)
    assert np.array_equal(matrix.values(0, 8), values)
    values[7, -2:] = 0.75, 0.5
    matrix = ternary_matrix("w", kind, w.shape, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
    with pytest.raises(BitgenError, match=rf"w \({kind}\) is not ternary"):
        matrix.rows(0, 8)


def test_stacked_matrices_share_the_finest_groups() -> None:
    w = random_ternary(4, 256)
    scales = np.random.default_rng(5).uniform(1, 2, (4, 4)).astype(np.float32)
    parts = [
        TernaryMatrix.of(w, scales[:, :2], group=128),
        TernaryMatrix.of(w, scales, group=64),
        TernaryMatrix.of(w, 3.0),
    ]
    stacked = TernaryMatrix.stack(parts)
    assert stacked.group == 64
    expected = np.concatenate([part.values(0, 4) for part in parts])
    assert np.array_equal(stacked.values(0, 12), expected)
    assert np.array_equal(stacked.slice(3, 9).values(1, 5), expected[4:8])
    order = np.array([1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10])
    assert np.array_equal(stacked.reordered(order).values(0, 12), expected[order])
    assert np.array_equal(stacked.scaled(np.array([2], np.float32)).values(2, 6), 2 * expected[2:6])


# ---- ternary values in formats for floats ----


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_ternary_values_are_recognised_in_every_float_format(kind: str) -> None:
    w = random_ternary(5, 40)
    w[3] = 0
    scale = np.array([1, 0.5, 2, 0, 0.75], np.float32)
    values = w * scale[:, None]
    values[0, :3] = -0.0
    w[0, :3] = 0
    data = {
        "f32": values,
        "f16": values.astype(np.float16),
        "bf16": (values.view(np.uint32) >> 16).astype(np.uint16),
    }[kind]
    got, got_scale = ternary_of_floats(kind, np.ascontiguousarray(data).view(np.uint8), 40, "w")
    assert np.array_equal(got, w)
    assert np.array_equal(got_scale[:, 0], scale)


@pytest.mark.parametrize("value", [0.25, 1.0009765625, np.nan, -0.5])
def test_a_row_with_a_third_size_is_not_ternary(value: float) -> None:
    values = random_ternary(3, 32).astype(np.float16)
    values[1, :4] = 1
    values[1, 7] = value
    with pytest.raises(BitgenError, match=r"blk\.0 \(f16\) is not ternary"):
        ternary_of_floats("f16", values.view(np.uint8), 32, "blk.0")


def test_ternary_values_in_q8_0() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import quantize

    w = random_ternary(4, 96)
    data = quantize(w * np.float32(0.37), gguf.GGMLQuantizationType.Q8_0)
    got, scale = ternary_of_floats("q8_0", data, 96, "w")
    assert np.array_equal(got, w)
    assert np.allclose(scale, 0.37, rtol=1e-3)
    data[0, 5] ^= 1
    with pytest.raises(BitgenError, match="not ternary"):
        ternary_of_floats("q8_0", data, 96, "w")


# ---- master weights ----


def test_absmean_rounds_half_to_even_and_clamps() -> None:
    values = np.array([[0.0, 0.49, 0.5, 0.51, 1.5, 7.0, -0.5, -0.51, -9.0]], np.float32)
    assert absmean(values, 1.0).tolist() == [[0, 0, 0, 1, 1, 1, 0, -1, -1]]


def test_absmean_equals_bitlinear_in_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    rng = np.random.default_rng(5)
    values = rng.standard_normal((64, 100)).astype(np.float32)
    weight = torch.from_numpy(values)
    s = 1.0 / weight.abs().mean().clamp(min=1e-5)
    expected = (weight * s).round().clamp(-1, 1).numpy()
    assert np.array_equal(absmean(values, float(np.abs(values).mean(dtype=np.float64))), expected)
