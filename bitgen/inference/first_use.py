"""What is raced when a model runs for the first time that nobody tuned: calls in turns, a session's cost.

Layouts (`bitgen.inference.layouts`) and numbers of threads (`bitgen.inference.thread_race`) are. The outcomes
are files below the cache, in ``races/``, and none is raced twice.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bitgen.cpu import detect_cpu
from bitgen.cpu.linux import available_memory
from bitgen.errors import BitgenError
from bitgen.paths import cache_dir, ensure_dir
from bitgen.records import dump
from bitgen.runtime import KernelTable, Linear, aligned_bytes
from bitgen.spec import Shape
from bitgen.trust import write_private

RACE_VARIABLE = "BITGEN_RACE"  # 0: nothing is raced, the library's own order and number of threads count

WORTH = 64 << 20  # packed bytes, below which a race takes longer than it can save
MARGIN = 0.02  # what is there already stays unless another takes so much less
# What is compared: a session of 128 steps and a prompt of 512, as tuning counts it (configs/search.yaml)
CALLS = {1: 128, 32: 16}  # of so many tokens each
_ROWS = 256  # a multiple of every layout's row block
_POOL = 512 << 20  # bytes of copies at most, which are read in turn so that they are in no cache

K = TypeVar("K", bound=Hashable)


def is_wanted() -> bool:
    """Whether the user lets anything be raced."""
    return os.environ.get(RACE_VARIABLE) != "0"


def rows_of(shape: Shape, weights: int) -> int:
    """Rows of a matrix that stand for all: whole row blocks of about so many weights."""
    return min(shape.m, max(_ROWS, weights // shape.k // _ROWS * _ROWS))


def in_turns(takers: Mapping[K, Callable[[], Linear]], k: int, ends: float, least: int = 1) -> dict[K, float]:
    """Nanoseconds of `CALLS` for each contender, called in turns until the clock says ``ends``.

    ``takers`` give the next copy of a matrix with k columns. A time is the lower quartile of its calls: other
    work on the machine only adds to it. Each has ``least`` calls of a size at least.
    """
    rng = np.random.default_rng(0)
    inputs = {n: rng.standard_normal((n, k)).astype(np.float32) for n in CALLS}
    times: dict[tuple[K, int], list[int]] = {(key, n): [] for key in takers for n in CALLS}
    turn = 0
    while time.perf_counter() < ends or turn < least:
        for n, x in inputs.items():
            for key, take in takers.items():
                linear = take()
                started = time.perf_counter_ns()
                linear(x)
                times[key, n].append(time.perf_counter_ns() - started)
        turn += 1
    return {key: sum(calls * _lower_quartile(times[key, n]) for n, calls in CALLS.items()) for key in takers}


def _lower_quartile(times: list[int]) -> float:
    return statistics.quantiles(times, n=4, method="inclusive")[0] if len(times) > 1 else float(times[0])


def pool_bytes() -> int:
    """Bytes of copies that no cache holds: twice the last-level cache, `_POOL` or a quarter of memory."""
    wanted = min(_POOL, 2 * detect_cpu().llc_total_bytes)
    room = available_memory()
    return wanted if room is None else min(wanted, room // 4)


def copies_of(linear: Linear, size: int) -> list[Linear]:
    """The packed matrix and copies of it, ``size`` bytes in all, two at least."""
    return [linear, *(_copy(linear) for _ in range(max(2, -(-size // linear.packed.size)) - 1))]


def _copy(linear: Linear) -> Linear:
    packed = aligned_bytes(linear.packed.size)
    packed[:] = linear.packed
    return Linear(linear.table, linear.shape, packed, linear.scales, linear.group)


# ---- what is remembered ----


def library_digest(table: KernelTable) -> str | None:
    """Names the library; None for one outside a bundle, whose outcomes are not kept."""
    return None if table.bundle is None else table.bundle.manifest.files[table.path.name]


def digest(*parts: object) -> str:
    """A short name of what an outcome holds for."""
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()[:16]


def race_file(name: str) -> Path:
    """The file of an outcome."""
    return cache_dir() / "races" / name


def keep(file: Path, outcome: Any) -> None:
    """Write an outcome where that is possible; else the next start races again."""
    with contextlib.suppress(OSError, BitgenError):
        ensure_dir(file.parent)
        write_private(file, (json.dumps(dump(outcome), indent=1) + "\n").encode())
