"""How many threads a model runs with where nobody says, and no tune found out.

One thread a core is not always the fastest: a few cores may read memory as fast as all of them, slow cores
hold fast ones up, and a second hardware thread of a core may help. So the first time that a model runs, a
few numbers of threads are raced for a second on matrices of its shapes, and the outcome is remembered for
this CPU, what of it the process may use, the library and the shapes. Results are the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TypeAlias

import numpy as np

from bitgen.bundle import Bundle
from bitgen.cpu import detect_cpu, detect_topology
from bitgen.cpu.linux import allowed_cpus, busy_seconds
from bitgen.cpu.raced import Raced, race_file, recall
from bitgen.formats.config import ModelConfig
from bitgen.inference import first_use
from bitgen.inference.synthetic import random_matrix
from bitgen.inference.weight_cache import PackedMatrix, pack_matrix
from bitgen.progress import Progress, Report
from bitgen.runtime import Groups, KernelTable, Linear, load
from bitgen.spec import Shape

BUDGET_S = 1.2  # of rounds; with packing and copies the race takes below 2 s
_PARTS = 3  # of the race: what wins must win in each
_WEIGHTS = (
    1 << 26
)  # of a matrix that is raced: threads share whole ones, and larger ones take too long to pack
_BUSY = 0.1  # of the cores: other work that makes a race worthless
_LOOK_S = 0.1  # how long other work is looked for before a race

Costs: TypeAlias = Mapping[int, float]  # nanoseconds of a session by the number of threads


def open_table(
    library: Path | str | Bundle,
    config: ModelConfig,
    threads: int | None,
    progress: Report | None = None,
    *,
    from_disk: bool = False,
) -> KernelTable:
    """The library to run a model with, on ``threads``; None: on as many as a race finds, now or before.

    Where weights come ``from_disk`` that is what decides, and memory is short: the library's own number then.
    """
    table = load(library, threads)
    if threads is not None or from_disk:
        return table
    best = settle_threads(table, config, progress)
    if best == table.threads or table.bundle is None:
        return table
    bundle = table.bundle
    table.close()
    return load(bundle, best)


def settle_threads(table: KernelTable, config: ModelConfig, progress: Report | None = None) -> int:
    """The number of threads for a model: what a race finds now or found before.

    It is the library's own where a tune found that out, and for models that are small. It is so, and nothing
    is remembered, where the machine has other work, which would decide a race.
    """
    own, bundle, library = table.threads, table.bundle, first_use.library_digest(table)
    if not first_use.is_wanted() or bundle is None or library is None:
        return own
    cores = detect_topology()
    counts = tuple(dict.fromkeys((own, *cores.counts)))
    is_known = len(counts) < 2 or bundle.manifest.cores == cores.threads
    if is_known or _bytes_of(table, config) < first_use.WORTH:
        return own
    file = race_file(cores, first_use.digest(library, config.kind, config.matmuls))
    if (known := recall(file)) is not None:
        return known.threads
    if (parts := _quiet_race(table, bundle, counts, config, progress)) is None:
        return own
    raced = Raced(
        detect_cpu().model_name,
        config.name or config.architecture,
        choose(parts, own),
        own,
        {str(count): sum(part[count] for part in parts) for count in counts},
    )
    first_use.keep(file, raced)
    if progress:
        text = f"threads: {raced} in a race, once ({first_use.RACE_VARIABLE}=0: no race, -t: so many)"
        progress(Progress(text, lasting=True))
    return raced.threads


def choose(parts: Sequence[Costs], own: int) -> int:
    """The number of threads that costs least, if it is the clear winner in each part; else ``own``."""
    if len(parts) < _PARTS:
        return own
    total = {count: sum(part[count] for part in parts) for count in parts[0]}
    best = min(total, key=total.__getitem__)
    clear = all(part[best] <= (1 - first_use.MARGIN) * part[own] for part in parts)
    return best if clear else own


def race(tables: Mapping[int, KernelTable], config: ModelConfig) -> list[Costs]:
    """What a session costs on each number of threads, in each part of the race; fewer where it takes long."""
    rng, own = np.random.default_rng(0), next(iter(tables.values()))
    shapes = {matmul.shape: _sample(rng, matmul.shape, own, config) for matmul in config.matmuls}
    copies = {shape: cycle(pool) for shape, pool in _pools(own, shapes).items()}
    cell = BUDGET_S / (_PARTS * len(config.matmuls))
    ends = time.perf_counter() + 2 * BUDGET_S
    parts: list[Costs] = []
    for _ in range(_PARTS):
        part = dict.fromkeys(tables, 0.0)
        for matmul in config.matmuls:
            pool = copies[matmul.shape]
            takers = {count: partial(_next_on, table, pool) for count, table in tables.items()}
            if (now := time.perf_counter()) > ends:
                return parts
            costs = first_use.in_turns(takers, matmul.k, now + cell)
            for count, cost in costs.items():
                part[count] += cost * matmul.count * matmul.m / shapes[matmul.shape].shape.m
        parts.append(part)
    return parts


# ---- Inside ----


def _bytes_of(table: KernelTable, config: ModelConfig) -> int:
    groups = Groups(config.group, weights=config.weights) if config.group else None
    return sum(table.packed_bytes(matmul.shape, groups) * matmul.count for matmul in config.matmuls)


def _quiet_race(
    table: KernelTable,
    bundle: Bundle,
    counts: Sequence[int],
    config: ModelConfig,
    progress: Report | None,
) -> list[Costs] | None:
    """A race on a machine that has nothing else to do; None where it has."""
    load_of = _OtherWork()
    time.sleep(_LOOK_S)
    if load_of.is_much():
        return None
    if progress:
        progress(Progress(f"racing {', '.join(map(str, counts))} threads, once"))
    with ExitStack() as stack:
        others = {
            count: stack.enter_context(load(bundle, count)) for count in counts if count != table.threads
        }
        parts = race({table.threads: table, **others}, config)
    return None if load_of.is_much() else parts


class _OtherWork:
    """Work of other processes on the cores of this one since it was made."""

    def __init__(self) -> None:
        self._cpus = allowed_cpus()
        self._began = (time.perf_counter(), *self._busy())

    def _busy(self) -> tuple[float, float]:
        """Seconds of the cores, of this process."""
        all_of = busy_seconds(self._cpus)
        return (0.0, 0.0) if all_of is None else (all_of, time.process_time())

    def is_much(self) -> bool:
        """Whether it took more than a tenth of the cores; False where the system does not tell."""
        began, busy, own = self._began
        now, busy_now, own_now = time.perf_counter(), *self._busy()
        return (busy_now - busy) - (own_now - own) > _BUSY * len(self._cpus) * (now - began)


def _sample(rng: np.random.Generator, shape: Shape, table: KernelTable, config: ModelConfig) -> PackedMatrix:
    rows = first_use.rows_of(shape, _WEIGHTS)
    return pack_matrix(random_matrix(rng, Shape(rows, shape.k), config), table, config.group)


def _pools(table: KernelTable, samples: Mapping[Shape, PackedMatrix]) -> dict[Shape, list[Linear]]:
    """Copies of each matrix, which no cache holds all of."""
    each = first_use.pool_bytes() // len(samples)
    return {shape: first_use.copies_of(_linear(table, sample), each) for shape, sample in samples.items()}


def _linear(table: KernelTable, matrix: PackedMatrix) -> Linear:
    return Linear(table, matrix.shape, matrix.data, matrix.scale, matrix.group)


def _next_on(table: KernelTable, copies: cycle[Linear]) -> Linear:
    """The next copy, multiplied by another table's threads."""
    linear = next(copies)
    return Linear(table, linear.shape, linear.packed, linear.scales, linear.group)
