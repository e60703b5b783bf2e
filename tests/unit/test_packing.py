from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bitgen.errors import BitgenError
from bitgen.families.t5 import TABLE as T5_TABLE
from bitgen.families.tl5 import CODES as TL5_CODES
from bitgen.families.tl5 import WEIGHTS as TL5_WEIGHTS
from bitgen.reference import check_ternary, pack, unpack
from bitgen.spec import FAMILIES, Layout, Shape

LAYOUTS = [Layout(family.name, rows * family.rows) for family in FAMILIES.values() for rows in (1, 2, 3)]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)

matrices = hnp.arrays(
    np.int8,
    st.tuples(st.integers(1, 70), st.integers(1, 130)),
    elements=st.integers(-1, 1),
)


def matrix(rows: list[list[int]]) -> np.ndarray:
    return np.array(rows, np.int8)


def chunk(family: str, w: np.ndarray) -> np.ndarray:
    """The bytes of the first chunk of the first rows."""
    f = FAMILIES[family]
    return pack(Layout(family, f.rows), w)[: f.rows // 16 * f.chunk_bytes]


# ---- round trips


@layouts
@settings(max_examples=25, deadline=None)
@given(w=matrices)
def test_unpack_undoes_pack(layout: Layout, w: np.ndarray) -> None:
    packed = pack(layout, w)
    assert packed.dtype == np.uint8
    assert packed.shape == (layout.packed_bytes(Shape(*w.shape)),)
    assert packed.flags.c_contiguous
    restored = unpack(layout, packed, Shape(*w.shape))
    assert restored.dtype == np.int8
    np.testing.assert_array_equal(restored, w)


@layouts
@settings(max_examples=15, deadline=None)
@given(w=matrices)
def test_padding_is_zero_weights(layout: Layout, w: np.ndarray) -> None:
    k_chunk = FAMILIES[layout.family].k_chunk
    m, k = -(-w.shape[0] // layout.row_block) * layout.row_block, layout.chunks(w.shape[1]) * k_chunk
    padded = np.zeros((m, k), np.int8)
    padded[: w.shape[0], : w.shape[1]] = w
    np.testing.assert_array_equal(pack(layout, w), pack(layout, padded))


@layouts
def test_row_blocks_are_independent_and_in_order(layout: Layout) -> None:
    w = np.random.default_rng(1).integers(-1, 2, (3 * layout.row_block, 100), dtype=np.int8)
    blocks = [pack(layout, block) for block in np.split(w, 3)]
    np.testing.assert_array_equal(pack(layout, w), np.concatenate(blocks))
    assert len(blocks[0]) == layout.block_bytes(100)


@pytest.mark.parametrize("family", FAMILIES)
def test_sub_blocks_alternate_chunk_by_chunk(family: str) -> None:
    f, k = FAMILIES[family], 100
    w = np.random.default_rng(2).integers(-1, 2, (2 * f.rows, k), dtype=np.int8)
    narrow = [pack(Layout(family, f.rows), half) for half in np.split(w, 2)]
    chunks, each = Layout(family, f.rows).chunks(k), f.rows // 16 * f.chunk_bytes
    expected = [half[c * each : (c + 1) * each] for c in range(chunks) for half in narrow]
    expected += [half[chunks * each :] for half in narrow]  # the trailers follow, in order
    np.testing.assert_array_equal(pack(Layout(family, 2 * f.rows), w), np.concatenate(expected))


# ---- known bytes, worked out by hand from the table at the top of bitgen/families


def test_i2s_bytes() -> None:
    # byte[4 r + j] = code(r, j) | code(r, 4 + j) << 2 | ..., code = w + 1; beyond k the code is 1
    got = chunk("i2s", matrix([[1, 0, -1, 1, -1], [0, 0, 0, 0, 1]]))
    expected = np.full(64, 0b01_01_01_01, np.uint8)
    expected[:4] = [0b01_01_00_10, 0b01_01_01_01, 0b01_01_01_00, 0b01_01_01_10]
    expected[4] = 0b01_01_10_01
    np.testing.assert_array_equal(got, expected)


def test_i2s_last_field() -> None:
    w = np.zeros((16, 16), np.int8)
    w[15, 15] = -1  # row 15, k = 4 * 3 + 3: byte 4 * 15 + 3, field 3
    assert chunk("i2s", w)[63] == 0b00_01_01_01


def test_tl1_bytes() -> None:
    # byte[16 l + r] = idx(k = 4 l, 4 l + 1) | idx(4 l + 2, 4 l + 3) << 4, idx(w0, w1) = 3 w0 + w1 + 4
    got = chunk("tl1", matrix([[1, -1, 0, 1, -1, -1], [0, 0, 0, 0, 1, 0]]))
    expected = np.full(64, 0x44, np.uint8)
    expected[0] = 6 | 5 << 4  # (1, -1), (0, 1)
    expected[16] = 0 | 4 << 4  # (-1, -1), zeros
    expected[17] = 7 | 4 << 4  # (1, 0), zeros
    np.testing.assert_array_equal(got, expected)


def test_tl1_largest_index() -> None:
    assert (chunk("tl1", np.ones((16, 16), np.int8)) == 0x88).all()


def test_tl2_bytes() -> None:
    # lane 0: v = 13, -9, -1, 2; lane 1: v = -5, then zeros
    w = matrix([[1, 1, 1, -1, 0, 0, 0, 0, -1, 0, 1, -1, -1, 1, 1]])
    packed = pack(Layout("tl2", 16), w)
    expected = np.zeros(160 + 64, np.uint8)
    expected[0] = 13 | 9 << 4  # A, lane 0: triples 0 and 1
    expected[16] = 5  # A, lane 1
    expected[64] = 1 | 2 << 4  # B, lane 0: triples 2 and 3
    expected[128] = 1 << 1 | 1 << 4  # triple 0 of lane 1 and triple 1 of lane 0 are negative
    expected[144] = 1 << 0  # triple 2 of lane 0 is negative
    expected[160] = 3  # the trailer counts them
    np.testing.assert_array_equal(packed, expected)


def test_tl2_lanes_and_sign_bits() -> None:
    w = np.zeros((16, 48), np.int8)
    w[7, 47] = -1  # lane 3, triple 3: v = -1
    got = chunk("tl2", w)
    assert list(np.flatnonzero(got)) == [64 + 16 * 3 + 7, 144 + 7]
    assert got[64 + 16 * 3 + 7] == 1 << 4
    assert got[144 + 7] == 1 << 7


def test_t5_bytes() -> None:
    # No weight at all: the fifth code 1 asks for a byte in 85..169, and 125 is the first of them with v = 0.
    w = np.zeros((2, 20), np.int8)
    w[0, 0], w[1, 4 + 1], w[1, 4 * 4 + 3] = 1, 1, -1
    got = chunk("t5", w)
    expected = np.full(64, 125, np.uint8)
    expected[0] = 128 + 13  # v = 27 with fifth code 1: the mirror of entry 13, v = 13 - 40
    expected[5] = 128 + 31  # v = 9: the mirror of entry 31, v = 31 - 40
    expected[7] = 40  # fifth weight -1 (k = 4 * 4 + 3): entry 40 is the first zero of 0..84
    np.testing.assert_array_equal(got, expected)


def test_t5_table_and_thirds() -> None:
    """The facts that the kernels' arithmetic needs, for every byte."""
    byte = np.arange(255)
    average = (byte + 1) >> 1  # of the byte and 0, rounded up
    third = (average + byte + 1) >> 1  # its top two bits, as a vector's rounding averages give it
    np.testing.assert_array_equal(third >> 6, byte // 85)
    digits = T5_TABLE[:, None] >> np.array([0, 2, 4, 6]) & 3
    value = (digits.astype(int) - 1) @ np.array([27, 9, 3, 1])
    assert list(value[:42]) == [*range(-40, 1), 0]  # the negative half, a spare
    assert list(value[42:85]) == [*range(41), 0, 0]  # the positive half
    assert list(value[85:]) == [*range(-40, 1), 0, 0]  # the negative half again
    signed = np.where(byte < 128, value[byte & 127], -value[byte & 127])
    for fifth in range(3):
        assert set(signed[byte // 85 == fifth]) == set(range(-40, 41))


def test_tl5_bytes() -> None:
    w = np.zeros((64, 40), np.int8)
    w[0, :20:4] = [1, 1, 1, 1, 1]  # v = 121, t = 13, p = 4 in vector 0
    w[5, 1:20:4] = [0, 0, 0, 1, -1]  # v = 2: t = 0, p = 2 in vector 1, sub-block 0, l = 1, q = 1
    w[17, 2] = -1  # v = -81: t = 9, p = 0 in vector 2, sub-block 1, q = 1
    w[63, 20 + 19] = -1  # v = -1: t = 0, p = 1 in vector 3 of the next chunk
    packed = pack(Layout("tl5", 64), w)
    expected = np.full((2, 4, 64), 112, np.uint8)
    expected[0, 0, 0] = 8 * 13 + 7
    expected[0, 1, 16 + 1] = 5
    expected[0, 2, 4 + 1] = 128 + 112 + 9
    expected[1, 3, 48 + 12 + 3] = 128 + 4
    np.testing.assert_array_equal(packed[:512], expected.reshape(-1))
    assert list(np.flatnonzero(packed[512:].view("<i4"))) == [17, 63]


def test_tl5_codes_and_weights() -> None:
    """All 243 values have a byte of their own; bit 7 is the sign, the other bits an index below 126."""
    assert len(set(TL5_CODES.tolist())) == 243
    places = np.array([81, 27, 9, 3, 1])
    for v, byte in enumerate(TL5_CODES.astype(int), -121):
        index = byte & 127
        assert (byte >= 128) == (v < 0)
        assert TL5_WEIGHTS[index] @ places == abs(v)
        three, two = (
            (index >> 3, TL5_WEIGHTS[index & 7]) if index < 112 else (index & 15, np.zeros(5, np.int8))
        )
        assert TL5_WEIGHTS[index, :3] @ [9, 3, 1] == three
        np.testing.assert_array_equal(TL5_WEIGHTS[index, 3:], two[3:])


# ---- TL2's trailers


@pytest.mark.parametrize("row_block", [16, 32])
@settings(max_examples=40, deadline=None)
@given(w=matrices)
def test_trailers_count_negative_triples(row_block: int, w: np.ndarray) -> None:
    layout, (m, k) = Layout("tl2", row_block), w.shape
    blocks = pack(layout, w).reshape(-1, layout.block_bytes(k))
    trailers = np.ascontiguousarray(blocks[:, -64 * layout.sub_blocks :]).view("<i4").reshape(-1)
    counts = [
        sum(9 * int(a) + 3 * int(b) + int(c) < 0 for a, b, c in np.pad(row, (0, -k % 3)).reshape(-1, 3))
        for row in w
    ]
    assert list(trailers[:m]) == counts
    assert not trailers[m:].any()


def test_families_without_trailers_have_only_chunks() -> None:
    for family in FAMILIES.values():
        layout = Layout(family.name, 64)
        body = 4 * layout.chunks(100) * family.chunk_bytes
        assert layout.block_bytes(100) == body + (256 if family.name in ("tl2", "tl5") else 0)


def test_row_blocks_of_tl5_are_multiples_of_64() -> None:
    for rows in (16, 32, 96):
        with pytest.raises(BitgenError, match="must be a positive multiple of 64"):
            Layout("tl5", rows)


# ---- errors


@pytest.mark.parametrize(
    ("w", "told"),
    [
        (np.zeros((3, 4), np.int16), "int16"),
        (np.zeros((3, 4), np.float32), "float32"),
        (np.zeros(12, np.int8), r"\(12,\)"),
        (np.zeros((1, 3, 4), np.int8), r"\(1, 3, 4\)"),
        (np.array([[0, 2]], np.int8), "-1, 0 or 1"),
        (np.array([[0, -2]], np.int8), "-1, 0 or 1"),
        (np.zeros((0, 4), np.int8), "at least 1"),
        (np.zeros((4, 0), np.int8), "at least 1"),
    ],
)
@pytest.mark.parametrize("function", [check_ternary, lambda w: pack(Layout("tl1", 16), w)])
def test_pack_refuses(w: np.ndarray, told: str, function: Callable[[np.ndarray], object]) -> None:
    with pytest.raises(BitgenError, match=told):
        function(w)


@layouts
def test_unpack_refuses_other_sizes(layout: Layout) -> None:
    shape = Shape(20, 70)
    packed = pack(layout, np.zeros((20, 70), np.int8))
    other: Any = packed.astype(np.int8)
    for wrong in (packed[:-1], np.append(packed, packed[:1]), other):
        with pytest.raises(BitgenError, match=rf"20x70 in {layout.name} take {len(packed)} bytes"):
            unpack(layout, wrong, shape)


def test_pack_reads_any_memory_order() -> None:
    w = np.random.default_rng(3).integers(-1, 2, (40, 60), dtype=np.int8)
    for layout in LAYOUTS:
        expected = pack(layout, w)
        np.testing.assert_array_equal(pack(layout, np.asfortranarray(w)), expected)
        np.testing.assert_array_equal(pack(layout, np.repeat(w, 2, axis=1)[:, ::2]), expected)
