"""What a weight family and an algorithm are: facts in numbers, from which bounds and sizes follow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitgen.cpu import Isa
from bitgen.errors import UsageError
from bitgen.shapes import Regime

Bytes = NDArray[np.uint8]
Ternary = NDArray[np.int8]
Knobs = Mapping[str, int]
Axes = Mapping[str, tuple[int, ...]]  # knob -> the values that a space offers, in the order of a schedule
# What is told when a schedule (knobs, row block, group or 0) breaks it.
Check = tuple[str, Callable[[Knobs, int, int], bool]]

X_MIN, X_MAX = -128, 127  # int8 activations
UNPACKING = frozenset(("panel", "tiles", "mmla"))  # algorithms that make bytes of weights first
INT16_MIN, INT16_MAX = -32768, 32767
TERNARY = "ternary"  # of `Family.weights`
TABLES = 4  # of 16 values at the head of a row block
VALUE_MAX = 127  # the largest magnitude of such a value: -128 has no negative
GROUPS = (32, 64, 128, 256)  # weights along k that may share a scale
FINE_GROUPS = (16,)  # likewise, of families whose `least_group` is that small
COMMON_GROUP = 128  # of ternary weights: every library has kernels of its ISA level for these groups
TAIL = 8  # weights behind the whole chunks of a group that 2-bit codes hold

# Values a knob may have at all; an algorithm narrows some. Counts multiply the code of a kernel; sizes
# (bytes, rows, columns, steps) end far above every useful value. A knob that is not here may have the values
# of its axis.
COUNT, SIZE = range(1, 17), range((1 << 20) + 1)
DOMAINS: Mapping[str, Sequence[int]] = {
    "streams": COUNT,
    "nr": COUNT,
    "unroll": COUNT,
    "accumulators": range(1, 5),
    "prefetch_hint": range(3),
    "mr": range(16, 257, 16),
    "mc": SIZE,
    "kc": SIZE,
    "widen_every": SIZE,
    "prefetch": SIZE,
}


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


@dataclass(frozen=True)
class Preset:
    """A schedule worth trying first; ``row_block`` 0: the family's smallest."""

    algorithm: str
    knobs: Knobs
    row_block: int = 0
    vendor: str = ""  # of the CPUs that it is for; empty: all


@dataclass(frozen=True)
class Algorithm(ABC):
    """A way to multiply: its knobs on an ISA level, and what a schedule of it needs.

    ``table_bytes``: of the lookup tables it reads for one token and one chunk; 0: it multiplies.
    ``constants``: names for the template that builds those tables.
    """

    name: str
    table_bytes: int = 0
    constants: Mapping[str, object] = field(default_factory=dict, compare=False)

    # Of knobs that were added later, the value with which the C is what it was before. A schedule leaves such
    # a knob out at that value, so names, presets, records and digests of older kernels stay as they are.
    off: ClassVar[Knobs] = {}

    @abstractmethod
    def axes(self, family: Family, isa: Isa, regime: Regime) -> Axes:
        """The values worth searching of each knob; empty where the algorithm is not offered."""

    @abstractmethod
    def registers(self, family: Family, isa: Isa, knobs: Knobs, row_block: int) -> int:
        """Vector registers that live across the inner loop, plus the operands of one step."""

    def presets(self, family: Family, isa: Isa, regime: Regime) -> Iterator[Preset]:
        """What to try first, best first, of an algorithm that only this family has."""
        del family, isa, regime
        return iter(())

    def domain(self, knob: str) -> Sequence[int]:
        """Every value that a knob may have; empty: those of its axis."""
        return DOMAINS.get(knob, ())

    def checks(self, family: Family, isa: Isa, axes: Axes) -> Iterator[Check]:
        """What the values of a schedule must be together, beside what holds for every algorithm."""
        del family, isa, axes
        return iter(())

    @property
    def grouped(self) -> bool:
        """Whether it also multiplies weights with a scale for each group."""
        return False

    def serves_groups(self, group: int, regime: Regime) -> bool:
        """Whether it does so for a regime and groups of ``group`` weights."""
        del group, regime
        return self.grouped

    def turns(self, family: Family, group: int) -> int:
        """Turns of the inner loop that a group takes: the most that ``widen_every`` can be there."""
        return group // family.k_chunk

    def int16_sums(self, family: Family, knobs: Knobs) -> Int16Sums | None:
        """The int16 partial sums of a schedule; None when every product goes to int32 at once."""
        del family, knobs
        return None

    def int32_share(self, family: Family, knobs: Knobs) -> tuple[str, int]:
        """Of k the share that one int32 lane adds up, and the most that one weight adds to it."""
        del knobs
        return "1", family.top_code * -X_MIN


@dataclass(frozen=True)
class Family:
    """A way to store weights of a few bits and to multiply with them.

    ``g`` weights share one code; a chunk of 16 rows x ``k_chunk`` weights takes ``chunk_bytes``; a row block
    has a multiple of ``rows`` rows. Kernels multiply ``step`` times the ``codes`` codes 0, 1, ..: weight
    + ``bias``.
    ``encode`` makes int8 weights (blocks, chunks, sub-blocks, 16 rows, k_chunk) uint8 (blocks, chunks,
    sub-blocks, chunk_bytes), in whatever shape of these bytes; ``decode`` undoes it. ``values``: of the same
    weights the numbers (blocks, chunks, sub-blocks, 16 rows, ...) whose negative ones a trailer of 64 bytes
    counts for each row, behind the chunks of its block. ``tail_weights``: `TAIL` where a group may end
    with so many weights as 2-bit codes, behind its chunks. ``constants``: names for its template, which is
    ``template`` (none: that of its name).

    ``weights`` is what they are: "ternary", or a kind of codes that no other family holds, of which
    ``encode`` takes and ``decode`` gives codes. ``in_rows``: whether a row may have one scale; else there are
    groups alone. ``least_group``: the fewest weights that share a scale. ``scales``: values of each row and
    group behind the codes: a scale, and where there are 2 an offset. ``by_table``: a code stands for an int8
    value of a table at the head of its row block. ``portable``: of a kind of codes the groups (0: a scale a
    row) that every library multiplies.
    """

    name: str
    title: str
    g: int
    k_chunk: int
    chunk_bytes: int
    algorithms: tuple[Algorithm, ...]
    encode: Callable[[Ternary], Bytes]
    decode: Callable[[Bytes], Ternary]
    values: Callable[[Ternary], NDArray[np.signedinteger]] | None = None
    rows: int = 16
    tail_weights: int = 0
    codes: int = 3
    bias: int = 1
    step: int = 1
    weights: str = TERNARY
    in_rows: bool = True
    scales: int = 1
    by_table: bool = False
    least_group: int = GROUPS[0]
    portable: tuple[int, ...] = ()
    template: str = ""
    constants: Mapping[str, object] = field(default_factory=dict, compare=False)

    @property
    def trailer_bytes(self) -> int:
        """Of each 16 rows at the end of a row block: int32[16], or nothing."""
        return 64 if self.values else 0

    @property
    def tables(self) -> tuple[tuple[str, int], ...]:
        """The algorithms that look sums up, and the bytes of each one's tables of one token and one chunk."""
        return tuple((one.name, one.table_bytes) for one in self.algorithms if one.table_bytes)

    @property
    def looks_up(self) -> bool:
        """Whether its own algorithms look sums up in tables; they multiply codes otherwise."""
        return bool(self.tables)

    def table_bytes(self, algorithm: str) -> int:
        """Bytes of the lookup tables of one token and one chunk; 0 for an algorithm that reads none."""
        return dict(self.tables).get(algorithm, 0)

    def builder(self, algorithm: str) -> str | None:
        """What builds the tables of an algorithm: the template kernels/NAME.c.j2; None when it reads none."""
        if not self.table_bytes(algorithm):
            return None
        kind = f"_{algorithm}" if len(self.tables) > 1 else ""
        return f"{self.name}{kind}_tables"

    def algorithm(self, name: str) -> Algorithm:
        """KeyError for an algorithm that it does not have."""
        return {one.name: one for one in self.algorithms}[name]

    def axes(self, isa: Isa, regime: Regime) -> dict[str, Axes]:
        """The knobs of each algorithm that a level offers for a regime."""
        offered = {one.name: one.axes(self, isa, regime) for one in self.algorithms}
        return {name: axes for name, axes in offered.items() if axes}

    @property
    def top_code(self) -> int:
        """The largest code that is multiplied; of values from a table the largest magnitude."""
        return VALUE_MAX if self.by_table else self.step * (self.codes - 1)

    @property
    def code_bits(self) -> int:
        """Bits of a code: 1 of two codes, 2 of three, 3 of eight, 4 of sixteen."""
        return (self.codes - 1).bit_length()

    @property
    def pair_range(self) -> tuple[int, int]:
        """The least and the largest sum of two products of a code and an activation."""
        return 2 * self.top_code * X_MIN, 2 * self.top_code * X_MAX

    @property
    def entry_max(self) -> int:
        """The largest magnitude of a sum of ``g`` activations, each times a weight."""
        return self.g * max(self.bias, self.top_code - self.bias) * -X_MIN

    @property
    def fields(self) -> int:
        """Products that a lane of int32 takes from a chunk are by fours: how many fours."""
        return self.k_chunk // 4

    @property
    def lookups(self) -> int:
        """Table entries of a chunk that one int16 lane adds up."""
        return self.k_chunk // self.g * self.rows // 64

    @property
    def tile_chunks(self) -> int:
        """The fewest chunks that fill whole tiles of 64 k: 4, or T5's 16 (five tiles)."""
        return 64 // gcd(64, self.k_chunk)

    @property
    def bits_a_weight(self) -> float:
        """Storage without padding, in bits a weight."""
        return 8 * self.chunk_bytes / (16 * self.k_chunk)

    @property
    def is_ternary(self) -> bool:
        return self.weights == TERNARY

    @property
    def groups(self) -> tuple[int, ...]:
        """The lengths of groups that are whole chunks, or those and a tail: its scales can lie behind."""
        own = (one for one in self.algorithms if one.name not in UNPACKING)  # one token needs them
        if not any(one.grouped for one in own):
            return ()
        lengths = (length for length in (*FINE_GROUPS, *GROUPS) if length >= self.least_group)
        return tuple(length for length in lengths if length % self.k_chunk in (0, self.tail_weights))

    def in_groups(self, group: int, regime: Regime) -> Family:
        """The family with the algorithms that multiply weights in groups of ``group``, and no others."""
        own = (one for one in self.algorithms if one.serves_groups(group, regime))
        return replace(self, algorithms=tuple(own))

    def require_group(self, group: int) -> None:
        """UsageError with the reason where no layout of it has a scale for each ``group`` weights."""
        if group in self.groups:
            return
        if self.groups:
            known = told(self.groups)
            raise UsageError(f"{self.title} has scales for groups of {known} weights, not {group}")
        whole = any(length % self.k_chunk in (0, self.tail_weights) for length in GROUPS)
        why = (
            "it adds sums of int16 over all of k" if whole else f"no group is whole chunks of {self.k_chunk}"
        )
        raise UsageError(f"{self.title} has no layout with scales for groups of weights: {why}")

    def group_bytes(self, group: int) -> int:
        """Bytes of the codes of 16 rows and a group: its chunks, then two bits for each weight of a tail."""
        return group // self.k_chunk * self.chunk_bytes + 4 * self.tail(group)

    def tail(self, group: int) -> int:
        """Weights of a group behind its whole chunks."""
        return group % self.k_chunk

    def head_bytes(self, selectors: int) -> int:
        """Bytes in front of a row block's groups, of a family by table.

        `TABLES` of 16 values, then a byte that selects one for each 16 rows of each group, filled up to lines
        of 64.
        """
        return 64 + -(-selectors // 64) * 64 if self.by_table else 0


@dataclass(frozen=True)
class Codes:
    """A matrix of codes in groups along k, or rows of it.

    ``codes`` uint8 (m, k) below `Family.codes`; ``scales`` and, of a family that has them, ``offsets``
    float32 (m, groups), without groups (m, 0). ``tables`` int8 (1..4, 16), -127..127, of a family by table,
    and ``selectors`` uint8 (ceil(m / 16), groups): the table of 16 rows and a group; None: the first
    everywhere.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None = None
    tables: NDArray[np.int8] | None = None
    selectors: NDArray[np.uint8] | None = None


def encode_tail(weights: Ternary) -> Bytes:
    """The tail of a group as 2-bit codes: weights (..., 16 rows, 8) -> (..., 32 bytes).

    ``byte[i] = V[i] | V[32 + i] << 4`` with ``V[4 r + j] = (w[r, j] + 1) | (w[r, 4 + j] + 1) << 2``.
    """
    codes: Bytes = (weights + 1).astype(np.uint8).reshape(*weights.shape[:-1], 2, 4)  # (..., 16 rows, s, j)
    fields = np.bitwise_or(codes[..., 0, :], codes[..., 1, :] << np.uint8(2)).reshape(*weights.shape[:-2], 64)
    packed: Bytes = np.bitwise_or(fields[..., :32], fields[..., 32:] << np.uint8(4))
    return packed


def told(values: Sequence[int]) -> str:
    """The values of a knob as a person says them: "0, 1 or 2", "1 .. 16", "4, 6, ... 16"."""
    first, last = values[0], values[-1]
    if len(values) == 1:
        return str(first)
    if len(values) <= 3:
        return " or ".join([", ".join(map(str, values[:-1])), str(last)])
    return f"{first} .. {last}" if values[1] == first + 1 else f"{first}, {values[1]}, ... {last}"


def first_fit(isa: Isa, table: Iterable[tuple[Mapping[str, object], Knobs]]) -> Knobs:
    """Of a table (capabilities, knobs) the first row whose capabilities the level has; the last has none."""
    return next(
        knobs for needs, knobs in table if all(getattr(isa, name) == want for name, want in needs.items())
    )
