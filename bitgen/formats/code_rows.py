"""Rows of codes as kernels take them: joined, as codes of another kind, as floats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.families.base import TABLES, Codes
from bitgen.formats.config import Floats
from bitgen.spec import EVERY_FAMILY


def joined_codes(name: str, parts: Sequence[Codes]) -> Codes:
    """Rows below each other; of different tables each 16 rows name theirs."""

    def rows(field: str) -> Any:
        found = [getattr(part, field) for part in parts]
        return None if found[0] is None else np.concatenate(found)

    tables, selectors = parts[0].tables, None
    if tables is not None and (
        any(part.selectors is not None or not _same(part.tables, tables) for part in parts)
    ):
        tables = np.unique(np.concatenate([part.tables for part in parts if part.tables is not None]), axis=0)
        if len(tables) > TABLES or any(len(part.codes) % 16 for part in parts[:-1]):
            raise FileError(f"{name}: its tables differ, and not by 16 rows each")
        selectors = np.concatenate([selectors_among(tables, part) for part in parts])
    return Codes(rows("codes"), rows("scales"), rows("offsets"), tables, selectors)


def _same(tables: NDArray[np.int8] | None, others: NDArray[np.int8]) -> bool:
    return tables is not None and np.array_equal(tables, others)


def selectors_among(tables: NDArray[np.int8], rows: Codes) -> NDArray[np.uint8]:
    """What 16 rows and a group select where ``tables``, which hold all of the rows', are the tables."""
    own = () if rows.tables is None else rows.tables
    ids = np.array([int(np.flatnonzero((tables == table).all(axis=1))[0]) for table in own], np.uint8)
    shape = (-(-len(rows.codes) // 16), rows.scales.shape[1])
    selected: NDArray[np.uint8] = ids[np.zeros(shape, np.uint8) if rows.selectors is None else rows.selectors]
    return selected


def with_offsets(rows: Codes) -> Codes:
    """Q4 as Q4M: the offset of each group is -8 times its scale."""
    return Codes(rows.codes, rows.scales, rows.scales * np.float32(-EVERY_FAMILY["q4"].bias))


def with_table(rows: Codes) -> Codes:
    """Q4 as T4, by the table -8 .. 7."""
    return Codes(rows.codes, rows.scales, None, np.arange(-8, 8, dtype=np.int8)[None])


# What holds weights of another kind exactly: Q4 is Q4M with the offset -8 d, and T4 with the table -8 .. 7;
# T3 is T4 with tables of which 8 values are used.
CHANGES: Mapping[tuple[str, str], Callable[[Codes], Codes]] = {
    ("q4", "q4m"): with_offsets,
    ("q4", "t4"): with_table,
    ("t3", "t4"): lambda rows: rows,
}


def common_kind(kinds: Iterable[str]) -> str:
    """The kind that holds weights of all of these. FileError: none does."""
    found = set(kinds)
    for kind in (*found, "q4m", "t4"):
        if all(one == kind or (one, kind) in CHANGES for one in found):
            return kind
    names = " and ".join(sorted(kind.upper() for kind in found))
    raise FileError(f"weights of {names} in one model are not supported")


def code_floats(rows: Codes, group: int, bias: int) -> Floats:
    """What rows of codes stand for, float32 (rows, k)."""
    k = rows.codes.shape[1]

    def spread(values: NDArray[Any]) -> NDArray[Any]:
        return np.repeat(values, group, axis=1)[:, :k]

    if rows.tables is None:
        made: Floats = spread(rows.scales) * (rows.codes.astype(np.float32) - np.float32(bias))
    else:
        table = np.zeros(rows.codes.shape, np.intp)
        if rows.selectors is not None:
            table += spread(np.repeat(rows.selectors, 16, axis=0)[: len(table)])
        made = spread(rows.scales) * rows.tables[table, rows.codes].astype(np.float32)
    return made if rows.offsets is None else made + spread(rows.offsets)
