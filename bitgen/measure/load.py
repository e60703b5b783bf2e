"""How busy others keep a machine, from /proc; None where the system does not tell."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_S = 0.3
_WATCH_S = 5.0


@dataclass(frozen=True)
class Load:
    """Shares of all CPUs' time: ``busy`` with anything, ``steal`` taken by the hypervisor for others."""

    busy: float
    steal: float


def sample_load(
    root: Path = Path("/"), seconds: float = _SAMPLE_S, sleep: Callable[[float], None] = time.sleep
) -> Load | None:
    """The load of the next ``seconds``, in which the caller must be idle."""
    before = _ticks(root)
    sleep(seconds)
    after = _ticks(root)
    if before is None or after is None:
        return None
    return _load(before, after, 0)


class Watch:
    """What others took of the CPUs since the last look, while this process and its children worked.

    `look` is for moments in which nothing is timed: it reads a file a process, some milliseconds; and tells
    something every ``every_s`` seconds at the most. A process that is not waited for by its parent is one of
    the others once it has ended.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        pid: int | None = None,
        every_s: float = _WATCH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._pid = root, os.getpid() if pid is None else pid
        self._every_s, self._clock = every_s, clock
        self._at, self._last = clock(), self._ticks()

    def look(self) -> Load | None:
        """The load since the last one that was told; None where that is not long ago, or not known."""
        if self._clock() - self._at < self._every_s:
            return None
        before, now = self._last, self._ticks()
        self._at, self._last = self._clock(), now
        if before is None or now is None:
            return None
        return _load(before[0], now[0], now[1] - before[1])

    def _ticks(self) -> tuple[list[int], int] | None:
        """Those of all CPUs, and of this process with all below it."""
        whole = _ticks(self._root)
        return None if whole is None else (whole, _own_ticks(self._root, self._pid))


def _load(before: list[int], after: list[int], own: int) -> Load:
    spent = [b - a for a, b in zip(before, after, strict=True)]
    total = sum(spent)
    if total <= 0:
        return Load(0.0, 0.0)
    idle, steal = spent[3] + spent[4], spent[7]
    return Load(max(0.0, 1 - (idle + steal + max(0, own)) / total), steal / total)


def _own_ticks(root: Path, pid: int) -> int:
    """Of a process and its descendants, also those that ended and were waited for."""
    parents: dict[int, int] = {}
    spent: dict[int, int] = {}
    for file in (root / "proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state ppid ...": the name may hold anything, so from its last bracket on.
            words = file.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            parents[int(file.parent.name)] = int(words[1])
            spent[int(file.parent.name)] = sum(map(int, words[11:15]))
        except (OSError, ValueError, IndexError):  # it ended meanwhile
            continue
    own, found = {pid}, 0
    while len(own) > found:
        found = len(own)
        own |= {child for child, parent in parents.items() if parent in own}
    return sum(spent.get(each, 0) for each in own)


def _ticks(root: Path) -> list[int] | None:
    """user, nice, system, idle, iowait, irq, softirq, steal of all CPUs together."""
    try:
        words = (root / "proc" / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        return [int(word) for word in words[1:9]] if len(words) >= 9 and words[0] == "cpu" else None
    except (OSError, ValueError):
        return None
