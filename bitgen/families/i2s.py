"""I2_S: two bits a weight, code w + 1.

A chunk is 16 rows x 16 k in 64 bytes::

    byte[4 r + j] = sum over s of (w[r, 4 s + j] + 1) << 2 s, s = 0..3
"""

from __future__ import annotations

import numpy as np

from bitgen.families.algorithms import UNPACKED, Multiply, SmallTable
from bitgen.families.base import Bytes, Family, Ternary

_SHIFTS = np.array([0, 2, 4, 6], np.uint8)[:, None]

# The default for one token. NEON and SVE by instructions a weight (docs/reference/arm.md): two streams of
# NEON do not stay in its registers. Prefetch distances: docs/reference/performance.md.
_FIRST: SmallTable = (
    ({"vector_bytes": 64, "native_dot4": True, "code_max": 128}, {"streams": 2, "accumulators": 4}),
    ({"vector_bytes": 64, "native_dot4": True}, {"streams": 4, "accumulators": 3}),
    ({"vector_bytes": 32, "register_count": 32}, {"streams": 2, "accumulators": 3}),
    ({"vector_bytes": 16, "native_dot4": True}, {"streams": 1, "accumulators": 3}),
    ({"vector_bytes": 16}, {"streams": 1, "accumulators": 1}),
    ({}, {"streams": 2, "accumulators": 2}),
)


def encode(tiles: Ternary) -> Bytes:
    codes = (tiles + 1).astype(np.uint8).reshape(*tiles.shape[:4], 4, 4)  # (..., 16 rows, s, j)
    packed: Bytes = np.bitwise_or.reduce(codes << _SHIFTS, axis=-2)
    return packed


def decode(cells: Bytes) -> Ternary:
    codes = cells.reshape(*cells.shape[:3], 16, 1, 4) >> _SHIFTS
    return ((codes & 3).astype(np.int8) - 1).reshape(*cells.shape[:3], 16, 16)


FAMILY = Family(
    name="i2s",
    title="I2_S",
    g=1,
    k_chunk=16,
    chunk_bytes=64,
    algorithms=(Multiply("direct", first=_FIRST, ahead=4096), *UNPACKED),
    encode=encode,
    decode=decode,
)
