"""TL5: five weights a byte, an index of 126 sums and a sign.

A chunk is 64 rows x 20 k in 256 bytes. byte[64 j + 16 l + 4 u + q] holds w[16 u + 4 l + q, 4 s + j],
s = 0..4: v = 9 t + p with t = 9 w_0 + 3 w_1 + w_2, p = 3 w_3 + w_4. Bit 7 is v < 0. The other bits, of
|v| = 9 t + p with t = 0..13: 8 t + p + 4 if p < 0, 8 t + p + 3 if p > 0, and 112 + t if p = 0. A trailer
counts the negative v of each row.

``wide`` looks up in one table of 128 sums for five activations, ``split`` in two of 16: the sum of three
weights and the sum of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bitgen.cpu import Isa
from bitgen.families.algorithms import UNPACKED, Lookup, SmallTable
from bitgen.families.base import TAIL, Axes, Bytes, Family, Int16Sums, Knobs, Preset, Ternary, first_fit
from bitgen.shapes import LARGE, N1, Regime

# Sums of the split tables are two digits, low + SPLIT_RADIX * high with high = (11 sum + 128) >> 8.
# So the digits of four groups add up within int8 (tests/unit/test_space.py).
SPLIT_RADIX = 23


def fives(tiles: Ternary) -> NDArray[np.int16]:
    """Values 81 w0 + 27 w1 + 9 w2 + 3 w3 + w4: (blocks, chunks, sub-blocks, 16 rows, 1, vector j)."""
    w = tiles.reshape(*tiles.shape[:4], 5, 4).astype(np.int16)
    values: NDArray[np.int16] = (w * _PLACES[:, None]).sum(axis=-2, keepdims=True, dtype=np.int16)
    return values


def _weights() -> Ternary:
    """(128, 5): the weights of an index; none where it stands for nothing (126 and 127)."""
    weights = np.zeros((128, 5), np.int8)
    pairs = [p for p in range(-4, 5) if p]  # 3 w3 + w4
    for t in range(14):
        three = [(t + 13) // 9 - 1, (t + 13) // 3 % 3 - 1, (t + 13) % 3 - 1]
        weights[112 + t, :3] = three
        for i, p in enumerate(pairs):
            weights[8 * t + i] = [*three, (p + 4) // 3 - 1, (p + 4) % 3 - 1]
    return weights


def _codes() -> Bytes:
    """(243,): the byte of v + 121."""
    codes = np.zeros(243, np.uint8)
    for index in reversed(range(128)):
        v = int(WEIGHTS[index] @ _PLACES)
        if v >= 0:  # t = 0 with p < 0 is written as its mirror
            codes[121 - v] = index | 128
            codes[121 + v] = index
    return codes


_PLACES = np.array([81, 27, 9, 3, 1], np.int16)
WEIGHTS = _weights()
CODES = _codes()


def encode(tiles: Ternary) -> Bytes:
    codes = CODES[fives(tiles)[..., 0, :] + 121]  # (blocks, chunks, sub-blocks, 16 rows, j)
    blocks, chunks, subs = tiles.shape[:3]
    rows = codes.reshape(blocks, chunks, subs // 4, 4, 4, 4, 4)  # (..., 64 rows, u, l, q, j)
    return np.moveaxis(rows, (6, 4, 3, 5), (3, 4, 5, 6)).reshape(blocks, chunks, subs, 64)


def decode(cells: Bytes) -> Ternary:
    blocks, chunks, subs = cells.shape[:3]
    vectors = cells.reshape(blocks, chunks, subs // 4, 4, 4, 4, 4)  # (..., 64 rows, j, l, u, q)
    byte = np.moveaxis(vectors, (3, 4, 5, 6), (6, 4, 3, 5)).reshape(blocks, chunks, subs, 16, 4, 1)
    w = np.where(byte < 128, WEIGHTS[byte[..., 0] & 127], -WEIGHTS[byte[..., 0] & 127])
    tiles: Ternary = np.swapaxes(w, -1, -2).reshape(blocks, chunks, subs, 16, 20)
    return tiles


def _wide_tables() -> dict[str, Any]:
    """For tl5_wide_tables: ``codes`` of registers whose lane l holds entries 16 l .., 8 in each of two."""
    entries = WEIGHTS.reshape(2, 4, 2, 8, 5).swapaxes(1, 2).reshape(4, 32, 5)
    return {"codes": _pair_codes(entries), "picks": _picks((0, 0, 0, 0))}


def _split_tables() -> dict[str, Any]:
    """For tl5_split_tables: ``codes`` of registers with sums of three in lanes 0 and 2, of two in 1 and 3.

    A lookup of two has a bit of the other half above its three: its 8 sums stand there twice.
    """
    lanes = np.zeros((4, 16, 5), np.int8)
    lanes[[0, 2]] = WEIGHTS[112:]
    lanes[[1, 3]] = np.tile(WEIGHTS[:8], (2, 1))
    entries = lanes.reshape(4, 2, 8, 5).swapaxes(0, 1).reshape(2, 32, 5)
    return {"codes": _pair_codes(entries), "picks": _picks((0, 0, 1, 1)), "radix": SPLIT_RADIX}


def _pair_codes(entries: NDArray[np.int8]) -> list[list[list[int]]]:
    """Weights (registers, 32, 5) as bytes w + 1 (3, registers, 64): (w0, w1), (w2, -), (w3, w4) an int16."""
    codes = np.insert(entries + 1, 3, 1, axis=2)
    pairs: list[list[list[int]]] = np.moveaxis(codes.reshape(-1, 32, 3, 2), 2, 0).reshape(3, -1, 64).tolist()
    return pairs


def _picks(groups: Sequence[int]) -> list[list[int]]:
    """For lanes of groups j: where x[4 s + j] is, two bytes an int16; 128: zero. The last two in x[4..]."""
    pairs = [[(j, 4 + j), (8 + j, 128), (8 + j, 12 + j)] for j in groups]
    return [[place for lane in pairs for place in lane[p] * 8] for p in range(3)]


@dataclass(frozen=True)
class FiveLookup(Lookup):
    """A lookup of five weights in tables of ``entries`` sums; the widest that a level looks up in is best."""

    entries: int = 16

    @property
    def grouped(self) -> bool:
        return self.entries == 16  # the wide tables count negative sums over all of k

    # Row blocks at once for one token: by capabilities.
    _ONE: ClassVar[SmallTable] = (
        ({"vector_bytes": 64, "lookup_max": 128}, {"streams": 8, "prefetch": 2048}),
        ({"vector_bytes": 64}, {"streams": 4, "prefetch": 2048}),
        ({"vector_bytes": 16}, {"streams": 1, "prefetch": 6144}),
        ({}, {"streams": 2, "prefetch": 6144}),
    )

    @staticmethod
    def _sizes(family: Family, isa: Isa) -> set[int]:
        """The tables that a level offers, or the smallest, which every level can look up in."""
        sizes = {one.entries for one in family.algorithms if isinstance(one, FiveLookup)}
        return sizes & set(isa.lookups) or {min(sizes)}

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        if regime is LARGE or self.entries not in self._sizes(family, isa):
            return {}
        wide, widen_every = not isa.generic, self._widest(family)
        return {
            "streams": (1, 2, 4, 8) if wide and regime is N1 else (1, 2),
            "nr": (1,) if regime is N1 else (2, 4) if wide else (2,),
            "widen_every": (widen_every,),
            "prefetch": (0, 2048, 6144) if regime is N1 and wide else (0,),
            **({"prefetch_hint": (0, 2) if wide else (0,)} if regime is N1 else {}),
        }

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        if self.entries != max(self._sizes(family, isa)):
            return
        widen_every = self._widest(family)
        if regime is N1:
            one = first_fit(isa, self._ONE)
            for streams, prefetch, prefetch_hint in ((one["streams"], one["prefetch"], 2), (1, 0, 0)):
                knobs = {
                    "streams": streams,
                    "nr": 1,
                    "widen_every": widen_every,
                    "prefetch": prefetch,
                    "prefetch_hint": prefetch_hint,
                }
                yield Preset(self.name, knobs)
        else:
            streams = 2 if isa.vector_bytes == 64 else 1
            yield Preset(self.name, {"streams": streams, "nr": 2, "widen_every": widen_every, "prefetch": 0})

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        sums = super().int16_sums(family, knobs)
        if sums is None or self.entries > 16:
            return sums
        # The lookups of a chunk are added as bytes first.
        return Int16Sums(knobs["widen_every"], family.lookups * sums.low, family.lookups * sums.high)

    def _table_blocks(self) -> int:
        return 6 if self.entries > 16 else 2


FAMILY = Family(
    name="tl5",
    title="TL5",
    g=5,
    k_chunk=20,
    chunk_bytes=64,
    algorithms=(
        FiveLookup("wide", table_bytes=1024, constants=_wide_tables(), entries=128),
        FiveLookup("split", table_bytes=256, constants=_split_tables()),
        *UNPACKED,
    ),
    encode=encode,
    decode=decode,
    values=fives,
    rows=64,
    tail_weights=TAIL,
    constants={"split_radix": SPLIT_RADIX},
)
