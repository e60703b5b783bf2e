"""What running a model takes of memory, known before any work, and what to do where that is too much."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.cpu.linux import available_memory
from bitgen.errors import BitgenError

# What stays free beside weights that are held in memory on purpose: rows that are being packed, the system.
_SPARE = 512 << 20


@dataclass(frozen=True)
class Memory:
    """Bytes an engine holds: packed weights with their scales, the KV cache, work memory.

    ``head``: of the LM head that steps read from the model file's own pages, which `total` leaves out.
    """

    weights: int
    cache: int
    work: int
    head: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.work

    def needed(self, *, from_disk: bool) -> int:
        """Bytes that must be in memory at once: all, or all but weights and head, which come from disk."""
        return self.cache + self.work + (0 if from_disk else self.weights + self.head)

    def __str__(self) -> str:
        parts = [f"packed weights {self.weights >> 20:,}", f"KV cache {self.cache >> 20:,}"]
        parts += [f"work {self.work >> 20:,}", *([f"LM head {self.head >> 20:,}"] if self.head else [])]
        return ", ".join(parts)


def fits(memory: Memory) -> bool:
    """Whether there is that much memory. Weights mapped from a file count: every step reads all of them."""
    available = available_memory()
    return available is None or memory.needed(from_disk=False) <= available


def is_large(memory: Memory) -> bool:
    """Whether it takes more than half of what there is, so that its user should know."""
    available = available_memory()
    return available is not None and 2 * memory.needed(from_disk=False) > available


def describe(memory: Memory) -> str:
    """The plan in one line: what is needed, and of what there is available."""
    available = available_memory()
    room = "" if available is None else f" of {available >> 20:,} MiB available"
    return f"memory: {memory.needed(from_disk=False) >> 20:,} MiB ({memory}){room}"


def check_fits(memory: Memory, *, from_disk: bool) -> None:
    """BitgenError unless there is that much memory, before any work; without a check the system kills."""
    available, needed = available_memory(), memory.needed(from_disk=from_disk)
    if available is None or needed <= available:
        return
    ways = ["a smaller context", "fewer sequences", "keys and values of 8 bits"]
    if not from_disk and memory.needed(from_disk=True) <= available:
        ways.append("--from-disk, which reads packed weights from a file")
    raise BitgenError(
        f"too little memory: {needed >> 20:,} MiB are needed ({memory}), {available >> 20:,} MiB are "
        f"available; ask for {', '.join(ways[:-1])} or {ways[-1]}"
    )


def with_cache_that_fits(memory: Memory, least: int, *, from_disk: bool) -> Memory:
    """The same with as many bytes of keys and values as there is memory for, ``least`` at least."""
    available = available_memory()
    if available is None:
        return memory
    left = available - available // 16 - (memory.needed(from_disk=from_disk) - memory.cache)
    return replace(memory, cache=max(min(memory.cache, left), least))


def resident_bytes(memory: Memory) -> int | None:
    """How many bytes of weights can stay in memory when they come from disk; None: all of them."""
    available = available_memory()
    if available is None:
        return None
    # The head's pages are left to the system's cache of files, which keeps them where there is room.
    room = available - memory.needed(from_disk=True) - memory.head - _SPARE
    return None if room >= memory.weights else max(0, room)


def mapping_of(data: NDArray[Any]) -> mmap.mmap | None:
    """The mapped file that an array is a view of, if it is one."""
    base: Any = data
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    return base if isinstance(base, mmap.mmap) else None
