"""Memory for kernels: buffers that end at an unmapped page, and pools of weights larger than the caches."""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.cpu.linux import available_memory
from bitgen.cpu.pages import HUGE, private_pages
from bitgen.errors import BitgenError
from bitgen.measure.harness import Harness

_PAGE = mmap.PAGESIZE
_NONE, _READ, _READ_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
# Pools that are kept: a race of all families has nine layouts, 2.3 GiB where pools have 256 MiB.
_POOLS_BYTES, _POOLS_SHARE = 3 << 30, 4  # at most this, and at most a quarter of the memory there is
_STEP = 64 << 20  # mappings are multiples of it, so that one of another shape fits
FILL = 0x5A  # what surrounds a buffer on its own pages


class Guarded:
    """Memory whose last byte is the last of its page, between two pages that fault when touched.

    ``align`` moves the start down to a multiple of it, so up to ``align - 1`` bytes behind the end stay
    reachable. ``seal`` makes it read-only.
    """

    def __init__(self, harness: Harness, nbytes: int, align: int = 1) -> None:
        inner = -(-max(nbytes, 1) // _PAGE) * _PAGE
        self._harness = harness
        # Private: only then can large ones have huge pages, as the outputs of a library's steps do.
        self._map = private_pages(inner + 2 * _PAGE)
        self._base = int(harness.ffi.cast("uintptr_t", harness.ffi.from_buffer(self._map)))
        self._inner = inner
        self._protect(0, _PAGE, _NONE)
        self._protect(_PAGE + inner, _PAGE, _NONE)
        self.address = (self._base + _PAGE + inner - nbytes) // align * align
        self.nbytes = nbytes
        start = self.address - self._base
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, nbytes, start)
        np.frombuffer(self._map, np.uint8, inner, _PAGE)[:] = FILL

    @property
    def end(self) -> int:
        """The address of the page behind."""
        return self._base + _PAGE + self._inner

    def seal(self) -> None:
        """From now on a write to it is a fault."""
        self._protect(_PAGE, self._inner, _READ)

    def pointer(self, ctype: str, address: int | None = None) -> Any:
        """The start, or another address, as a C pointer."""
        return self._harness.ffi.cast(ctype, self.address if address is None else address)

    def _protect(self, offset: int, nbytes: int, access: int) -> None:
        at = self._harness.ffi.cast("void *", self._base + offset)
        if self._harness.libc.mprotect(at, nbytes, access) != 0:
            raise BitgenError("the system refuses guard pages (too many mappings?)")


def guarded_copy(harness: Harness, data: NDArray[Any], align: int = 1) -> Guarded:
    """A sealed copy of ``data``."""
    buffer = Guarded(harness, data.nbytes, align)
    buffer.bytes[:] = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    buffer.seal()
    return buffer


@dataclass(frozen=True)
class Pool:
    """Packed weights over and over: copy i of a matrix starts at ``address + i * step``."""

    memory: mmap.mmap
    address: int
    nbytes: int


class Pools:
    """Large buffers of repeated packed rows, kept while they fit 3 GiB together; the least used one goes.

    Those asked for since the last `release` are in use: none of them goes, whatever they take.

    Anonymous private memory in 2 MiB pages, as numpy has for its large arrays: a forked process reads the
    worker's pages and copies none.
    """

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._pools: OrderedDict[tuple[Any, ...], Pool] = OrderedDict()
        self._spare: list[mmap.mmap] = []  # the memory of pools that went
        self._in_use: set[tuple[Any, ...]] = set()
        available = available_memory()
        self._most = min(_POOLS_BYTES, available // _POOLS_SHARE) if available else _POOLS_BYTES

    def release(self) -> None:
        """Nobody reads the pools that were handed out so far."""
        self._in_use.clear()

    def get(self, key: tuple[Any, ...], nbytes: int, content: Callable[[], NDArray[np.uint8]]) -> Pool:
        """At least ``nbytes`` of repetitions of ``content()``; a large enough pool of ``key`` is reused.

        The start of the pool is 64-byte aligned (a page).
        """
        pool = self._pools.pop(key, None)
        if pool is None or pool.nbytes < nbytes:
            if pool is not None and key not in self._in_use:
                self._spare.append(pool.memory)
            pool = self._filled(self._memory(nbytes), nbytes, content())
        self._pools[key] = pool
        self._in_use.add(key)
        return pool

    def _memory(self, nbytes: int) -> mmap.mmap:
        """A mapping for ``nbytes``, if possible one that was used before.

        New pages cost a virtual machine 1.5 s a GiB at their first touch, filling those it has 0.15 s.
        """
        wanted = -(-(nbytes + HUGE) // _STEP) * _STEP
        while True:
            fitting = [memory for memory in self._spare if len(memory) >= wanted]
            if fitting:
                memory = min(fitting, key=len)
                self._spare.remove(memory)
                return memory
            held = [*self._spare, *(pool.memory for pool in self._pools.values())]
            if sum(map(len, held)) + wanted <= self._most or not held:
                return private_pages(wanted)
            idle = next((key for key in self._pools if key not in self._in_use), None)
            if self._spare:
                self._spare.pop()
            elif idle is not None:
                self._spare.append(self._pools.pop(idle).memory)
            else:
                return private_pages(wanted)

    def _filled(self, memory: mmap.mmap, nbytes: int, unit: NDArray[np.uint8]) -> Pool:
        base = int(self._harness.ffi.cast("uintptr_t", self._harness.ffi.from_buffer(memory)))
        address = -(-base // HUGE) * HUGE  # whole huge pages only
        view = np.frombuffer(memory, np.uint8, nbytes, address - base)
        whole = nbytes // unit.size
        view[: whole * unit.size].reshape(whole, unit.size)[:] = unit
        view[whole * unit.size :] = unit[: nbytes - whole * unit.size]
        return Pool(memory, address, nbytes)
