"""Ternary weights as files store them, in numpy: codes and scales of every layout, there and back.

A layout is a run of blocks along a row: ``block`` weights of -1, 0 and 1 in ``block_bytes`` bytes, two of
which are the block's scale, an f16. `TERNARY` has one record for each; docs/reference/formats.md draws them.
I2_S has one scale a tensor instead, and files also hold ternary values in types for floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.formats.quants import BlockType, Bytes, Floats, dequantize, half

Ternary: TypeAlias = NDArray[np.int8]

I2_S_ID = 36
I2_S_BLOCK = 128


@dataclass(frozen=True)
class TernaryType(BlockType):
    """A layout of blocks: where its scale is, and its codes, w + 1.

    ``unpack`` makes codes uint8 (rows, blocks, block) of the blocks' bytes without their scale, uint8 (rows,
    blocks, block_bytes - 2), ``pack`` the reverse; both get the tensor's name for the FileError that says
    what cannot be.
    """

    scale_at: int  # bytes before the scale: 0, or behind all else
    unpack: Callable[[Bytes, str], Bytes]
    pack: Callable[[Bytes, str], Bytes]


def decode_blocks(kind: str, data: Bytes, cols: int, name: str) -> Ternary:
    """uint8 (rows, row_bytes) without its scales -> int8 (rows, cols)."""
    t = TERNARY[kind]
    blocks = data.reshape(len(data), cols // t.block, t.block_bytes)
    codes = t.unpack(blocks[..., 2:] if t.scale_at == 0 else blocks[..., :-2], name)
    codes -= 1  # 0 wraps to 255, which is -1 as int8
    return codes.view(np.int8).reshape(len(data), cols)


def block_scales(kind: str, data: Bytes, cols: int) -> Floats:
    """The scale of every block: uint8 (rows, row_bytes) -> float32 (rows, blocks)."""
    t = TERNARY[kind]
    return half(data.reshape(len(data), cols // t.block, t.block_bytes), t.scale_at)[..., 0]


def encode_blocks(kind: str, w: Ternary, scale: Floats | np.float32, name: str = "w") -> Bytes:
    """The bytes of w int8 (rows, cols): uint8 (rows, row_bytes).

    ``scale`` float32, broadcast to (rows, blocks), is rounded to f16.

    FileError where the layout has no code for these weights.
    """
    t = TERNARY[kind]
    blocks = w.reshape(len(w), -1, t.block)
    codes = t.pack((blocks + 1).view(np.uint8), name)
    out = np.empty((*blocks.shape[:2], t.block_bytes), np.uint8)
    begin = 2 if t.scale_at == 0 else 0
    out[..., begin : begin + t.block_bytes - 2] = codes
    halves = np.broadcast_to(scale, blocks.shape[:2]).astype("<f2")
    out[..., t.scale_at : t.scale_at + 2] = halves[..., None].view(np.uint8)
    return out.reshape(len(w), -1)


def dequantize_blocks(kind: str, data: Bytes, cols: int, name: str) -> Floats:
    """uint8 (rows, row_bytes) -> float32 (rows, cols): codes times scales, which is exact."""
    w = decode_blocks(kind, data, cols, name)
    scales = np.repeat(block_scales(kind, data, cols), TERNARY[kind].block, axis=1)
    return w.astype(np.float32) * scales


# ---- five digits of base 3 in a byte: TQ1_0, PTQ1_0 ----

# (stride, digits): a run of `stride` bytes holds `stride * digits` weights, digit n of byte m is weight m +
# stride n.
_Runs: TypeAlias = Sequence[tuple[int, int]]
_TQ1_0_RUNS: _Runs = ((32, 5), (16, 5), (4, 4))
_PTQ1_0_RUNS: _Runs = ((16, 5), (8, 5), (2, 4))


def _digits(runs: _Runs) -> Callable[[Bytes, str], Bytes]:
    """Digit n of a byte is ((byte * 3^n mod 256) * 3) >> 8: every byte stands for codes."""

    def unpack(blocks: Bytes, _name: str) -> Bytes:
        parts, at = [], 0
        for stride, digits in runs:
            powers = np.array([3**n for n in range(digits)], np.uint8)[:, None]
            top = blocks[..., None, at : at + stride] * powers  # mod 256
            parts.append((top.astype(np.uint16) * 3 >> 8).astype(np.uint8).reshape(*blocks.shape[:2], -1))
            at += stride
        return np.concatenate(parts, axis=-1)

    return unpack


def _bytes_of_digits(runs: _Runs) -> Callable[[Bytes, str], Bytes]:
    """The smallest byte at or above v * 256 / 243, v = the sum of digit n * 3^(4 - n)."""

    def pack(codes: Bytes, _name: str) -> Bytes:
        parts, at = [], 0
        for stride, digits in runs:
            part = codes[..., at : at + stride * digits].reshape(*codes.shape[:2], digits, stride)
            powers = np.array([3 ** (4 - n) for n in range(digits)], np.uint16)[:, None]
            v = (part * powers).sum(axis=-2, dtype=np.uint16)
            parts.append(((v * 256 + 242) // 243).astype(np.uint8))
            at += stride * digits
        return np.concatenate(parts, axis=-1)

    return pack


# ---- two bits: TQ2_0, Q2_0, PQ2_0 ----

_FIELDS = np.array([0, 2, 4, 6], np.uint8)
# Four codes side by side, for each byte: one look-up a byte is ten times as fast as shifts.
_Q2_TABLE = (np.arange(256, dtype=np.uint8)[:, None] >> _FIELDS & 3).view("<u4")[:, 0]


def _tq2_0_codes(blocks: Bytes, name: str) -> Bytes:
    """Byte p of a run of 32 holds weights p, 32 + p, 64 + p, 96 + p, low bits first."""
    runs = blocks.reshape(*blocks.shape[:2], 2, 1, 32)
    _refuse_code_3(runs, f"{name} holds codes that are not ternary; the file is damaged")
    codes = runs >> _FIELDS[:, None]
    codes &= 3
    return codes.reshape(*blocks.shape[:2], 256)


def _tq2_0_bytes(codes: Bytes, _name: str) -> Bytes:
    runs = codes.reshape(*codes.shape[:2], 2, 4, 32) << _FIELDS[:, None]
    packed: Bytes = np.bitwise_or.reduce(runs, axis=-2).reshape(*codes.shape[:2], 64)
    return packed


def _q2_codes(blocks: Bytes, name: str) -> Bytes:
    """Byte p holds weights 4 p .. 4 p + 3, low bits first. The fourth code is +2: another kind of model."""
    _refuse_code_3(
        blocks,
        f"{name} holds the code 3, which is +2 times the scale: it has weights of 2 bits, not ternary ones; "
        "`bitgen convert --type table4` makes a file of it that runs",
    )
    return _Q2_TABLE[blocks].view(np.uint8)


def _q2_bytes(codes: Bytes, _name: str) -> Bytes:
    packed: Bytes = np.bitwise_or.reduce(codes.reshape(*codes.shape[:2], -1, 4) << _FIELDS, axis=-1)
    return packed


def _refuse_code_3(packed: Bytes, message: str) -> None:
    """Four 2-bit codes a byte: 0, 1, 2 are -1, 0, 1."""
    if (packed & packed >> 1 & 0x55).any():
        raise FileError(message)


# ---- one bit: Q1_0 ----


def _q1_0_codes(blocks: Bytes, _name: str) -> Bytes:
    """Bit j % 8 of byte j / 8: 1 is +1, 0 is -1."""
    codes = np.unpackbits(blocks, axis=-1, bitorder="little")
    codes <<= 1
    return codes


def _q1_0_bytes(codes: Bytes, name: str) -> Bytes:
    if (codes == 1).any():
        raise FileError(f"{name} holds zeros, for which Q1_0 has no code: it has -1 and 1 alone")
    return np.packbits(codes >> 1, axis=-1, bitorder="little")


# ---- 1.25 bits: STQ1_0, of four weights one is zero ----

# The 2-bit codes of four weights, lane p in bits 2 p, by sign << 4 | nibble. The second half mirrors the
# first.
_STQ_PATTERNS = np.frombuffer(
    bytes.fromhex("A9892909A68626069A921A126A624A42012181A1042484A41018909840486068"), np.uint8
)
_STQ_INDEX = np.full(256, 255, np.uint8)
_STQ_INDEX[_STQ_PATTERNS] = np.arange(32, dtype=np.uint8)


def _stq1_0_codes(blocks: Bytes, _name: str) -> Bytes:
    """32 bytes of nibbles, 8 of signs; group 16 c + g holds the weights 64 c + 16 p + g, p = 0..3."""
    nibbles = np.stack([blocks[..., :32] & 15, blocks[..., :32] >> 4], axis=-1).reshape(*blocks.shape[:2], 64)
    signs = np.unpackbits(blocks[..., 32:], axis=-1, bitorder="little")
    patterns = _STQ_PATTERNS[nibbles | signs << 4].reshape(*blocks.shape[:2], 4, 1, 16)
    codes: Bytes = patterns >> _FIELDS[:, None] & 3
    return codes.reshape(*blocks.shape[:2], 256)


def _stq1_0_bytes(codes: Bytes, name: str) -> Bytes:
    sets = codes.reshape(*codes.shape[:2], 4, 4, 16) << _FIELDS[:, None]
    index = _STQ_INDEX[np.bitwise_or.reduce(sets, axis=-2)].reshape(*codes.shape[:2], 64)
    if (index == 255).any():
        raise FileError(f"{name} is not STQ1_0's: it holds four weights of which not exactly one is zero")
    nibbles = index & 15
    signs = np.packbits(index >> 4, axis=-1, bitorder="little")
    return np.concatenate([nibbles[..., ::2] | nibbles[..., 1::2] << 4, signs], axis=-1)


_TYPES = (
    TernaryType("tq1_0", 34, 256, 54, 52, _digits(_TQ1_0_RUNS), _bytes_of_digits(_TQ1_0_RUNS)),
    TernaryType("tq2_0", 35, 256, 66, 64, _tq2_0_codes, _tq2_0_bytes),
    TernaryType("q1_0", 41, 128, 18, 0, _q1_0_codes, _q1_0_bytes),
    TernaryType("q2_0", 42, 64, 18, 0, _q2_codes, _q2_bytes),
    TernaryType("stq1_0", 43, 256, 42, 40, _stq1_0_codes, _stq1_0_bytes),
    TernaryType("pq2_0", 142, 128, 34, 0, _q2_codes, _q2_bytes),
    TernaryType("ptq1_0", 143, 128, 28, 26, _digits(_PTQ1_0_RUNS), _bytes_of_digits(_PTQ1_0_RUNS)),
)
TERNARY = {t.name: t for t in _TYPES}


# ---- I2_S ----


def i2_s_bytes(weights: int) -> int:
    """Bytes of an I2_S tensor: 2 bits a weight, then 32 bytes of which the first four are its f32 scale."""
    return weights // 4 + 32


def decode_i2_s(codes: Bytes, begin: int, end: int, name: str) -> Ternary:
    """Weights [begin, end) of a flattened I2_S tensor, int8; ``codes`` are its bytes without the scale.

    Blocks of 128 weights, code c = w + 1: byte p is c[p] << 6 | c[32+p] << 4 | c[64+p] << 2 | c[96+p].
    """
    first, last = begin // I2_S_BLOCK, -(-end // I2_S_BLOCK)
    raw = codes[first * 32 : last * 32].reshape(-1, 1, 32)
    _refuse_code_3(raw, f"{name} holds codes that are not ternary; the file is damaged")
    w = raw >> _FIELDS[::-1, None]
    w &= 3
    w -= 1
    return w.reshape(-1).view(np.int8)[begin - first * I2_S_BLOCK : end - first * I2_S_BLOCK]


def encode_i2_s(w: Ternary) -> Bytes:
    """The codes of w int8 in {-1, 0, 1}, any shape, a multiple of 128 weights -> uint8 (w.size / 4)."""
    codes = (w.reshape(-1, 4, 32) + 1).view(np.uint8)
    packed: Bytes = np.bitwise_or.reduce(codes << _FIELDS[::-1, None], axis=1).reshape(-1)
    return packed


# ---- Ternary values in types for floats ----


def ternary_of_floats(kind: str, data: Bytes, cols: int, name: str, group: int = 0) -> tuple[Ternary, Floats]:
    """Groups of ``group`` values along a row (0: all of it) that are all -s, 0 or s.

    -> w int8 (rows, cols), s float32 (rows, groups). FileError when a group holds other values: latent
    weights of training, or a model that is not ternary.
    """
    rows, size = len(data), group or cols
    if kind in _FLOAT_BITS:
        dtype, sign = _FLOAT_BITS[kind]
        bits = np.ascontiguousarray(data).view(dtype)
        magnitude = bits & (sign - 1)
        negative = bits >= sign
    else:
        values = dequantize(kind, data, cols)
        magnitude = np.abs(values)
        negative = values < 0
    nonzero = magnitude != 0
    groups = np.pad(magnitude, ((0, 0), (0, -cols % size))).reshape(rows, -1, size)
    largest = groups.max(axis=2, keepdims=True)
    if not ((groups == largest) | (groups == 0)).all():
        raise FileError(
            f"{name} ({kind}) is not ternary: a row holds other values than -s, 0 and s; bitgen runs "
            "BitNet-style models (train one, or convert a checkpoint whose master weights are made for it)",
        )
    negative &= nonzero
    w: Ternary = nonzero.view(np.int8) - 2 * negative.view(np.int8)
    scale = largest[..., 0]
    if kind in _FLOAT_BITS:
        scale = dequantize(kind, np.ascontiguousarray(scale).view(np.uint8), scale.shape[1])
    return w, scale


_FLOAT_BITS = {"f32": ("<u4", 1 << 31), "f16": ("<u2", 1 << 15), "bf16": ("<u2", 1 << 15)}


def absmean(values: Floats, mean: float) -> Ternary:
    """Latent weights -> int8 round(clamp(W / mean|W|)), as BitLinear has it: W * (1 / mean) in float32."""
    inverse = np.float32(1) / np.float32(mean)
    w: Ternary = np.clip(np.rint(values * inverse), -1, 1).astype(np.int8)
    return w
