"""Weights with a scale for each group along k: kernels, packing and the library against numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import libraries
import numpy as np
import pytest
from loaded import load_units

from bitgen import runtime
from bitgen.errors import BitgenError
from bitgen.families.base import GROUPS
from bitgen.reference import fused_multiply_add, grouped_linear, pack
from bitgen.runtime import ArgumentValueError, KernelTable
from bitgen.spec import Layout, Shape
from bitgen.toolchain import Prototype, Unit


@pytest.fixture(scope="module")
def table(bundle: Path) -> Iterator[KernelTable]:
    with runtime.load(bundle, 2) as opened:
        yield opened


def weights(m: int, k: int, group: int, *, half: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Random weights (m, k) and scales (m, groups), zeros and half subnormals among them."""
    rng = np.random.default_rng((m, k, group))
    w = rng.integers(-1, 2, (m, k), dtype=np.int8)
    scales = rng.uniform(-0.1, 0.1, (m, -(-k // group))).astype(np.float32)
    scales.reshape(-1)[3::7] = 0
    scales.reshape(-1)[4::7] *= np.float32(1e-4)
    return w, scales.astype(np.float16).astype(np.float32) if half else scales


# ---- the reference


def test_fused_multiply_add_rounds_once() -> None:
    """Against fmaf of C, on values whose exact sum lies beside the middle of two float32."""
    rng = np.random.default_rng(5)
    count = 200_000
    a = rng.integers(-32768, 32769, count).astype(np.float32)
    b = rng.normal(size=count).astype(np.float32)
    p = (a * b).astype(np.float32)
    # sums that cancel, that are as large, and far smaller or larger than the product
    c = np.concatenate(
        [-p[: count // 2], p[count // 2 :] * rng.choice([2.0**-30, 2.0**-24, 1, 2.0**24], count // 2)]
    )
    c = c.astype(np.float32)
    text = "#include <math.h>\nvoid fma_all(const float *a, const float *b, float *c, int64_t n);\n"
    text += "void fma_all(const float *a, const float *b, float *c, int64_t n)\n"
    text += "{ for (int64_t i = 0; i < n; ++i) c[i] = fmaf(a[i], b[i], c[i]); }\n"
    prototype = Prototype.parse("void fma_all(const float *a, const float *b, float *c, int64_t n)")
    made: Any = load_units(
        libraries.toolchain_of(), [Unit("fma", f"#include <stdint.h>\n{text}", functions=(prototype,))]
    )
    expected = c.copy()
    buffers = [made.ffi.from_buffer("float[]", values) for values in (a, b, expected)]
    made.lib.fma_all(*buffers, count)
    np.testing.assert_array_equal(fused_multiply_add(a, b, c), expected)


# ---- the library


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_the_library_packs_as_numpy_does(table: KernelTable, group: int, half: bool) -> None:
    for m, k in ((1, 1), (33, 200), (64, 512)):
        w, scales = weights(m, k, group, half=half)
        linear = table.linear(w, scales, group=group)
        groups = runtime.Groups(group, half)
        assert runtime.Groups.of(scales, group) == groups
        name = table.layout_name(linear.shape, groups)
        layout = Layout("i2s", int(name.split("_")[1][1:]), group)
        assert layout.name == name
        blocks = pack(layout, w, scales, half=half)
        assert table.packed_bytes(linear.shape, groups) == linear.packed.size >= 64 + blocks.size
        np.testing.assert_array_equal(linear.packed[64 : 64 + blocks.size], blocks)
        assert table.is_packed(linear.packed, linear.shape)


def test_rows_of_groups_are_packed_piece_by_piece(table: KernelTable) -> None:
    w, scales = weights(600, 300, 128)
    whole, groups, shape = table.linear(w, scales, group=128), runtime.Groups(128), Shape(600, 300)
    packed = runtime.aligned_bytes(table.packed_bytes(shape, groups))
    for begin, end in ((0, 256), (256, 512), (512, 600)):
        assert not table.is_packed(packed, shape)
        table.pack_rows(w[begin:end], begin, shape, packed, groups, np.ascontiguousarray(scales[begin:end]))
    np.testing.assert_array_equal(packed, whole.packed)


@pytest.mark.parametrize("threads", [1, 2])
def test_y_is_the_same_for_every_batch_and_number_of_threads(table: KernelTable, threads: int) -> None:
    w, scales = weights(100, 1000, 128)
    x = np.random.default_rng(6).normal(size=(40, 1000)).astype(np.float32)
    x[3] = 0
    x[5, 128:256] = 0
    expected = grouped_linear(x, w, scales, 128)
    with runtime.load(table.path, threads) as own:
        linear = own.linear(w, scales, group=128)
        for n in (1, 2, 16, 17, 40):
            y = np.concatenate([linear(x[i : i + n]) for i in range(0, 40, n)])
            np.testing.assert_array_equal(y, expected)


def test_powers_of_two_show_the_integers(table: KernelTable) -> None:
    """With scales of one and activations that quantise to themselves y is the exact sum."""
    rng = np.random.default_rng(7)
    w = rng.integers(-1, 2, (50, 700), dtype=np.int8)
    x = rng.integers(-127, 128, (3, 700)).astype(np.float32)
    x[:, ::32] = 127
    for group in GROUPS:
        y = table.linear(w, np.ones((50, -(-700 // group)), np.float32), group=group)(x)
        np.testing.assert_array_equal(y, x @ w.T.astype(np.float32))


def test_what_is_wrong_with_groups_is_told(table: KernelTable) -> None:
    w, scales = weights(20, 200, 128)
    linear = table.linear(w, scales, group=128)
    with pytest.raises(BitgenError, match="no integer sums over all of k"):
        linear.accumulate(np.zeros((1, 200), np.int8))
    with pytest.raises(ArgumentValueError, match="group must be one of 32, 64, 128, 256, not 100"):
        table.linear(w, scales, group=100)
    with pytest.raises(ArgumentValueError, match=r"scale must have the shape \(20, 4\), not \(20, 2\)"):
        table.linear(w, scales, group=64)
    bad = scales.copy()
    bad[3, 1] = np.nan
    with pytest.raises(ArgumentValueError, match="NaN or infinity"):
        table.linear(w, bad, group=128)
    packed = runtime.aligned_bytes(table.packed_bytes(linear.shape, runtime.Groups(128)))
    with pytest.raises(ArgumentValueError, match="no half float"):
        table.pack_rows(w, 0, linear.shape, packed, runtime.Groups(128), scales + np.float32(1e-7))
    with pytest.raises(ArgumentValueError, match="-1, 0 and 1 only"):
        table.linear(w * np.int8(2), scales, group=128)
    ffi, lib, context = table.native
    x, y = np.zeros((1, 200), np.float32), np.zeros((1, 20), np.float32)
    one = ffi.new("float *", 1)
    data = ffi.from_buffer("uint8_t[]", linear.packed)
    buffers = ffi.from_buffer("float[]", x), 1, 20, 200, ffi.from_buffer("float[]", y)
    assert lib.bitgen_matmul(context, data, one, 1, *buffers) == lib.BITGEN_ERROR_SCALE_COUNT
    assert lib.bitgen_matmul(context, data, ffi.NULL, 0, *buffers) == lib.BITGEN_OK
    plain = table.linear(w, 1.0)
    data = ffi.from_buffer("uint8_t[]", plain.packed)
    assert lib.bitgen_matmul(context, data, ffi.NULL, 0, *buffers) == lib.BITGEN_ERROR_NULL


def test_families_tell_which_groups_they_have() -> None:
    with pytest.raises(
        BitgenError,
        match="TL2 has no layout with scales for groups of weights: no group is whole chunks of 48",
    ):
        Layout("tl2", 16, 128)
    with pytest.raises(BitgenError, match=r"I2_S has scales for groups of 32, 64, .* weights, not 48"):
        Layout("i2s", 16, 48)
    assert replace(Layout("i2s", 32), group=128).name == "i2s_r32_g128"
    assert Layout("i2s", 16, 128).bits_a_weight == 2.125
