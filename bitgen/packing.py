"""Lay out ternary weights for a kernel, and undo it: the numpy definition of every layout.

``pack(layout, w)`` takes w int8 (m, k) in {-1, 0, 1} and gives uint8 (layout.packed_bytes,). The matrix is
padded with zero weights to whole row blocks and chunks. In all layouts a sub-block is 16 rows, a lane is 16
bytes, and a chunk is followed by the same chunk of the next sub-block of its row block (tl5: of the next
four).

====== =================== ==================================================================================
family a chunk             bytes
====== =================== ==================================================================================
i2s    16 rows x 16 k, 64  byte[4 r + j] = sum over s of (w[r, 4 s + j] + 1) << 2 s, s = 0..3
tl1    16 rows x 16 k, 64  byte[16 l + r] = idx(w[r, 4 l], w[r, 4 l + 1])
                           | idx(w[r, 4 l + 2], w[r, 4 l + 3]) << 4, idx(w0, w1) = 3 w0 + w1 + 4
tl2    16 rows x 48 k, 160 lane l holds k = 12 l .. 12 l + 11 as triples t = 0..3 with v = 9 w0 + 3 w1 + w2:
                           64 bytes |v_0| | |v_1| << 4, 64 bytes |v_2| | |v_3| << 4, then 16 bytes of signs
                           (one a row: bit l is v_0 < 0 in lane l, bit 4 + l is v_1 < 0), 16 for v_2 and v_3.
                           A sub-block's trailer is int32[16]: the number of negative v of each row.
t5     16 rows x 20 k, 64  byte[4 r + j] holds w[r, 4 s + j], s = 0..4: its third of 0..254 (85 codes each) is
                           w_4 + 1; T5_TABLE[byte & 127] holds the codes w_s + 1 << 2 s, s = 0..3, of a byte
                           below 128; a byte from 128 on has 2 - code in every place. The smallest byte that
                           decodes right is used.
tl5    64 rows x 20 k, 256 byte[64 j + 16 l + 4 u + q] holds w[16 u + 4 l + q, 4 s + j], s = 0..4: v = 9 t + p
                           with t = 9 w_0 + 3 w_1 + w_2, p = 3 w_3 + w_4. Bit 7 is v < 0. The other bits, of
                           |v| = 9 t + p with t = 0..13: 8 t + p + 4 if p < 0, 8 t + p + 3 if p > 0, and
                           112 + t if p = 0. A trailer counts the negative v of each row.
====== =================== ==================================================================================
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError
from bitgen.spec import FAMILIES, Layout, Shape, ceil_to

Bytes = NDArray[np.uint8]
Ternary = NDArray[np.int8]


def check_ternary(w: Ternary) -> Shape:
    """The shape of ``w``, which must be int8 (m, k) with values in {-1, 0, 1}."""
    if w.dtype != np.int8 or w.ndim != 2:
        raise BitgenError(f"weights must be int8 with two dimensions (m, k), not {w.dtype} {w.shape}")
    shape = Shape(*w.shape)
    if w.min() < -1 or w.max() > 1:
        raise BitgenError("weights must be -1, 0 or 1")
    return shape


def pack(layout: Layout, w: Ternary) -> Bytes:
    """Pack w int8 (m, k) -> uint8 (layout.packed_bytes,)."""
    shape = check_ternary(w)
    chunks = layout.chunks(shape.k)
    k_chunk = FAMILIES[layout.family].k_chunk
    padded = np.zeros((ceil_to(shape.m, layout.row_block), chunks * k_chunk), np.int8)
    padded[: shape.m, : shape.k] = w
    # (blocks, chunks, sub-blocks, 16 rows, k_chunk)
    tiles = padded.reshape(-1, layout.sub_blocks, 16, chunks, k_chunk).transpose(0, 3, 1, 2, 4)
    body = _ENCODE[layout.family](tiles)
    blocks = body.reshape(len(tiles), -1)
    if FAMILIES[layout.family].trailer_bytes:
        values = _triples(tiles) if layout.family == "tl2" else _fives(tiles)
        negative = np.less(values, 0).sum(axis=(1, 4, 5), dtype=np.int32)  # (blocks, sub-blocks, 16)
        blocks = np.concatenate([blocks, negative.reshape(len(tiles), -1).view(np.uint8)], axis=1)
    return np.ascontiguousarray(blocks).reshape(-1)


def unpack(layout: Layout, packed: Bytes, shape: Shape) -> Ternary:
    """The inverse of ``pack``: uint8 (layout.packed_bytes,) -> int8 (m, k)."""
    if packed.dtype != np.uint8 or packed.size != layout.packed_bytes(shape):
        raise BitgenError(
            f"packed weights of {shape.name} in {layout.name} take {layout.packed_bytes(shape)} bytes, "
            f"not {packed.size}"
        )
    family = FAMILIES[layout.family]
    chunks = layout.chunks(shape.k)
    blocks = packed.reshape(-1, layout.block_bytes(shape.k))
    body = blocks[:, : layout.sub_blocks * chunks * family.chunk_bytes]
    cells = body.reshape(-1, chunks, layout.sub_blocks, family.chunk_bytes)
    tiles = _DECODE[layout.family](cells)
    rows = tiles.transpose(0, 2, 3, 1, 4).reshape(len(blocks) * layout.row_block, -1)
    return np.ascontiguousarray(rows[: shape.m, : shape.k])


def _encode_i2s(tiles: Ternary) -> Bytes:
    codes = (tiles + 1).astype(np.uint8).reshape(*tiles.shape[:4], 4, 4)  # (..., 16 rows, s, j)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(codes << shifts, axis=-2)
    return packed


def _decode_i2s(cells: Bytes) -> Ternary:
    codes = cells.reshape(*cells.shape[:3], 16, 1, 4) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    return ((codes & 3).astype(np.int8) - 1).reshape(*cells.shape[:3], 16, 16)


def _encode_tl1(tiles: Ternary) -> Bytes:
    pairs = tiles.reshape(*tiles.shape[:4], 4, 2, 2)  # (..., 16 rows, lane, pair, 2)
    idx = (3 * pairs[..., 0] + pairs[..., 1] + 4).astype(np.uint8)
    return np.swapaxes(idx[..., 0] | idx[..., 1] << 4, -1, -2)  # (..., lane, 16 rows)


def _decode_tl1(cells: Bytes) -> Ternary:
    lanes = np.swapaxes(cells.reshape(*cells.shape[:3], 4, 16), -1, -2)
    idx = np.stack([lanes & 15, lanes >> 4], axis=-1).astype(np.int8)  # (..., 16 rows, lane, pair)
    w0 = idx // 3 - 1
    return np.stack([w0, idx - 4 - 3 * w0], axis=-1).reshape(*cells.shape[:3], 16, 16)


def _t5_value(index: int) -> int:
    """Value 27 w0 + 9 w1 + 3 w2 + w3 of a table entry: the negative half, the positive, the negative again.

    So each third of 0..254 reaches all 81 patterns, some of them only mirrored; five entries are spare zeros.
    """
    first, count = (0, 41) if index < 42 else (42, 41) if index < 85 else (85, 41)
    at = index - first
    if at >= count:
        return 0
    return at if first == 42 else at - 40


def _t5_pattern(value: int) -> int:
    """The four 2-bit codes of v, as they stand in a byte."""
    digits = [(value + 40) // 3 ** (3 - s) % 3 for s in range(4)]  # v + 40 = 27 (w0 + 1) + 9 (w1 + 1) + ...
    return sum(digit << 2 * s for s, digit in enumerate(digits))


T5_TABLE: Bytes = np.array([_t5_pattern(_t5_value(i)) for i in range(128)], np.uint8)


def _t5_codes() -> Bytes:
    """(3, 81): the smallest byte for a fifth trit's code and a value v + 40."""
    codes = np.zeros((3, 81), np.uint8)
    for byte in reversed(range(255)):
        value = _t5_value(byte & 127)
        codes[byte // 85, (-value if byte >= 128 else value) + 40] = byte
    return codes


T5_CODES = _t5_codes()


def _encode_t5(tiles: Ternary) -> Bytes:
    w = tiles.reshape(*tiles.shape[:4], 5, 4)  # (..., 16 rows, s, j)
    value = 27 * w[..., 0, :] + 9 * w[..., 1, :] + 3 * w[..., 2, :] + w[..., 3, :]
    codes: Bytes = T5_CODES[w[..., 4, :] + 1, value + 40]
    return codes


def _decode_t5(cells: Bytes) -> Ternary:
    byte = cells.reshape(*cells.shape[:3], 16, 1, 4)
    codes = T5_TABLE[byte & 127] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = np.where(byte >= 128, 2 - codes, codes)
    w = np.concatenate([codes, byte // 85], axis=-2).astype(np.int8) - 1
    return w.reshape(*cells.shape[:3], 16, 20)


def _triples(tiles: Ternary) -> Ternary:
    """Triples v = 9 w0 + 3 w1 + w2 in -13..13: (blocks, chunks, sub-blocks, 16 rows, 4 lanes, 4 triples)."""
    w = tiles.reshape(*tiles.shape[:4], 4, 4, 3)
    return (9 * w[..., 0] + 3 * w[..., 1] + w[..., 2]).astype(np.int8)


def _encode_tl2(tiles: Ternary) -> Bytes:
    v = np.moveaxis(_triples(tiles), 3, 5)  # (..., lane, triple, 16 rows)
    index = np.abs(v).astype(np.uint8)
    nibbles = index[..., 0::2, :] | index[..., 1::2, :] << 4  # (..., lane, A or B, 16 rows)
    negative = (v < 0).astype(np.uint8)
    lane_bits = np.arange(4, dtype=np.uint8)[:, None, None]
    bits = negative[..., 0::2, :] << lane_bits | negative[..., 1::2, :] << (lane_bits + 4)
    signs = np.bitwise_or.reduce(bits, axis=-3)  # (..., A or B, 16 rows)
    flat = (*tiles.shape[:3], -1)
    return np.concatenate([np.swapaxes(nibbles, -2, -3).reshape(flat), signs.reshape(flat)], axis=-1)


def _decode_tl2(cells: Bytes) -> Ternary:
    head = cells.shape[:3]
    nibbles = cells[..., :128].reshape(*head, 2, 4, 16)  # (A or B, lane, row)
    signs = cells[..., 128:].reshape(*head, 2, 1, 16)
    lane_bits = np.arange(4, dtype=np.uint8)[:, None]
    index = np.stack([nibbles & 15, nibbles >> 4], axis=-4).astype(np.int8)  # (half, A or B, lane, row)
    negative = np.stack([signs >> lane_bits & 1, signs >> (lane_bits + 4) & 1], axis=-4).astype(bool)
    v = np.where(negative, -index, index)
    v = np.moveaxis(
        v, (-1, -2, -3, -4), (-4, -3, -2, -1)
    )  # (row, lane, A or B, half): triple = 2 * AB + half
    w0 = (v + 13) // 9 - 1  # v + 13 = 9 (w0 + 1) + 3 (w1 + 1) + (w2 + 1)
    w1 = (v + 13) // 3 % 3 - 1
    w2 = (v + 13) % 3 - 1
    return np.stack([w0, w1, w2], axis=-1).astype(np.int8).reshape(*head, 16, 48)


def _fives(tiles: Ternary) -> NDArray[np.int16]:
    """Values 81 w0 + 27 w1 + 9 w2 + 3 w3 + w4: (blocks, chunks, sub-blocks, 16 rows, 1, vector j)."""
    w = tiles.reshape(*tiles.shape[:4], 5, 4).astype(np.int16)
    values: NDArray[np.int16] = (w * _FIVE_PLACES[:, None]).sum(axis=-2, keepdims=True, dtype=np.int16)
    return values


def _tl5_weights() -> Ternary:
    """(128, 5): the weights of an index; none where it stands for nothing (126 and 127)."""
    weights = np.zeros((128, 5), np.int8)
    pairs = [p for p in range(-4, 5) if p]  # 3 w3 + w4
    for t in range(14):
        three = [(t + 13) // 9 - 1, (t + 13) // 3 % 3 - 1, (t + 13) % 3 - 1]
        weights[112 + t, :3] = three
        for i, p in enumerate(pairs):
            weights[8 * t + i] = [*three, (p + 4) // 3 - 1, (p + 4) % 3 - 1]
    return weights


def _tl5_codes() -> Bytes:
    """(243,): the byte of v + 121."""
    codes = np.zeros(243, np.uint8)
    for index in reversed(range(128)):
        v = int(TL5_WEIGHTS[index] @ _FIVE_PLACES)
        if v >= 0:  # t = 0 with p < 0 is written as its mirror
            codes[121 - v] = index | 128
            codes[121 + v] = index
    return codes


_FIVE_PLACES = np.array([81, 27, 9, 3, 1], np.int16)
TL5_WEIGHTS = _tl5_weights()
TL5_CODES = _tl5_codes()


def _encode_tl5(tiles: Ternary) -> Bytes:
    codes = TL5_CODES[_fives(tiles)[..., 0, :] + 121]  # (blocks, chunks, sub-blocks, 16 rows, j)
    blocks, chunks, subs = tiles.shape[:3]
    rows = codes.reshape(blocks, chunks, subs // 4, 4, 4, 4, 4)  # (..., 64 rows, u, l, q, j)
    return np.moveaxis(rows, (6, 4, 3, 5), (3, 4, 5, 6)).reshape(blocks, chunks, subs, 64)


def _decode_tl5(cells: Bytes) -> Ternary:
    blocks, chunks, subs = cells.shape[:3]
    vectors = cells.reshape(blocks, chunks, subs // 4, 4, 4, 4, 4)  # (..., 64 rows, j, l, u, q)
    byte = np.moveaxis(vectors, (3, 4, 5, 6), (6, 4, 3, 5)).reshape(blocks, chunks, subs, 16, 4, 1)
    w = np.where(byte < 128, TL5_WEIGHTS[byte[..., 0] & 127], -TL5_WEIGHTS[byte[..., 0] & 127])
    tiles: Ternary = np.swapaxes(w, -1, -2).reshape(blocks, chunks, subs, 16, 20)
    return tiles


_ENCODE: dict[str, Callable[[Ternary], Bytes]] = {
    "i2s": _encode_i2s,
    "tl1": _encode_tl1,
    "tl2": _encode_tl2,
    "t5": _encode_t5,
    "tl5": _encode_tl5,
}
_DECODE: dict[str, Callable[[Bytes], Ternary]] = {
    "i2s": _decode_i2s,
    "tl1": _decode_tl1,
    "tl2": _decode_tl2,
    "t5": _decode_t5,
    "tl5": _decode_tl5,
}
