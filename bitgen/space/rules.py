"""What makes a schedule legal: bounds of each knob, and what values may be together."""

from __future__ import annotations

from collections.abc import Iterator

from bitgen.cpu import Cpu, Isa
from bitgen.space.axes import axes_of
from bitgen.space.headroom import INT16_MAX, INT16_MIN, field_scale, int16_sums
from bitgen.space.space import Rule
from bitgen.spec import FAMILIES, LARGE, N1, KernelSpec, Layout, Regime, Shape

# Knobs that multiply the code of a kernel.
_COUNTS, _COUNT_MAX = ("streams", "nr", "unroll"), 16
_TILE_SUMS = 4  # tiles of sums; two of activations and two of weights are the others of eight
# Bytes, rows, columns, steps: far above every useful value.
_SIZE_MAX = 1 << 20


def bounds_of(family: str, isa: Isa, regime: Regime, layouts: tuple[Layout, ...]) -> Iterator[Rule]:
    yield Rule(
        f"it must be a kernel of {family} on {isa.name} for {regime.name}",
        lambda s: (s.family, s.isa, s.regime) == (family, isa.name, regime.name),
    )
    axes = axes_of(family, isa, regime)
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
        yield Rule("accs must be 1 .. 4", lambda s: s.schedule.get("accs", 1) in (1, 2, 3, 4))
    if "hint" in knobs:
        yield Rule("hint must be 0, 1 or 2", lambda s: s.schedule.get("hint", 0) in (0, 1, 2))
    if "mr" in knobs:
        yield Rule("mr must be 16, 32, ... 256", lambda s: s.schedule.get("mr", 16) in range(16, 257, 16))
    if "pack" in knobs:
        yield Rule(
            "mr of tiles must be 16, 32 or 64, nr 16 or 32",
            lambda s: (
                s.schedule.algorithm != "tiles"
                or (s.schedule["mr"] in (16, 32, 64) and s.schedule["nr"] in (16, 32))
            ),
        )
    if "mmla" in axes:
        yield Rule(
            "nr of mmla must be 4, 6, 8, ...: tokens go by twos",
            lambda s: s.schedule.algorithm != "mmla" or s.schedule["nr"] in range(4, 17, 2),
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


def rules_of(family: str, isa: Isa, regime: Regime, shape: Shape, cpu: Cpu) -> Iterator[Rule]:
    yield Rule(
        f"int16 partial sums must stay within {INT16_MIN} .. {INT16_MAX}: a smaller widen",
        lambda s: (sums := int16_sums(s)) is None or sums.exact,
    )
    axes = axes_of(family, isa, regime)
    if any("accs" in knobs for knobs in axes.values()) and 2 * field_scale(4) > isa.code_max:
        yield Rule(
            f"codes in place, 2 x 4^(accs - 1), must not exceed {isa.code_max}, the largest byte that "
            f"{isa.name} multiplies: a smaller accs",
            lambda s: 2 * field_scale(s.schedule.get("accs", 1)) <= isa.code_max,
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
    columns = FAMILIES[family].k_chunk * FAMILIES[family].tile_chunks
    if regime is LARGE and isa.tiles:
        yield Rule(
            f"kc of tiles must be a multiple of {columns}: whole chunks and whole tiles",
            lambda s: s.schedule.algorithm != "tiles" or s.schedule["kc"] % columns == 0,
        )
    if regime is not N1 and isa.mmla:
        yield Rule(
            f"kc of mmla must be a multiple of {columns}: whole chunks, and blocks of 64 activations",
            lambda s: s.schedule.algorithm != "mmla" or s.schedule["kc"] % columns == 0,
        )
    if any("hint" in knobs for knobs in axes.values()):
        yield Rule(
            "hint says where prefetched lines go: 1 and 2 need a prefetch distance",
            lambda s: s.schedule["prefetch"] > 0 or s.schedule["hint"] == 0,
        )
    if any("kc" in knobs for knobs in axes.values()):
        yield Rule(
            f"kc must be 0 (all of k) or a multiple of the family's chunk, {FAMILIES[family].k_chunk}",
            lambda s: s.schedule.get("kc", 0) % FAMILIES[s.family].k_chunk == 0,
        )
        yield Rule(f"kc must be below k = {shape.k}", lambda s: s.schedule.get("kc", 0) < shape.k, local=True)
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
    return s["mc"] > 0 and s["mc"] % s.get("mr", 16) == 0 and s["mc"] % spec.layout.row_block == 0


def _panel_bytes(spec: KernelSpec, k: int) -> int:
    s = dict(spec.schedule)
    if not spec.schedule.unpacks or "mc" not in s:
        return 0
    if s["kc"] == 0 and s["mc"] == spec.layout.row_block and s.get("mr", 16) <= 32:
        return 0  # the smallest panel is always legal, so that every shape has a kernel
    return s["mc"] * (s["kc"] or k)


def _registers_used(spec: KernelSpec, isa: Isa) -> int:
    """Accumulators that live across the inner loop, plus the operands of one step."""
    each, _ = block_registers(isa)
    s = dict(spec.schedule)
    sums = each * isa.sums_bytes // 64 if s.get("widen") else each
    if spec.schedule.algorithm == "panel":
        rows = s["mr"] // 16
        return rows * (sums * s["nr"] + each) + 1
    if spec.schedule.algorithm == "mmla":  # half a block of rows, and a register for two tokens
        return each * (s["nr"] + 1) + s["nr"] // 2
    rows = s["streams"] * spec.layout.sub_blocks
    if not FAMILIES[spec.family].looks_up:
        # AVX2 holds the masks of shifted fields in one register, of fields in place in one for each.
        return sums * rows * s["nr"] * s["accs"] + each + 1 + s["accs"]
    # Two int16 accumulators for each 16 rows (TL5: 64), two nibbles; a wide table is four blocks.
    rows = rows * 16 // FAMILIES[spec.family].rows
    return each * (2 * rows * s["nr"] + (6 if spec.schedule.algorithm == "wide" else 2)) + 1


def block_registers(isa: Isa) -> tuple[int, int]:
    """(registers that hold one 64-byte block, registers of the ISA)."""
    registers = 32 if isa.vector_bytes == 64 or isa.arch == "aarch64" else 16
    return max(1, 64 // isa.vector_bytes), registers
