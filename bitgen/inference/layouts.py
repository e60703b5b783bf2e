"""Which layout a model's matrices are packed in where the library leaves it open, or memory decides.

A library has kernels of several layouts, and knows the best one for the shapes that it was tuned for. For
the shapes of other models its layouts are raced the first time, on weights that come from memory, and the
outcome is remembered for this CPU. Where a model does not fit, the smallest layout is taken. All of them
give the same bits. Weights in groups have one layout.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bitgen.cpu import cpu_key, detect_cpu, load_isas
from bitgen.errors import BitgenError
from bitgen.families.base import TERNARY
from bitgen.formats.config import Matmul, ModelConfig
from bitgen.formats.weights import Weights
from bitgen.inference import first_use
from bitgen.inference.weight_cache import GroupsOf, PackedMatrix, named_matrices
from bitgen.progress import Progress, Report
from bitgen.records import load, load_json
from bitgen.runtime import KernelTable, Linear
from bitgen.spec import Shape

BUDGET_S = 8.0  # of rounds, all shapes together; with packing the race takes 10 s
_WEIGHTS = 1 << 24  # of a matrix that is raced: rows beyond change nothing but the time it takes to pack them
_PROBE = Shape(64, 512)  # weights that show which kernel a layout has for shapes nobody tuned


class Option(NamedTuple):
    """A layout that a library has kernels for."""

    family: str
    row_block: int

    @property
    def name(self) -> str:
        return f"{self.family}_r{self.row_block}"

    @classmethod
    def named(cls, name: str) -> Option:
        family, _, rows = name.rpartition("_r")
        return cls(family, int(rows))


def options_of(table: KernelTable) -> list[Option]:
    """The layouts whose kernels for any shape are of the library's best ISA level here, its own first."""
    w = np.zeros((_PROBE.m, _PROBE.k), np.int8)
    own, level = table.layout_name(_PROBE), table.linear(w, 1.0).kernel(1).isa
    every = _every_option(table)
    found = [option for option in every if option.name == own]
    try:
        for option in every:
            if option.name == own or not table.prefer(_PROBE, *option):
                continue
            if table.linear(w, 1.0).kernel(1).isa == level:
                found.append(option)
    finally:
        table.prefer(_PROBE, None)
    return found


def _every_option(table: KernelTable) -> list[Option]:
    """The layouts of all kernels, whatever shapes and ISA levels they are for."""
    return list(dict.fromkeys(Option(kernel.family, kernel.row_block) for kernel in table.kernels))


def pack_smaller(
    table: KernelTable, weights: Weights, groups: GroupsOf, progress: Report | None = None
) -> bool:
    """Have a model's matrices packed in the smallest layouts that there are; whether that changes any."""
    matrices = named_matrices(weights)
    shapes = dict.fromkeys(matrix.shape for name, matrix in matrices.items() if groups[name] is None)
    options, changed = options_of(table), {}
    for shape in shapes:
        own = Option.named(table.layout_name(shape))
        sizes = {own: table.packed_bytes(shape)}
        for option in options:
            if table.prefer(shape, *option):
                sizes.setdefault(option, table.packed_bytes(shape))
        least = min(sizes, key=sizes.__getitem__)
        table.prefer(shape, *least)
        if least != own:
            changed[shape] = least
    if changed and progress:
        names = ", ".join(sorted({option.name for option in changed.values()}))
        progress(Progress(f"memory is short: weights are packed as {names}, the smallest here", lasting=True))
    return bool(changed)


def settle_layouts(table: KernelTable, config: ModelConfig, progress: Report | None = None) -> None:
    """Choose layouts for shapes that the library was not tuned for: remembered ones, else by a race now."""
    if config.weights != TERNARY or config.group or not first_use.is_wanted():
        return
    tuned = {kernel.shape for kernel in table.kernels}
    matmuls = [matmul for matmul in config.matmuls if matmul.shape not in tuned]
    if sum(table.packed_bytes(m.shape) * m.count for m in matmuls) < first_use.WORTH:
        return
    if (file := _file(table)) is None:
        return
    known = recall(file)
    missing = [matmul for matmul in matmuls if matmul.shape.name not in known.layouts]
    if missing:
        if len(options := options_of(table)) < 2:  # packs a matrix in each: not for what is remembered
            return
        found = race(table, missing, options, progress)
        known = Settled(known.cpu, {**known.layouts, **found})
        first_use.keep(file, known)
    by_name = {option.name: option for option in _every_option(table)}
    for matmul in matmuls:
        if option := by_name.get(known.layouts[matmul.shape.name]):
            table.prefer(matmul.shape, *option)


def tell_portable(
    table: KernelTable, config: ModelConfig, matrices: Iterable[PackedMatrix], progress: Report
) -> None:
    """Say where a library has portable kernels alone for matrices, and better ones for other weights.

    Portable code is tens of times slower than that of an ISA level.
    """
    portable = {isa.name for isa in load_isas() if isa.generic}
    slow = {one.group for one in matrices if table.kernel_for(one.data, 1).isa in portable}
    if not slow:
        return
    level = table.linear(np.zeros((_PROBE.m, _PROBE.k), np.int8), 1.0).kernel(1).isa
    if level not in portable:
        groups = " and ".join(map(str, sorted(slow)))
        text = (
            f"slow, portable kernels run: {table.path.name} has no {level} ones for {config.weights} weights "
            f"in groups of {groups}; with a C compiler here and without --library a library is built that has"
        )
        progress(Progress(text, lasting=True))


# ---- the race ----


def race(
    table: KernelTable, matmuls: Sequence[Matmul], options: Sequence[Option], progress: Report | None = None
) -> dict[str, str]:
    """The layout that costs least, by the name of each shape; the first of ``options`` stays where near.

    Each call of a layout is followed by one of the next, on copies that no cache holds any more. A time is
    the lower quartile of its rounds: other work on the machine only adds to it.
    """
    began, found, saved = time.perf_counter(), {}, []
    names = ", ".join(option.name for option in options)
    for at, matmul in enumerate(matmuls):
        if progress:
            progress(Progress(f"racing {names}, once", at, len(matmuls), "shapes"))
        costs = _costs(table, matmul.shape, options, BUDGET_S / len(matmuls))
        best = min(costs, key=costs.__getitem__)
        best = best if costs[best] <= (1 - first_use.MARGIN) * costs[options[0]] else options[0]
        found[matmul.shape.name] = best.name
        saved.append((costs[options[0]], costs[best], matmul.count * matmul.shape.m))
    if progress:
        progress(Progress(_outcome(options, found, saved, time.perf_counter() - began), lasting=True))
    return found


def _outcome(
    options: Sequence[Option],
    found: Mapping[str, str],
    costs: Sequence[tuple[float, float, int]],
    seconds: float,
) -> str:
    """What a race found, in one line; ``costs``: own, best and weight of each shape."""
    own, best = (sum(each[i] * each[2] for each in costs) for i in (0, 1))
    chosen = dict.fromkeys(found.values())
    if list(chosen) == [options[0].name]:
        what = f"{options[0].name} stays"
    else:
        what = f"{', '.join(chosen)} instead of {options[0].name} alone, {own / best:.2f} times as fast"
    undo = f"{first_use.RACE_VARIABLE}=0: no race"
    return f"nobody tuned these shapes; a race of {seconds:.0f} s: {what} ({undo})"


def _costs(
    table: KernelTable, shape: Shape, options: Sequence[Option], budget_s: float
) -> dict[Option, float]:
    """Nanoseconds of a session with a matrix of a shape, over its rows, in each layout."""
    rows = first_use.rows_of(shape, _WEIGHTS)
    w = np.random.default_rng(0).integers(-1, 2, (rows, shape.k), np.int8)
    takers = {option: cycle(pool).__next__ for option, pool in _pools(table, w, options).items()}
    costs = first_use.in_turns(takers, shape.k, time.perf_counter() + budget_s, least=2)
    return {option: cost / rows for option, cost in costs.items()}


def _pools(table: KernelTable, w: NDArray[np.int8], options: Sequence[Option]) -> dict[Option, list[Linear]]:
    """Copies of one matrix in each layout, which no cache holds all of."""
    shape, each = Shape(*w.shape), first_use.pool_bytes() // len(options)
    pools: dict[Option, list[Linear]] = {}
    try:
        for option in options:
            table.prefer(shape, *option)
            pools[option] = first_use.copies_of(table.linear(w, 1.0), each)
    finally:
        table.prefer(shape, None)
    return pools


# ---- what is remembered ----


@dataclass(frozen=True)
class Settled:
    """Layouts by the names of shapes, as races on ``cpu`` found them for one library."""

    cpu: str
    layouts: Mapping[str, str] = field(default_factory=dict)


def recall(file: Path) -> Settled:
    """What races found before; without layouts where there were none, or the file is damaged."""
    try:
        return load(Settled, load_json(file), str(file))
    except BitgenError:
        return Settled(detect_cpu().model_name)


def _file(table: KernelTable) -> Path | None:
    """For this CPU, the library and its threads; None for a library outside a bundle, which has no name."""
    if (library := first_use.library_digest(table)) is None:
        return None
    key = first_use.digest(cpu_key(detect_cpu()), library, table.threads)
    return first_use.race_file(f"layouts-{key}.json")
