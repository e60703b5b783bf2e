"""What a kernel must get right before its time counts: ragged shapes, every n of the regime, overflow edges.

A `Case` names a weight matrix and activations; `Checks` are cases packed for one layout in guarded memory,
with the reference's answers beside them, ready for C to run against any number of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.families.base import TABLES, VALUE_MAX, Codes
from bitgen.measure.guarded import Guarded, guarded_copy
from bitgen.measure.harness import Harness
from bitgen.reference import (
    code_values,
    group_sums,
    pack,
    pack_codes,
    scale_codes,
    scale_groups,
    scale_output,
    ternary_matmul,
)
from bitgen.spec import K_MAX, LARGE, N1, SMALL, Layout, Shape, ceil_to, family_named, x_stride

Int8 = NDArray[np.int8]

# The n of each regime: both ends, tails of every register block, powers of two.
TOKENS: Mapping[str, tuple[int, ...]] = {
    N1.name: (1,),
    SMALL.name: (2, 3, 7, 8, 16),
    LARGE.name: (17, 33, 64),
}

# 1x1; odd everything; a row behind two sub-blocks; k = 192 + 5 crosses the activations' padding; a real k;
# more rows than any schedule walks at once (8 streams of 32 rows, cache blocks of 512).
RAGGED = (Shape(1, 1), Shape(5, 127), Shape(33, 100), Shape(48, 197), Shape(100, 640), Shape(530, 97))
# Longer than two int16 blocks of every family (at most 1016 columns between two widenings).
EDGE = Shape(33, 2113)
# Longer than every cache block along k.
BLOCKED = Shape(20, 4001)
# More tokens than a panel kernel keeps sums of (512) while k is cut into blocks.
MANY, MANY_TOKENS = Shape(20, 2113), 515
# The largest k at all: the int32 sums of I2_S, scaled by 64, are within a factor of 1 of their bound.
LONGEST = Shape(16, K_MAX)

# Sums that reach the bounds of the accumulators. w and x are given for each column, all rows alike.
_ONES, _SIGNS = (1, 1), (1, -1)
EDGES: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "all w = +1, x = 127": (_ONES, (127, 127)),
    "all w = +1, x = -128": (_ONES, (-128, -128)),
    "all w = -1, x = -128": ((-1, -1), (-128, -128)),
    "all w = -1, x = 127": ((-1, -1), (127, 127)),
    "w = +1, -1, ..., x = 127, -128, ...: no product cancels": (_SIGNS, (127, -128)),
    "w = +1, -1, ..., x = -128, 127, ...: no product cancels": (_SIGNS, (-128, 127)),
    "w = +1, x = 127, -128, ...": (_ONES, (127, -128)),
    "w = +1, -1, ..., x = -128: every pair cancels": (_SIGNS, (-128, -128)),
}


@dataclass(frozen=True)
class Case:
    """One product of weights and activations by name; ``floats``: the epilogue's y, not the integers.

    ``split`` runs the rows in two ranges and watches that neither writes the other's.
    """

    name: str
    shape: Shape
    n: int
    floats: bool = False
    split: bool = False

    @property
    def title(self) -> str:
        what = "y" if self.floats else "acc"
        return f"{what} of {self.shape.name}, n = {self.n}, {self.name}"


def cases_of(regime: str, shapes: Sequence[Shape] = RAGGED, deep: bool = False) -> tuple[Case, ...]:
    """The cases of a regime: integers and floats of random data on every shape and n, then the edges.

    ``deep`` runs the edges for every n and adds the largest k: some hundred milliseconds a kernel.
    """
    tokens = TOKENS[regime]
    cases = [
        Case("random", shape, n, floats=floats, split=not floats)
        for shape in shapes
        for n in tokens
        for floats in (False, True)
    ]
    cases += [Case("random", shape, tokens[-1], split=True) for shape in (EDGE, BLOCKED)]
    edge_tokens = tokens if deep else tokens[:1]
    cases += [Case(name, EDGE, n) for n in edge_tokens for name in EDGES]
    cases += [
        Case(name, Shape(33, 100), n) for n in edge_tokens for name in ("zero x", "zero w", "one product")
    ]
    cases.append(Case("zero x", Shape(33, 100), tokens[0], floats=True))
    if deep and regime == LARGE.name:
        cases.append(Case("random", MANY, MANY_TOKENS, split=True))
    return tuple(cases)


def longest_cases(regime: str) -> tuple[Case, ...]:
    """The int32 edge: the largest k, where I2_S's scaled sums of codes w + 1 reach their bounds."""
    return tuple(Case(name, LONGEST, TOKENS[regime][0]) for name in tuple(EDGES)[:2])


def shape_cases(regime: str, shape: Shape) -> tuple[Case, ...]:
    """The cases of a kernel that is for one shape only."""
    tokens = TOKENS[regime]
    random = [Case("random", shape, n, floats=f, split=not f) for n in tokens for f in (False, True)]
    return (*random, *(Case(name, shape, tokens[0]) for name in (*EDGES, "zero x", "zero w", "one product")))


def case_weights(case: Case) -> Int8:
    """W int8 (m, k) of a case."""
    return _weights(case.name, case.shape)


def case_activations(case: Case) -> Int8:
    """Xq int8 (n, k) of a case."""
    return _activations(case.name, case.n, case.shape.k)


@lru_cache(maxsize=64)
def _weights(name: str, shape: Shape) -> Int8:
    if name == "one product":
        w = np.zeros((shape.m, shape.k), np.int8)
        w[-1, -1] = -1
        return w
    if name in EDGES:
        return np.broadcast_to(_alternating(EDGES[name][0], shape.k), (shape.m, shape.k)).copy()
    if name == "zero w":
        return np.zeros((shape.m, shape.k), np.int8)
    return _rng(shape.m, shape.k).integers(-1, 2, (shape.m, shape.k), dtype=np.int8)


@lru_cache(maxsize=64)
def _activations(name: str, n: int, k: int) -> Int8:
    if name == "one product":
        x = np.zeros((n, k), np.int8)
        x[:, -1] = -128
        return x
    if name in EDGES:
        return np.broadcast_to(_alternating(EDGES[name][1], k), (n, k)).copy()
    if name == "zero x":
        return np.zeros((n, k), np.int8)
    return _rng(n, k, 1).integers(-128, 128, (n, k), dtype=np.int8)


def _alternating(pair: tuple[int, int], k: int) -> Int8:
    # np.resize joins pair by pair: 20 ms for the longest k.
    return np.tile(np.array(pair, np.int8), -(-k // 2))[:k]


def _rng(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


# The members of enum harness_kind (csrc/harness.h).
_KINDS = {
    "HARNESS_VALUE": "row {row} of token {token} is {got:#010x}, not {want:#010x}",
    "HARNESS_OUTSIDE": "it writes outside the rows of the output (token {token}, row {row})",
    "HARNESS_RANGE": "it writes row {row} of token {token}, which is outside its row range",
    "HARNESS_SCRATCH": "it wants {got} bytes of scratch, there are {want}",
    "HARNESS_OVERRUN": "it writes outside its scratch, or the table builder in front of the tables",
    "HARNESS_TABLES": "the harness has no room for the tables",
}


@dataclass(frozen=True)
class Mismatch:
    """The first thing a kernel got wrong."""

    case: Case
    what: str

    def __str__(self) -> str:
        return f"{self.case.title}: {self.what}"


class Checks:
    """Cases packed for one layout, inputs read-only with unmapped pages behind every buffer.

    ``scratch`` may be that of other checks too: each case fills what its kernel asks for.
    """

    def __init__(self, harness: Harness, layout: Layout, cases: Sequence[Case], scratch: Guarded) -> None:
        self.cases = tuple(cases)
        self._harness = harness
        self._layout = layout
        self._buffers: dict[tuple[Any, ...], Guarded] = {}
        self._calls = harness.ffi.new("struct harness_check[]", len(self.cases))
        for call, case in zip(self._calls, self.cases, strict=True):
            self._fill(call, case)
        self._areas = self._work_areas(scratch)
        self._arena = harness.ffi.new("struct harness_arena *")
        for name, area in self._areas.items():
            setattr(self._arena, f"{name}_end", area.pointer("uint8_t *", area.end))
            setattr(self._arena, f"{name}_bytes", area.nbytes)

    def run(self, kernel: Any, progress: Any, first: int = 0) -> Mismatch | None:
        """Run every case through ``kernel`` (struct harness_kernel *) up to the first mismatch.

        Case i is ``first + i`` in ``progress`` (struct harness_progress *).
        """
        found = self._harness.ffi.new("struct harness_mismatch *")
        count = len(self.cases)
        kind = self._harness.lib.harness_check(
            kernel, self._calls, count, first, self._arena, progress, found
        )
        if not kind:
            return None
        name = self._harness.ffi.typeof("enum harness_kind").elements[kind]
        what = _KINDS[name].format(token=found.token, row=found.row, got=found.got, want=found.want)
        return Mismatch(self.cases[found.check], what)

    def _fill(self, call: Any, case: Case) -> None:
        m, k, n = case.shape.m, case.shape.k, case.n
        a = call.call
        a.m, a.k, a.n, a.x_stride = m, k, n, x_stride(self._layout.columns(k))
        a.out_stride = m if case.floats else m + 3  # three columns nobody may write
        if self._layout.group:
            self._fill_groups(call, case)
            return
        a.w_scale_stride = n % 2  # a scale a row, and one for the tensor
        w_name, x_name = (_input_name(case, part) for part in (0, 1))
        a.w = self._input(
            "const uint8_t *", ("w", w_name, m, k), lambda: _packed_rows(self._layout, case), 64
        )
        a.x = self._input("const int8_t *", ("x", x_name, n, k), lambda: _padded(case_activations(case)), 64)
        a.x_sum = self._input("const int32_t *", ("sum", x_name, n, k), lambda: _sums(case_activations(case)))
        a.x_scale = self._input("const float *", ("xs", n), lambda: _scales(n))
        a.w_scale = self._input(
            "const float *", ("ws", m if n % 2 else 1), lambda: _scales(m if n % 2 else 1)
        )
        what = ("y" if case.floats else "acc", case.name, m, k, n)
        call.expected = self._input("const void *", what, lambda: _expected(self._layout, case))
        call.floats = case.floats
        self._split(call, case)

    def _fill_groups(self, call: Any, case: Case) -> None:
        """Weights in groups give floats only: scales of 1 show the integers, while those are below 2^24."""
        layout, a, (m, k, n) = self._layout, call.call, (case.shape.m, case.shape.k, case.n)
        half = n % 2 == 1  # half floats among the weights, and floats
        a.w_scale_stride = 2 if half else 4
        w_name, x_name = (_input_name(case, part) for part in (0, 1))
        weights = ("w", w_name, m, k, case.floats, half)
        a.w = self._input(
            "const uint8_t *",
            weights,
            lambda: _packed_groups(layout, case, half),
            64,
        )
        columns = layout.columns(k)
        a.x = self._input(
            "const int8_t *", ("x", x_name, n, k), lambda: _padded(case_activations(case), columns), 64
        )
        a.x_sum = self._input(
            "const int32_t *", ("sum", x_name, n, k), lambda: group_sums(case_activations(case), layout.group)
        )
        a.x_scale = self._input(
            "const float *", ("xs", n, k, case.floats), lambda: _token_scales(layout, case)
        )
        what = ("y", case.name, m, k, n, case.floats)
        call.expected = self._input("const void *", what, lambda: _expected_groups(layout, case, half))
        call.floats = True
        self._split(call, case)

    def _split(self, call: Any, case: Case) -> None:
        half = -(-case.shape.m // self._layout.row_block) // 2 * self._layout.row_block
        call.split = half if case.split else 0

    def _input(
        self, ctype: str, key: tuple[Any, ...], make: Callable[[], NDArray[Any]], align: int = 1
    ) -> Any:
        if key not in self._buffers:
            self._buffers[key] = guarded_copy(self._harness, make(), align)
        return self._buffers[key].pointer(ctype)

    def _work_areas(self, scratch: Guarded) -> dict[str, Guarded]:
        table_bytes = max((size for _, size in family_named(self._layout.family).tables), default=0)
        out = max(4 * c.n * (c.shape.m + 3) for c in self.cases)
        tables = max(c.n * self._layout.chunks(c.shape.k) * table_bytes for c in self.cases)
        edge = 64  # watched in front of each area
        sizes = {"out": out + edge, "tables": tables + edge}
        areas = {name: Guarded(self._harness, ceil_to(size, 64), 64) for name, size in sizes.items()}
        return {**areas, "scratch": scratch}


def _input_name(case: Case, part: int) -> object:
    """What decides an input besides its size, so that cases which share one share the buffer."""
    return EDGES[case.name][part] if case.name in EDGES else case.name


def _padded(xq: Int8, columns: int = 0) -> Int8:
    n, k = xq.shape
    padded = np.zeros((n, x_stride(max(k, columns))), np.int8)
    padded[:, :k] = xq
    return padded


def _sums(xq: Int8) -> NDArray[np.int32]:
    sums: NDArray[np.int32] = xq.sum(axis=1, dtype=np.int32)
    return sums


def _scales(count: int) -> NDArray[np.float32]:
    return _rng(count).uniform(0.001, 0.1, count).astype(np.float32)


def _group_scales(layout: Layout, case: Case, half: bool) -> NDArray[np.float32]:
    """Scales (m, groups) of a case, half floats or not: its random ones, or ones."""
    shape = (case.shape.m, layout.groups(case.shape.k))
    if not case.floats:
        return np.ones(shape, np.float32)
    scales = _scales(shape[0] * shape[1]).reshape(shape)
    return scales.astype(np.float16).astype(np.float32) if half else scales


def _token_scales(layout: Layout, case: Case) -> NDArray[np.float32]:
    """The same of the activations, (n, groups)."""
    shape = (case.n, layout.groups(case.shape.k))
    return _scales(shape[0] * shape[1]).reshape(shape) if case.floats else np.ones(shape, np.float32)


def case_integers(layout: Layout, case: Case) -> Int8:
    """What is multiplied, int8 (m, k): the weights of a case as a layout without groups holds them."""
    if family_named(layout.family).is_ternary:
        return case_weights(case)
    return code_values(layout, case_codes(layout, case, half=True))


def _packed_rows(layout: Layout, case: Case) -> NDArray[np.uint8]:
    if not family_named(layout.family).is_ternary:
        return pack_codes(layout, case_codes(layout, case, half=True))
    return pack(layout, case_weights(case))


def _packed_groups(layout: Layout, case: Case, half: bool) -> NDArray[np.uint8]:
    if not family_named(layout.family).is_ternary:
        return pack_codes(layout, case_codes(layout, case, half), half=half)
    return pack(layout, case_weights(case), _group_scales(layout, case, half), half=half)


def case_codes(layout: Layout, case: Case, half: bool) -> Codes:
    """The weights of a case as codes: where those are -1, 0, 1 the least, one between and the largest.

    Tables hold the values with the largest sums at both ends; one table is all of one value.
    """
    family = family_named(layout.family)
    (m, k), rng = (case.shape.m, case.shape.k), _rng(case.shape.m, case.shape.k, 4)
    codes = rng.integers(0, family.codes, (m, k), dtype=np.uint8)
    ends = [0, family.codes // 2, family.codes - 1]
    if case.name != "random":
        codes = np.array(ends, np.uint8)[case_weights(case) + 1]
    scales = _group_scales(layout, case, half)
    offsets = np.roll(scales, 1, axis=0) * np.float32(-2) if family.scales > 1 else None
    if not family.by_table:
        return Codes(codes, scales, offsets)
    tables = rng.integers(-VALUE_MAX, VALUE_MAX + 1, (TABLES, 16), dtype=np.int8)
    tables[:, ends] = ((-VALUE_MAX, 0, VALUE_MAX), (-VALUE_MAX, 1, VALUE_MAX), (-12, 0, 12), (127,) * 3)
    if case.name != "random":
        return Codes(codes, scales, None, tables[:1])
    selectors = rng.integers(0, TABLES, (-(-m // 16), layout.groups(k)), dtype=np.uint8)
    return Codes(codes, scales, None, tables, selectors)


def _expected_groups(layout: Layout, case: Case, half: bool) -> NDArray[np.float32]:
    x_scale, w_scale = _token_scales(layout, case), _group_scales(layout, case, half)
    if not family_named(layout.family).is_ternary:
        return scale_codes(case_activations(case), case_codes(layout, case, half), x_scale, layout)
    return scale_groups(case_activations(case), case_weights(case), x_scale, w_scale, layout.group)


def _expected(layout: Layout, case: Case) -> NDArray[Any]:
    acc = ternary_matmul(case_activations(case), case_integers(layout, case))
    if not case.floats:
        return acc
    return scale_output(acc, _scales(case.n), _scales(case.shape.m if case.n % 2 else 1))
