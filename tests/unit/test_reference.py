from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitgen.errors import BitgenError
from bitgen.reference import (
    INT16_MAX,
    grouped_int16_linear,
    int16_linear,
    linear,
    planes_of,
    quantize_activations,
    quantize_int16,
    scale_output,
    ternary_matmul,
)

f32 = np.float32
FLOOR = f32(1e-5)


def quantize(*values: float) -> tuple[list[int], np.float32]:
    xq, x_scale = quantize_activations(np.array([values], f32))
    assert (xq.dtype, x_scale.dtype) == (np.dtype(np.int8), np.dtype(f32))
    assert x_scale.shape == (1,)
    return [int(v) for v in xq[0]], x_scale[0]


# ---- quantize_activations


def test_largest_magnitude_becomes_127() -> None:
    assert quantize(0.0, 2.0, -1.0, 1.0)[0] == [0, 127, -64, 64]
    assert quantize(-3.0, 1.5)[0] == [-127, 64]
    assert quantize(127.0)[1] == f32(1)


def test_ties_go_to_even() -> None:
    values = [
        127.0,
        0.5,
        1.5,
        2.5,
        3.5,
        -0.5,
        -1.5,
        -2.5,
        126.5,
        125.5,
    ]  # s = 1: the values are their own codes
    assert quantize(*values)[0] == [127, 0, 2, 2, 4, 0, -2, -2, 126, 126]


def test_all_zero_rows_give_zeros_with_a_finite_scale() -> None:
    xq, x_scale = quantize_activations(np.zeros((3, 5), f32))
    assert not xq.any()
    assert np.isfinite(x_scale).all()
    assert (x_scale == f32(1) / (f32(127) / FLOOR)).all()
    assert not linear(np.zeros((3, 5), f32), np.ones((2, 5), np.int8), np.ones(1, f32)).any()
    assert quantize(-0.0, 0.0)[0] == [0, 0]


def test_magnitudes_below_the_floor_share_one_scale() -> None:
    at_floor = quantize(1e-5)
    assert at_floor[0] == [127]
    assert quantize(5e-6) == ([round(127 * 0.5)], at_floor[1])
    assert quantize(1e-30) == ([0], at_floor[1])
    assert quantize(float(np.finfo(f32).smallest_subnormal)) == ([0], at_floor[1])
    assert quantize(2e-5)[1] > at_floor[1]


def test_extreme_magnitudes() -> None:
    largest = float(np.finfo(f32).max)
    xq, scale = quantize(largest, -largest, 1.0)
    assert xq == [127, -127, 0]
    assert np.isfinite(scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0), (2, 4)])
def test_nan_and_infinity_are_refused(bad: float, at: tuple[int, int]) -> None:
    x = np.ones((3, 5), f32)
    x[at] = bad
    with pytest.raises(BitgenError, match="NaN or infinity"):
        quantize_activations(x)


@pytest.mark.parametrize("x", [np.ones((2, 3)), np.ones(3, f32), np.ones((2, 3), np.float16)])
def test_quantize_refuses_other_types_and_ranks(x: np.ndarray) -> None:
    with pytest.raises(BitgenError, match="float32"):
        quantize_activations(x)


finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)


@settings(max_examples=100, deadline=None)
@given(x=hnp.arrays(f32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=finite))
def test_quantize_equals_the_formula_one_value_at_a_time(x: np.ndarray) -> None:
    xq, x_scale = quantize_activations(x)
    for row, codes, scale in zip(x, xq, x_scale, strict=True):
        s = f32(127) / max(FLOOR, *(abs(v) for v in row))
        assert scale == f32(1) / s
        for value, code in zip(row, codes, strict=True):
            product = float(value * s)  # rounded to float32 once
            assert abs(product - int(code)) <= 0.5
            assert int(code) == max(-128, min(127, round(product)))  # Python's round: ties to even
        assert (codes >= -127).all()  # -128 is legal for kernels, but the quantiser never makes it


def test_rows_do_not_influence_each_other() -> None:
    x = np.random.default_rng(0).standard_normal((4, 33), f32) * np.array([[1e-9], [1], [1e9], [0]], f32)
    together = quantize_activations(x)
    for i in range(4):
        alone = quantize_activations(x[i : i + 1])
        np.testing.assert_array_equal(together[0][i], alone[0][0])
        assert together[1][i] == alone[1][0]


# ---- ternary_matmul


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 5), m=st.integers(1, 9), k=st.integers(1, 50))
def test_matmul_equals_python_integers(data: st.DataObject, n: int, m: int, k: int) -> None:
    xq = data.draw(hnp.arrays(np.int8, (n, k), elements=st.integers(-128, 127)))
    w = data.draw(hnp.arrays(np.int8, (m, k), elements=st.integers(-1, 1)))
    acc = ternary_matmul(xq, w)
    assert acc.dtype == np.int32
    expected = [[sum(int(a) * int(b) for a, b in zip(x, row, strict=True)) for row in w] for x in xq]
    assert acc.tolist() == expected


def test_matmul_is_exact_where_float32_and_int16_are_not() -> None:
    k = 200_001  # 200001 * 128 > 2^24
    ones = np.ones((1, k), np.int8)
    assert ternary_matmul(np.full((1, k), -128, np.int8), ones).item() == -128 * k
    assert ternary_matmul(np.full((1, k), 127, np.int8), -ones).item() == -127 * k
    assert ternary_matmul(np.full((1, k), -128, np.int8), -ones).item() == 128 * k


@pytest.mark.parametrize(
    ("xq", "w"),
    [
        (np.zeros((1, 4), np.int16), np.zeros((2, 4), np.int8)),
        (np.zeros((1, 5), np.int8), np.zeros((2, 4), np.int8)),
        (np.zeros(4, np.int8), np.zeros((2, 4), np.int8)),
        (np.zeros((1, 4), np.int8), np.full((2, 4), 2, np.int8)),
        (np.zeros((1, 4), np.int8), np.zeros((2, 4), np.int32)),
    ],
)
def test_matmul_refuses(xq: np.ndarray, w: np.ndarray) -> None:
    with pytest.raises(BitgenError, match="must be"):
        ternary_matmul(xq, w)


# ---- scale_output, linear


def test_one_order_of_operations() -> None:
    """(float)acc * (x_scale * w_scale): the other orders give other bits for these values."""
    rng = np.random.default_rng(4)
    acc = rng.integers(-(1 << 26), 1 << 26, (8, 64), dtype=np.int32)
    x_scale, w_scale = rng.uniform(0.001, 0.1, 8).astype(f32), rng.uniform(0.001, 0.1, 64).astype(f32)
    y = scale_output(acc, x_scale, w_scale)
    assert y.dtype == f32
    for i, j in np.ndindex(acc.shape):
        assert y[i, j] == f32(acc[i, j]) * f32(x_scale[i] * w_scale[j])
    other = (acc.astype(f32) * x_scale[:, None]) * w_scale
    assert (y != other).any(), "the data must tell the orders apart"


def test_tensor_scale_is_a_row_scale_repeated() -> None:
    acc = np.arange(-6, 6, dtype=np.int32).reshape(2, 6)
    x_scale = np.array([0.3, 0.7], f32)
    one = scale_output(acc, x_scale, np.array([0.11], f32))
    np.testing.assert_array_equal(one, scale_output(acc, x_scale, np.full(6, 0.11, f32)))


def test_linear_is_close_to_the_real_product() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((3, 400), f32), rng.integers(-1, 2, (20, 400), dtype=np.int8)
    y = linear(x, w, np.array([0.5], f32))
    exact = 0.5 * x.astype(float) @ w.T
    step = np.abs(x).max(axis=1, keepdims=True) / 127  # an activation is off by half a step at most
    assert (np.abs(y - exact) <= 0.5 * 0.5 * step * 400 + 1e-3).all()
    assert np.abs(y - exact).max() < 0.05 * np.abs(exact).max()


# ---- int16 activations


def test_every_int16_is_two_int8() -> None:
    xq = np.arange(-INT16_MAX, INT16_MAX + 1, dtype=np.int16)
    high, low = planes_of(xq)
    assert (high.dtype, low.dtype) == (np.dtype(np.int8), np.dtype(np.int8))
    assert np.array_equal(256 * high.astype(np.int32) + low, xq)
    assert (high.min(), high.max(), low.min(), low.max()) == (-127, 127, -128, 127)


@given(hnp.arrays(f32, (2, 9), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
@settings(max_examples=200)
def test_the_largest_magnitude_becomes_32639(x: np.ndarray) -> None:
    xq, x_scale = quantize_int16(x)
    largest = np.abs(x).max(axis=1)
    assert (np.abs(xq.astype(int)).max(axis=1)[largest >= FLOOR] == INT16_MAX).all()
    assert (np.abs(xq * x_scale[:, None].astype(float) - x) <= 0.51 * x_scale[:, None]).all()


def test_int16_is_256_times_nearer_than_int8() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 300)).astype(f32)
    w = rng.integers(-1, 2, (40, 300), dtype=np.int8)
    scale = rng.uniform(0.5, 2, (40, 3)).astype(f32)
    exact = x.astype(float) @ (w * np.repeat(scale, 128, axis=1)[:, :300]).T
    whole = x.astype(float) @ w.T
    errors = [
        np.abs(linear(x, w, np.ones(1, f32)) - whole).std(),
        np.abs(int16_linear(x, w, np.ones(1, f32)) - whole).std(),
        np.abs(grouped_int16_linear(x, w, scale, 128) - exact).std(),
    ]
    assert errors[1] < errors[0] / 150
    assert errors[2] < errors[0] / 150
