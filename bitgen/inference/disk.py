"""Models larger than memory: the packed weights that fit stay in memory, the rest comes from disk each step.

Pages of a file that is read over and over, and is larger than what the system caches of it, are all gone when
they are asked for again. So the first matrices are copied out of the file and stay, and only what is left
over is read.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitgen.inference.weight_cache import PackedMatrix, PackedModel, release_pages
from bitgen.runtime import aligned_bytes

_PIECE = 4 << 20  # bytes of one read; disks reach their rate from about 1 MiB on
_AT_ONCE = 4  # reads in flight, as page faults of a few threads with readahead keep
_PROBE_S = 1.0


def hold(packed: PackedModel, budget: int) -> tuple[PackedModel, int]:
    """The model with its first matrices copied into memory, and the bytes that are left on disk.

    ``budget``: bytes of the copies at most.
    """
    left, on_disk = budget, 0

    def held(matrix: PackedMatrix) -> PackedMatrix:
        nonlocal left, on_disk
        if matrix.data.nbytes > left:
            left = 0  # what comes behind is read in one stretch
            on_disk += matrix.data.nbytes
            return matrix
        left -= matrix.data.nbytes
        copy = aligned_bytes(matrix.data.nbytes)
        copy[:] = matrix.data
        release_pages(matrix.data)
        return replace(matrix, data=copy)

    layers = tuple({role: held(matrix) for role, matrix in layer.items()} for layer in packed.layers)
    held_head = None if packed.head is None else held(packed.head)
    return replace(packed, layers=layers, head=held_head), on_disk


def read_rate(path: Path, behind: int) -> float:
    """Bytes a second at which the last ``behind`` bytes of a file are read, past the system's cache."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        file = os.open(path, os.O_RDONLY | direct)
    except OSError:  # a file system without direct reads
        file, direct = os.open(path, os.O_RDONLY), 0
    try:
        size = os.fstat(file).st_size
        first = max(0, size - behind) // _PIECE * _PIECE
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, first, size - first, os.POSIX_FADV_DONTNEED)
        return _timed_reads(file, np.arange(first, size, _PIECE))
    finally:
        os.close(file)


def _timed_reads(file: int, offsets: NDArray[np.int64]) -> float:
    """Bytes a second over pieces at these offsets, in an order that no readahead guesses, for a second."""
    np.random.default_rng(0).shuffle(offsets)
    started, ends = time.perf_counter(), time.perf_counter() + _PROBE_S
    pending = iter(offsets.tolist())

    def reads() -> int:
        done = 0
        with contextlib.closing(mmap.mmap(-1, _PIECE)) as buffer:  # direct reads want whole pages
            for offset in pending:
                done += os.preadv(file, [buffer], offset)
                if time.perf_counter() >= ends:
                    break
        return done

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        total = sum(each.result() for each in [pool.submit(reads) for _ in range(_AT_ONCE)])
    return total / max(time.perf_counter() - started, 1e-9)
