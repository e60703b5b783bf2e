"""One measurement at a time on a machine: two that overlap would time each other."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bitgen.paths import cache_dir, ensure_dir

_POLL_S = 0.2


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class MachineLock:
    """A lock in ``folder`` (default: the cache folder); the operating system frees it when its holder dies.

    Compiling disturbs timings too, so it is held for a whole run and not for each measurement. ``report``
    gets one line when there is somebody to wait for.
    """

    def __init__(self, folder: Path | None = None, report: Callable[[str], None] = _to_stderr) -> None:
        self._folder = folder if folder is not None else cache_dir()
        self._report = report
        self._held: contextlib.ExitStack | None = None

    def acquire(self) -> None:
        """Take the lock, waiting for as long as it takes; nothing when it is held by this object already."""
        if self._held is not None:
            return
        from filelock import FileLock, Timeout  # 35 ms that a replay does not pay

        lock = FileLock(ensure_dir(self._folder) / "measure.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._report(f"{self._holder()} is measuring on this machine; waiting until it is done")
            lock.acquire(poll_interval=_POLL_S)
        stack = contextlib.ExitStack()
        stack.callback(lock.release)
        self._held = stack
        with contextlib.suppress(OSError):  # for the message above only
            self._pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")

    def release(self) -> None:
        """Give the lock back; nothing when it is not held."""
        if self._held is not None:
            with contextlib.suppress(OSError):
                self._pid_file.unlink()
            self._held.close()
            self._held = None

    @property
    def _pid_file(self) -> Path:
        return self._folder / "measure.pid"

    def _holder(self) -> str:
        try:
            return f"another bitgen (pid {int(self._pid_file.read_text(encoding='ascii'))})"
        except (OSError, ValueError):
            return "another bitgen"
