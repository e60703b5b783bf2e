"""Kernels that measure the machine: memory bandwidth by access pattern, peak rate by ISA level.

They are called like every kernel, through the same host code with the same threads and weight pools, so they
can take part in a race.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitgen.measure.candidates import support_units
from bitgen.measure.harness import Functions, isas, unit_of
from bitgen.render import Source, render_probe
from bitgen.spec import Layout, Shape
from bitgen.toolchain import Toolchain, build_module

LAYOUT = Layout("i2s", 16)  # whose bytes the reading probe reads

# 32 MiB a call: what a thread waits for at the end of a call is below 1 %.
READ_SHAPE = Shape(8192, 16384)
# Enough work for the host code to split rows over threads, and little enough for a turn of a few ms.
DOT_SHAPE = Shape(2048, 4096)
# Additions of pairs of products of codes 0 .. 2, each -512 .. 508, to an int16: 64 * -512 = -32768.
PAIRS_WIDEN_EVERY = 64


@dataclass(frozen=True)
class ReadPattern:
    """A way to read memory: ``streams`` at once, each asking for lines ``prefetch`` bytes ahead (0: not)."""

    streams: int
    prefetch: int

    @property
    def name(self) -> str:
        return f"streams{self.streams}_prefetch{self.prefetch}"

    def source(self, isa: str) -> Source:
        return render_probe("read", isa, streams=self.streams, prefetch=self.prefetch)


# A core that waits for single lines reads more with more of them under way, and hardware prefetchers stop at
# the end of a page of 4 KiB: on an Ice Lake two threads read 23 GB/s by 2 streams, 30 by 16 with 6 KiB ahead.
PATTERNS = tuple(ReadPattern(s, p) for s in (1, 2, 4, 8, 16) for p in (0, 4096, 6144))
DEFAULT_PATTERN = ReadPattern(4, 4096)


@dataclass(frozen=True)
class _Sums:
    """Independent sums in registers, to which ops add over and over."""

    isa: str

    @property
    def chains(self) -> int:
        # Two of latency 4 to 5 a cycle need 10 sums; an AVX2 block is two of 16 registers, an op two sums.
        return {64: 12, 32: 6}.get(isas()[self.isa].vector_bytes, 4)

    @property
    def turns(self) -> int:
        """For each 16 rows; a call of `DOT_SHAPE` takes about a millisecond on every level."""
        return 40 if isas()[self.isa].generic else 2000


@dataclass(frozen=True)
class Dot4(_Sums):
    """Multiply-adds of int8: the peak that matmuls are compared with."""

    def operations(self, shape: Shape) -> int:
        """Multiplies and adds of one call with weights of ``shape``."""
        return -(-shape.m // 16) * self.turns * self.chains * self.products * 2

    @property
    def products(self) -> int:
        """Multiply-adds of one op: of vw_mmla where an instruction does it, else of vw_dot4."""
        level = isas()[self.isa]
        return 128 if level.mmla and not level.generic else 64

    def source(self) -> Source:
        knobs = {"chains": self.chains, "turns": self.turns, "products": self.products}
        return render_probe("dot4", self.isa, **knobs)


@dataclass(frozen=True)
class Pairs(_Sums):
    """Multiply-adds of int8 through int16 sums that are widened rarely, as ternary kernels add them.

    Where no instruction adds four products to an int32 this beats `Dot4`: vpmaddubsw, vpaddw on AVX2 against
    vpmaddubsw, vpmaddwd, vpaddd.
    """

    @property
    def chains(self) -> int:
        return 4  # blocks of two registers on AVX2: 8 sums cover an addition's latency of 1 many times

    @property
    def turns(self) -> int:
        return 1 if isas()[self.isa].generic else 2000 // PAIRS_WIDEN_EVERY

    def operations(self, shape: Shape) -> int:
        """Multiplies and adds of one call with weights of ``shape``."""
        return -(-shape.m // 16) * self.turns * PAIRS_WIDEN_EVERY * self.chains * 64 * 2

    def source(self) -> Source:
        knobs = {"chains": self.chains, "turns": self.turns, "widen_every": PAIRS_WIDEN_EVERY}
        return render_probe("pairs", self.isa, **knobs)


@dataclass(frozen=True)
class Tiles:
    """Products of tiles whose operands come from L1, for levels with tile registers."""

    isa: str
    turns: int = 400  # for each 16 rows; a call of `DOT_SHAPE` takes about 1.5 ms at 4 TOPS

    def operations(self, shape: Shape) -> int:
        """Multiplies and adds of one call with weights of ``shape``."""
        return -(-shape.m // 16) * self.turns * 4 * 2 * 16 * 16 * 64

    def source(self) -> Source:
        return render_probe("tiles", self.isa, turns=self.turns)


@dataclass(frozen=True)
class Fma(_Sums):
    """Multiply-adds of float32, 16 in an op: the peak that attention is compared with."""

    def operations(self, shape: Shape) -> int:
        """Multiplies and adds of one call with weights of ``shape``."""
        return -(-shape.m // 16) * self.turns * self.chains * 2 * 16

    def source(self) -> Source:
        return render_probe("fma", self.isa, chains=self.chains, turns=self.turns)


PeakProbe = Dot4 | Pairs | Tiles


def peak_probes(isa: str) -> tuple[PeakProbe, ...]:
    """Every way to multiply that may be the fastest of an ISA level: its peak is the best of them."""
    return (Tiles(isa),) if isas()[isa].tile_registers else (Dot4(isa), Pairs(isa))


def build_probes(toolchain: Toolchain, sources: Sequence[Source]) -> list[Functions]:
    """The probes compiled, those of one ISA level in one library. CompileError when one does not compile."""
    units = {source: unit_of(source) for source in sources}
    levels = list(dict.fromkeys(source.isa for source in sources))
    support = {isa: support_units(isa) for isa in levels}
    # All at once, so that every core has work; the modules below are linked from the cache.
    toolchain.compile_objects([*units.values(), *(unit for isa in levels for unit in support[isa])])
    libraries = {
        isa: build_module(toolchain, [*(units[s] for s in sources if s.isa == isa), *support[isa]])
        for isa in levels
    }
    return [_functions(source, libraries[source.isa]) for source in sources]


def _functions(source: Source, library: Path) -> Functions:
    return Functions(
        library=str(library),
        run=source.name,
        scratch=f"{source.name}_scratch",
        support=str(library),
        quantize=f"bitgen_quantize__{source.isa}",
        tables=None,
        family=LAYOUT.family,
        row_block=LAYOUT.row_block,
        row_grain=LAYOUT.row_block,
        n_min=1,
        n_max=2**31 - 1,
        tile_registers=bool(isas()[source.isa].tile_registers),
    )
