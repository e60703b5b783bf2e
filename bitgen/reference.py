"""The oracle, in plain numpy: what every kernel must equal, and what the bytes of every layout mean.

Weights that are not ternary are `Codes`, which `pack_codes` packs and `code_values` reads as integers.

``pack(layout, w)`` takes w int8 (m, k) in {-1, 0, 1} and gives uint8 (layout.packed_bytes,). The matrix is
padded with zero weights to whole row blocks and chunks (whole groups where scales lie among the weights, and
scales 0). In all layouts a sub-block is 16 rows, a lane is 16
bytes, and a chunk is followed by the same chunk of the next sub-block of its row block (tl5: of the next
four). What a chunk's bytes are says the file of its family in bitgen/families.

``y[n, m] = (float)acc[n, m] * (x_scale[n] * w_scale[m])`` with ``acc[n, m] = sum_k w[m, k] * xq[n, k]``;
with a scale for each group of weights along k the sum over groups of `scale_groups`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError
from bitgen.families.base import Bytes, Codes, Ternary, encode_tail
from bitgen.spec import EVERY_FAMILY, Layout, Shape, ceil_to


def are_halves(values: NDArray[np.floating[Any]]) -> bool:
    """Whether each of them, float32 of any shape, is a half float exactly."""
    with np.errstate(over="ignore"):
        return bool((values == values.astype(np.float16)).all())


def check_ternary(w: Ternary) -> Shape:
    """The shape of ``w``, which must be int8 (m, k) with values in {-1, 0, 1}."""
    if w.dtype != np.int8 or w.ndim != 2:
        raise BitgenError(f"weights must be int8 with two dimensions (m, k), not {w.dtype} {w.shape}")
    shape = Shape(*w.shape)
    if w.min() < -1 or w.max() > 1:
        raise BitgenError("weights must be -1, 0 or 1")
    return shape


def pack(
    layout: Layout, w: Ternary, scales: NDArray[np.float32] | None = None, *, half: bool = True
) -> Bytes:
    """Pack w int8 (m, k) -> uint8 (layout.packed_bytes,).

    ``scales`` float32 (m, groups), of a layout with groups; ``half``: stored as half floats, which must hold
    them exactly, else as floats.
    """
    shape = check_ternary(w)
    if layout.group:
        if scales is None or scales.shape != (shape.m, layout.groups(shape.k)):
            raise BitgenError(f"{layout.name} needs scales ({shape.m}, {layout.groups(shape.k)})")
        return _pack_groups(layout, w, (scales,), half)
    return _pack_rows(layout, w)


def _pack_rows(layout: Layout, w: Ternary) -> Bytes:
    """Of each row block its chunks, then its trailers: weights, or codes, whose scales lie outside."""
    (m, k), family = w.shape, EVERY_FAMILY[layout.family]
    chunks = layout.chunks(k)
    padded = np.zeros((ceil_to(m, layout.row_block), chunks * family.k_chunk), np.int8)
    padded[:m, :k] = w
    # (blocks, chunks, sub-blocks, 16 rows, k_chunk)
    tiles = padded.reshape(-1, layout.sub_blocks, 16, chunks, family.k_chunk).transpose(0, 3, 1, 2, 4)
    blocks = family.encode(tiles).reshape(len(tiles), -1)
    if family.values:
        negative = np.less(family.values(tiles), 0).sum(axis=(1, 4, 5), dtype=np.int32)
        blocks = np.concatenate([blocks, negative.reshape(len(tiles), -1).view(np.uint8)], axis=1)
    return np.ascontiguousarray(blocks).reshape(-1)


def _pack_groups(
    layout: Layout, w: Ternary, scales: Sequence[NDArray[np.float32]], half: bool, head: Bytes | None = None
) -> Bytes:
    """Of each row block and group the chunks of its sub-blocks, their tails, then the scales of each.

    ``scales``: one or more of (m, groups); ``head`` (row blocks, bytes): what comes before the groups.
    """
    (m, k), family = w.shape, EVERY_FAMILY[layout.family]
    rows, groups = ceil_to(m, layout.row_block), layout.groups(k)
    padded = np.zeros((rows, layout.columns(k)), np.int8)
    scale = np.zeros((rows, len(scales), groups), np.float16 if half else np.float32)
    padded[:m, :k], scale[:m] = w, np.stack(scales, axis=1)
    blocks, whole = rows // layout.row_block, layout.group // family.k_chunk
    # (blocks, groups, sub-blocks, 16 rows, group)
    cells = padded.reshape(blocks, layout.sub_blocks, 16, groups, layout.group).transpose(0, 3, 1, 2, 4)
    tiles = cells[..., : whole * family.k_chunk].reshape(*cells.shape[:4], whole, family.k_chunk)
    # (blocks, chunks, sub-blocks, 16 rows, k_chunk)
    tiles = tiles.transpose(0, 1, 4, 2, 3, 5).reshape(blocks, -1, layout.sub_blocks, 16, family.k_chunk)
    parts: list[Bytes] = [family.encode(tiles).reshape(blocks, groups, -1)]
    if family.tail(layout.group):
        parts.append(encode_tail(cells[..., whole * family.k_chunk :]).reshape(blocks, groups, -1))
    # (blocks, groups, sub-blocks, scales, 16 rows)
    lines = scale.reshape(blocks, layout.sub_blocks, 16, len(scales), groups).transpose(0, 4, 1, 3, 2)
    parts.append(np.ascontiguousarray(lines).reshape(blocks, groups, -1).view(np.uint8))
    body = np.concatenate(parts, axis=2).reshape(blocks, -1)
    return (body if head is None else np.concatenate([head, body], axis=1)).reshape(-1)


def unpack(layout: Layout, packed: Bytes, shape: Shape) -> Ternary:
    """The inverse of ``pack`` without scales: uint8 (layout.packed_bytes,) -> int8 (m, k)."""
    if packed.dtype != np.uint8 or packed.size != layout.packed_bytes(shape):
        raise BitgenError(
            f"packed weights of {shape.name} in {layout.name} take {layout.packed_bytes(shape)} bytes, "
            f"not {packed.size}"
        )
    family = EVERY_FAMILY[layout.family]
    chunks = layout.chunks(shape.k)
    blocks = packed.reshape(-1, layout.block_bytes(shape.k))
    body = blocks[:, : layout.sub_blocks * chunks * family.chunk_bytes]
    cells = body.reshape(-1, chunks, layout.sub_blocks, family.chunk_bytes)
    tiles = family.decode(cells)
    rows = tiles.transpose(0, 2, 3, 1, 4).reshape(len(blocks) * layout.row_block, -1)
    return np.ascontiguousarray(rows[: shape.m, : shape.k])


def quantize_activations(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise x float32 (n, k) -> (xq int8 (n, k), x_scale float32 (n,)).

    For each token ``s = 127 / max(absmax, 1e-5)``, ``xq = clamp(round_half_even(x * s), -128, 127)`` and
    ``x_scale = 1 / s``, all in float32. Raises on NaN and infinity.
    """
    check_activations(x)
    absmax = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    s = np.float32(127) / absmax
    xq = np.clip(np.rint(x * s), -128, 127).astype(np.int8)
    return xq, (np.float32(1) / s)[:, 0]


def check_activations(x: NDArray[np.float32]) -> None:
    """BitgenError where x is not float32 (n, k), or not finite."""
    if x.dtype != np.float32 or x.ndim != 2:
        raise BitgenError(f"activations must be float32 (n, k), not {x.dtype} {x.shape}")
    if not np.isfinite(x).all():
        raise BitgenError("activations hold NaN or infinity")


def ternary_matmul(xq: NDArray[np.int8], w: NDArray[np.int8]) -> NDArray[np.int32]:
    """Multiply exactly: acc int32 (n, m) = xq int8 (n, k) times w int8 (m, k) transposed.

    float64 holds every partial sum exactly (|sum| <= 128 k < 2^53), so BLAS may be used in any order.
    """
    check_ternary(w)
    if xq.dtype != np.int8 or xq.ndim != 2 or xq.shape[1] != w.shape[1]:
        raise BitgenError(f"xq must be int8 (n, {w.shape[1]}), not {xq.dtype} {xq.shape}")
    return (xq.astype(np.float64) @ w.T.astype(np.float64)).astype(np.int32)


def scale_output(
    acc: NDArray[np.int32], x_scale: NDArray[np.float32], w_scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Scale to y float32 (n, m) = (float)acc * (x_scale * w_scale), w_scale (m,) or (1,); in this order."""
    return acc.astype(np.float32) * (x_scale[:, None] * w_scale[None, :])


def linear(x: NDArray[np.float32], w: NDArray[np.int8], w_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The whole BitLinear product: quantise, multiply exactly, scale."""
    xq, x_scale = quantize_activations(x)
    return scale_output(ternary_matmul(xq, w), x_scale, w_scale)


# ---- int16 activations

INT16_MAX = 32639  # the largest that is 256 times an int8 and an int8


def quantize_int16(x: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Quantise x float32 (n, k) -> (xq int16 (n, k), x_scale float32 (n,)).

    As `quantize_activations`, with 32639 for 127: ``xq = 256 * high + low`` (`planes_of`).
    """
    check_activations(x)
    absmax = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-5))
    s = np.float32(INT16_MAX) / absmax
    return np.rint(x * s).astype(np.int16), (np.float32(1) / s)[:, 0]


def planes_of(xq: NDArray[np.int16]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """(high, low) int8 with ``xq = 256 * high + low``, of int16 between -32639 and 32639."""
    high = (xq.astype(np.int32) + 128) >> 8
    return high.astype(np.int8), (xq - 256 * high).astype(np.int8)


def int16_linear(
    x: NDArray[np.float32], w: NDArray[np.int8], w_scale: NDArray[np.float32]
) -> NDArray[np.float32]:
    """The product with int16 activations: y = (float)(256 acc_high + acc_low) * (x_scale * w_scale)."""
    xq, x_scale = quantize_int16(x)
    high, low = (ternary_matmul(plane, w).astype(np.int64) for plane in planes_of(xq))
    return scale_output((256 * high + low).astype(np.int32), x_scale, w_scale)


# ---- weights with a scale for each group along k


def _split_groups(x: NDArray[Any], group: int) -> NDArray[Any]:
    """X (n, k) -> (n, groups, group), zeros behind k."""
    n, k = x.shape
    padded = np.zeros((n, ceil_to(k, group)), x.dtype)
    padded[:, :k] = x
    return padded.reshape(n, -1, group)


def group_sums(xq: NDArray[np.int8], group: int) -> NDArray[np.int32]:
    """The sums of the activations of each group: xq int8 (n, k) -> int32 (n, groups)."""
    sums: NDArray[np.int32] = _split_groups(xq, group).sum(axis=2, dtype=np.int32)
    return sums


def quantize_groups(x: NDArray[np.float32], group: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise x float32 (n, k) by groups of ``group`` along k -> (xq int8 (n, k), x_scale (n, groups)).

    The rule of `quantize_activations` for each group of each token.
    """
    groups = _split_groups(x, group)
    xq, x_scale = quantize_activations(groups.reshape(-1, group))
    return xq.reshape(len(x), -1)[:, : x.shape[1]], x_scale.reshape(groups.shape[:2])


def fused_multiply_add(
    a: NDArray[np.float32], b: NDArray[np.float32], c: NDArray[np.float32]
) -> NDArray[np.float32]:
    """``a * b + c`` in float32 with one rounding.

    A product of two float32 is exact in float64; their sum is rounded to odd there (53 bits are more than
    twice 24 and 2), so that rounding to float32 afterwards is the only rounding that counts.
    """
    p, y = a.astype(np.float64) * b, c.astype(np.float64)
    total = p + y
    back = total - p
    error = (p - (total - back)) + (y - back)  # exact: total + error = p + y
    even = total.view(np.int64) & 1 == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    with np.errstate(over="ignore"):
        return odd.astype(np.float32)


def scale_groups(
    xq: NDArray[np.int8],
    w: NDArray[np.int8],
    x_scale: NDArray[np.float32],
    w_scale: NDArray[np.float32],
    group: int,
) -> NDArray[np.float32]:
    """Multiply in groups: y float32 (n, m) of xq int8 (n, k), w int8 (m, k).

    ``y = 0; for g = 0, 1, ...: y = fma((float)acc[:, :, g], w_scale[m, g] * x_scale[n, g], y)`` with x_scale
    (n, groups), w_scale (m, groups), the integer sums exact and each scale product rounded first.
    """
    check_ternary(w)
    y = np.zeros((len(xq), len(w)), np.float32)
    x_parts, w_parts = _split_groups(xq, group), _split_groups(w, group)
    for g in range(x_parts.shape[1]):
        acc = x_parts[:, g].astype(np.float64) @ w_parts[:, g].T.astype(np.float64)
        y = fused_multiply_add(acc.astype(np.float32), w_scale[None, :, g] * x_scale[:, None, g], y)
    return y


def grouped_linear(
    x: NDArray[np.float32], w: NDArray[np.int8], w_scale: NDArray[np.float32], group: int
) -> NDArray[np.float32]:
    """The whole product of weights in groups: quantise, multiply exactly, scale and add in order."""
    xq, x_scale = quantize_groups(x, group)
    return scale_groups(xq, w, x_scale, w_scale, group)


def grouped_int16_linear(
    x: NDArray[np.float32], w: NDArray[np.int8], w_scale: NDArray[np.float32], group: int
) -> NDArray[np.float32]:
    """The same with int16 activations, also quantised by groups: y = y_high + y_low.

    Each is what `scale_groups` gives of a plane: of high with the scales 256 * x_scale.
    """
    groups = _split_groups(x, group)
    xq, x_scale = quantize_int16(groups.reshape(-1, group))
    x_scale = x_scale.reshape(groups.shape[:2])
    planes = [plane.reshape(len(x), -1)[:, : x.shape[1]] for plane in planes_of(xq)]
    scales = np.float32(256) * x_scale, x_scale
    high, low = (scale_groups(p, w, s, w_scale, group) for p, s in zip(planes, scales, strict=True))
    return high + low


# ---- weights that are codes


def pack_codes(layout: Layout, weights: Codes, *, half: bool = True) -> Bytes:
    """Pack codes -> uint8 (layout.packed_bytes,); ``half`` as in `pack`."""
    w, family = weights.codes, EVERY_FAMILY[layout.family]
    if w.max(initial=0) >= family.codes or weights.scales.shape != (len(w), layout.groups(w.shape[1])):
        raise BitgenError(f"{layout.name} needs codes of {family.code_bits} bits and scales of its groups")
    offsets = () if weights.offsets is None else (weights.offsets,)
    if family.is_ternary or len(offsets) != family.scales - 1 or (weights.tables is None) == family.by_table:
        raise BitgenError(f"these weights are not {family.title}'s")
    if not layout.group:
        return _pack_rows(layout, w.astype(np.int8))
    head = _table_head(layout, weights) if family.by_table else None
    return _pack_groups(layout, w.astype(np.int8), (weights.scales, *offsets), half, head)


def _table_head(layout: Layout, weights: Codes) -> Bytes:
    """Of each row block its tables, zeros behind the last, and the selectors, those of a group together."""
    m, k = weights.codes.shape
    blocks, groups = -(-m // layout.row_block), layout.groups(k)
    head = np.zeros((blocks, layout.head_bytes(k)), np.uint8)
    if weights.tables is not None:
        head[:, : weights.tables.size] = weights.tables.reshape(-1).view(np.uint8)
    if weights.selectors is not None:
        every = np.zeros((blocks * layout.sub_blocks, groups), np.uint8)
        every[: len(weights.selectors)] = weights.selectors
        of_block = every.reshape(blocks, layout.sub_blocks, groups).transpose(0, 2, 1)
        head[:, 64 : 64 + layout.sub_blocks * groups] = of_block.reshape(blocks, -1)
    return head


def code_values(layout: Layout, weights: Codes) -> NDArray[np.int8]:
    """The integers (m, k) that kernels multiply, times whose scales, plus offsets, they are weights."""
    if weights.tables is None:
        family = EVERY_FAMILY[layout.family]
        return np.int8(family.step) * weights.codes.astype(np.int8) - np.int8(family.bias)
    m, k = weights.codes.shape
    table = np.zeros((m, k), np.intp)
    if weights.selectors is not None:
        table = np.repeat(np.repeat(weights.selectors, 16, axis=0)[:m], layout.group, axis=1)[:, :k].astype(
            np.intp
        )
    return weights.tables[table, weights.codes]


def scale_codes(
    xq: NDArray[np.int8], weights: Codes, x_scale: NDArray[np.float32], layout: Layout
) -> NDArray[np.float32]:
    """As `scale_groups`, of weights that are codes.

    With offsets each group adds ``y = fma(offset[m, g], x_scale[n, g] * (float)x_sum[n, g], y)`` behind its
    sum.
    """
    y = np.zeros((len(xq), len(weights.codes)), np.float32)
    values = code_values(layout, weights)
    x_parts, w_parts = _split_groups(xq, layout.group), _split_groups(values, layout.group)
    for g in range(x_parts.shape[1]):
        acc = x_parts[:, g].astype(np.float64) @ w_parts[:, g].T.astype(np.float64)
        scale = x_scale[:, None, g]
        y = fused_multiply_add(acc.astype(np.float32), weights.scales[None, :, g] * scale, y)
        if weights.offsets is not None:
            x_sum = x_parts[:, g].sum(axis=1, dtype=np.int32).astype(np.float32)
            y = fused_multiply_add(weights.offsets[None, :, g], scale * x_sum[:, None], y)
    return y


def coded_linear(x: NDArray[np.float32], weights: Codes, layout: Layout) -> NDArray[np.float32]:
    """The whole product of codes in groups: quantise by groups, multiply exactly, scale and add in order."""
    xq, x_scale = quantize_groups(x, layout.group)
    return scale_codes(xq, weights, x_scale, layout)


def coded_int16_linear(x: NDArray[np.float32], weights: Codes, layout: Layout) -> NDArray[np.float32]:
    """The same with int16 activations, as `grouped_int16_linear` has them."""
    groups = _split_groups(x, layout.group)
    xq, x_scale = quantize_int16(groups.reshape(-1, layout.group))
    x_scale = x_scale.reshape(groups.shape[:2])
    planes = [plane.reshape(len(x), -1)[:, : x.shape[1]] for plane in planes_of(xq)]
    scales = np.float32(256) * x_scale, x_scale
    high, low = (scale_codes(p, weights, s, layout) for p, s in zip(planes, scales, strict=True))
    return high + low
