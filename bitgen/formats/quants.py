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
Ternary: TypeAlias = NDArray[np.int8]


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
    ("bf16", 30, 1, 2),
)
# Ternary matrices in blocks that each have a scale. I2_S has one scale a tensor instead: i2_s_bytes.
TERNARY = _types(("tq1_0", 34, 256, 54), ("tq2_0", 35, 256, 66))
I2_S_ID = 36
I2_S_BLOCK = 128

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
    ("iq4_nl", 20, 32, 18),
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
    ("q1_0", 41, 128, 18),
)
# Types of forks, of whose sizes nothing is said here: bitnet.cpp's tiled packings, ik_llama.cpp's rows with a
# scale in front, Ternary Bonsai's group scales.
FORKS = {37: "i8_s", 38: "tl1", 42: "q2_0", 134: "iq1_bn", 135: "iq2_bn", 335: "iq2_bn_r4"}
BY_ID = {t.id: t for t in (*DENSE.values(), *TERNARY.values(), *OTHER.values())}


def i2_s_bytes(weights: int) -> int:
    """Bytes of an I2_S tensor: 2 bits a weight, then 32 bytes of which the first four are its f32 scale."""
    return weights // 4 + 32


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


def _half(blocks: Bytes, at: int) -> Floats:
    """The f16 at byte ``at`` of each block: float32 (rows, blocks, 1)."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """Low nibbles, then high nibbles of the last axis."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * (_nibbles(blocks[..., 2:]) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[..., 4:]) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * np.ascontiguousarray(blocks[..., 2:]).view(np.int8).astype(np.float32)


def _q4_k(blocks: Bytes) -> Floats:
    s = blocks[..., 4:16]
    low, mid, high = s[..., 0:4], s[..., 4:8], s[..., 8:12]
    scale = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=-1)  # 8 groups of 32
    least = np.concatenate([mid & 63, (high >> 4) | (mid >> 6) << 4], axis=-1)
    quads = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    q = np.stack([quads & 15, quads >> 4], axis=-2).reshape(*blocks.shape[:2], 8, 32).astype(np.float32)
    d = (_half(blocks, 0) * scale)[..., None]
    m = (_half(blocks, 2) * least)[..., None]
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
    scale = (_half(blocks, 208) * scales)[..., None]  # 16 groups of 16
    values: Floats = scale * q.reshape(*blocks.shape[:2], 16, 16).astype(np.float32)
    return values


_DEQUANTIZE = {"q4_0": _q4_0, "q4_1": _q4_1, "q8_0": _q8_0, "q4_k": _q4_k, "q6_k": _q6_k}


# ---- Ternary formats -----------------------------------------------------------


def decode_i2_s(codes: Bytes, begin: int, end: int, name: str) -> Ternary:
    """Weights [begin, end) of a flattened I2_S tensor, int8; ``codes`` are its bytes without the scale.

    Blocks of 128 weights, code c = w + 1: byte p is c[p] << 6 | c[32+p] << 4 | c[64+p] << 2 | c[96+p].
    """
    first, last = begin // I2_S_BLOCK, -(-end // I2_S_BLOCK)
    raw = codes[first * 32 : last * 32].reshape(-1, 1, 32)
    _refuse_code_3(raw, name)
    w = raw >> np.array([6, 4, 2, 0], np.uint8)[:, None]
    w &= 3
    w -= 1  # 0 wraps to 255, which is -1 as int8
    return w.reshape(-1).view(np.int8)[begin - first * I2_S_BLOCK : end - first * I2_S_BLOCK]


def encode_i2_s(w: Ternary) -> Bytes:
    """The codes of w int8 in {-1, 0, 1}, any shape, a multiple of 128 weights -> uint8 (w.size / 4)."""
    codes = (w.reshape(-1, 4, 32) + 1).view(np.uint8)
    shifted = codes << np.array([6, 4, 2, 0], np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(shifted, axis=1).reshape(-1)
    return packed


def block_scales(kind: str, data: Bytes, cols: int) -> Floats:
    """The f16 scale of every block: uint8 (rows, row_bytes) -> float32 (rows, blocks)."""
    t = TERNARY[kind]
    blocks = data.reshape(len(data), cols // t.block, t.block_bytes)
    return _half(blocks, t.block_bytes - 2)[..., 0]


def decode_tq(kind: str, data: Bytes, cols: int, name: str) -> Ternary:
    """TQ1_0 or TQ2_0 without its scales: uint8 (rows, row_bytes) -> int8 (rows, cols).

    The weights of a block with scale 0 are 0 whatever its codes say.
    """
    t = TERNARY[kind]
    blocks = data.reshape(len(data), cols // t.block, t.block_bytes)
    codes = _tq1_0_codes(blocks) if kind == "tq1_0" else _tq2_0_codes(blocks, name)
    codes -= 1
    w = codes.view(np.int8)
    zero = block_scales(kind, data, cols) == 0
    if zero.any():
        w[zero] = 0
    return w.reshape(len(data), cols)


def _tq1_0_codes(blocks: Bytes) -> Bytes:
    """Trit i of a byte is ((byte * 3^i mod 256) * 3) >> 8: uint8 (rows, blocks, 256)."""
    parts = []
    for begin, end, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = np.array([3**i for i in range(trits)], np.uint8)[:, None]
        top = blocks[..., None, begin:end] * powers  # mod 256
        parts.append((top.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape[:2], -1))
    return np.concatenate(parts, axis=-1)


def _tq2_0_codes(blocks: Bytes, name: str) -> Bytes:
    """Byte p of a run of 32 holds weights p, 32+p, 64+p, 96+p, low bits first: uint8 (rows, blocks, 256)."""
    runs = blocks[..., :64].reshape(*blocks.shape[:2], 2, 1, 32)
    _refuse_code_3(runs, name)
    codes = runs >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes &= 3
    return codes.reshape(*blocks.shape[:2], 256)


def encode_tq(kind: str, w: Ternary, scale: Floats) -> Bytes:
    """The bytes of w int8 (rows, cols), scale float32 (rows): uint8 (rows, row_bytes).

    Blocks of zeros get scale 0. The scale is rounded to f16, which is all the format holds.
    """
    t = TERNARY[kind]
    blocks = w.reshape(len(w), -1, 256)
    codes = (blocks + 1).view(np.uint8)
    d = np.where(blocks.any(axis=-1), scale[:, None], 0).astype("<f2")
    head = _tq1_0_bytes(codes) if kind == "tq1_0" else _tq2_0_bytes(codes)
    out = np.empty((*blocks.shape[:2], t.block_bytes), np.uint8)
    out[..., :-2] = head
    out[..., -2:] = d[..., None].view(np.uint8)
    return out.reshape(len(w), -1)


def _tq1_0_bytes(codes: Bytes) -> Bytes:
    parts, at = [], 0
    for stride, trits in ((32, 5), (16, 5), (4, 4)):
        part = codes[..., at : at + stride * trits].reshape(*codes.shape[:2], trits, stride)
        at += stride * trits
        powers = np.array([3 ** (4 - i) for i in range(trits)], np.uint16)[:, None]
        q = (part * powers).sum(axis=-2, dtype=np.uint16)
        parts.append(((q * 256 + 242) // 243).astype(np.uint8))  # ceil(q * 256 / 243)
    return np.concatenate(parts, axis=-1)


def _tq2_0_bytes(codes: Bytes) -> Bytes:
    runs = codes.reshape(*codes.shape[:2], 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(runs, axis=-2).reshape(*codes.shape[:2], 64)
    return packed


def _refuse_code_3(packed: Bytes, name: str) -> None:
    """Four 2-bit codes a byte: 0, 1, 2 are -1, 0, 1, and 3 is none."""
    if (packed & packed >> 1 & 0x55).any():
        raise FileError(f"{name} holds codes that are not ternary; the file is damaged")


# ---- Ternary values in formats for floats --------------------------------------


def ternary_of_floats(kind: str, data: Bytes, cols: int, name: str) -> tuple[Ternary, Floats]:
    """Rows whose values are all -s, 0 or s: -> w int8 (rows, cols), s float32 (rows).

    BitgenError when a row holds other values: latent weights of training, or a model that is not ternary.
    """
    if kind in _FLOAT_BITS:
        dtype, sign = _FLOAT_BITS[kind]
        bits = np.ascontiguousarray(data).view(dtype)
        size = bits & (sign - 1)
        negative = bits >= sign
    else:
        values = dequantize(kind, data, cols)
        size = np.abs(values)
        negative = values < 0
    largest = size.max(axis=1, keepdims=True)
    nonzero = size != 0
    if np.count_nonzero(size == largest) != np.count_nonzero(nonzero | (largest == 0)):
        raise FileError(
            f"{name} ({kind}) is not ternary: a row holds other values than -s, 0 and s; bitgen runs "
            "BitNet-style models (train one, or convert a checkpoint whose master weights are made for it)",
        )
    negative &= nonzero
    w: Ternary = nonzero.view(np.int8) - 2 * negative.view(np.int8)
    if kind in _FLOAT_BITS:
        row_bytes = np.ascontiguousarray(largest).view(np.uint8)
        scale = dequantize(kind, row_bytes, 1)[:, 0]
    else:
        scale = largest[:, 0]
    return w, scale


_FLOAT_BITS = {"f32": ("<u4", 1 << 31), "f16": ("<u2", 1 << 15), "bf16": ("<u2", 1 << 15)}


def absmean(values: Floats, mean: float) -> Ternary:
    """Latent weights -> int8 round(clamp(W / mean|W|)), as BitLinear has it: W * (1 / mean) in float32."""
    inverse = np.float32(1) / np.float32(mean)
    w: Ternary = np.clip(np.rint(values * inverse), -1, 1).astype(np.int8)
    return w
