"""Q1: one bit a weight, -1 or 1. Q1_0 has a scale for each 128, a matrix may have one a row.

A chunk is 16 rows x 32 k in 64 bytes, q[r, i] a code 0 or 1, w = 2 q - 1::

    byte[4 r + j] = sum over s of q[r, 4 s + j] << s, s = 0..7

A bit is masked where it stands, so accumulator i of four has the codes at scale 2^i (bits 4..7 are shifted to
0..3 at once). Twice their sum less the activations' is the product: accumulator 0 is added twice, accumulator
1 as it is, and the sum of the activations comes off that one. Sums of pairs in int16 are at most 2 x 128 at
scale 1 and 16 x 128 at scale 8: 128 and 16 additions. AVX-512 could subtract under a mask register
instead (a bit a byte is what those hold), in bytes that overflow after one weight: the dot product of codes
adds four weights to an int32 in an instruction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bitgen.cpu import Isa
from bitgen.families.algorithms import UNPACKED, Multiply, SmallTable, on_lines
from bitgen.families.base import (
    INT16_MIN,
    X_MAX,
    X_MIN,
    Axes,
    Bytes,
    Check,
    Family,
    Int16Sums,
    Knobs,
    Preset,
    Ternary,
)
from bitgen.shapes import LARGE, Regime

# The default for one token; see i2s.py. Rows that share activations share their broadcasts: 64 rows at 512
# bits take 11.1 instructions for 256 products, 32 rows 14.5.
_FIRST: SmallTable = (
    ({"vector_bytes": 64, "native_dot4": True}, {"streams": 4, "accumulators": 4}),
    ({"vector_bytes": 64}, {"streams": 4, "accumulators": 2}),
    ({"vector_bytes": 32, "register_count": 32}, {"streams": 2, "accumulators": 4}),
    ({"vector_bytes": 32}, {"streams": 1, "accumulators": 4}),
    ({"vector_bytes": 16, "native_dot4": True}, {"streams": 1, "accumulators": 4}),
    ({"vector_bytes": 16}, {"streams": 1, "accumulators": 2}),
    ({}, {"streams": 2, "accumulators": 2}),
)
_ACCUMULATORS = (1, 2, 4)
_SHIFTS = np.arange(8, dtype=np.uint8)[:, None]


@dataclass(frozen=True)
class Bits(Multiply):
    """`Multiply` with eight codes of a bit in a byte: bit f stays at 2^(f mod accumulators)."""

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        if regime is LARGE:
            return {}
        return {**super().axes(family, isa, regime), "accumulators": _ACCUMULATORS}

    def domain(self, knob: str) -> Sequence[int]:
        return _ACCUMULATORS if knob == "accumulators" else super().domain(knob)

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        return (on_lines(preset, isa) for preset in super().presets(family, isa, regime))

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        return iter(())  # the largest code in place is 8

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        if not knobs["widen_every"]:
            return None
        accumulators = knobs["accumulators"]
        additions = knobs["widen_every"] * family.fields // accumulators
        return Int16Sums(additions, *(2 * _scale(accumulators) * x for x in (X_MIN, X_MAX)))

    def int32_share(self, family: Family, knobs: Knobs) -> tuple[str, int]:
        accumulators = knobs["accumulators"]
        return f"1/{accumulators}" if accumulators > 1 else "1", _scale(accumulators) * -X_MIN

    @staticmethod
    def _pair_chunks(family: Family) -> int:
        """Chunks that one int16 accumulator takes: 128 additions of 256 fit, eight a chunk."""
        return INT16_MIN // (2 * X_MIN) // family.fields


def _scale(accumulators: int) -> int:
    """The scale of the last accumulator's codes."""
    return int(2 ** (accumulators - 1))


def encode(tiles: Ternary) -> Bytes:
    codes = tiles.astype(np.uint8).reshape(*tiles.shape[:4], 8, 4)  # (..., 16 rows, s, j)
    packed: Bytes = np.bitwise_or.reduce(codes << _SHIFTS, axis=-2)
    return packed


def decode(cells: Bytes) -> Ternary:
    codes = cells.reshape(*cells.shape[:3], 16, 1, 4) >> _SHIFTS
    return (codes & 1).astype(np.int8).reshape(*cells.shape[:3], 16, 32)


FAMILY = Family(
    name="q1",
    title="Q1",
    g=1,
    k_chunk=32,
    chunk_bytes=64,
    algorithms=(Bits("direct", first=_FIRST, ahead=4096), *UNPACKED),
    encode=encode,
    decode=decode,
    codes=2,
    step=2,
    weights="q1",
    portable=(0, 128),
)
