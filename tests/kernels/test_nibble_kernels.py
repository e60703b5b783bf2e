"""Weights of 4 bits: their bytes, the library against numpy, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import libraries
import numpy as np
import pytest

from bitgen import runtime
from bitgen.cpu import detect_cpu, find_isa, load_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.families import families_of, family_named
from bitgen.families.base import Codes
from bitgen.reference import code_values, coded_linear, pack_codes
from bitgen.runtime import ArgumentValueError, Groups, KernelTable
from bitgen.space import space_for
from bitgen.spec import EVERY_FAMILY, FAMILIES, N1, Layout, Shape

KINDS = [name for name, family in EVERY_FAMILY.items() if not family.is_ternary]
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelTable]:
    with runtime.load(libraries.built_library(tmp_path_factory), 2) as opened:
        yield opened


def weights(kind: str, m: int, k: int, *, half: bool = True, group: int = 32) -> Codes:
    """Random codes; scales and offsets of both signs, zeros and half subnormals among them; three tables."""
    rng, family = np.random.default_rng((m, k)), EVERY_FAMILY[kind]

    def scales() -> np.ndarray:
        values = rng.uniform(-0.1, 0.1, (m, -(-k // group))).astype(np.float32)
        values.reshape(-1)[3::7] = 0
        values.reshape(-1)[4::7] *= np.float32(1e-4)
        return values.astype(np.float16).astype(np.float32) if half else values

    codes = rng.integers(0, 16, (m, k), dtype=np.uint8)
    if not family.by_table:
        return Codes(codes, scales(), scales() if family.scales > 1 else None)
    tables = rng.integers(-127, 128, (3, 16), dtype=np.int8)
    selectors = rng.integers(0, 3, (-(-m // 16), -(-k // group)), dtype=np.uint8)
    return Codes(codes, scales(), None, tables, selectors)


def layout_of(table: KernelTable, shape: Shape, groups: Groups) -> Layout:
    name = table.layout_name(shape, groups)
    layout = Layout(groups.weights, int(name.split("_")[1][1:]), groups.group)
    assert layout.name == name
    return layout


# ---- bytes


def test_a_chunk_as_it_is_drawn() -> None:
    """Byte 4 r + j: the code of k = j in the low nibble, of k = 4 + j in the high one."""
    codes = np.random.default_rng(1).integers(0, 16, (16, 32), dtype=np.uint8)
    packed = pack_codes(Layout("q4", 16, 32), Codes(codes, np.ones((16, 1), np.float32)))
    assert packed.size == 4 * 64 + 32
    for chunk, r, j in ((0, 0, 0), (1, 5, 2), (3, 15, 3)):
        k = 8 * chunk + j
        assert packed[64 * chunk + 4 * r + j] == codes[r, k] | codes[r, k + 4] << 4
    assert np.array_equal(packed[256:].view(np.float16), np.ones(16))


def test_offsets_stand_behind_the_scales_of_their_rows() -> None:
    scales = np.arange(32, dtype=np.float32).reshape(32, 1)
    packed = pack_codes(Layout("q4m", 32, 32), Codes(np.zeros((32, 32), np.uint8), scales, -scales))
    values = packed[512:].view(np.float16)
    expected = np.concatenate([scales[:16], -scales[:16], scales[16:], -scales[16:]])
    assert np.array_equal(values, expected[:, 0])


def test_a_row_block_of_tables_begins_with_them() -> None:
    tables = np.arange(-24, 24, dtype=np.int8).reshape(3, 16)
    selectors = np.array([[0, 1, 2], [2, 1, 0], [1, 1, 1]], np.uint8)  # 48 rows, 96 columns
    codes = np.random.default_rng(2).integers(0, 16, (48, 96), dtype=np.uint8)
    rows = Codes(codes, np.ones((48, 3), np.float32), None, tables, selectors)
    layout = Layout("t4", 32, 32)
    packed = pack_codes(layout, rows).reshape(2, -1)
    assert layout.head_bytes(96) == 128
    assert np.array_equal(packed[0, :64].view(np.int8), [*range(-24, 24), *[0] * 16])
    assert packed[0, 64:71].tolist() == [0, 2, 1, 1, 2, 0, 0]
    assert packed[1, 64:71].tolist() == [1, 0, 1, 0, 1, 0, 0]
    values = code_values(layout, rows)
    assert values[20, 5] == tables[2, codes[20, 5]]
    assert values[40, 90] == tables[1, codes[40, 90]]


def test_bits_a_weight() -> None:
    bits = {kind: Layout(kind, 16, 32).bits_a_weight for kind in KINDS}
    assert bits == {"q4": 4.5, "q4m": 5.0, "t4": 4.5}
    assert Layout("t4", 16, 128).bits_a_weight == 4.125
    assert Layout("t4", 16, 16).bits_a_weight == 5


@pytest.mark.parametrize(("kind", "most"), [("q4", 4), ("q4m", 4), ("t4", 0)])
def test_int16_sums_end_before_they_overflow(kind: str, most: int) -> None:
    """Of codes 8 additions of 2 x 15 x 128 fit, two a chunk; of values one of 2 x 127 x 128 does."""
    avx2 = find_isa("avx2", load_isas())
    space = space_for(kind, avx2, N1, Shape(4096, 4096), detect_cpu(), 256)
    default = space.default
    legal = [
        w
        for w in range(9)
        if not space.broken(replace(default, schedule=default.schedule.with_knobs(widen_every=w)))
    ]
    assert max(legal) == most
    assert 0 in legal


# ---- the library


@pytest.mark.parametrize("half", [True, False])
@kinds
def test_the_library_packs_as_numpy_does(table: KernelTable, kind: str, half: bool) -> None:
    for m, k in ((1, 1), (33, 200), (64, 512)):
        rows, groups = weights(kind, m, k, half=half), Groups(32, half, kind)
        linear = table.coded(rows, groups)
        blocks = pack_codes(layout_of(table, linear.shape, groups), rows, half=half)
        assert table.packed_bytes(linear.shape, groups) == linear.packed.size >= 64 + blocks.size
        np.testing.assert_array_equal(linear.packed[64 : 64 + blocks.size], blocks)
        assert table.is_packed(linear.packed, linear.shape)


@kinds
def test_rows_are_packed_piece_by_piece(table: KernelTable, kind: str) -> None:
    rows, groups, shape = weights(kind, 600, 300), Groups(32, True, kind), Shape(600, 300)
    whole = table.coded(rows, groups)
    packed = runtime.aligned_bytes(table.packed_bytes(shape, groups), zeros=True)
    for begin, end in ((0, 256), (256, 512), (512, 600)):
        assert not table.is_packed(packed, shape)
        table.pack_codes(part(rows, begin, end), begin, shape, packed, groups)
    np.testing.assert_array_equal(packed, whole.packed)


def part(rows: Codes, begin: int, end: int) -> Codes:
    return Codes(
        rows.codes[begin:end],
        rows.scales[begin:end],
        None if rows.offsets is None else rows.offsets[begin:end],
        rows.tables,
        None if rows.selectors is None else rows.selectors[begin // 16 : -(-end // 16)],
    )


@kinds
def test_y_is_the_same_for_every_batch_and_number_of_threads(table: KernelTable, kind: str) -> None:
    rows, groups = weights(kind, 100, 1000), Groups(32, True, kind)
    x = np.random.default_rng(6).normal(size=(40, 1000)).astype(np.float32)
    x[3] = 0
    x[5, 32:64] = 0
    for threads in (1, 2):
        with runtime.load(table.path, threads) as own:
            linear = own.coded(rows, groups)
            expected = coded_linear(x, rows, layout_of(own, linear.shape, groups))
            for n in (1, 2, 16, 17, 40):
                y = np.concatenate([linear(x[i : i + n]) for i in range(0, 40, n)])
                np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("group", EVERY_FAMILY["t4"].groups)
def test_groups_by_table_of_every_length(table: KernelTable, group: int, half: bool) -> None:
    """Of 16 weights (NVFP4) too: packed as numpy packs, multiplied as numpy does."""
    for m, k in ((1, 1), (33, 200), (64, 512)):
        rows, groups = weights("t4", m, k, half=half, group=group), Groups(group, half, "t4")
        linear = table.coded(rows, groups)
        layout = layout_of(table, linear.shape, groups)
        blocks = pack_codes(layout, rows, half=half)
        np.testing.assert_array_equal(linear.packed[64 : 64 + blocks.size], blocks)
        x = np.random.default_rng(k).normal(size=(18, k)).astype(np.float32)
        np.testing.assert_array_equal(linear(x), coded_linear(x, rows, layout))


def test_only_values_by_table_have_groups_of_16() -> None:
    assert [kind for kind in KINDS if 16 in EVERY_FAMILY[kind].groups] == ["t4"]
    with pytest.raises(UsageError, match=r"Q4 has scales for groups of 32, 64, .* weights, not 16"):
        Layout("q4", 16, 16)
    assert not any(16 in family.groups for family in FAMILIES.values())


def test_the_formula(table: KernelTable) -> None:
    """Of scales of one and activations that quantise to themselves: (q - 8) x, q x + m sum x, table[q] x."""
    x = np.random.default_rng(7).integers(-127, 128, (3, 64)).astype(np.float32)
    x[:, ::32] = 127
    codes = np.random.default_rng(8).integers(0, 16, (20, 64), dtype=np.uint8)
    one = np.ones((20, 2), np.float32)
    values = np.array([[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]], np.int8)
    for kind, rows, w in (
        ("q4", Codes(codes, one), codes.astype(np.float32) - 8),
        ("q4m", Codes(codes, one, -3 * one), codes.astype(np.float32) - 3),
        ("t4", Codes(codes, one, None, values), values[0].astype(np.float32)[codes]),
    ):
        np.testing.assert_array_equal(table.coded(rows, Groups(32, True, kind))(x), x @ w.T)


def test_what_is_wrong_is_told(table: KernelTable) -> None:
    rows = weights("t4", 20, 64)
    assert rows.tables is not None
    assert rows.selectors is not None
    groups = Groups(32, True, "t4")
    for wrong in (
        replace(rows, codes=rows.codes + np.uint8(1)),
        replace(rows, tables=np.full((3, 16), -128, np.int8)),
        replace(rows, selectors=rows.selectors + np.uint8(2)),
    ):
        with pytest.raises(ArgumentValueError, match="codes: a code of 4 bits is above 15"):
            table.coded(wrong, groups)
    with pytest.raises(ArgumentValueError, match="no half float"):
        table.coded(replace(rows, scales=rows.scales + np.float32(1e-7)), groups)
    with pytest.raises(BitgenError):
        table.coded(replace(rows, tables=None), groups)
    with pytest.raises(BitgenError):
        table.coded(rows, Groups(100, True, "t4"))
    with pytest.raises(BitgenError):
        pack_codes(Layout("q4", 16, 32), rows)
    linear = table.coded(rows, groups)
    with pytest.raises(BitgenError, match="no integer sums over all of k"):
        linear.accumulate(np.zeros((1, 64), np.int8))


def test_families_hold_one_kind_of_weights() -> None:
    assert families_of("ternary") == tuple(FAMILIES)
    assert {kind: families_of(kind) for kind in KINDS} == {kind: (kind,) for kind in KINDS}
    assert family_named("Q4_M").name == "q4m"
    with pytest.raises(UsageError, match="unknown kind of weights"):
        families_of("q5")
    with pytest.raises(UsageError, match=r"Q4 has scales for groups of 32, 64, .* weights, not 0"):
        Layout("q4", 16)
