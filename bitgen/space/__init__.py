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
                  because a token reads its weights once, 2: into L2 (T1), because L1 holds the lookup tables
mr      panel     rows whose accumulators live in registers
mc      both      rows of a cache block;  kc  columns of a cache block, 0: all of k
====== ========== ============================================================================================

``direct`` reads packed weights and multiplies or looks up at once; ``wide`` and ``split`` are TL5's ways to
look up, in one table of 128 sums for five activations or in two of 16; ``panel`` unpacks ``mc`` x ``kc``
weights to bytes that serve every token of the batch. ``tiles`` multiplies tiles of 16 tokens x 64 k with
tiles of 64 k x 16 rows, on ISA levels that have them: on the way for 2..16 tokens (``streams``, ``ahead``,
``prefetch``), from panels for more (``mr`` and ``nr`` are multiples of 16). ``mmla`` multiplies 2 rows x 8 k
by 8 k x 2 tokens, from panels of an order of its own, on ISA levels with i8mm; 16 rows are in registers.
"""

from __future__ import annotations

from bitgen.cpu import Cpu, Isa
from bitgen.errors import unknown
from bitgen.space.axes import axes_of
from bitgen.space.headroom import headroom_lines, int16_sums
from bitgen.space.presets import presets_of
from bitgen.space.rules import bounds_of, rules_of
from bitgen.space.space import Rule, Space
from bitgen.spec import FAMILIES, Layout, Regime, Shape

__all__ = ["Rule", "Space", "headroom_lines", "int16_sums", "space_for"]


def space_for(family: str, isa: Isa, regime: Regime, shape: Shape, cpu: Cpu) -> Space:
    """The space of a family on an ISA level for one shape; ``cpu`` gives the cache sizes."""
    if family not in FAMILIES:
        raise unknown("family", family, FAMILIES)
    rows = FAMILIES[family].rows
    layouts = tuple(Layout(family, rows) for rows in ((16, 32) if rows == 16 else (rows,)))
    return Space(
        family=family,
        isa=isa,
        regime=regime,
        shape=shape,
        layouts=layouts,
        axes=axes_of(family, isa, regime),
        presets=tuple(presets_of(family, isa, regime)),
        bounds=tuple(bounds_of(family, isa, regime, layouts)),
        rules=tuple(rules_of(family, isa, regime, shape, cpu)),
    )
