"""Weights of 4 bits as GGUF files store them: the codes, scales and tables of their blocks.

A block is 32 weights along a row: of byte j the low nibble is the code of weight j, the high one that of
weight j + 16. NVFP4 has four groups of 16 in a block, each 8 bytes: weights j and j + 8 of the group.
docs/reference/file-types.md draws them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitgen.families.base import Codes
from bitgen.formats.quants import IQ4_NL, Bytes, Floats, half
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.formats.ternary import TERNARY
from bitgen.spec import Shape

# 16 int8 values. Those of FP4 (E2M1) are doubled, so that half of one is an integer too.
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
BLOCK = 32  # weights of a block and of a group, but of NVFP4


@dataclass(frozen=True)
class CodedType:
    """A type of blocks: the kind of weights (`Family.weights`), and where what is in a block.

    ``scale`` and ``offset`` make float32 (rows, groups) of uint8 (rows, blocks, block_bytes); ``group``
    weights of a ``block`` share a scale.
    """

    name: str
    kind: str
    block_bytes: int
    codes_at: int
    scale: Callable[[Bytes], Floats]
    offset: Callable[[Bytes], Floats] | None = None
    table: tuple[int, ...] | None = None
    block: int = BLOCK
    group: int = BLOCK


def _half_at(at: int) -> Callable[[Bytes], Floats]:
    return lambda blocks: half(blocks, at)[..., 0]


def _power_of_two(blocks: Bytes) -> Floats:
    """2^(e - 127) / 2, of which the least is a subnormal float."""
    return np.ldexp(np.float32(1), blocks[..., 0].astype(np.int32) - 128).astype(np.float32)


def _ue4m3() -> Floats:
    """Half of what each byte means as UE4M3: exponents of 4 bits from 2^-6 on, 3 bits of mantissa.

    All of them are half floats. 127, a NaN in other programs' E4M3, is 0 in GGML; bytes with a sign are none.
    """
    byte = np.arange(128)
    exponent, mantissa = byte >> 3, byte & 7
    values = np.where(exponent == 0, mantissa / 512, (1 + mantissa / 8) * np.exp2(exponent - 7.0)) / 2
    values[127] = 0
    return np.concatenate([values, np.full(128, np.nan)]).astype(np.float32)


UE4M3 = _ue4m3()


def _four_of_ue4m3(blocks: Bytes) -> Floats:
    return UE4M3[blocks[..., :4]].reshape(len(blocks), -1)


TWO_BITS = ("q2_0", "pq2_0")  # ternary, unless the fourth code is used
TWO_BIT_KIND = "t3"  # then: no kernels have fewer bits with values that are not -1, 0, 1
CODED = {
    one.name: one
    for one in (
        CodedType("q4_0", "q4", 18, 2, _half_at(0)),
        CodedType("q4_1", "q4m", 20, 4, _half_at(0), offset=_half_at(2)),
        CodedType("iq4_nl", "t4", 18, 2, _half_at(0), table=IQ4_NL),
        CodedType("mxfp4", "t4", 17, 1, _power_of_two, table=FP4),
        CodedType("nvfp4", "t4", 36, 4, _four_of_ue4m3, table=FP4, block=64, group=16),
    )
}


def decode_codes(kind: str, data: Bytes, cols: int) -> Codes:
    """uint8 (rows, row_bytes) -> the codes of (rows, cols)."""
    t = CODED[kind]
    blocks = data.reshape(len(data), cols // t.block, t.block_bytes)
    packed = blocks[..., t.codes_at :].reshape(len(data), cols // t.group, t.group // 2)
    codes: NDArray[np.uint8] = np.concatenate([packed & 15, packed >> 4], axis=-1).reshape(len(data), cols)
    with np.errstate(invalid="ignore"):
        scales, offsets = t.scale(blocks), None if t.offset is None else t.offset(blocks)
    table = None if t.table is None else np.array([t.table], np.int8)
    return Codes(codes, scales, offsets, table)


def encode_codes(kind: str, rows: Codes) -> Bytes:
    """The bytes of rows whose scales the type holds exactly: uint8 (rows, row_bytes)."""
    t = CODED[kind]
    m, k = rows.codes.shape
    halves = rows.codes.reshape(m, k // t.group, 2, t.group // 2)
    out = np.empty((m, k // t.block, t.block_bytes), np.uint8)
    if kind == "mxfp4":
        out[..., 0] = np.log2(rows.scales).astype(np.int32) + 128
    elif kind == "nvfp4":
        out[..., : t.codes_at] = np.searchsorted(UE4M3[:127], rows.scales).reshape(m, -1, t.codes_at)
    else:
        parts = (rows.scales,) if rows.offsets is None else (rows.scales, rows.offsets)
        out[..., : t.codes_at] = np.stack(parts, axis=-1).astype("<f2").view(np.uint8)
    packed = halves[..., 0, :] | halves[..., 1, :] << 4
    out[..., t.codes_at :] = packed.reshape(m, k // t.block, -1)
    return out.reshape(m, -1)


def coded_matrix(name: str, kind: str, shape: tuple[int, ...], data: Bytes) -> CodedMatrix:
    """A matrix (m, k) stored as one of `CODED`."""
    m, k = shape
    rows, t = data.reshape(m, -1), CODED[kind]
    return CodedMatrix.make(
        name, Shape(m, k), t.kind, t.group, lambda begin, end: decode_codes(kind, rows[begin:end], k)
    )


def two_bit_matrix(name: str, kind: str, shape: tuple[int, ...], data: Bytes) -> CodedMatrix:
    """A matrix (m, k) stored as one of `TWO_BITS`, with all four codes: T3 by the table -1, 0, 1, 2."""
    (m, k), t = shape, TERNARY[kind]
    rows = data.reshape(m, k // t.block, t.block_bytes)
    table = np.zeros((1, 16), np.int8)
    table[0, :4] = -1, 0, 1, 2

    def read(begin: int, end: int) -> Codes:
        blocks = rows[begin:end]
        codes: NDArray[np.uint8] = (
            blocks[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & np.uint8(3)
        ).reshape(-1, k)
        return Codes(codes, half(blocks, 0)[..., 0], None, table)

    return CodedMatrix.make(name, Shape(m, k), TWO_BIT_KIND, t.block, read)
