"""Weights of 4 bits, of 3 and of 1: their bytes, the library against numpy, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bitgen import runtime
from bitgen.cpu import detect_cpu, find_isa, load_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.families import families_of, family_named
from bitgen.families.base import Codes
from bitgen.measure.worker import _random_codes
from bitgen.reference import (
    code_values,
    coded_linear,
    pack_codes,
    quantize_activations,
    scale_output,
    ternary_matmul,
)
from bitgen.runtime import ArgumentValueError, Groups, KernelTable
from bitgen.space import space_for
from bitgen.spec import EVERY_FAMILY, FAMILIES, N1, Layout, Shape

KINDS = [name for name, family in EVERY_FAMILY.items() if not family.is_ternary]
kinds = pytest.mark.parametrize("kind", KINDS)
# The groups that every library multiplies.
GROUP = {name: 32 if 32 in EVERY_FAMILY[name].portable else 128 for name in KINDS}


@pytest.fixture(scope="module")
def table(bundle: Path) -> Iterator[KernelTable]:
    with runtime.load(bundle, 2) as opened:
        yield opened


def weights(kind: str, m: int, k: int, *, half: bool = True, group: int = 0) -> Codes:
    """Random codes; scales and offsets of both signs, zeros and half subnormals among them; three tables."""
    rng, family, group = np.random.default_rng((m, k)), EVERY_FAMILY[kind], group or GROUP[kind]

    def scales() -> np.ndarray:
        values = rng.uniform(-0.1, 0.1, (m, -(-k // group))).astype(np.float32)
        values.reshape(-1)[3::7] = 0
        values.reshape(-1)[4::7] *= np.float32(1e-4)
        return values.astype(np.float16).astype(np.float32) if half else values

    codes = rng.integers(0, family.codes, (m, k), dtype=np.uint8)
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


def test_a_chunk_of_bits_as_it_is_drawn() -> None:
    """Byte 4 r + j: bit s is the code of k = 4 s + j; without groups nothing stands behind the chunks."""
    codes = np.random.default_rng(3).integers(0, 2, (16, 64), dtype=np.uint8)
    rows = Codes(codes, np.ones((16, 2), np.float32))
    packed = pack_codes(Layout("q1", 16, 32), rows)
    assert packed.size == 2 * (64 + 32)
    for chunk, r, j in ((0, 0, 0), (1, 5, 2), (1, 15, 3)):
        bits = codes[r, 32 * chunk + j : 32 * chunk + 32 : 4]
        assert packed[96 * chunk + 4 * r + j] == np.packbits(bits, bitorder="little")[0]
    assert np.array_equal(code_values(Layout("q1", 16, 32), rows), 2 * codes.astype(np.int8) - 1)
    whole = pack_codes(Layout("q1", 16), replace(rows, scales=np.empty((16, 0), np.float32)))
    assert np.array_equal(whole, np.concatenate([packed[:64], packed[96:160]]))


def test_a_chunk_of_3_bits_as_it_is_drawn() -> None:
    """Of 192 bytes: six fields of 4 k as nibbles of three vectors, the last two in their bits 3 and 7."""
    codes = np.random.default_rng(4).integers(0, 8, (16, 64), dtype=np.uint8)
    rows = Codes(codes, np.ones((16, 1), np.float32), None, np.zeros((1, 16), np.int8))
    layout = Layout("t3", 16, 64)
    packed = pack_codes(layout, rows)[layout.head_bytes(64) :]
    assert packed.size == 2 * 192 + 32
    for chunk, r, j, p in ((0, 0, 0, 0), (0, 3, 1, 2), (1, 15, 3, 1)):
        q = codes[r, 32 * chunk + j : 32 * chunk + 32 : 4]
        byte = q[2 * p] | q[2 * p + 1] << 4 | (q[6] >> p & 1) << 3 | (q[7] >> p & 1) << 7
        assert packed[192 * chunk + 64 * p + 4 * r + j] == byte
    family = family_named("t3")
    tiles = codes.reshape(1, 1, 16, 2, 32).transpose(0, 3, 1, 2, 4).astype(np.int8)
    np.testing.assert_array_equal(family.decode(family.encode(tiles)), tiles)


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
    assert bits == {"q4": 4.5, "q4m": 5.0, "t4": 4.5, "t3": 3.5, "q1": 1.5}
    assert Layout("t4", 16, 128).bits_a_weight == 4.125
    assert Layout("t4", 16, 16).bits_a_weight == 5
    assert Layout("t3", 16, 128).bits_a_weight == 3.125
    assert Layout("q1", 16, 128).bits_a_weight == 1.125
    assert Layout("q1", 16).bits_a_weight == 1.0


@pytest.mark.parametrize(("kind", "most"), [("q4", 4), ("q4m", 4), ("t4", 0), ("t3", 0), ("q1", 8)])
def test_int16_sums_end_before_they_overflow(kind: str, most: int) -> None:
    """Of codes 8 additions of 2 x 15 x 128 fit, two a chunk; of values one of 2 x 127 x 128 does.

    A group of 256 has eight chunks of bits.
    """
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


@pytest.mark.parametrize(("accumulators", "most"), [(1, 16), (2, 16), (4, 8)])
def test_bits_in_place_end_before_they_overflow(accumulators: int, most: int) -> None:
    """Rows with one scale: 128 additions of 2 x 128 fit at scale 1, 16 of 2 x 8 x 128 at scale 8."""
    avx2 = find_isa("avx2", load_isas())
    space = space_for("q1", avx2, N1, Shape(4096, 4096), detect_cpu())
    schedule = space.default.schedule.with_knobs(accumulators=accumulators, streams=1)
    specs = (replace(space.default, schedule=schedule.with_knobs(widen_every=w)) for w in range(40))
    legal = [spec.schedule["widen_every"] for spec in specs if not space.broken(spec)]
    assert legal == list(range(most + 1))
    three = replace(space.default, schedule=schedule.with_knobs(accumulators=3))
    assert "accumulators of direct must be 1, 2 or 4" in [rule.text for rule in space.broken(three)]


@kinds
def test_codes_that_are_timed_are_those_of_the_family(kind: str) -> None:
    """A tune draws its own weights: all codes there are, and none beyond."""
    layout, rng = Layout(kind, 16, 128), np.random.default_rng(9)
    codes = _random_codes(layout, 256, np.ones((32, 2), np.float32), rng)
    assert np.unique(codes.codes).tolist() == list(range(EVERY_FAMILY[kind].codes))
    assert pack_codes(layout, codes).size == layout.packed_bytes(Shape(32, 256))


# ---- the library


@pytest.mark.parametrize("half", [True, False])
@kinds
def test_the_library_packs_as_numpy_does(table: KernelTable, kind: str, half: bool) -> None:
    for m, k in ((1, 1), (33, 200), (64, 512)):
        rows, groups = weights(kind, m, k, half=half), Groups(GROUP[kind], half, kind)
        linear = table.coded(rows, groups)
        blocks = pack_codes(layout_of(table, linear.shape, groups), rows, half=half)
        assert table.packed_bytes(linear.shape, groups) == linear.packed.size >= 64 + blocks.size
        np.testing.assert_array_equal(linear.packed[64 : 64 + blocks.size], blocks)
        assert table.is_packed(linear.packed, linear.shape)


@kinds
def test_rows_are_packed_piece_by_piece(table: KernelTable, kind: str) -> None:
    rows, groups, shape = weights(kind, 600, 300), Groups(GROUP[kind], True, kind), Shape(600, 300)
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
    rows, groups = weights(kind, 100, 1000), Groups(GROUP[kind], True, kind)
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


@pytest.mark.parametrize("shape", [(1, 1), (33, 200), (64, 512), (100, 1000)])
def test_bits_with_a_scale_a_row(table: KernelTable, shape: tuple[int, int]) -> None:
    """The bytes of numpy, exact integers for every n, one product of a scale and a scale."""
    m, k = shape
    rows = Codes(weights("q1", m, k).codes, np.empty((m, 0), np.float32))
    scale = np.random.default_rng(m).uniform(-1, 1, m).astype(np.float32)
    linear, layout = table.coded(rows, Groups(0, weights="q1"), scale), Layout("q1", 16)
    blocks = pack_codes(layout, rows)
    np.testing.assert_array_equal(linear.packed[64 : 64 + blocks.size], blocks)
    assert table.layout_name(linear.shape, Groups(0, weights="q1")) == layout.name
    x = np.random.default_rng(k).normal(size=(17, k)).astype(np.float32)
    xq, x_scale = quantize_activations(x)
    acc = ternary_matmul(xq, code_values(layout, rows))
    for n in (1, 2, 16, 17):
        np.testing.assert_array_equal(linear.accumulate(xq[:n]), acc[:n])
        np.testing.assert_array_equal(linear(x[:n]), scale_output(acc, x_scale, scale)[:n])


def test_the_formula(table: KernelTable) -> None:
    """Scales of one and activations that quantise to themselves: (q - 8) x, q x + m sum x, table[q] x, ..."""
    x = np.random.default_rng(7).integers(-127, 128, (3, 64)).astype(np.float32)
    x[:, ::32] = 127
    codes = np.random.default_rng(8).integers(0, 16, (20, 64), dtype=np.uint8)
    threes, bits = codes & np.uint8(7), codes & np.uint8(1)
    one = np.ones((20, 2), np.float32)
    values = np.array([[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]], np.int8)
    for kind, rows, w in (
        ("q4", Codes(codes, one), codes.astype(np.float32) - 8),
        ("q4m", Codes(codes, one, -3 * one), codes.astype(np.float32) - 3),
        ("t4", Codes(codes, one, None, values), values[0].astype(np.float32)[codes]),
        ("t3", Codes(threes, one, None, values), values[0].astype(np.float32)[threes]),
        ("q1", Codes(bits, one[:, :1]), bits.astype(np.float32) * 2 - 1),
    ):
        np.testing.assert_array_equal(table.coded(rows, Groups(GROUP[kind], True, kind))(x), x @ w.T)


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
        with pytest.raises(ArgumentValueError, match="codes: a code has too many bits"):
            table.coded(wrong, groups)
    threes = weights("t3", 20, 64)
    with pytest.raises(ArgumentValueError, match="codes: a code has too many bits"):
        table.coded(replace(threes, codes=threes.codes + np.uint8(1)), Groups(32, weights="t3"))
    bits = weights("q1", 20, 64)
    with pytest.raises(ArgumentValueError, match="codes: a code has too many bits"):
        table.coded(replace(bits, codes=bits.codes + np.uint8(1)), Groups(128, weights="q1"))
    with pytest.raises(BitgenError):
        table.coded(replace(bits, scales=np.empty((20, 0), np.float32)), Groups(0, weights="q4"))
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
