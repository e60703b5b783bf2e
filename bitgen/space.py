"""The legal schedules of a family for a shape on an ISA level.

A `Space` is a grid of knob values per algorithm plus a few presets, thinned by named rules. What a rule
forbids cannot be built: `Space` never yields it, and `Space.check` says in words which rule it breaks.

====== ========== ==============================================================================================
knob   algorithm  meaning
====== ========== ==============================================================================================
streams direct    row blocks walked at once, each a stream of its own in memory; rows in registers = streams x
                  row_block
nr      both      tokens whose accumulators live in registers
accs    direct    I2_S: accumulators of a 16-row block and token: 4 = every field masked in place (scales 1, 4,
                  16, 64), 2 = one shift (scales 1, 4), 1 = three shifts
widen   both      0: every product goes to int32 at once (a dot instruction); W > 0: int16 partial sums, added to
                  int32 every W chunks (direct) or every W steps of 4 k (panel)
unroll  both      chunks (direct) or steps of 4 k (panel) in one turn of the inner loop
prefetch direct   bytes ahead of each stream that are asked for; 0: leave it to the hardware
mr      panel     rows whose accumulators live in registers
mc      both      rows of a cache block;  kc  columns of a cache block, 0: all of k
====== ========== ==============================================================================================

``direct`` reads packed weights and multiplies or looks up at once; ``panel`` unpacks ``mc`` x ``kc`` weights to
bytes that serve every token of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from bitgen.errors import BitgenError
from bitgen.spec import FAMILIES, I2S, LARGE, N1, SMALL, KernelSpec, Layout, Regime, Schedule, Shape
from bitgen.target import Cpu, Isa

INT16_MAX_SUM = 32768  # the most negative int16; the largest positive sum is smaller for every family
# The largest |value| one addition puts into an int16 lane, with activations in -128..127:
PAIR_BOUND = 2 * 2 * 128  # I2_S and panels: codes 0..2, two products a lane
ENTRY_BOUND = {"tl1": 256, "tl2": 384}  # a sum of two, of three activations
MAX_WEIGHT_BLOCKS = 1 << 31  # int32 indices of rows

Axes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """A named constraint; ``text`` is what a user is told when a schedule breaks it."""

    text: str
    holds: Callable[[KernelSpec], bool] = field(repr=False, compare=False)


def adds_before_widening(spec: KernelSpec) -> tuple[int, int]:
    """(additions into one int16 lane between two widenings, bound on |one addition|); (0, 0) without int16 sums."""
    s = dict(spec.schedule)
    if not s.get("widen"):
        return 0, 0
    if spec.schedule.algorithm == "panel":
        return s["widen"], PAIR_BOUND
    if spec.family == "i2s":
        scale = {1: 1, 2: 4, 4: 64}[s["accs"]]
        return s["widen"] * 4 // s["accs"], PAIR_BOUND * scale
    groups = FAMILIES[spec.family].k_chunk // FAMILIES[spec.family].g // 4  # lookups a lane and chunk
    return s["widen"] * groups, ENTRY_BOUND[spec.family]


def headroom_lines(spec: KernelSpec) -> list[str]:
    """The bounds of a kernel's accumulators as arithmetic."""
    adds, bound = adds_before_widening(spec)
    lines = [f"int16: {adds} additions x {bound} = {adds * bound} <= {INT16_MAX_SUM}"] if adds else []
    scale = 64 if dict(spec.schedule).get("accs") == 4 else 4 if dict(spec.schedule).get("accs") == 2 else 1
    per = 2 * 128 * scale if spec.family == "i2s" or spec.schedule.algorithm == "panel" else 128
    share = dict(spec.schedule).get("accs", 1) if spec.family == "i2s" and spec.schedule.algorithm == "direct" else 1
    lines.append(f"int32: k / {share} x {per} <= 2^31 for k <= {share * (1 << 31) // per}; k is at most 524288")
    return lines


def block_registers(isa: Isa) -> tuple[int, int]:
    """(registers that hold one 64-byte block, registers of the ISA)."""
    registers = 32 if isa.vector_bytes == 64 or isa.arch == "aarch64" else 16
    return max(1, 64 // isa.vector_bytes), registers


@dataclass(frozen=True)
class Space:
    """All legal kernels of one family, ISA level and regime for one shape. Iterating yields `KernelSpec`."""

    family: str
    isa: Isa
    regime: Regime
    shape: Shape
    layouts: tuple[Layout, ...]
    axes: Mapping[str, Axes]
    presets: tuple[KernelSpec, ...]
    rules: tuple[Rule, ...] = field(repr=False)

    @property
    def algorithms(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def knobs(self, algorithm: str) -> Axes:
        """The values each knob of an algorithm may take."""
        if algorithm not in self.axes:
            raise BitgenError(
                f"{FAMILIES[self.family].title} for {self.regime.name} has no algorithm {algorithm!r}; "
                f"it has {', '.join(self.axes)}"
            )
        return self.axes[algorithm]

    def make(self, algorithm: str, layout: Layout, values: Mapping[str, int]) -> KernelSpec:
        """The spec of one point; it may still break rules (see `broken`)."""
        knobs = self.knobs(algorithm)
        unknown = set(values) - set(knobs)
        if unknown:
            raise BitgenError(f"{algorithm} has no knob {', '.join(sorted(unknown))}; it has {', '.join(knobs)}")
        missing = set(knobs) - set(values)
        if missing:
            raise BitgenError(f"{algorithm} needs a value for {', '.join(sorted(missing))}")
        schedule = Schedule(algorithm, tuple((name, int(values[name])) for name in knobs))
        return KernelSpec(self.family, self.isa.name, self.regime.name, layout, schedule)

    def broken(self, spec: KernelSpec) -> list[Rule]:
        """The rules that ``spec`` breaks; empty for a legal one."""
        return [rule for rule in self.rules if not rule.holds(spec)]

    def check(self, spec: KernelSpec) -> None:
        """BitgenError that quotes every broken rule."""
        texts = [rule.text for rule in self.broken(spec)]
        if texts:
            raise BitgenError(f"schedule {spec.schedule.name} is not legal: {'; '.join(texts)}")

    @cached_property
    def points(self) -> tuple[KernelSpec, ...]:
        grid = (
            self.make(algorithm, layout, dict(zip(axes, values, strict=True)))
            for algorithm, axes in self.axes.items()
            for layout in self.layouts
            for values in product(*axes.values())
        )
        legal = [spec for spec in grid if not self.broken(spec)]
        return tuple(dict.fromkeys([*legal, *self.known_good]))

    def __iter__(self) -> Iterator[KernelSpec]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def known_good(self) -> tuple[KernelSpec, ...]:
        """Points worth trying first: the default, and what other projects ship for such a shape."""
        return tuple(dict.fromkeys(spec for spec in self.presets if not self.broken(spec)))

    @property
    def default(self) -> KernelSpec:
        """The schedule used where nothing was tuned. Every space has one."""
        return self.known_good[0]


def space_for(family: str, isa: Isa, regime: Regime, shape: Shape, cpu: Cpu) -> Space:
    """The space of a family on an ISA level for one shape; ``cpu`` gives the cache sizes."""
    if family not in FAMILIES:
        raise BitgenError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    layouts = tuple(Layout(family, rows) for rows in (16, 32))
    return Space(
        family=family,
        isa=isa,
        regime=regime,
        shape=shape,
        layouts=layouts,
        axes=_axes(family, isa, regime),
        presets=tuple(_presets(family, isa, regime)),
        rules=tuple(_rules(family, isa, regime, shape, cpu)),
    )


# ------------------------------------------------------------------------------------------------- axes

# Values that were measured to matter; what lies between them was never outside the noise. kc is a multiple of 48
# and 16, so every family's chunks divide it. The scalar level is a fallback and an oracle: it needs one point of
# each kind, not a search.


def _axes(family: str, isa: Isa, regime: Regime) -> dict[str, Axes]:
    axes: dict[str, Axes] = {}
    if family != "i2s":
        axes["direct"] = _lookup_axes(family, isa, regime)
    elif regime is not LARGE:
        axes["direct"] = _multiply_axes(isa, regime)
    if regime is not N1:
        axes["panel"] = _panel_axes(isa, regime)
    return axes


def _multiply_axes(isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4, 8) if wide else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4, 8, 16) if wide else (2,),
        "accs": (1, 2, 4) if regime is N1 or not wide else (1, 2),
        "widen": _pair_widths(isa, (8, 16)),
        "unroll": (1, 2) if regime is N1 else (1,),
        "prefetch": (0, 1024, 2048) if regime is N1 and wide else (0, 1024),
    }


def _lookup_axes(family: str, isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4) if wide else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4, 8) if wide else (2,),
        "mc": (0, 128, 512) if wide else (0, 128),
        "kc": (0, 960, 1920) if wide else (0, 960),
        "widen": {"tl1": (63,), "tl2": (21,)}[family],
        "unroll": (1, 2) if regime is N1 else (1,),
        "prefetch": (0, 1024) if regime is N1 else (0,),
    }


def _panel_axes(isa: Isa, regime: Regime) -> Axes:
    wide, large = isa.name != "scalar", regime is LARGE
    return {
        "mr": ((32, 64) if isa.vector_bytes == 64 else (16, 32)),
        "nr": ((4, 6, 8, 12) if large else (4, 8)) if wide else (2, 4),
        "mc": (64, 256) if large and wide else (64,),
        "kc": (0, 960, 1920) if large and wide else (0, 960),
        "widen": _pair_widths(isa, (64,)),
        "unroll": (1, 2) if large else (1,),
    }


def _pair_widths(isa: Isa, widths: tuple[int, ...]) -> tuple[int, ...]:
    """A dot instruction widens by itself; without one int16 sums are three instructions cheaper a step."""
    if isa.name == "scalar":
        return (0, *widths)
    return (0,) if isa.native_dot4 else widths


# ------------------------------------------------------------------------------------------------- rules


def _rules(family: str, isa: Isa, regime: Regime, shape: Shape, cpu: Cpu) -> Iterator[Rule]:
    yield Rule(
        f"int16 partial sums must stay within {INT16_MAX_SUM}: widen less often",
        lambda s: adds_before_widening(s)[0] * adds_before_widening(s)[1] <= INT16_MAX_SUM,
    )
    yield Rule(
        f"accumulators and operands must fit the registers of {isa.name}",
        lambda s: _registers_used(s, isa) <= block_registers(isa)[1],
    )
    if regime is SMALL:
        yield Rule("nr is at most the 16 tokens of the regime", lambda s: s.schedule["nr"] <= 16)
    yield Rule(
        "kc must be 0 (all of k) or a multiple of the family's chunk, below k",
        lambda s: _kc_fits(s, shape.k),
    )
    if family != "i2s":
        yield Rule(
            "mc and kc block the cache together: give both, or neither",
            lambda s: s.schedule.algorithm == "panel" or (s.schedule["mc"] > 0) == (s.schedule["kc"] > 0),
        )
        yield Rule(
            "mc must be a multiple of the rows walked at once",
            lambda s: s.schedule.algorithm == "panel"
            or s.schedule["mc"] % (s.schedule["streams"] * s.layout.row_block) == 0,
        )
    if regime is not N1:
        yield Rule("mc must be a multiple of mr and of the row block", _panel_rows_divide)
        yield Rule(
            f"a panel of mc x kc bytes must leave a quarter of the L2 cache free ({cpu.l2_bytes} bytes)",
            lambda s: s.schedule.algorithm != "panel" or _panel_bytes(s, shape.k) <= cpu.l2_bytes * 3 // 4,
        )


def _kc_fits(spec: KernelSpec, k: int) -> bool:
    kc = dict(spec.schedule).get("kc", 0)
    return kc == 0 or (kc % FAMILIES[spec.family].k_chunk == 0 and kc < k)


def _panel_rows_divide(spec: KernelSpec) -> bool:
    if spec.schedule.algorithm != "panel":
        return True
    s = dict(spec.schedule)
    return s["mc"] % s["mr"] == 0 and s["mc"] % spec.layout.row_block == 0


def _panel_bytes(spec: KernelSpec, k: int) -> int:
    s = dict(spec.schedule)
    if s["kc"] == 0 and s["mc"] == s["mr"] == min_mr(spec):
        return 0  # the smallest panel is always legal, so that every shape has a kernel
    return s["mc"] * (s["kc"] or k)


def min_mr(spec: KernelSpec) -> int:
    """The smallest legal panel height of a layout."""
    return spec.layout.row_block


def _registers_used(spec: KernelSpec, isa: Isa) -> int:
    """Accumulators that live across the inner loop, plus the operands of one step."""
    each, _ = block_registers(isa)
    s = dict(spec.schedule)
    if isa.name == "scalar":
        return 0  # arrays: the compiler decides
    if spec.schedule.algorithm == "panel":
        rows = s["mr"] // 16
        return each * rows * (s["nr"] + 1) + 1
    rows = s["streams"] * spec.layout.sub_blocks
    if spec.family == "i2s":
        # AVX2 holds the masks of shifted fields in one register, of fields in place in one for each.
        return each * (rows * s["nr"] * s["accs"] + 1) + 1 + s["accs"]
    return each * (2 * rows * s["nr"] + 2) + 1  # two int16 accumulators, two nibbles


# ------------------------------------------------------------------------------------------------- presets


def _presets(family: str, isa: Isa, regime: Regime) -> Iterator[KernelSpec]:
    """The default first: it must be legal for every shape."""

    def spec(algorithm: str, row_block: int = 16, **knobs: int) -> KernelSpec:
        schedule = Schedule(algorithm, tuple(knobs.items()))
        return KernelSpec(family, isa.name, regime.name, Layout(family, row_block), schedule)

    zmm = isa.vector_bytes == 64
    pairs = 0 if isa.native_dot4 or isa.name == "scalar" else 16
    widen = {"tl1": 63, "tl2": 21}.get(family, pairs)
    if regime is N1 and family == "i2s":
        accs = 4 if isa.native_dot4 and zmm else 1
        yield spec("direct", streams=4 if zmm else 2, nr=1, accs=accs, widen=pairs, unroll=1, prefetch=1024)
        yield spec("direct", streams=1, nr=1, accs=1, widen=pairs, unroll=1, prefetch=0)
    elif regime is N1:
        yield spec("direct", streams=4 if zmm else 1, nr=1, mc=0, kc=0, widen=widen, unroll=1, prefetch=1024)
        yield spec("direct", streams=1, nr=1, mc=0, kc=0, widen=widen, unroll=1, prefetch=0)
        # bitnet.cpp's presets for the 3B shapes: BM x BK blocks, bm rows in registers.
        for bm, block, kc in ((2, 160, 96), (4, 320, 96), (2, 320, 192), (1, 160, 96)):
            yield spec("direct", streams=bm, nr=1, mc=block, kc=kc, widen=widen, unroll=1, prefetch=0)
    elif regime is SMALL and family == "i2s":
        yield spec("direct", streams=2 if zmm else 1, nr=8 if zmm else 2, accs=1, widen=pairs, unroll=1, prefetch=0)
        yield spec("direct", streams=1, nr=4 if zmm else 2, accs=1, widen=pairs, unroll=1, prefetch=0)
    if regime is not N1:
        small = dict(mr=16, nr=4, mc=16, kc=0, widen=4 * pairs, unroll=1)
        large = dict(mr=64, nr=6, mc=64, kc=960, widen=4 * pairs, unroll=1)
        if zmm:
            yield spec("panel", **large)
        yield spec("panel", **{**small, "mc": 64, "kc": 960})
        yield spec("panel", **small)
    if regime is not N1 and family != "i2s":
        for bm, block, kc in ((2, 160, 96), (1, 160, 96)):
            yield spec("direct", streams=bm, nr=2, mc=block, kc=kc, widen=widen, unroll=1, prefetch=0)


__all__ = ["I2S", "Rule", "Space", "adds_before_widening", "headroom_lines", "space_for"]
