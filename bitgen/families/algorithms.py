"""The algorithms: their knobs, the registers they need, what their sums reach.

============= ========= ======================================================================================
knob          algorithm meaning
============= ========= ======================================================================================
streams       not panel row blocks walked at once, each a stream of its own in memory; rows in registers =
                        streams x row_block
nr            both      tokens whose accumulators live in registers
accumulators  direct    I2_S: those of a 16-row block and token: 4 = every field masked in place (scales 1, 4,
                        16, 64), 3 = the fourth shifted, 2 = one shift (scales 1, 4), 1 = three shifts
widen_every   both      0: every product goes to int32 at once (a dot instruction); W > 0: int16 partial sums,
                        added to int32 every W chunks (direct) or every W steps of 4 k (panel)
unroll        both      chunks (direct) or steps of 4 k (panel) in one turn of the inner loop
prefetch      not panel bytes ahead of each stream that are asked for; 0: leave it to the hardware
affine        direct    1: fields of codes are shifted and masked by one instruction (GFNI); several tokens
prefetch_hint not panel n = 1 only: where a prefetched line goes. 0: into all caches (T0), 1: past them (NTA),
                        because a token reads its weights once, 2: into L2 (T1), because L1 holds the tables
mr            panel     rows whose accumulators live in registers
mc            both      rows of a cache block;  kc  columns of a cache block, 0: all of k
============= ========= ======================================================================================

`Multiply` (direct) and `Lookup` (direct, and TL5's wide and split) read packed weights and multiply or look
up at once. `Panel` unpacks ``mc`` x ``kc`` weights to bytes that serve every token of the batch. `Tiles`
multiplies tiles of 16 tokens x 64 k with tiles of 64 k x 16 rows: on the way for 2..16 tokens (``streams``,
``ahead``, ``prefetch``), from panels for more (``mr`` and ``nr`` are multiples of 16). `Mmla` multiplies 2
rows x 8 k by 8 k x 2 tokens, from panels of an order of its own; 16 rows are in registers.

Values were measured to matter; what lies between them was never outside the noise. kc is a multiple of 48 and
16, so every family's chunks divide it. The generic level is a fallback and an oracle: it needs one point of
each kind, not a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from bitgen.cpu import Isa
from bitgen.families.base import (
    INT16_MAX,
    INT16_MIN,
    Algorithm,
    Axes,
    Check,
    Family,
    Int16Sums,
    Knobs,
    Preset,
    first_fit,
)
from bitgen.shapes import LARGE, N1, SMALL, Regime

_TILE_SUMS = 4  # tiles of sums; two of activations and two of weights are the others of eight
# Registers twice those of AVX2, for blocks of two: SVE of 256 bits.
_ROOMY: Mapping[str, object] = {"vector_bytes": 32, "register_count": 32}
_WIDE: Mapping[str, object] = {"vector_bytes": 64}

SmallTable = tuple[tuple[Mapping[str, object], Knobs], ...]


@dataclass(frozen=True)
class Multiply(Algorithm):
    """Packed codes are masked and multiplied with activations in one pass.

    ``first``: by capabilities the default's knobs for one token; ``ahead``: its prefetch distance.
    """

    off: ClassVar[Knobs] = {"affine": 0}

    first: SmallTable = field(default=(), compare=False)
    ahead: int = 0

    # Few tokens, by capabilities.
    _FEW: ClassVar[SmallTable] = (
        (_WIDE, {"streams": 2, "nr": 8}),
        (_ROOMY, {"streams": 1, "nr": 8}),
        ({"vector_bytes": 16, "native_dot4": True}, {"streams": 1, "nr": 4}),
        ({}, {"streams": 1, "nr": 2}),
    )

    @property
    def grouped(self) -> bool:
        return True

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        wide = not isa.generic
        if regime is LARGE:
            return self._many(family, isa)
        return {
            "streams": (1, 2, 4, 8) if wide else (1, 2),
            "nr": (1,) if regime is N1 else (2, 4, 8, 16) if wide else (2,),
            "accumulators": (1, 2, 4 if isa.code_max >= 128 else 3) if regime is N1 or not wide else (1, 2),
            "widen_every": _widths(family, isa, (8, self._pair_chunks(family))),
            "unroll": (1, 2) if regime is N1 else (1,),
            "prefetch": ((0, 4096, 6144) if regime is N1 else (0, 2048)) if wide else (0,),
            **({"prefetch_hint": (0, 1) if wide else (0,)} if regime is N1 else self._affine(family, isa)),
        }

    @staticmethod
    def _affine(family: Family, isa: Isa) -> Axes:
        """Where fields are shifted between multiplications, which wait for the same pipes or for others.

        Time with it / without, 8 tokens of 3B's shapes, cold: 0.94 (T5) and 0.93 (I2_S) on an Emerald Rapids,
        1.08 and 1.09 on a Zen 4. Of codes of 3 and 4 bits at most one field is shifted.
        """
        return {"affine": (0, 1)} if isa.affine and not isa.generic and family.code_bits <= 2 else {}

    def _many(self, family: Family, isa: Isa) -> Axes:
        """More than 16 tokens: codes that stay in L1 are decoded once for ``nr`` of them.

        Instead of a panel on its way out of L1 and back: on Zen 5 1.37 times as fast with 32 tokens and 1.13
        with 128, on a Xeon without its tiles 0.82 with 128. Matrix instructions leave both behind.
        """
        if isa.generic or isa.tiles or isa.mmla:
            return {}
        return {
            "streams": (1, 2),
            "nr": (4, 8, 16) if isa.register_count > 16 else (2, 4),
            "accumulators": (1,),
            "widen_every": _widths(family, isa, (self._pair_chunks(family),)),
            "unroll": (1,),
            "prefetch": (0, 2048),
            **self._affine(family, isa),
        }

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        widen_every = 0 if isa.adds_dots else self._pair_chunks(family)
        if regime is N1:
            plain = {
                "streams": 1,
                "nr": 1,
                "accumulators": 1,
                "widen_every": widen_every,
                "unroll": 1,
                "prefetch": 0,
                "prefetch_hint": 0,
            }
            best = plain | dict(first_fit(isa, self.first))
            best = best | {"widen_every": widen_every // best["accumulators"], "prefetch": self.ahead}
            yield Preset("direct", best)
            yield Preset("direct", plain)
            if isa.vector_bytes == 64:
                # Cores that keep few lines under way read more with more streams: T5 by 4 instead of 2 takes
                # 0.89 of the time on an Ice Lake, where a tune of 150 s can miss it among 200 points.
                yield Preset("direct", best | {"streams": 4, "prefetch": 4096})
        else:
            rest = {"accumulators": 1, "widen_every": widen_every, "unroll": 1}
            few = {**first_fit(isa, self._FEW), **rest, "prefetch": 2048}
            if regime is SMALL and self._affine(family, isa):
                yield Preset("direct", {**few, "affine": 1}, vendor="GenuineIntel")
            yield Preset("direct", few)
            if regime is SMALL:
                nr = 4 if isa.vector_bytes == 64 else 2
                yield Preset("direct", {"streams": 1, "nr": nr, **rest, "prefetch": 0})

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        # AVX2 holds the masks of shifted fields in one register, of fields in place in one for each.
        block, accumulators = isa.block_registers, knobs["accumulators"]
        sums = knobs["streams"] * (row_block // 16) * knobs["nr"] * accumulators
        return _sum_registers(isa, knobs) * sums + block + 1 + accumulators

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        most = isa.code_max
        if family.top_code * _scale(4) > most:
            yield (
                f"codes in place, {family.top_code} x 4^(accumulators - 1), must not exceed {most}, the "
                f"largest byte that {isa.name} multiplies: fewer accumulators",
                lambda knobs, *_: family.top_code * _scale(knobs["accumulators"]) <= most,
            )
        if "affine" in axes:
            yield (
                "affine shifts fields to one accumulator: accumulators must be 1",
                lambda knobs, *_: not knobs["affine"] or knobs["accumulators"] == 1,
            )

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        if not knobs["widen_every"]:
            return None
        accumulators = knobs["accumulators"]
        low, high = (_scale(accumulators) * value for value in family.pair_range)
        return Int16Sums(knobs["widen_every"] * self._last_fields(family, accumulators), low, high)

    def int32_share(self, family: Family, knobs: Knobs) -> tuple[str, int]:
        accumulators = knobs["accumulators"]
        # of a chunk's fields, those of the last accumulator
        share = f"{self._last_fields(family, accumulators)}/{family.fields}" if accumulators > 1 else "1"
        return share, family.top_code * 128 * _scale(accumulators)

    @staticmethod
    def _last_fields(family: Family, accumulators: int) -> int:
        """How many fields of a chunk go to the last accumulator, which has the largest scale."""
        # Of three the fourth field and T5's fifth are shifted to the first.
        return 1 if accumulators == 3 else 4 // accumulators + family.fields - 4

    @staticmethod
    def _pair_chunks(family: Family) -> int:
        """Chunks that one int16 accumulator takes: 64 additions of 512 fit, 4 a chunk or T5's 5."""
        return -INT16_MIN // -family.pair_range[0] // family.fields


@dataclass(frozen=True)
class Lookup(Algorithm):
    """Weights are indices of sums of ``g`` activations, looked up in tables of 16 entries of int16."""

    # Row blocks at once for one token: by capabilities.
    _STREAMS: ClassVar[SmallTable] = ((_WIDE, {"streams": 4}), (_ROOMY, {"streams": 2}), ({}, {"streams": 1}))
    # bitnet.cpp's presets for the 3B shapes: BM x BK blocks, bm rows in registers.
    _BITNET: ClassVar = ((2, 160, 96), (4, 320, 96), (2, 320, 192), (1, 160, 96))

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        wide = not isa.generic
        return {
            "streams": (1, 2, 4) if wide else (1, 2),
            "nr": (1,) if regime is N1 else (2, 4, 8) if wide else (2,),
            "mc": (0, 128) if wide else (0, 64),
            "kc": (0, 960, 1920) if wide else (0, 960),
            "widen_every": (self._widest(family),),
            "unroll": (1, 2) if regime is N1 and wide else (1,),
            "prefetch": (0, 4096) if regime is N1 and wide else (0,),
        }

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        sums = {"widen_every": self._widest(family), "unroll": 1}
        if regime is N1:
            whole = {"nr": 1, "mc": 0, "kc": 0, **sums}
            yield Preset("direct", {**first_fit(isa, self._STREAMS), **whole, "prefetch": 4096})
            yield Preset("direct", {"streams": 1, **whole, "prefetch": 0})
        for bm, block, kc in self._BITNET if regime is N1 else (self._BITNET[0], self._BITNET[3]):
            nr = 1 if regime is N1 else 2
            yield Preset("direct", {"streams": bm, "nr": nr, "mc": block, "kc": kc, **sums, "prefetch": 0})

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        # Two int16 accumulators for each 16 rows (TL5: 64), two nibbles; a wide table is four blocks.
        rows = knobs["streams"] * row_block // family.rows
        return isa.block_registers * (2 * rows * knobs["nr"] + self._table_blocks()) + 1

    def _table_blocks(self) -> int:
        return 2

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        yield (
            "entries of lookup tables are int16 sums: widen_every must be at least 1",
            lambda knobs, *_: knobs["widen_every"] >= 1,
        )
        if "mc" in axes:
            yield (
                "mc and kc block the cache together: give both, or neither",
                lambda knobs, *_: (knobs["mc"] > 0) == (knobs["kc"] > 0),
            )
            yield (
                "mc must be a multiple of the rows walked at once",
                lambda knobs, row_block, _: knobs["mc"] % (knobs["streams"] * row_block) == 0,
            )

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        if not knobs["widen_every"]:
            return None
        return Int16Sums(knobs["widen_every"] * family.lookups, -family.entry_max, family.entry_max)

    def int32_share(self, family: Family, knobs: Knobs) -> tuple[str, int]:
        return "1", 128

    @staticmethod
    def _widest(family: Family) -> int:
        """Chunks that one int16 accumulator takes."""
        return INT16_MAX // (family.lookups * family.entry_max)


@dataclass(frozen=True)
class Panel(Algorithm):
    """Rows are unpacked to bytes that serve every token."""

    @property
    def grouped(self) -> bool:
        return True

    def turns(self, family: Family, group: int) -> int:
        return group // 4

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        if regime is N1:
            return {}
        wide, large = not isa.generic, regime is LARGE
        tokens = (4, 6, 8, 12) if large else (4, 8)
        if isa.sums_bytes > 64:  # NEON: eight registers for 16 rows of a token
            tokens = (2, 3)
        return {
            "mr": ((32, 64) if isa.vector_bytes == 64 else (16, 32)),
            "nr": tokens if wide else (2, 4),
            "mc": (64, 256) if large and wide else (64,),
            "kc": (0, 960),
            "widen_every": _widths(family, isa, (64,)),
            "unroll": (1, 2) if large and wide else (1,),
        }

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        return knobs["mr"] // 16 * (_sum_registers(isa, knobs) * knobs["nr"] + isa.block_registers) + 1

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        return Int16Sums(knobs["widen_every"], *family.pair_range) if knobs["widen_every"] else None


@dataclass(frozen=True)
class Tiles(Algorithm):
    """Tiles of bytes are multiplied by one instruction, on levels that have it."""

    def serves_groups(self, group: int, regime: Regime) -> bool:
        # Tiles of 64 k, of groups of 32 half ones; few tokens would wait for their floats.
        return regime is LARGE and group >= 32

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        wide = not isa.generic
        if regime is N1 or not isa.tiles:
            return {}
        if regime is SMALL:
            return {
                "streams": (1, 2, 4) if wide else (1, 2),
                "ahead": (0, 1),
                "prefetch": (0, 4096) if wide else (0,),
            }
        return {
            "mr": (32, 64) if wide else (32,),
            "nr": (16, 32),
            "mc": (64, 256, 512) if wide else (64,),
            # 480 is no whole tiles, so it is for groups, as 480 or 512: activations fit L1 beside the sums.
            "kc": (0, 480, 640, 960, 1920) if wide else (0, 960),
            "pack": (0, 1),
        }

    def domain(self, knob: str) -> Sequence[int]:
        return {"mr": (16, 32, 64), "nr": (16, 32)}.get(knob) or super().domain(knob)

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        return 0  # sums and operands are in tiles

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        yield (
            f"there are {_TILE_SUMS} tiles of sums: rows walked at once x tokens must not exceed "
            f"{_TILE_SUMS} x 16 x 16",
            lambda knobs, row_block, _: self._sums(knobs, row_block) <= _TILE_SUMS,
        )
        columns = family.k_chunk * family.tile_chunks
        if "kc" in axes:
            yield (
                f"kc of tiles must be a multiple of {columns}: whole chunks and whole tiles",
                lambda knobs, _, group: bool(group) or knobs["kc"] % columns == 0,
            )

    @staticmethod
    def _sums(knobs: Knobs, row_block: int) -> int:
        """Tiles of sums that are held at once."""
        rows = knobs["mr"] if "mr" in knobs else knobs["streams"] * row_block
        return rows // 16 * (knobs.get("nr", 16) // 16)


@dataclass(frozen=True)
class Mmla(Algorithm):
    """2 x 8 bytes are multiplied with 8 x 2 by one instruction, on levels that have it."""

    @property
    def grouped(self) -> bool:
        return True

    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        wide = not isa.generic
        if regime is N1 or not isa.mmla:
            return {}
        return {
            "nr": (4,) if not wide else (4, 6) if isa.vector_bytes == 16 else (6, 8, 12),
            "mc": (64, 256) if regime is LARGE and wide else (64,),
            "kc": (0, 960),
        }

    def domain(self, knob: str) -> Sequence[int]:
        return range(4, 17, 2) if knob == "nr" else super().domain(knob)  # tokens go by twos

    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        # half a block of rows, and a register for two tokens
        return isa.block_registers * (knobs["nr"] + 1) + knobs["nr"] // 2

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        columns = family.k_chunk * family.tile_chunks
        yield (
            f"kc of mmla must be a multiple of {columns}: whole chunks, and blocks of 64 activations",
            lambda knobs, *_: knobs["kc"] % columns == 0,
        )


PANEL, TILES, MMLA = Panel("panel"), Tiles("tiles"), Mmla("mmla")
UNPACKED = (PANEL, TILES, MMLA)  # weights become bytes first, whatever the family


def presets_of(family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
    """What is worth trying first, for every family: the default, and what other projects ship.

    A family's own algorithms stand behind instructions for matrices; for more than a token lookups come last.
    """
    own = [
        preset
        for one in family.algorithms
        if one.axes(family, isa, regime)
        for preset in one.presets(family, isa, regime)
    ]
    if regime is N1:
        yield from own
        return
    matrices = [*_tile_presets(family, isa, regime), *_mmla_presets(family, isa)]
    steps = 0 if isa.adds_dots or family.by_table else 64
    if not isa.generic:
        yield from matrices
    if regime is SMALL and isa.sums_bytes > 64:  # a loop of 52 instructions; direct's has 88
        yield Preset("panel", {"mr": 16, "nr": 2, "mc": 64, "kc": 960, "widen_every": steps, "unroll": 1})
    before_panels = regime is SMALL and not family.looks_up
    if before_panels:
        yield from own
    yield from _panel_presets(family, isa, steps)
    if isa.generic:
        yield from matrices
    if not before_panels:
        yield from own


def on_lines(preset: Preset, isa: Isa) -> Preset:
    """The same rows as row blocks of 32, where registers are lines and 16 rows of a group are no whole ones.

    Of 4-bit codes in groups of 32 those are 288 bytes with their scales; of 32 rows every group begins on a
    line.
    """
    streams = preset.knobs["streams"]
    if isa.vector_bytes != 64 or streams % 2:
        return preset
    return replace(preset, knobs={**preset.knobs, "streams": streams // 2}, row_block=32)


def _panel_presets(family: Family, isa: Isa, steps: int) -> Iterator[Preset]:
    some = 3 if isa.sums_bytes > 64 else 4  # three tokens of NEON take 24 of its 32 registers
    sums = {"widen_every": steps, "unroll": 1}
    rows: SmallTable = ((_WIDE, {"mr": 64}), (_ROOMY, {"mr": 32}), ({}, {}))
    large = first_fit(isa, rows)
    if large:
        yield Preset("panel", {**large, "nr": 6, "mc": 64, "kc": 960, **sums})
    yield Preset("panel", {"mr": 16, "nr": some, "mc": 64, "kc": 960, **sums})
    yield Preset("panel", {"mr": 16, "nr": some, "mc": family.rows, "kc": 0, **sums})


def _tile_presets(family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
    if not isa.tiles:
        return
    if isa.generic and regime is SMALL:
        yield Preset("tiles", {"streams": 1, "ahead": 1, "prefetch": 0})
    elif isa.generic:
        yield Preset("tiles", {"mr": 32, "nr": 32, "mc": 64, "kc": 0, "pack": 1})
    elif regime is SMALL:
        for streams, rows, ahead in ((4, 0, 1), (2, 32, 1), (2, 0, 0), (1, 0, 1)):
            yield Preset("tiles", {"streams": streams, "ahead": ahead, "prefetch": 4096 * ahead}, rows)
    else:
        for mr, mc, kc, pack in (
            (32, 512, 480, 1),
            (32, 256, 640, 0),
            (32, 256, 960, 1),
            (32, 64, 0, 1),
            (16, family.rows, 0, 1),
        ):
            yield Preset("tiles", {"mr": mr, "nr": 32, "mc": mc, "kc": kc, "pack": pack})


def _mmla_presets(family: Family, isa: Isa) -> Iterator[Preset]:
    if isa.mmla and isa.generic:
        yield Preset("mmla", {"nr": 4, "mc": 64, "kc": 960})
    elif isa.mmla:
        few = 8 if isa.vector_bytes == 32 else 6
        yield Preset("mmla", {"nr": few, "mc": 64, "kc": 960})
        yield Preset("mmla", {"nr": few, "mc": family.rows, "kc": 0})


def _widths(family: Family, isa: Isa, widths: tuple[int, ...]) -> tuple[int, ...]:
    """A dot instruction widens by itself; without one int16 sums are three instructions cheaper a step.

    Two products with values of a table fill an int16.
    """
    if family.by_table:
        return (0,)
    if isa.generic:
        return (0, *widths)
    return (0,) if isa.native_dot4 else widths


def _scale(accumulators: int) -> int:
    """The largest scale of codes in place: field f stays at 4^(f mod accumulators)."""
    return int(4 ** (accumulators - 1))


def _sum_registers(isa: Isa, knobs: Knobs) -> int:
    """Registers of the sums of 16 rows and a token."""
    return isa.block_registers * isa.sums_bytes // 64 if knobs["widen_every"] else isa.block_registers
