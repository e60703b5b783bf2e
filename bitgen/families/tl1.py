"""TL1: pairs of weights are four-bit indices of a table of 9 sums.

A chunk is 16 rows x 16 k in 64 bytes, in four lanes of 16 rows::

    byte[16 l + r] = idx(w[r, 4 l], w[r, 4 l + 1]) | idx(w[r, 4 l + 2], w[r, 4 l + 3]) << 4
    idx(w0, w1) = 3 w0 + w1 + 4
"""

from __future__ import annotations

import numpy as np

from bitgen.families.algorithms import UNPACKED, Lookup
from bitgen.families.base import Bytes, Family, Ternary


def encode(tiles: Ternary) -> Bytes:
    pairs = tiles.reshape(*tiles.shape[:4], 4, 2, 2)  # (..., 16 rows, lane, pair, 2)
    idx = (3 * pairs[..., 0] + pairs[..., 1] + 4).astype(np.uint8)
    return np.swapaxes(idx[..., 0] | idx[..., 1] << 4, -1, -2)  # (..., lane, 16 rows)


def decode(cells: Bytes) -> Ternary:
    lanes = np.swapaxes(cells.reshape(*cells.shape[:3], 4, 16), -1, -2)
    idx = np.stack([lanes & 15, lanes >> 4], axis=-1).astype(np.int8)  # (..., 16 rows, lane, pair)
    w0 = idx // 3 - 1
    return np.stack([w0, idx - 4 - 3 * w0], axis=-1).reshape(*cells.shape[:3], 16, 16)


FAMILY = Family(
    name="tl1",
    title="TL1",
    g=2,
    k_chunk=16,
    chunk_bytes=64,
    algorithms=(Lookup("direct", table_bytes=256), *UNPACKED),
    encode=encode,
    decode=decode,
)
