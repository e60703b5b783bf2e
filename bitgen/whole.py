"""Files that are there whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_numbers = itertools.count()  # two threads may write the same file, and so may two machines that share a home


@contextlib.contextmanager
def whole(path: Path, *, synced: bool = True, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends without an error.

    Whoever reads ``path`` sees the file of before or the whole new one, whenever this process ends, and, of
    one that is ``synced``, the machine: not worth its time for what can be made again. ``private``: for its
    owner only. OSErrors are passed on: what could not be written, the caller knows. What processes that were
    killed had begun is deleted.
    """
    fresh = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{next(_numbers)}")
    _tidy(path)
    fresh.unlink(missing_ok=True)  # of a killed process that had the same number
    try:
        mode = 0o600 if private else 0o666
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        with contextlib.suppress(OSError):  # a folder that cannot be written: the first error says it
            fresh.unlink(missing_ok=True)


def _tidy(path: Path) -> None:
    """Delete what processes of this machine had begun that live no more."""
    start = f".{path.name}.{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(start)}*"):
        process = left.name.removeprefix(start).partition("-")[0]
        if process.isdigit():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)
            except (OSError, OverflowError):  # somebody else's
                continue
