"""Weights of 4 bits from one type of file to another that holds the same codes and scales.

A type of GGUF has one table, or none, and groups of 32; coarser groups become equal ones. ``table4`` is
bitgen's own layout with whatever tables there are. What would change a weight is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from bitgen.errors import FileError
from bitgen.families.base import Codes
from bitgen.formats.code_rows import selectors_among, with_offsets, with_table
from bitgen.formats.coded import CODED, UE4M3, encode_codes
from bitgen.formats.gguf import NewTensor
from bitgen.formats.quants import DENSE, OTHER, Bytes
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.formats.table_types import ROWS, TableLayout
from bitgen.reference import are_halves

OWN = "table4"
CODE_TYPES = (*CODED, OWN)
_STEP = 1 << 20  # weights at once


def coded_tensor(name: str, matrix: CodedMatrix, kind: str) -> NewTensor:
    """NAME.weight as one of GGUF's types. FileError, when it is written, where that has no such weights."""
    m, k = matrix.shape.m, matrix.shape.k
    stored = DENSE.get(kind) or OTHER[kind]

    def chunks() -> Iterator[Bytes]:
        for rows in _rows(matrix):
            yield encode_codes(kind, _as(kind, rows, matrix, name))

    return NewTensor(f"{name}.weight", (m, k), stored.id, m * stored.row_bytes(k), chunks)


def table_tensors(name: str, matrix: CodedMatrix) -> tuple[NewTensor, NewTensor]:
    """NAME.tables and NAME.weight in bitgen's own layout of 4 bits, of a matrix whose codes have no more."""
    layout = TableLayout(OWN, 4, matrix.group)
    coded = matrix.as_kind(layout.kind)
    m, k = coded.shape.m, coded.shape.k
    tables = coded.coded(0, m).tables
    if tables is None:
        raise FileError(f"{matrix.name} has no tables")
    shape = layout.shape(m, k)

    def chunks() -> Iterator[Bytes]:
        for rows in _rows(coded):
            _require_halves(rows.scales, name)
            yield layout.encode(replace(rows, tables=tables, selectors=selectors_among(tables, rows)))

    i8 = OTHER["i8"].id
    first = NewTensor(f"{name}.tables", tables.shape, i8, tables.size, lambda: [tables.view(np.uint8)])
    return first, NewTensor(f"{name}.weight", shape, i8, shape[0] * shape[1], chunks)


def _rows(matrix: CodedMatrix) -> Iterator[Codes]:
    m = matrix.shape.m
    step = max(1, _STEP // (matrix.shape.k * ROWS)) * ROWS
    for begin in range(0, m, step):
        yield matrix.coded(begin, min(begin + step, m))


def _as(kind: str, rows: Codes, matrix: CodedMatrix, name: str) -> Codes:
    """The same weights as one of GGUF's types."""

    def refused(what: str) -> FileError:
        return FileError(f"{name}.weight cannot be {kind.upper()} without loss: {what}")

    target = CODED[kind]
    if matrix.group % target.group:
        raise refused(f"it has groups of {matrix.group}")
    if target.kind == "q4m" and rows.tables is None and rows.offsets is None:
        rows = with_offsets(rows)
    if target.kind == "q4" and rows.offsets is not None:
        if not np.array_equal(with_offsets(rows).offsets, rows.offsets):  # type: ignore[arg-type]
            raise refused("its offsets are not -8 times its scales")
        rows = replace(rows, offsets=None)
    wanted = with_table(rows).tables if target.kind == "q4" else np.array([target.table or ()], np.int8)
    if rows.tables is None and target.table is not None:
        raise refused("its values are evenly spaced")
    if rows.tables is not None:
        used = rows.tables[:1] if rows.selectors is None else rows.tables[np.unique(rows.selectors)]
        if target.kind == "q4m" or any(not np.array_equal(table, wanted[0]) for table in used):  # type: ignore[index]
            raise refused("its table has other values")
    repeat = matrix.group // target.group
    count = -(-matrix.shape.k // target.group)

    def finer(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, repeat, axis=1)[:, :count]

    made = Codes(rows.codes, finer(rows.scales), None if rows.offsets is None else finer(rows.offsets))
    if kind == "mxfp4":
        exponents = np.log2(np.where(made.scales > 0, made.scales, 3))
        if (exponents % 1).any() or (exponents < -128).any():
            raise refused("a scale of it is no power of two")
        return made
    if kind == "nvfp4":
        if not np.isin(made.scales, UE4M3[:127]).all():
            raise refused("a scale of it is no UE4M3 number")
        return made
    for values in (made.scales, made.offsets):
        if values is not None:
            _require_halves(values, name)
    return made


def _require_halves(values: np.ndarray, name: str) -> None:
    if not are_halves(values):
        raise FileError(f"{name}.weight cannot be converted without loss: a scale of it is no f16")
