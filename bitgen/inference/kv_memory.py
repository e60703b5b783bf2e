"""Memory for keys and values: reserved for all positions, taken where they are written, given back."""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitgen.cpu.pages import private_pages

# Linux: no promise of memory for what is only reserved; the module has no name for it before Python 3.13.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class Capacity:
    """How many sequences run at once, how many more slots keep what they held, and the memory of them all.

    ``pinned`` slots are for what `Scheduler.pin` keeps. ``bytes`` None: as much as ``parallel`` + ``pinned``
    sequences of the whole context take. Where there is less memory than that, there is less for them. With
    ``shared`` a start is reused whoever computed it, of which others may then learn by the times.
    """

    parallel: int
    parked: int = 0
    pinned: int = 0
    bytes: int | None = None
    shared: bool = False

    @property
    def slots(self) -> int:
        return self.parallel + self.parked + self.pinned

    def bytes_of(self, whole: int) -> int:
        """The bytes that are asked for, where a sequence of the whole context takes ``whole``."""
        return self.bytes or (self.parallel + self.pinned) * whole


class KvMemory:
    """``data``: zeroed bytes, uint8 (size). MemoryError where so many addresses cannot be had."""

    def __init__(self, size: int) -> None:
        self._map: mmap.mmap | None = None
        if sys.platform == "win32":  # takes memory as it is written too, but cannot give it back
            self.data: NDArray[np.uint8] = np.zeros(size, np.uint8)
            return
        try:
            self._map = private_pages(size, _NO_RESERVE)  # a chunk is MBs in one piece, all of it written
        except OSError:
            raise MemoryError from None
        self.data = np.frombuffer(self._map, np.uint8)

    def give_back(self, begin: int, end: int) -> None:
        """Let the system have the whole pages of [begin, end), whose bytes are then undefined."""
        page = mmap.PAGESIZE
        begin, end = -(-begin // page) * page, end // page * page
        if self._map is not None and begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)
