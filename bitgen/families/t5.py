"""T5: five weights a byte, 1.6 bits each.

A chunk is 16 rows x 20 k in 64 bytes. byte[4 r + j] holds w[r, 4 s + j], s = 0..4: its third of 0..254 (85
codes each) is w_4 + 1; TABLE[byte & 127] holds the codes w_s + 1 << 2 s, s = 0..3, of a byte below 128; a
byte from 128 on has 2 - code in every place. The smallest byte that decodes right is used.
"""

from __future__ import annotations

import numpy as np

from bitgen.families.algorithms import UNPACKED, Multiply, SmallTable
from bitgen.families.base import TAIL, Bytes, Family, Ternary

# The default for one token; see i2s.py.
_FIRST: SmallTable = (
    ({"vector_bytes": 64, "native_dot4": True, "code_max": 128}, {"streams": 2, "accumulators": 4}),
    ({"vector_bytes": 64, "native_dot4": True}, {"streams": 4, "accumulators": 1}),
    ({"vector_bytes": 32, "register_count": 32}, {"streams": 2, "accumulators": 1}),
    ({"vector_bytes": 16}, {"streams": 1, "accumulators": 1}),
    ({"adds_dots": True}, {"streams": 2, "accumulators": 2}),
    ({}, {"streams": 2, "accumulators": 1}),
)


def _value(index: int) -> int:
    """Value 27 w0 + 9 w1 + 3 w2 + w3 of a table entry: the negative half, the positive, the negative again.

    So each third of 0..254 reaches all 81 patterns, some of them only mirrored; five entries are spare zeros.
    """
    first, count = (0, 41) if index < 42 else (42, 41) if index < 85 else (85, 41)
    at = index - first
    if at >= count:
        return 0
    return at if first == 42 else at - 40


def _pattern(value: int) -> int:
    """The four 2-bit codes of v, as they stand in a byte."""
    digits = [(value + 40) // 3 ** (3 - s) % 3 for s in range(4)]  # v + 40 = 27 (w0 + 1) + 9 (w1 + 1) + ...
    return sum(digit << 2 * s for s, digit in enumerate(digits))


TABLE: Bytes = np.array([_pattern(_value(i)) for i in range(128)], np.uint8)


def _codes() -> Bytes:
    """(3, 81): the smallest byte for a fifth trit's code and a value v + 40."""
    codes = np.zeros((3, 81), np.uint8)
    for byte in reversed(range(255)):
        value = _value(byte & 127)
        codes[byte // 85, (-value if byte >= 128 else value) + 40] = byte
    return codes


CODES = _codes()


def encode(tiles: Ternary) -> Bytes:
    w = tiles.reshape(*tiles.shape[:4], 5, 4)  # (..., 16 rows, s, j)
    value = 27 * w[..., 0, :] + 9 * w[..., 1, :] + 3 * w[..., 2, :] + w[..., 3, :]
    codes: Bytes = CODES[w[..., 4, :] + 1, value + 40]
    return codes


def decode(cells: Bytes) -> Ternary:
    byte = cells.reshape(*cells.shape[:3], 16, 1, 4)
    codes = TABLE[byte & 127] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    codes = np.where(byte >= 128, 2 - codes, codes)
    w = np.concatenate([codes, byte // 85], axis=-2).astype(np.int8) - 1
    return w.reshape(*cells.shape[:3], 16, 20)


FAMILY = Family(
    name="t5",
    title="T5",
    g=5,
    k_chunk=20,
    chunk_bytes=64,
    algorithms=(Multiply("direct", first=_FIRST, ahead=6144), *UNPACKED),
    encode=encode,
    decode=decode,
    tail_weights=TAIL,
    constants={"t5_table": TABLE.tolist()},
)
