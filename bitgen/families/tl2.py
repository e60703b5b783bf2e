"""TL2: triples of weights are a four-bit magnitude, the index of a table of 14 sums, and a sign.

A chunk is 16 rows x 48 k in 160 bytes. Lane l holds k = 12 l .. 12 l + 11 as triples t = 0..3 with
v = 9 w0 + 3 w1 + w2: 64 bytes |v_0| | |v_1| << 4, 64 bytes |v_2| | |v_3| << 4, then 16 bytes of signs (one
a row: bit l is v_0 < 0 in lane l, bit 4 + l is v_1 < 0), 16 for v_2 and v_3. A sub-block's trailer is
int32[16]: the number of negative v of each row.
"""

from __future__ import annotations

import numpy as np

from bitgen.families.algorithms import UNPACKED, Lookup
from bitgen.families.base import Bytes, Family, Ternary


def triples(tiles: Ternary) -> Ternary:
    """Triples v = 9 w0 + 3 w1 + w2 in -13..13: (blocks, chunks, sub-blocks, 16 rows, 4 lanes, 4 triples)."""
    w = tiles.reshape(*tiles.shape[:4], 4, 4, 3)
    return (9 * w[..., 0] + 3 * w[..., 1] + w[..., 2]).astype(np.int8)


def encode(tiles: Ternary) -> Bytes:
    v = np.moveaxis(triples(tiles), 3, 5)  # (..., lane, triple, 16 rows)
    index = np.abs(v).astype(np.uint8)
    nibbles = index[..., 0::2, :] | index[..., 1::2, :] << 4  # (..., lane, A or B, 16 rows)
    negative = (v < 0).astype(np.uint8)
    lane_bits = np.arange(4, dtype=np.uint8)[:, None, None]
    bits = negative[..., 0::2, :] << lane_bits | negative[..., 1::2, :] << (lane_bits + 4)
    signs = np.bitwise_or.reduce(bits, axis=-3)  # (..., A or B, 16 rows)
    flat = (*tiles.shape[:3], -1)
    return np.concatenate([np.swapaxes(nibbles, -2, -3).reshape(flat), signs.reshape(flat)], axis=-1)


def decode(cells: Bytes) -> Ternary:
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


FAMILY = Family(
    name="tl2",
    title="TL2",
    g=3,
    k_chunk=48,
    chunk_bytes=160,
    algorithms=(Lookup("direct", table_bytes=512), *UNPACKED),
    encode=encode,
    decode=decode,
    values=triples,
)
