"""The legal schedules of a family for a shape on an ISA level.

A `Space` is a grid of knob values per algorithm plus a few presets, thinned by named rules. What a rule
forbids cannot be built: `Space` never yields it, and `Space.check` says in words which rule it breaks.

====== ========== ============================================================================================
knob   algorithm  meaning
====== ========== ============================================================================================
streams not panel row blocks walked at once, each a stream of its own in memory; rows in registers = streams x
                  row_block
nr      both      tokens whose accumulators live in registers
accs    direct    I2_S: accumulators of a 16-row block and token: 4 = every field masked in place (scales
                  1, 4, 16, 64), 3 = the fourth shifted, 2 = one shift (scales 1, 4), 1 = three shifts
widen   both      0: every product goes to int32 at once (a dot instruction); W > 0: int16 partial sums, added
                  to int32 every W chunks (direct) or every W steps of 4 k (panel)
unroll  both      chunks (direct) or steps of 4 k (panel) in one turn of the inner loop
prefetch not panel bytes ahead of each stream that are asked for; 0: leave it to the hardware
hint    not panel n = 1 only: where a prefetched line goes. 0: into every cache (T0), 1: past them (NTA),
                  because a token reads its weights once
mr      panel     rows whose accumulators live in registers
mc      both      rows of a cache block;  kc  columns of a cache block, 0: all of k
====== ========== ============================================================================================

``direct`` reads packed weights and multiplies or looks up at once; ``wide`` and ``split`` are TL5's ways to
look up, in one table of 128 sums for five activations or in two of 16; ``panel`` unpacks ``mc`` x ``kc``
weights to bytes that serve every token of the batch. ``tiles`` multiplies tiles of 16 tokens x 64 k with
tiles of 64 k x 16 rows, on ISA levels that have them: on the way for 2..16 tokens (``streams``, ``ahead``,
``prefetch``), from panels for more (``mr`` and ``nr`` are multiples of 16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from bitgen.errors import EXIT_USAGE, BitgenError
from bitgen.spec import FAMILIES, I2S, K_MAX, LARGE, N1, SMALL, KernelSpec, Layout, Regime, Schedule, Shape
from bitgen.target import Cpu, Isa

INT16_MIN, INT16_MAX = -32768, 32767
# The least and the largest value that one addition puts into an int16 lane, with activations in -128..127.
PAIR_RANGE = (-2 * 2 * 128, 2 * 2 * 127)  # I2_S and panels: codes 0..2, two products a lane
ENTRY_RANGE = {"tl1": (-2 * 128, 2 * 128), "tl2": (-3 * 128, 3 * 128), "tl5": (-5 * 128, 5 * 128)}

Axes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Rule:
    """A named constraint; ``text`` is what a user is told when a schedule breaks it.

    ``local``: it is about the shape and the caches of this CPU. A kernel that breaks it is right, and may be
    useful elsewhere.
    """

    text: str
    holds: Callable[[KernelSpec], bool] = field(repr=False, compare=False)
    local: bool = False


@dataclass(frozen=True)
class Int16Sums:
    """Additions into one int16 lane between two widenings, each of a value in [low, high]."""

    additions: int
    low: int
    high: int

    @property
    def exact(self) -> bool:
        """Whether no sum can leave int16."""
        return self.additions * self.low >= INT16_MIN and self.additions * self.high <= INT16_MAX

    def __str__(self) -> str:
        low, high = self.additions * self.low, self.additions * self.high
        return f"{self.additions} additions of {self.low} .. {self.high} give {low} .. {high}"


def int16_sums(spec: KernelSpec) -> Int16Sums | None:
    """The int16 partial sums of a kernel; None when every product goes to int32 at once."""
    s = dict(spec.schedule)
    if not s.get("widen"):
        return None  # tiles have no such knob
    if spec.schedule.algorithm == "panel":
        return Int16Sums(s["widen"], *PAIR_RANGE)
    if not FAMILIES[spec.family].looks_up:
        scale = field_scale(s["accs"])
        adds = s["widen"] * last_fields(spec.family, s["accs"])
        return Int16Sums(adds, scale * PAIR_RANGE[0], scale * PAIR_RANGE[1])
    family = FAMILIES[spec.family]
    lookups = family.k_chunk // family.g * family.rows // 64  # an int16 lane and chunk
    return Int16Sums(s["widen"] * lookups, *ENTRY_RANGE[spec.family])


def field_scale(accs: int) -> int:
    """The largest scale of codes in place that ``accs`` accumulators add: field f stays at 4^(f mod accs)."""
    return int(4 ** (accs - 1))


def last_fields(family: str, accs: int) -> int:
    """How many fields of a chunk go to the last accumulator, which has the largest scale."""
    fields = FAMILIES[family].k_chunk // 4
    # Of three the fourth field and T5's fifth are shifted to the first.
    return 1 if accs == 3 else 4 // accs + fields - 4


def headroom_lines(spec: KernelSpec) -> list[str]:
    """The bounds of a kernel's accumulators as arithmetic."""
    sums = int16_sums(spec)
    lines = [f"int16: {sums}, within {INT16_MIN} .. {INT16_MAX}"] if sums else []
    s, family = dict(spec.schedule), FAMILIES[spec.family]
    multiplies = spec.schedule.unpacks or not family.looks_up
    accs, fields = s.get("accs", 1), family.k_chunk // 4
    per = 2 * 128 * field_scale(accs) if multiplies else 128
    # of a chunk's fields, those of the last accumulator
    mine = f"{last_fields(spec.family, accs)}/{fields}" if accs > 1 else "1"
    lines.append(f"int32: {mine} of k x {per} is below 2^31 for k <= {K_MAX}")
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
    bounds: tuple[Rule, ...] = field(repr=False)  # what each value may be at all
    rules: tuple[Rule, ...] = field(repr=False)  # what values may be together; asked only within the bounds

    @property
    def algorithms(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def knobs(self, algorithm: str) -> Axes:
        """The values each knob of an algorithm may take."""
        if algorithm not in self.axes:
            raise BitgenError(
                f"{FAMILIES[self.family].title} for {self.regime.name} has no algorithm {algorithm!r}; "
                f"it has {', '.join(self.axes)}",
                EXIT_USAGE,
            )
        return self.axes[algorithm]

    def make(self, algorithm: str, layout: Layout, values: Mapping[str, int]) -> KernelSpec:
        """The spec of one point; it may still break rules (see `broken`)."""
        knobs = self.knobs(algorithm)
        unknown = set(values) - set(knobs)
        if unknown:
            names = ", ".join(sorted(unknown))
            raise BitgenError(f"{algorithm} has no knob {names}; it has {', '.join(knobs)}", EXIT_USAGE)
        missing = set(knobs) - set(values)
        if missing:
            raise BitgenError(f"{algorithm} needs a value for {', '.join(sorted(missing))}", EXIT_USAGE)
        schedule = Schedule(algorithm, tuple((name, int(values[name])) for name in knobs))
        return KernelSpec(self.family, self.isa.name, self.regime.name, layout, schedule)

    def broken(self, spec: KernelSpec) -> list[Rule]:
        """The rules that ``spec`` breaks; empty for a legal one."""
        outside = [rule for rule in self.bounds if not rule.holds(spec)]
        return outside or [rule for rule in self.rules if not rule.holds(spec)]

    def check(self, spec: KernelSpec, local: bool = True) -> None:
        """BitgenError that quotes every broken rule; ``local`` False: only those that make a kernel wrong."""
        texts = [rule.text for rule in self.broken(spec) if local or not rule.local]
        if texts:
            message = f"schedule {spec.schedule.name} is not legal: {'; '.join(texts)}"
            raise BitgenError(message, EXIT_USAGE)

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
        raise BitgenError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}", EXIT_USAGE)
    rows = FAMILIES[family].rows
    layouts = tuple(Layout(family, rows) for rows in ((16, 32) if rows == 16 else (rows,)))
    return Space(
        family=family,
        isa=isa,
        regime=regime,
        shape=shape,
        layouts=layouts,
        axes=_axes(family, isa, regime),
        presets=tuple(_presets(family, isa, regime)),
        bounds=tuple(_bounds(family, isa, regime, layouts)),
        rules=tuple(_rules(family, isa, regime, shape, cpu)),
    )


# ------------------------------------------------------------------------------------------------- axes

# Values that were measured to matter; what lies between them was never outside the noise. kc is a multiple of
# 48 and 16, so every family's chunks divide it. The scalar level is a fallback and an oracle: it needs one
# point of each kind, not a search.


def _axes(family: str, isa: Isa, regime: Regime) -> dict[str, Axes]:
    axes: dict[str, Axes] = {}
    if family == "tl5" and regime is not LARGE:
        wide, split = isa.lut_bytes >= 128, isa.lut_bytes < 128 or isa.name == "scalar"
        axes |= {name: _five_axes(isa, regime) for name, has in (("wide", wide), ("split", split)) if has}
    elif family in ("tl1", "tl2"):
        axes["direct"] = _lookup_axes(family, isa, regime)
    elif regime is not LARGE:
        axes["direct"] = _multiply_axes(family, isa, regime)
    if regime is not N1:
        axes["panel"] = _panel_axes(isa, regime)
    if regime is not N1 and isa.tiles:
        axes["tiles"] = _tile_axes(isa, regime)
    return axes


def _multiply_axes(family: str, isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4, 8) if wide else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4, 8, 16) if wide else (2,),
        "accs": (1, 2, 4 if isa.code_max >= 128 else 3) if regime is N1 or not wide else (1, 2),
        "widen": _pair_widths(isa, (8, _pairs(family))),
        "unroll": (1, 2) if regime is N1 else (1,),
        "prefetch": ((0, 4096, 6144) if regime is N1 else (0, 2048)) if wide else (0,),
        **({"hint": (0, 1) if wide else (0,)} if regime is N1 else {}),
    }


def _lookup_axes(family: str, isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4) if wide else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4, 8) if wide else (2,),
        "mc": (0, 128) if wide else (0, 64),
        "kc": (0, 960, 1920) if wide else (0, 960),
        "widen": {"tl1": (63,), "tl2": (21,)}[family],
        "unroll": (1, 2) if regime is N1 and wide else (1,),
        "prefetch": (0, 4096) if regime is N1 and wide else (0,),
    }


def _five_axes(isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
    return {
        "streams": (1, 2, 4, 8) if wide and regime is N1 else (1, 2),
        "nr": (1,) if regime is N1 else (2, 4) if wide else (2,),
        "widen": (12,),
        "prefetch": (0, 4096, 6144) if regime is N1 and wide else (0,),
        **({"hint": (0, 1) if wide else (0,)} if regime is N1 else {}),
    }


def _panel_axes(isa: Isa, regime: Regime) -> Axes:
    wide, large = isa.name != "scalar", regime is LARGE
    return {
        "mr": ((32, 64) if isa.vector_bytes == 64 else (16, 32)),
        "nr": ((4, 6, 8, 12) if large else (4, 8)) if wide else (2, 4),
        "mc": (64, 256) if large and wide else (64,),
        "kc": (0, 960),
        "widen": _pair_widths(isa, (64,)),
        "unroll": (1, 2) if large and wide else (1,),
    }


def _tile_axes(isa: Isa, regime: Regime) -> Axes:
    wide = isa.name != "scalar"
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
        "kc": (0, 960, 1920) if wide else (0, 960),
        "pack": (0, 1),
    }


def _pairs(family: str) -> int:
    """Chunks that one int16 accumulator takes: 64 additions of 512 fit, 4 a chunk or T5's 5."""
    return 16 if family == "i2s" else 12


def _pair_widths(isa: Isa, widths: tuple[int, ...]) -> tuple[int, ...]:
    """A dot instruction widens by itself; without one int16 sums are three instructions cheaper a step."""
    if isa.name == "scalar":
        return (0, *widths)
    return (0,) if isa.native_dot4 else widths


# ------------------------------------------------------------------------------------------------- rules

# Knobs that multiply the code of a kernel.
_COUNTS, _COUNT_MAX = ("streams", "nr", "unroll"), 16
_TILE_SUMS = 4  # tiles of sums; two of activations and two of weights are the others of eight
# Bytes, rows, columns, steps: far above every useful value.
_SIZE_MAX = 1 << 20


def _bounds(family: str, isa: Isa, regime: Regime, layouts: tuple[Layout, ...]) -> Iterator[Rule]:
    yield Rule(
        f"it must be a kernel of {family} on {isa.name} for {regime.name}",
        lambda s: (s.family, s.isa, s.regime) == (family, isa.name, regime.name),
    )
    axes = _axes(family, isa, regime)
    knobs = {name for algorithm in axes.values() for name in algorithm}
    yield Rule(
        f"it must have all knobs of one of {', '.join(axes)}",
        lambda s: tuple(name for name, _ in s.schedule) == tuple(axes.get(s.schedule.algorithm, ("",))),
    )
    yield Rule(
        f"row_block must be one of {', '.join(str(layout.row_block) for layout in layouts)}",
        lambda s: s.layout in layouts,
    )
    yield Rule(
        f"{', '.join(_COUNTS)} must be 1 .. {_COUNT_MAX}",
        lambda s: (
            all(1 <= value <= _COUNT_MAX for name, value in s.schedule if name in _COUNTS)
            or (s.schedule.algorithm == "tiles" and "nr" in dict(s.schedule))
        ),
    )
    if "accs" in knobs:
        yield Rule("accs must be 1 .. 4", lambda s: dict(s.schedule).get("accs", 1) in (1, 2, 3, 4))
    if "hint" in knobs:
        yield Rule("hint must be 0 or 1", lambda s: dict(s.schedule).get("hint", 0) in (0, 1))
    if "mr" in knobs:
        yield Rule(
            "mr must be 16, 32, ... 256", lambda s: dict(s.schedule).get("mr", 16) in range(16, 257, 16)
        )
    if "pack" in knobs:
        yield Rule(
            "mr of tiles must be 16, 32 or 64, nr 16 or 32",
            lambda s: (
                s.schedule.algorithm != "tiles"
                or (s.schedule["mr"] in (16, 32, 64) and s.schedule["nr"] in (16, 32))
            ),
        )
    switches = [name for name in ("ahead", "pack") if name in knobs]
    if switches:
        yield Rule(
            f"{', '.join(switches)} must be 0 or 1",
            lambda s: all(value in (0, 1) for name, value in s.schedule if name in switches),
        )
    sizes = [name for name in ("widen", "prefetch", "mc", "kc") if name in knobs]
    yield Rule(
        f"{', '.join(sizes)} must be 0 .. {_SIZE_MAX}",
        lambda s: all(0 <= value <= _SIZE_MAX for _, value in s.schedule),
    )


def _rules(family: str, isa: Isa, regime: Regime, shape: Shape, cpu: Cpu) -> Iterator[Rule]:
    yield Rule(
        f"int16 partial sums must stay within {INT16_MIN} .. {INT16_MAX}: a smaller widen",
        lambda s: (sums := int16_sums(s)) is None or sums.exact,
    )
    axes = _axes(family, isa, regime)
    if any("accs" in knobs for knobs in axes.values()) and 2 * field_scale(4) > isa.code_max:
        yield Rule(
            f"codes in place, 2 x 4^(accs - 1), must not exceed {isa.code_max}, the largest byte that "
            f"{isa.name} multiplies: a smaller accs",
            lambda s: 2 * field_scale(dict(s.schedule).get("accs", 1)) <= isa.code_max,
        )
    if isa.name != "scalar":  # its blocks are arrays: the compiler decides
        yield Rule(
            f"accumulators and operands must fit the registers of {isa.name}",
            lambda s: s.schedule.algorithm == "tiles" or _registers_used(s, isa) <= block_registers(isa)[1],
        )
    if regime is not N1 and isa.tiles:
        yield Rule(
            f"there are {_TILE_SUMS} tiles of sums: rows walked at once x tokens must not exceed "
            f"{_TILE_SUMS} x 16 x 16",
            lambda s: s.schedule.algorithm != "tiles" or _tile_sums(s) <= _TILE_SUMS,
        )
    if regime is LARGE and isa.tiles:
        columns = FAMILIES[family].k_chunk * FAMILIES[family].tile_chunks
        yield Rule(
            f"kc of tiles must be a multiple of {columns}: whole chunks and whole tiles",
            lambda s: s.schedule.algorithm != "tiles" or s.schedule["kc"] % columns == 0,
        )
    if any("hint" in knobs for knobs in axes.values()):
        yield Rule(
            "hint says where prefetched lines go: 1 needs a prefetch distance",
            lambda s: s.schedule["prefetch"] > 0 or s.schedule["hint"] == 0,
        )
    if any("kc" in knobs for knobs in axes.values()):
        yield Rule(
            f"kc must be 0 (all of k) or a multiple of the family's chunk, {FAMILIES[family].k_chunk}",
            lambda s: dict(s.schedule).get("kc", 0) % FAMILIES[s.family].k_chunk == 0,
        )
        yield Rule(
            f"kc must be below k = {shape.k}", lambda s: dict(s.schedule).get("kc", 0) < shape.k, local=True
        )
    if any(FAMILIES[family].table_bytes(algorithm) for algorithm in axes):
        yield Rule(
            "entries of lookup tables are int16 sums: widen must be at least 1",
            lambda s: s.schedule.unpacks or s.schedule["widen"] >= 1,
        )
    if "mc" in axes.get("direct", {}):
        yield Rule(
            "mc and kc block the cache together: give both, or neither",
            lambda s: s.schedule.unpacks or (s.schedule["mc"] > 0) == (s.schedule["kc"] > 0),
        )
        yield Rule(
            "mc must be a multiple of the rows walked at once",
            lambda s: (
                s.schedule.unpacks or s.schedule["mc"] % (s.schedule["streams"] * s.layout.row_block) == 0
            ),
        )
    if regime is not N1:
        yield Rule("mc of a panel must be a multiple of mr and of the row block, not 0", _panel_rows_divide)
        yield Rule(
            f"a panel of mc x kc bytes must leave a quarter of the L2 cache free ({cpu.l2_bytes} bytes)",
            lambda s: _panel_bytes(s, shape.k) <= cpu.l2_bytes * 3 // 4,
            local=True,
        )


def _tile_sums(spec: KernelSpec) -> int:
    """Tiles of sums that are held at once."""
    s = dict(spec.schedule)
    rows = s["mr"] if "mr" in s else s["streams"] * spec.layout.row_block
    return rows // 16 * (s.get("nr", 16) // 16)


def _panel_rows_divide(spec: KernelSpec) -> bool:
    s = dict(spec.schedule)
    if not spec.schedule.unpacks or "mc" not in s:
        return True
    return s["mc"] > 0 and s["mc"] % s["mr"] == 0 and s["mc"] % spec.layout.row_block == 0


def _panel_bytes(spec: KernelSpec, k: int) -> int:
    s = dict(spec.schedule)
    if not spec.schedule.unpacks or "mc" not in s:
        return 0
    if s["kc"] == 0 and s["mc"] == spec.layout.row_block and s["mr"] <= 32:
        return 0  # the smallest panel is always legal, so that every shape has a kernel
    return s["mc"] * (s["kc"] or k)


def _registers_used(spec: KernelSpec, isa: Isa) -> int:
    """Accumulators that live across the inner loop, plus the operands of one step."""
    each, _ = block_registers(isa)
    s = dict(spec.schedule)
    if spec.schedule.algorithm == "panel":
        rows = s["mr"] // 16
        return each * rows * (s["nr"] + 1) + 1
    rows = s["streams"] * spec.layout.sub_blocks
    if not FAMILIES[spec.family].looks_up:
        # AVX2 holds the masks of shifted fields in one register, of fields in place in one for each.
        return each * (rows * s["nr"] * s["accs"] + 1) + 1 + s["accs"]
    # Two int16 accumulators for each 16 rows (TL5: 64), two nibbles; a wide table is four blocks.
    rows = rows * 16 // FAMILIES[spec.family].rows
    return each * (2 * rows * s["nr"] + (6 if spec.schedule.algorithm == "wide" else 2)) + 1


# ------------------------------------------------------------------------------------------------- presets


def _presets(family: str, isa: Isa, regime: Regime) -> Iterator[KernelSpec]:
    """The default first: it must be legal for every shape."""
    rows = FAMILIES[family].rows

    def spec(algorithm: str, row_block: int = rows, **knobs: int) -> KernelSpec:
        schedule = Schedule(algorithm, tuple(knobs.items()))
        layout = Layout(family, max(row_block, rows))
        return KernelSpec(family, isa.name, regime.name, layout, schedule)

    zmm, arm = isa.vector_bytes == 64, isa.arch == "aarch64"
    sve256 = arm and isa.vector_bytes == 32  # twice the registers of AVX2, for blocks of two
    dots = isa.native_dot4 or isa.name == "scalar"
    pairs, steps = (0, 0) if dots else (_pairs(family), 64)
    widen = {"tl1": 63, "tl2": 21, "tl5": 12}.get(family, pairs)
    looks_up = FAMILIES[family].looks_up
    five = "wide" if isa.lut_bytes >= 128 else "split"
    ahead = 4096 if family == "i2s" else 6144  # measured for two streams (docs/performance.md)
    if regime is N1 and not looks_up:
        accs = 4 if isa.native_dot4 and zmm else 1 if pairs and family == "t5" else 2
        streams = 2
        if arm:  # by instructions a weight (docs/arm.md): two streams of NEON do not stay in its registers
            in_place = 4 if isa.code_max >= 128 else 3
            accs = 1 if family == "t5" else in_place if isa.native_dot4 else 2
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
        yield spec(five, streams=4 if zmm else 2 if sve256 or not arm else 1, **knobs, prefetch=ahead, hint=0)
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
    if regime is SMALL and not looks_up:
        few = 8 if sve256 else 4 if arm and dots else 2
        tile = {"streams": 2, "nr": 8} if zmm else {"streams": 1, "nr": few}
        yield spec("direct", **tile, accs=1, widen=pairs, unroll=1, prefetch=2048)
        yield spec("direct", streams=1, nr=4 if zmm else 2, accs=1, widen=pairs, unroll=1, prefetch=0)
    if regime is not N1:
        small = {"mr": 16, "nr": 4, "mc": rows, "kc": 0, "widen": steps, "unroll": 1}
        large = {"mr": 64, "nr": 6, "mc": 64, "kc": 960, "widen": steps, "unroll": 1}
        if zmm:
            yield spec("panel", **large)
        if sve256:
            yield spec("panel", **{**large, "mr": 32})
        yield spec("panel", **{**small, "mc": 64, "kc": 960, "nr": 6 if arm and dots else 4})
        yield spec("panel", **small)
    if regime is SMALL and isa.tiles and not zmm:
        yield spec("tiles", streams=1, ahead=1, prefetch=0)
    if regime is LARGE and isa.tiles and not zmm:
        yield spec("tiles", mr=32, nr=32, mc=64, kc=0, pack=1)
    if regime is SMALL and family == "tl5":
        yield spec(five, streams=2 if zmm else 1, nr=2, widen=widen, prefetch=0)
    elif regime is not N1 and looks_up:
        for bm, block, kc in ((2, 160, 96), (1, 160, 96)):
            yield spec("direct", streams=bm, nr=2, mc=block, kc=kc, widen=widen, unroll=1, prefetch=0)


__all__ = ["I2S", "Rule", "Space", "headroom_lines", "int16_sums", "space_for"]
