"""Storage formats of GGML in numpy: the exact values that stored bytes stand for, and back.

Every function works on whole rows: uint8 (rows, row_bytes) <-> float32 (rows, cols). A row is a run of blocks
of ``block`` values in ``block_bytes`` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """A storage type of GGML: its number in a GGUF file and the size of its blocks."""

    name: str
    id: int
    block: int  # values
    block_bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` values. BitgenError when it does not fill whole blocks."""
        if cols % self.block:
            raise FileError(f"{self.name} holds blocks of {self.block}: {cols} columns do not fit")
        return cols // self.block * self.block_bytes


def _types(*rows: tuple[str, int, int, int]) -> dict[str, BlockType]:
    return {name: BlockType(name, id_, block, size) for name, id_, block, size in rows}


# Matrices of floats: heads and embeddings.
DENSE = _types(
    ("f32", 0, 1, 4),
    ("f16", 1, 1, 2),
    ("q4_0", 2, 32, 18),
    ("q4_1", 3, 32, 20),
    ("q8_0", 8, 32, 34),
    ("q4_k", 12, 256, 144),
    ("q6_k", 14, 256, 210),
    ("iq4_nl", 20, 32, 18),
    ("bf16", 30, 1, 2),
)
# Everything else has a name, for messages, and mostly a size, for checks of the file that holds it.
OTHER = _types(
    ("q5_0", 6, 32, 22),
    ("q5_1", 7, 32, 24),
    ("q8_1", 9, 32, 40),
    ("q2_k", 10, 256, 84),
    ("q3_k", 11, 256, 110),
    ("q5_k", 13, 256, 176),
    ("q8_k", 15, 256, 292),
    ("iq2_xxs", 16, 256, 66),
    ("iq2_xs", 17, 256, 74),
    ("iq3_xxs", 18, 256, 98),
    ("iq1_s", 19, 256, 50),
    ("iq3_s", 21, 256, 110),
    ("iq2_s", 22, 256, 82),
    ("iq4_xs", 23, 256, 136),
    ("i8", 24, 1, 1),
    ("i16", 25, 1, 2),
    ("i32", 26, 1, 4),
    ("i64", 27, 1, 8),
    ("f64", 28, 1, 8),
    ("iq1_m", 29, 256, 56),
    ("mxfp4", 39, 32, 17),
    ("nvfp4", 40, 64, 36),
)


# IQ4_NL's values by their codes.
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(name: str, data: Bytes, cols: int) -> Floats:
    """uint8 (rows, row_bytes) -> float32 (rows, cols), exactly as GGML's own dequantisation."""
    kind = DENSE[name]
    rows = len(data)
    raw = np.ascontiguousarray(data)
    if name == "f32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if name == "f16":
        return raw.view("<f2").astype(np.float32)
    if name == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(rows, cols // kind.block, kind.block_bytes)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged file may hold NaN and infinity
        return _DEQUANTIZE[name](blocks).reshape(rows, cols)


def quantize_rows(name: str, values: Floats, what: str) -> Bytes:
    """float32 (rows, cols) -> the bytes of F16 or Q8_0, uint8 (rows, row_bytes).

    Q8_0: d = f16(max|w| / 127) of each block, codes round(w / d). FileError when a value is too large.
    """
    rows, cols = values.shape
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if name == "f16":
            stored = values.astype("<f2")
            scales = stored
        else:
            blocks = values.reshape(rows, -1, DENSE["q8_0"].block)
            scales = (np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)).astype("<f2")
            codes = np.rint(blocks / scales.astype(np.float32))
            codes = np.where(scales == 0, 0, codes).clip(-127, 127).astype(np.int8)
    if not np.isfinite(scales).all():
        raise FileError(f"{what}: its values are no numbers, or too large for half floats")
    if name == "f16":
        return np.ascontiguousarray(stored).view(np.uint8)
    made: Bytes = np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=-1)
    return made.reshape(rows, cols // DENSE["q8_0"].block * DENSE["q8_0"].block_bytes)


def half(blocks: Bytes, at: int) -> Floats:
    """The f16 at byte ``at`` of each block: float32 (rows, blocks, 1)."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """Low nibbles, then high nibbles of the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * (_nibbles(blocks[..., 2:]) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return half(blocks, 0) * _nibbles(blocks[..., 4:]) + half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return half(blocks, 0) * np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float32)


def _iq4_nl(blocks: Bytes) -> Floats:
    codes = np.concatenate([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], axis=-1)
    values: Floats = np.array(IQ4_NL, np.float32)[codes]
    return half(blocks, 0) * values


def _q4_k(blocks: Bytes) -> Floats:
    s = blocks[..., 4:16]
    low, mid, high = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=-1)  # 8 groups of 32
    least = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], axis=-1)
    quads = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    q = np.stack([quads & 15, quads >> 4], axis=-2).reshape(*blocks.shape[:2], 8, 32).astype(np.float32)
    d = (half(blocks, 0) * scale)[..., None]
    m = (half(blocks, 2) * least)[..., None]
    values: Floats = d * q - m
    return values


def _q6_k(blocks: Bytes) -> Floats:
    halves = (*blocks.shape[:2], 2)
    ql = blocks[..., :128].reshape(*halves, 2, 32)
    qh = blocks[..., 128:192].reshape(*halves, 1, 32)
    low = np.concatenate([ql & 15, ql >> 4], axis=-2)  # (..., half, 4, 32)
    high = qh >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3
    q = (low | high << 4).astype(np.int8) - 32
    scales = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    scale = (half(blocks, 208) * scales)[..., None]  # 16 groups of 16
    values: Floats = scale * q.reshape(*blocks.shape[:2], 16, 16).astype(np.float32)
    return values


_DEQUANTIZE = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
}
