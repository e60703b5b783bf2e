"""bitgen's own file types: codes of 3 or 4 bits that stand for values of a few tables, in groups along k.

A GGUF file says in its metadata that its matrices are stored like this; their tensors are I8, so programs
that know nothing of it can list and copy them. docs/reference/file-types.md draws the layout:

- `NAME.tables` int8 (tables, 2^bits): up to four tables of values, -127 .. 127;
- `NAME.weight` uint8 (ceil(m / 16), bytes): of each 16 rows a selector a group (which table), f16 scales of
  each row and group, then the codes of each row.

Matrices that share their input are one tensor, with their rows in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.families.base import TABLES, VALUE_MAX, Codes
from bitgen.formats.config import printable
from bitgen.formats.gguf import U32
from bitgen.formats.quants import Bytes
from bitgen.formats.source import Settings, short
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.spec import EVERY_FAMILY, Shape

VERSION = 1
ROWS = 16  # that share a selector: those of a block
KINDS = {3: "t3", 4: "t4"}  # of `Family.weights`, by bits
STACKS = {"qkv": "attn_qkv", "o": "attn_output", "gate_up": "ffn_gate_up", "down": "ffn_down"}
_PREFIX = "bitgen.weights."
_EIGHT = 8  # codes in ``bits`` bytes


@dataclass(frozen=True)
class TableLayout:
    """How a file stores its matrices. ``type`` says how the values were found; readers do not need it."""

    type: str
    bits: int
    group: int

    @classmethod
    def of(cls, where: object, metadata: Mapping[str, Any]) -> TableLayout | None:
        """What a file's metadata says; None: its matrices are stored in another way. FileError."""
        keys = Settings(where, metadata, _PREFIX)
        if keys.raw("version") is None:
            return None
        if (version := keys.integer("version")) != VERSION:
            raise keys.error("version", f"is {version}; this bitgen reads version {VERSION}: use a newer one")
        bits, group = keys.integer("bits"), keys.integer("group")
        if bits not in (3, 4):
            raise keys.error("bits", f"is {bits}; 3 and 4 are supported")
        if group not in (known := EVERY_FAMILY[KINDS[4]].groups):
            raise keys.error("group", f"is {group}; {', '.join(map(str, known))} are supported")
        return cls(printable(keys.text("type", "unnamed")[:40]), bits, group)

    @property
    def metadata(self) -> dict[str, Any]:
        facts = {"version": U32(VERSION), "type": self.type, "bits": U32(self.bits), "group": U32(self.group)}
        return {_PREFIX + key: value for key, value in facts.items()}

    @property
    def kind(self) -> str:
        """Of `Family.weights`: codes of 3 bits in groups that T3 does not have run as nibbles."""
        fewest = KINDS[self.bits]
        return fewest if self.group in EVERY_FAMILY[fewest].groups else KINDS[4]

    @property
    def levels(self) -> int:
        """Values of a table."""
        return 1 << self.bits

    def groups(self, k: int) -> int:
        return -(-k // self.group)

    def shape(self, m: int, k: int) -> tuple[int, int]:
        """Of the tensor with the weights of a matrix (m, k): blocks of 16 rows, and the bytes of each."""
        return -(-m // ROWS), self.groups(k) * (1 + 2 * ROWS) + ROWS * self._row_bytes(k)

    def _row_bytes(self, k: int) -> int:
        return -(-k // _EIGHT) * self.bits

    def encode(self, rows: Codes) -> Bytes:
        """Rows from a multiple of 16 on, with selectors and scales that are f16 -> uint8 (blocks, bytes)."""
        m, k = rows.codes.shape
        if rows.selectors is None:
            raise BitgenError("a selector for each 16 rows and group is missing")
        blocks, size = self.shape(m, k)
        groups = self.groups(k)
        codes = np.zeros((blocks * ROWS, -(-k // _EIGHT) * _EIGHT), np.uint8)
        codes[:m, :k] = rows.codes
        scales = np.zeros((blocks * ROWS, groups), "<f2")
        scales[:m] = rows.scales
        out = np.empty((blocks, size), np.uint8)
        out[:, :groups] = rows.selectors
        out[:, groups : groups * (1 + 2 * ROWS)] = scales.view(np.uint8).reshape(blocks, -1)
        out[:, groups * (1 + 2 * ROWS) :] = _packed(codes, self.bits).reshape(blocks, -1)
        return out

    def decode(self, blocks: Bytes, k: int, tables: NDArray[np.int8]) -> Codes:
        """uint8 (blocks, bytes) -> 16 rows of each. FileError: a selector names no table."""
        groups, scales_end = self.groups(k), self.groups(k) * (1 + 2 * ROWS)
        selectors = np.ascontiguousarray(blocks[:, :groups])
        if (selectors >= len(tables)).any():
            raise FileError("a selector names a table that is not there; the file is damaged")
        halves = np.ascontiguousarray(blocks[:, groups:scales_end]).view("<f2")
        packed = np.ascontiguousarray(blocks[:, scales_end:]).reshape(len(blocks) * ROWS, -1)
        codes = _unpacked(packed, self.bits)[:, :k]
        wide = np.zeros((len(tables), 16), np.int8)
        wide[:, : self.levels] = tables
        return Codes(codes, halves.reshape(-1, groups).astype(np.float32), None, wide, selectors)

    def matrix(self, name: str, shape: Shape, data: Bytes, tables: NDArray[np.int8]) -> CodedMatrix:
        """The matrix of a tensor's bytes. FileError: the tables are none."""
        m, k = shape.m, shape.k
        if not 1 <= len(tables) <= TABLES or tables.shape[1] != self.levels or (tables < -VALUE_MAX).any():
            raise FileError(
                f"{name}: its tables are {short(tables.shape)}; 1 to {TABLES} of {self.levels} values, "
                f"-{VALUE_MAX} .. {VALUE_MAX}, are supported"
            )
        blocks = data.reshape(self.shape(m, k))

        def read(begin: int, end: int) -> Codes:
            if begin % ROWS and len(tables) > 1:
                raise BitgenError(
                    f"{name}: {ROWS} rows share a table, so none can be read from row {begin} on"
                )
            try:
                rows = self.decode(blocks[begin // ROWS : -(-end // ROWS)], k, tables)
            except FileError as error:
                raise FileError(f"{name}: {error.message}") from None
            count = end - begin
            selectors = rows.selectors if len(tables) > 1 else None
            return Codes(rows.codes[:count], rows.scales[:count], None, rows.tables, selectors)

        return CodedMatrix.make(name, shape, self.kind, self.group, read)


def _packed(codes: Bytes, bits: int) -> Bytes:
    """(rows, k) -> (rows, k / 8 * bits): of eight codes the first in the lowest bits, little-endian."""
    eights = codes.reshape(len(codes), -1, _EIGHT).astype("<u4")
    words = np.bitwise_or.reduce(eights << _shifts(bits), axis=-1)
    packed: Bytes = words[..., None].view(np.uint8)[..., :bits].reshape(len(codes), -1)
    return packed


def _unpacked(packed: Bytes, bits: int) -> Bytes:
    words = np.zeros((len(packed), packed.shape[1] // bits, 4), np.uint8)
    words[..., :bits] = packed.reshape(len(packed), -1, bits)
    codes = words.view("<u4") >> _shifts(bits) & ((1 << bits) - 1)
    return codes.astype(np.uint8).reshape(len(packed), -1)


def _shifts(bits: int) -> NDArray[np.uint32]:
    return np.arange(0, _EIGHT * bits, bits, dtype=np.uint32)
