"""Codes, scales and tables for given weights: the least squared error, weighted by what is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.families.base import VALUE_MAX, Codes
from bitgen.formats.config import Floats
from bitgen.formats.table_types import ROWS

Tables: TypeAlias = NDArray[np.int8]
Sign: TypeAlias = Literal["plus", "largest", "free"]
_SCALE_MAX = 1 << 15  # half of what an f16 can be, so that a fitted scale is one too
_HALVES = 2 * VALUE_MAX + 2  # beyond the doubled values of any table
_ROUNDS = 2  # of scale by least squares, then nearest values again


@dataclass(frozen=True)
class Fit:
    """How to choose. ``rows`` share a selector (kernels: 16). ``fitted`` False: scales are as they start.

    ``sign``: see `DataType`. The error of a weight w near v is h (w - v)^2, h the mean square of what it is
    multiplied with, or 1.
    """

    group: int
    sign: Sign = "plus"
    fitted: bool = True
    rows: int = ROWS


@dataclass(frozen=True)
class Chosen:
    """``codes`` uint8 (m, groups, group), ``scales`` float32 and ``tables`` uint8 (m, groups)."""

    codes: NDArray[np.uint8]
    scales: Floats
    tables: NDArray[np.uint8]
    error: float  # the sum over all weights
    size: float  # and that of h w^2, what the error would be if all were zero

    def rows(self, tables: Tables, k: int) -> Codes:
        """As kernels and files take them, of tables that 16 rows share."""
        wide = np.zeros((len(tables), 16), np.int8)
        wide[:, : tables.shape[1]] = tables
        return Codes(self._flat(k), self.scales, None, wide, np.ascontiguousarray(self.tables[::ROWS]))

    def values(self, tables: Tables, k: int) -> Floats:
        """What they stand for, float32 (m, k), whatever number of rows shares a table."""
        found = tables[self.tables[..., None], self.codes].astype(np.float32) * self.scales[..., None]
        return found.reshape(len(found), -1)[:, :k]

    def _flat(self, k: int) -> NDArray[np.uint8]:
        return np.ascontiguousarray(self.codes.reshape(len(self.codes), -1)[:, :k])


def choose(w: Floats, tables: Tables, fit: Fit, importance: Floats | None = None, name: str = "w") -> Chosen:
    """Of each ``fit.rows`` rows and group the table with the least error; of each row and group the scale.

    ``w`` float32 (m, k), its first row a multiple of 16 of the matrix; ``importance`` float32 (k). Scales are
    f16. FileError when w is not finite, or too large for them.
    """
    groups, h = in_groups(w, fit.group, importance, name)
    m, count, _ = groups.shape
    if np.abs(groups).max() > _SCALE_MAX * float(np.abs(tables).max(axis=1).min()):
        raise FileError(f"{name}: its weights are too large for scales of half floats")
    best: tuple[NDArray[np.uint8], Floats, Floats] | None = None
    selected = np.zeros((m, count), np.uint8)
    for number, table in enumerate(tables):
        codes, scales, error = _by_table(groups, table, h, fit)
        error = _shared(error, fit.rows)
        if best is None:
            best = codes, scales, error
            continue
        better = error < best[2]
        selected[better] = number
        best = (
            np.where(better[..., None], codes, best[0]),
            np.where(better, scales, best[1]),
            np.where(better, error, best[2]),
        )
    if best is None:
        raise ValueError("no tables")
    codes, scales, error = best
    shares = np.minimum(fit.rows, m - np.arange(m) // fit.rows * fit.rows)  # rows that share a table
    total = float((error / shares[:, None]).sum(dtype=np.float64))
    return Chosen(codes, scales, selected, total, float((groups**2 * h).sum(dtype=np.float64)))


def in_groups(w: Floats, group: int, importance: Floats | None, name: str) -> tuple[Floats, Floats]:
    """Weights float32 (m, groups, group), zeros behind their end; h float32 (groups, group), zero there."""
    m, k = w.shape
    if not np.isfinite(w).all():
        raise FileError(f"{name} holds NaN or infinity; the file is damaged")
    wide = -(-k // group) * group
    padded = np.zeros((m, wide), np.float32)
    padded[:, :k] = w
    h = np.zeros(wide, np.float32)
    h[:k] = 1 if importance is None else importance
    return padded.reshape(m, -1, group), h.reshape(-1, group)


def extremes(groups: Floats) -> Floats:
    """Of each row and group the weight with the largest magnitude, float32 (m, groups)."""
    at = np.abs(groups).argmax(axis=-1)
    largest: Floats = np.take_along_axis(groups, at[..., None], axis=-1)[..., 0]
    return largest


def _by_table(
    groups: Floats, table: NDArray[np.int8], h: Floats, fit: Fit
) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """Codes, scales and errors (m, groups) if all used one table."""
    values = table.astype(np.float32)
    start = extremes(groups) / values[np.abs(values).argmax()]
    if fit.sign == "largest":
        return _from(groups, values, h, start, fit)
    made = _from(groups, values, h, np.abs(start), fit)
    if fit.sign == "free":
        made = _better(_from(groups, values, h, -np.abs(start), fit), made)
    return made


_Made: TypeAlias = tuple[NDArray[np.uint8], Floats, Floats]


def _from(groups: Floats, values: Floats, h: Floats, start: Floats, fit: Fit) -> _Made:
    """The same with scales near ``start``."""
    scales = _halves(start)
    cells = _cells(values)
    codes = _nearest(groups, scales, cells)
    made = codes, scales, _errors(groups, values[codes], scales, h)
    for _ in range(_ROUNDS if fit.fitted else 0):
        found = values[made[0]]
        weighted = found * h
        below = (weighted * found).sum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            scales = _halves(np.where(below > 0, (weighted * groups).sum(axis=-1) / below, 0))
        codes = _nearest(groups, scales, cells)
        # Rounding to f16 may lose what the last round gained.
        made = _better((codes, scales, _errors(groups, values[codes], scales, h)), made)
    return made


def _better(new: _Made, old: _Made) -> _Made:
    """Of each row and group what has the smaller error, the old one of two that are equal."""
    gains = new[2] < old[2]
    return (
        np.where(gains[..., None], new[0], old[0]),
        np.where(gains, new[1], old[1]),
        np.minimum(new[2], old[2]),
    )


def _halves(scales: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return scales.astype(np.float16).astype(np.float32)


def _cells(values: Floats) -> NDArray[np.uint8]:
    """By ceil(2 x) + `_HALVES`: the code of the value nearest to x, the lower one of two that are as near.

    Values are integers, so that the middles between them are halves of integers, and this is exact.
    """
    distinct, first = np.unique(values, return_index=True)
    doubled = np.arange(-_HALVES, _HALVES + 1)
    return first.astype(np.uint8)[np.searchsorted(distinct[1:] + distinct[:-1], doubled)]


def _nearest(groups: Floats, scales: Floats, cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The codes of the values nearest to w / scale; of 0 where the scale is 0."""
    doubled = groups * np.where(scales == 0, 0, 2 / np.where(scales == 0, 1, scales))[..., None]
    np.ceil(doubled, out=doubled)
    doubled += _HALVES
    np.clip(doubled, 0, 2 * _HALVES, out=doubled)
    codes: NDArray[np.uint8] = cells[doubled.astype(np.intp)]
    return codes


def _errors(groups: Floats, values: Floats, scales: Floats, h: Floats) -> Floats:
    off = groups - values * scales[..., None]
    off *= off
    errors: Floats = np.einsum("mgk,gk->mg", off, h)
    return errors


def _shared(error: Floats, rows: int) -> Floats:
    """The errors of all rows that share a table, added up, for each of them."""
    if rows == 1:
        return error
    starts = np.arange(0, len(error), rows)
    return np.repeat(np.add.reduceat(error, starts, axis=0), rows, axis=0)[: len(error)]
