"""T3: codes of three bits that stand for values of a table of 8, in groups.

BitMoD-FP3, learned codebooks of 8, FP3, INT3, and 2-bit codes that are no ternary ones. A chunk is 16 rows x
32 k in 192 bytes, three vectors of 64, q[r, i] a code 0..7 and Q[s] the codes q[r, 4 s + j]::

    byte[64 p + 4 r + j] = Q[2 p] | Q[2 p + 1] << 4 | (Q[6] >> p & 1) << 3 | (Q[7] >> p & 1) << 7, p = 0, 1, 2

So six fields of four k are nibbles, looked up as those of T4, and the spare bits of three vectors make a
fourth vector of the last two: three masks, a shift and two averages for eight products. Two planes, of two
bits and of one, would take a shift, a mask and a sum more for every field.

Tables and selectors are T4's (nibble.py), of whose 16 values the first 8 count; so is what is multiplied.
"""

from __future__ import annotations

import numpy as np

from bitgen.families.algorithms import UNPACKED
from bitgen.families.base import GROUPS, Bytes, Family, Ternary
from bitgen.families.nibble import FIRST, ONE_SUM, Nibbles

_PLANES = np.arange(3, dtype=np.uint8)[:, None, None]  # p, before rows and j


def encode(tiles: Ternary) -> Bytes:
    q = tiles.astype(np.uint8).reshape(*tiles.shape[:4], 8, 4)
    q = np.moveaxis(q, -2, -3)  # (..., s, 16 rows, j)
    low, high, spare = q[..., 0:6:2, :, :], q[..., 1:6:2, :, :], q[..., 6:, :, :]
    sixth, seventh = (spare[..., i : i + 1, :, :] >> _PLANES & np.uint8(1) for i in (0, 1))
    packed: Bytes = low | high << np.uint8(4) | sixth << np.uint8(3) | seventh << np.uint8(7)
    return packed.reshape(*tiles.shape[:3], 192)


def decode(cells: Bytes) -> Ternary:
    byte = cells.reshape(*cells.shape[:3], 3, 16, 4)
    q = np.empty((*cells.shape[:3], 8, 16, 4), np.uint8)
    q[..., 0:6:2, :, :], q[..., 1:6:2, :, :] = byte & 7, byte >> 4 & 7
    for i, shift in ((6, 3), (7, 7)):
        q[..., i, :, :] = np.bitwise_or.reduce((byte >> np.uint8(shift) & np.uint8(1)) << _PLANES, axis=-3)
    return np.moveaxis(q, -3, -2).astype(np.int8).reshape(*cells.shape[:3], 16, 32)


FAMILY = Family(
    name="t3",
    title="T3",
    g=1,
    k_chunk=32,
    chunk_bytes=192,
    algorithms=(Nibbles("direct", first=FIRST, ahead=4096), *UNPACKED),
    encode=encode,
    decode=decode,
    codes=8,
    bias=0,
    weights="t3",
    in_rows=False,
    by_table=True,
    portable=GROUPS,
    constants=dict(ONE_SUM),
)
