"""Tables that are learned from the weights of a matrix: k-means of tables, each a k-means of values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bitgen.families.base import VALUE_MAX
from bitgen.formats.config import Floats
from bitgen.formats.table_types import ROWS
from bitgen.quantize.fit import Fit, Tables, extremes, in_groups

_BINS = 2048
_CENTRES = ((np.arange(_BINS) + 0.5) * (2 / _BINS) - 1).astype(np.float64)
_LLOYD, _TURNS = 40, 20  # iterations at most


def learn_tables(
    slabs: Sequence[Floats], levels: int, count: int, fit: Fit, importance: Floats | None, name: str
) -> Tables:
    """``count`` tables of ``levels`` values for rows of a matrix: int8 (count, levels), ascending.

    Each 16 rows and group go to the table that fits them best, and each table becomes the k-means (Lloyd) of
    the weights that came to it, every weight divided by the largest of its row and group, sign included. A
    weight counts as its error would: h times the square of what it was divided by. ``slabs``: the rows to
    learn from, each a multiple of 16.
    """
    mass = np.concatenate([_histograms(slab, fit, importance, name) for slab in slabs])
    moments = mass * _CENTRES
    spread = (moments * _CENTRES).sum(axis=1) / np.maximum(mass.sum(axis=1), 1e-300)
    members = np.argsort(np.argsort(spread)) * count // len(mass)  # quantiles of the spread to begin with
    tables = np.stack([_start(mass[members == t].sum(axis=0) + 1e-300, levels) for t in range(count)])
    for _ in range(_TURNS):
        for t in range(count):
            if (members == t).any():
                tables[t] = _lloyd(
                    tables[t], mass[members == t].sum(axis=0), moments[members == t].sum(axis=0)
                )
        off = np.stack([(_CENTRES - table[_cells(table)]) ** 2 for table in tables])
        before, members = members, (mass @ off.T).argmin(axis=1)
        if (before == members).all():
            break
    scaled = tables * (VALUE_MAX / np.abs(tables).max(axis=1, keepdims=True))
    made: Tables = np.rint(scaled).astype(np.int8)
    return made


def _histograms(w: Floats, fit: Fit, importance: Floats | None, name: str) -> NDArray[np.float64]:
    """Of each 16 rows and group how much counts where between -1 and 1: (units, bins)."""
    groups, h = in_groups(w, fit.group, importance, name)
    largest = extremes(groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        x = np.where(largest[..., None] == 0, 0, groups / largest[..., None])
    counts = largest[..., None] ** 2 * h
    bins = np.clip(((x + 1) * (_BINS / 2)).astype(np.int64), 0, _BINS - 1)
    units = np.arange(len(w))[:, None] // ROWS * groups.shape[1] + np.arange(groups.shape[1])
    size = -(-len(w) // ROWS) * groups.shape[1]
    places = (units[..., None] * _BINS + bins).reshape(-1)
    mass = np.bincount(places, counts.reshape(-1).astype(np.float64), size * _BINS)
    return mass.reshape(size, _BINS).astype(np.float64)


def _start(mass: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
    """Values as dense as the cube root of the mass, which is best where there are many."""
    share = np.cumsum(np.cbrt(np.maximum(mass, mass.max() * 1e-9)))
    wanted = (np.arange(levels) + 0.5) / levels * share[-1]
    start: NDArray[np.float64] = _CENTRES[np.minimum(np.searchsorted(share, wanted), _BINS - 1)]
    return start


def _cells(table: NDArray[np.float64]) -> NDArray[np.int64]:
    """Of each bin the value nearest to it."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, _CENTRES)


def _lloyd(
    table: NDArray[np.float64], mass: NDArray[np.float64], moment: NDArray[np.float64]
) -> NDArray[np.float64]:
    for _ in range(_LLOYD):
        cells = _cells(table)
        weight = np.bincount(cells, mass, len(table))
        mean = np.bincount(cells, moment, len(table)) / np.where(weight > 0, weight, 1)
        after = np.where(weight > 0, mean, table)
        if np.abs(after - table).max() < 1e-5:
            break
        table = after
    return table
