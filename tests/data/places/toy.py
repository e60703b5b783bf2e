"""Toy: a byte a weight, code w + 1, in the order of a panel.

A chunk is 16 rows x 16 k in 256 bytes: byte[64 f + 4 r + j] = w[r, 4 f + j] + 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bitgen.cpu import Isa
from bitgen.families.algorithms import UNPACKED
from bitgen.families.base import Algorithm, Axes, Bytes, Family, Knobs, Preset, Ternary
from bitgen.shapes import N1, Regime


class Plain(Algorithm):
    """One row block at a time, for one token."""

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        return {"streams": (1,), "nr": (1,)} if regime is N1 else {}

    def domain(self, knob: str) -> range | tuple[int, ...]:
        return (1,)

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        return isa.block_registers * (row_block // 16 + 2)

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        yield Preset("direct", {"streams": 1, "nr": 1})


def encode(tiles: Ternary) -> Bytes:
    codes = (tiles + 1).astype(np.uint8).reshape(*tiles.shape[:4], 4, 4)  # (..., 16 rows, f, j)
    return np.swapaxes(codes, -2, -3)


def decode(cells: Bytes) -> Ternary:
    codes = np.swapaxes(cells.reshape(*cells.shape[:3], 4, 16, 4), -2, -3)
    return (codes.astype(np.int8) - 1).reshape(*cells.shape[:3], 16, 16)


FAMILY = Family(
    name="toy",
    title="Toy",
    g=1,
    k_chunk=16,
    chunk_bytes=256,
    algorithms=(Plain("direct"), *UNPACKED),
    encode=encode,
    decode=decode,
)
