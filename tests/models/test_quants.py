from __future__ import annotations

import numpy as np
import pytest

from bitgen.errors import BitgenError
from bitgen.formats.quants import (
    DENSE,
    TERNARY,
    absmean,
    block_scales,
    decode_i2_s,
    decode_tq,
    dequantize,
    encode_i2_s,
    encode_tq,
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
    from bitgen.formats.quants import BY_ID

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


# ---- TQ1_0 and TQ2_0 ----


@pytest.mark.parametrize("kind", sorted(TERNARY))
def test_tq_bytes_are_those_of_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize as oracle_values
    from gguf.quants import quantize as oracle_bytes

    w = random_ternary(6, 768)
    w[2, 256:512] = 0  # a block of zeros has scale 0
    scale = np.array([0.5, 1, 2, 0.375, 1.5, 3], np.float32)
    ours = encode_tq(kind, w, scale)
    number = gguf.GGMLQuantizationType(TERNARY[kind].id)
    assert np.array_equal(ours, oracle_bytes(w * scale[:, None], number))
    assert np.array_equal(oracle_values(ours, number), w * scale[:, None])
    assert np.array_equal(decode_tq(kind, ours, 768, "w"), w)
    scales = block_scales(kind, ours, 768)
    assert scales[2].tolist() == [2, 0, 2]
    assert scales[0].tolist() == [0.5] * 3


def test_every_byte_of_tq1_0_decodes_as_the_gguf_package_does() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize as oracle_values

    data = np.random.default_rng(3).integers(0, 256, (64, 54), dtype=np.uint8)
    data[:, 52:] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    expected = oracle_values(data, gguf.GGMLQuantizationType.TQ1_0)
    assert np.array_equal(decode_tq("tq1_0", data, 256, "w"), expected)


@pytest.mark.parametrize("kind", sorted(TERNARY))
def test_weights_of_a_block_with_scale_zero_are_zero_whatever_its_codes_are(kind: str) -> None:
    data = encode_tq(kind, np.ones((2, 512), np.int8), np.ones(2, np.float32))
    size = TERNARY[kind].block_bytes
    data[1, size - 2 : size] = 0
    w = decode_tq(kind, data, 512, "w")
    assert w[0].all()
    assert not w[1, :256].any()
    assert w[1, 256:].all()


def test_tq2_0_refuses_the_fourth_code() -> None:
    data = encode_tq("tq2_0", random_ternary(1, 256), np.ones(1, np.float32))
    data[0, 5] = 0b11000000
    with pytest.raises(BitgenError, match="not ternary"):
        decode_tq("tq2_0", data, 256, "w")


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
    assert np.array_equal(got_scale, scale)


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
