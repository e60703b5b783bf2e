"""Weights of four bits in groups: Q4 and Q4M multiply their codes, T4 looks values up in a table.

A chunk is 16 rows x 8 k in 64 bytes, q[r, i] a code 0..15::

    byte[4 r + j] = q[r, j] | q[r, 4 + j] << 4

======  ====================  =========================================================================
Q4      w = (q - 8) d         Q4_0
Q4M     w = q d + m           Q4_1: an offset beside the scale of each row and group
T4      w = T[q] d            IQ4_NL, MXFP4, NVFP4 and learned tables: 16 int8 values, -127 .. 127
======  ====================  =========================================================================

A row block of T4 begins with four tables, and a byte for each group and each 16 rows that selects one of
them. Rows lie across lanes, so a table that 16 rows share is one broadcast a group; one a row would be a
shuffle and a blend for each table.

Sums of pairs in int16: of codes at most 2 x 15 x 128, of values 2 x 127 x 128, which fit once. So values are
never added in int16. Without a dot instruction x86 multiplies |x| with the values under the sign of x, which
is why -128 is no value; with one it multiplies value + 128 as an unsigned byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from bitgen.cpu import Isa
from bitgen.families.algorithms import UNPACKED, Multiply, SmallTable, on_lines
from bitgen.families.base import (
    FINE_GROUPS,
    GROUPS,
    Axes,
    Bytes,
    Check,
    Family,
    Int16Sums,
    Knobs,
    Preset,
    Ternary,
)
from bitgen.shapes import Regime

# The default for one token, of T3 too; see i2s.py.
FIRST: SmallTable = (
    ({"vector_bytes": 64, "native_dot4": True}, {"streams": 4, "accumulators": 1}),
    ({"vector_bytes": 16}, {"streams": 1, "accumulators": 1}),
    ({}, {"streams": 2, "accumulators": 1}),
)
ONE_SUM: Mapping[str, int] = {"accumulators": 1}
Value = TypeVar("Value")


@dataclass(frozen=True)
class Nibbles(Multiply):
    """`Multiply` with codes of four bits: the high one is shifted, so there is one accumulator."""

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        return _without(super().axes(family, isa, regime))

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        for preset in super().presets(family, isa, regime):
            own = replace(preset, knobs=_without(preset.knobs))
            yield on_lines(own, isa) if family.scales == 1 else own

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        tables = knobs["streams"] * (row_block // 16) if family.by_table else 0
        return super().registers(family, isa, {**knobs, **ONE_SUM}, row_block) + tables

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        return iter(())

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        if not knobs["widen_every"]:
            return None
        return Int16Sums(knobs["widen_every"] * family.fields, *family.pair_range)

    def int32_share(self, family: Family, knobs: Knobs) -> tuple[str, int]:
        return "1", family.top_code * 128


def _without(knobs: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in knobs.items() if name not in ONE_SUM}


def encode(tiles: Ternary) -> Bytes:
    codes = tiles.astype(np.uint8).reshape(*tiles.shape[:4], 2, 4)  # (..., 16 rows, s, j)
    packed: Bytes = np.bitwise_or(codes[..., 0, :], codes[..., 1, :] << np.uint8(4))
    return packed


def decode(cells: Bytes) -> Ternary:
    byte = cells.reshape(*cells.shape[:3], 16, 1, 4)
    codes = np.concatenate([byte & 15, byte >> 4], axis=-2)
    return codes.astype(np.int8).reshape(*cells.shape[:3], 16, 8)


def _family(name: str, title: str, **facts: object) -> Family:
    known: dict[str, object] = {"name": name, "title": title, "weights": name, **facts}
    return Family(
        g=1,
        k_chunk=8,
        chunk_bytes=64,
        algorithms=(Nibbles("direct", first=FIRST, ahead=4096), *UNPACKED),
        encode=encode,
        decode=decode,
        codes=16,
        in_rows=False,
        template="nibble",
        constants=dict(ONE_SUM),
        **known,  # type: ignore[arg-type]
    )


FAMILIES = (
    _family("q4", "Q4", bias=8, portable=(32,)),
    _family("q4m", "Q4M", bias=0, scales=2, portable=(32,)),
    _family("t4", "T4", bias=0, by_table=True, least_group=16, portable=(*FINE_GROUPS, *GROUPS)),
)
