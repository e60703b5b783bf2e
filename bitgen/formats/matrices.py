"""From the bytes of a tensor to a TernaryMatrix: one constructor for each way in which files store one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from bitgen.errors import FileError
from bitgen.formats.config import Floats
from bitgen.formats.quants import (
    DENSE,
    TERNARY,
    Ternary,
    absmean,
    block_scales,
    decode_i2_s,
    decode_tq,
    dequantize,
    ternary_of_floats,
)
from bitgen.formats.source import Bytes
from bitgen.formats.weights import TernaryMatrix
from bitgen.spec import Shape

_CHUNK_VALUES = 1 << 20  # decoded at once while a whole matrix is read for its scales: 4 MB of float32
_ABSMEAN_FLOOR = 1e-5


def ternary_matrix(
    name: str, kind: str, shape: tuple[int, ...], data: Bytes, where: str = ""
) -> TernaryMatrix:
    """A matrix (m, k) stored as i2_s, tq1_0, tq2_0 or as ternary values in a type for floats."""
    m, k = shape
    if kind == "i2_s":
        return _i2_s(name, Shape(m, k), data)
    if kind in TERNARY:
        return _tq(name, kind, Shape(m, k), data.reshape(m, -1), where)
    return _floats(name, kind, Shape(m, k), data.reshape(m, DENSE[kind].row_bytes(k)))


def _i2_s(name: str, shape: Shape, data: Bytes) -> TernaryMatrix:
    codes = data[: shape.m * shape.k // 4]
    scale = data[codes.size : codes.size + 4].copy().view("<f4").astype(np.float32)

    def decode(begin: int, end: int) -> Ternary:
        return decode_i2_s(codes, begin * shape.k, end * shape.k, name).reshape(-1, shape.k)

    return TernaryMatrix(name, shape, decode, lambda: scale)


def _tq(name: str, kind: str, shape: Shape, data: Bytes, where: str) -> TernaryMatrix:
    def decode(begin: int, end: int) -> Ternary:
        return decode_tq(kind, data[begin:end], shape.k, name)

    def row_scales(begin: int, end: int) -> Floats:
        """The one non-zero scale of each row's blocks, 0 where there is none."""
        scales = block_scales(kind, data[begin:end], shape.k)
        first = np.take_along_axis(scales, (scales != 0).argmax(axis=1)[:, None], axis=1)
        if not ((scales == 0) | (scales == first)).all():
            raise FileError(
                f"{where}: the scales of {name} ({kind.upper()}) differ within a row: one scale for each "
                "group of 256 weights is not supported; bitgen needs one a tensor or one a row",
            )
        return first[:, 0]

    return TernaryMatrix(name, shape, decode, lambda: _common_scale(shape, row_scales))


def _floats(name: str, kind: str, shape: Shape, data: Bytes) -> TernaryMatrix:
    def decode(begin: int, end: int) -> Ternary:
        return ternary_of_floats(kind, data[begin:end], shape.k, name)[0]

    def row_scales(begin: int, end: int) -> Floats:
        return ternary_of_floats(kind, data[begin:end], shape.k, name)[1]

    return TernaryMatrix(name, shape, decode, lambda: _common_scale(shape, row_scales))


def _common_scale(shape: Shape, row_scales: Callable[[int, int], Floats]) -> Floats:
    """(1,) where all rows that are not zero share their scale, else (m,); read in bounded blocks of rows."""
    step = max(1, _CHUNK_VALUES // shape.k)
    scales = np.concatenate([row_scales(b, min(b + step, shape.m)) for b in range(0, shape.m, step)])
    live = scales[scales != 0]
    if live.size == 0:
        return np.zeros(1, np.float32)
    return live[:1] if (live == live[0]).all() else scales


def packed_matrix(name: str, m: int, data: Bytes, scale: Floats) -> TernaryMatrix:
    """Four rows in a byte, data uint8 (R, k): byte[r, c] = sum over i of (w[i R + r, c] + 1) << 2 i."""
    quarter, k = data.shape

    def decode(begin: int, end: int) -> Ternary:
        out = np.empty((end - begin, k), np.uint8)
        for i in range(4):
            low, high = max(begin, i * quarter), min(end, (i + 1) * quarter)
            if low < high:
                out[low - begin : high - begin] = data[low - i * quarter : high - i * quarter] >> 2 * i & 3
        if (out == 3).any():
            raise FileError(f"{name} holds codes that are not ternary; the file is damaged")
        out -= 1
        return out.view(np.int8)

    return TernaryMatrix(name, Shape(m, k), decode, lambda: scale)


def master_matrix(name: str, kind: str, data: Bytes, k: int) -> TernaryMatrix:
    """Latent weights: w = round(clamp(W / mean|W|, -1, 1)), scale mean|W|, the mean at least 1e-5."""

    @cache
    def mean() -> float:
        return _mean_of(name, kind, data, k)

    def decode(begin: int, end: int) -> Ternary:
        return absmean(dequantize(kind, data[begin:end], k), mean())

    def find_scale() -> Floats:
        # As BitLinear computes it: one over the inverse it multiplied the weights with.
        return np.float32(1) / (np.float32(1) / np.array([mean()], np.float32))

    return TernaryMatrix(name, Shape(len(data), k), decode, find_scale)


def _mean_of(name: str, kind: str, data: Bytes, k: int) -> float:
    """mean|W|, summed in double, at least 1e-5."""
    step = max(1, _CHUNK_VALUES // k)
    total = 0.0
    for begin in range(0, len(data), step):
        values = dequantize(kind, data[begin : begin + step], k)
        total += float(np.abs(values).sum(dtype=np.float64))
    mean = total / (len(data) * k)
    if not math.isfinite(mean):
        raise FileError(f"{name} holds NaN or infinity; the file is damaged")
    return max(mean, _ABSMEAN_FLOOR)
