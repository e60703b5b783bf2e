"""Memory of this process alone, straight from the system."""

from __future__ import annotations

import mmap

HUGE = 2 << 20  # bytes of a huge page of x86 and, with its usual pages of 4 KiB, of ARM


def private_pages(nbytes: int, flags: int = 0) -> mmap.mmap:
    """Zeroed pages, huge ones where the system has them: large arrays are then read with few misses.

    ``flags`` of mmap beside those it takes. OSError where so many addresses cannot be had.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
