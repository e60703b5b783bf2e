"""Schedules worth trying first: the default, and what other projects ship."""

from __future__ import annotations

from collections.abc import Iterator

from bitgen.cpu import Isa
from bitgen.space.headroom import chunk_pairs
from bitgen.spec import FAMILIES, LARGE, N1, SMALL, KernelSpec, Layout, Regime, Schedule


def presets_of(family: str, isa: Isa, regime: Regime) -> Iterator[KernelSpec]:
    """The default first: it must be legal for every shape."""
    rows = FAMILIES[family].rows

    def spec(algorithm: str, row_block: int = rows, **knobs: int) -> KernelSpec:
        schedule = Schedule(algorithm, tuple(knobs.items()))
        layout = Layout(family, max(row_block, rows))
        return KernelSpec(family, isa.name, regime.name, layout, schedule)

    zmm, arm = isa.vector_bytes == 64, isa.arch == "aarch64"
    sve256 = arm and isa.vector_bytes == 32  # twice the registers of AVX2, for blocks of two
    dots = isa.native_dot4 or isa.name == "scalar"
    pairs, steps = (0, 0) if dots else (chunk_pairs(family), 64)
    widen = {"tl1": 63, "tl2": 21, "tl5": 12}.get(family, pairs)
    looks_up = FAMILIES[family].looks_up
    five = "wide" if isa.lut_bytes >= 128 else "split"
    ahead = 4096 if family == "i2s" else 6144  # measured for two streams (docs/performance.md)
    if regime is N1 and not looks_up:
        accs = 4 if isa.native_dot4 and zmm else 1 if pairs and family == "t5" else 2
        streams = 2
        if arm:  # by instructions a weight (docs/arm.md): two streams of NEON do not stay in its registers
            accs = 3 if isa.native_dot4 and family == "i2s" else 1
            streams = 4 if zmm else 2 if sve256 else 1
        yield spec(
            "direct",
            streams=streams,
            nr=1,
            accs=accs,
            widen=pairs // accs,
            unroll=1,
            prefetch=ahead,
            hint=0,
        )
        yield spec("direct", streams=1, nr=1, accs=1, widen=pairs, unroll=1, prefetch=0, hint=0)
    elif family == "tl5" and regime is N1:
        knobs = {"nr": 1, "widen": widen}
        streams = 8 if zmm and five == "wide" else 4 if zmm else 2 if sve256 or not arm else 1
        yield spec(five, streams=streams, **knobs, prefetch=2048 if zmm else ahead, hint=2)
        yield spec(five, streams=1, **knobs, prefetch=0, hint=0)
    elif regime is N1:
        streams = 4 if zmm else 2 if sve256 else 1
        yield spec("direct", streams=streams, nr=1, mc=0, kc=0, widen=widen, unroll=1, prefetch=4096)
        yield spec("direct", streams=1, nr=1, mc=0, kc=0, widen=widen, unroll=1, prefetch=0)
        # bitnet.cpp's presets for the 3B shapes: BM x BK blocks, bm rows in registers.
        for bm, block, kc in ((2, 160, 96), (4, 320, 96), (2, 320, 192), (1, 160, 96)):
            yield spec("direct", streams=bm, nr=1, mc=block, kc=kc, widen=widen, unroll=1, prefetch=0)
    if regime is SMALL and isa.tiles and zmm:
        yield spec("tiles", streams=4, ahead=1, prefetch=4096)
        yield spec("tiles", streams=2, row_block=32, ahead=1, prefetch=4096)
        yield spec("tiles", streams=2, ahead=0, prefetch=0)
        yield spec("tiles", streams=1, ahead=1, prefetch=4096)
    if regime is LARGE and isa.tiles and zmm:
        yield spec("tiles", mr=32, nr=32, mc=256, kc=960, pack=1)
        yield spec("tiles", mr=32, nr=32, mc=64, kc=0, pack=1)
        yield spec("tiles", mr=16, nr=32, mc=rows, kc=0, pack=1)
    if regime is not N1 and isa.mmla and arm:
        few = 8 if sve256 else 6
        yield spec("mmla", nr=few, mc=64, kc=960)
        yield spec("mmla", nr=few, mc=rows, kc=0)
    if regime is SMALL and isa.sums_bytes > 64:  # a loop of 52 instructions; direct's has 88
        yield spec("panel", mr=16, nr=2, mc=64, kc=960, widen=steps, unroll=1)
    if regime is SMALL and not looks_up:
        few = 8 if sve256 else 4 if arm and dots else 2
        tile = {"streams": 2, "nr": 8} if zmm else {"streams": 1, "nr": few}
        yield spec("direct", **tile, accs=1, widen=pairs, unroll=1, prefetch=2048)
        yield spec("direct", streams=1, nr=4 if zmm else 2, accs=1, widen=pairs, unroll=1, prefetch=0)
    if regime is not N1:
        some = 3 if isa.sums_bytes > 64 else 4  # three tokens of NEON take 24 of its 32 registers
        small = {"mr": 16, "nr": some, "mc": rows, "kc": 0, "widen": steps, "unroll": 1}
        large = {"mr": 64, "nr": 6, "mc": 64, "kc": 960, "widen": steps, "unroll": 1}
        if zmm:
            yield spec("panel", **large)
        if sve256:
            yield spec("panel", **{**large, "mr": 32})
        yield spec("panel", **{**small, "mc": 64, "kc": 960})
        yield spec("panel", **small)
    if regime is SMALL and isa.tiles and not zmm:
        yield spec("tiles", streams=1, ahead=1, prefetch=0)
    if regime is LARGE and isa.tiles and not zmm:
        yield spec("tiles", mr=32, nr=32, mc=64, kc=0, pack=1)
    if regime is not N1 and isa.mmla and not arm:
        yield spec("mmla", nr=4, mc=64, kc=960)
    if regime is SMALL and family == "tl5":
        yield spec(five, streams=2 if zmm else 1, nr=2, widen=widen, prefetch=0)
    elif regime is not N1 and looks_up:
        for bm, block, kc in ((2, 160, 96), (1, 160, 96)):
            yield spec("direct", streams=bm, nr=2, mc=block, kc=kc, widen=widen, unroll=1, prefetch=0)
