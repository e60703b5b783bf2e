"""From the bytes of a tensor to a TernaryMatrix: one constructor for each way in which files store one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TypeAlias

import numpy as np

from bitgen.errors import FileError
from bitgen.formats.config import Floats
from bitgen.formats.quants import DENSE, dequantize
from bitgen.formats.source import Bytes
from bitgen.formats.stored_matrix import GroupScales, TernaryMatrix
from bitgen.formats.ternary import (
    TERNARY,
    Ternary,
    absmean,
    block_scales,
    decode_blocks,
    decode_i2_s,
    ternary_of_floats,
)
from bitgen.formats.weights import DenseMatrix
from bitgen.spec import Shape

_CHUNK_VALUES = 1 << 20  # decoded at once while a whole matrix is read for its scales: 4 MB of float32
_FLOATS = ("f32", "f16", "bf16")
ONE_BIT = "q1_0"
_ROWS_TRIED = 64
_GROUPS = (256, 128, 64, 32)  # sizes of groups that kernels know
_ABSMEAN_FLOOR = 1e-5


def ternary_matrix(
    name: str, kind: str, shape: tuple[int, ...], data: Bytes, *, binary: bool = False
) -> TernaryMatrix:
    """A matrix (m, k) stored as i2_s, in blocks with scales, or as ternary values in a type for floats.

    ``binary``: one of Q1_0 is for kernels of bits.
    """
    m, k = shape
    if kind == "i2_s":
        return _i2_s(name, Shape(m, k), data)
    if kind in TERNARY:
        return _blocks(name, kind, Shape(m, k), data.reshape(m, -1), binary=binary and kind == ONE_BIT)
    return _floats(name, kind, Shape(m, k), data.reshape(m, DENSE[kind].row_bytes(k)))


def ternary_head(head: DenseMatrix, group: int, *, binary: bool = False) -> TernaryMatrix | None:
    """The matrix that makes logits, for the ternary kernels; None where it is not ternary.

    ``group``: of the model's matrices; a head of floats is ternary where some of its rows are, which is how
    models with groups are unpacked. A row that is not makes reading it a FileError. ``binary``: see
    `ternary_matrix`.
    """
    if head.is_ternary or (group and head.type in _FLOATS and _is_probably_ternary(head, group)):
        return ternary_matrix(head.name, head.type, head.shape, head.data, binary=binary)
    return None


def _is_probably_ternary(head: DenseMatrix, group: int) -> bool:
    some = np.unique(np.linspace(0, head.shape[0] - 1, _ROWS_TRIED).astype(np.int64))
    try:
        ternary_of_floats(head.type, head.data[some], head.shape[1], head.name, group)
    except FileError:
        return False
    return True


def _i2_s(name: str, shape: Shape, data: Bytes) -> TernaryMatrix:
    codes = data[: shape.m * shape.k // 4]
    scale = data[codes.size : codes.size + 4].copy().view("<f4").astype(np.float32)

    def decode(begin: int, end: int) -> Ternary:
        return decode_i2_s(codes, begin * shape.k, end * shape.k, name).reshape(-1, shape.k)

    return TernaryMatrix(name, shape, decode, lambda: scale)


def _blocks(name: str, kind: str, shape: Shape, data: Bytes, *, binary: bool) -> TernaryMatrix:
    """Blocks with scales. Where those of each row are the same, or zero, it is a scale a row.

    Bits cannot say 0: a scale of zero among them keeps all of them in blocks.
    """
    block = TERNARY[kind].block

    def scales(begin: int, end: int, group: int) -> Floats | None:
        found = block_scales(kind, data[begin:end], shape.k)
        if group:
            return _merged(found, group // block)
        first = np.take_along_axis(found, (found != 0).argmax(axis=1)[:, None], axis=1)
        same = (found == first) & (found != 0) if binary else (found == 0) | (found == first)
        return first if same.all() else None

    sizes = (0, *(size for size in _GROUPS if size % block == 0 and size <= max(block, 128)))
    group = cache(lambda: _coarsest(shape, sizes, scales))

    def decode(begin: int, end: int) -> Ternary:
        w = decode_blocks(kind, data[begin:end], shape.k, name)
        if group() == 0:  # what a scale of zero makes zero is so under the scale of its row
            dead = block_scales(kind, data[begin:end], shape.k) == 0
            if dead.any():
                w.reshape(*dead.shape, block)[dead] = 0
        return w

    return replace(_grouped(name, shape, decode, group, scales), binary=binary)


def _merged(scales: Floats, count: int) -> Floats | None:
    """One scale for each ``count`` blocks of a row; None where they differ, or are no whole groups."""
    if scales.shape[1] % count:
        return None
    runs = scales.reshape(len(scales), -1, count)
    return runs[..., 0] if (runs == runs[..., :1]).all() else None


def _floats(name: str, kind: str, shape: Shape, data: Bytes) -> TernaryMatrix:
    def read(begin: int, end: int, group: int) -> tuple[Ternary, Floats]:
        return ternary_of_floats(kind, data[begin:end], shape.k, name, group)

    def scales(begin: int, end: int, group: int) -> Floats | None:
        try:
            return read(begin, end, group)[1]
        except FileError:
            if group == sizes[-1]:
                raise
            return None

    sizes = (0, *(size for size in _GROUPS if size < shape.k))
    group = cache(lambda: _coarsest(shape, sizes, scales))

    def decode(begin: int, end: int) -> Ternary:
        return read(begin, end, group())[0]

    def values(begin: int, end: int) -> Floats:
        found = dequantize(kind, data[begin:end], shape.k)
        if not np.isfinite(found).all():
            raise FileError(f"{name} holds NaN or infinity; the file is damaged")
        return found

    return replace(_grouped(name, shape, decode, group, scales), floats=values)


_Scales: TypeAlias = Callable[[int, int, int], Floats | None]  # of rows [begin, end), for a size of groups


def _grouped(
    name: str, shape: Shape, decode: Callable[[int, int], Ternary], group: Callable[[], int], scales: _Scales
) -> TernaryMatrix:
    def rows_of_scales(begin: int, end: int) -> Floats:
        found = scales(begin, end, group())
        if found is None:  # the file changed since its groups were found
            raise FileError(f"{name}: the scales are not those that were there before; the file has changed")
        return found

    def find_scale() -> Floats:
        return _common_scale(shape, lambda begin, end: rows_of_scales(begin, end)[:, 0])

    return TernaryMatrix(name, shape, decode, find_scale, GroupScales(group, rows_of_scales))


def _coarsest(shape: Shape, sizes: Sequence[int], scales: _Scales) -> int:
    """The first of ``sizes``, coarse to fine, in which all rows have a scale a group.

    What fits a size fits every finer one, so that the matrix is read once, and not to its end once only the
    last size is left.
    """
    step = max(1, _CHUNK_VALUES // shape.k)
    at = 0
    for begin in range(0, shape.m, step):
        while scales(begin, min(begin + step, shape.m), sizes[at]) is None:
            at += 1
        if at == len(sizes) - 1:
            break
    return sizes[at]


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
