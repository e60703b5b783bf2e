"""How busy a machine's owner keeps it, from /proc/stat; None where the system does not tell."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_S = 0.3


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
    spent = [b - a for a, b in zip(before, after, strict=True)]
    total = sum(spent)
    if total <= 0:
        return Load(0.0, 0.0)
    idle, steal = spent[3] + spent[4], spent[7]
    return Load(max(0.0, 1 - (idle + steal) / total), steal / total)


def _ticks(root: Path) -> list[int] | None:
    """user, nice, system, idle, iowait, irq, softirq, steal of all CPUs together."""
    try:
        words = (root / "proc" / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        return [int(word) for word in words[1:9]] if len(words) >= 9 and words[0] == "cpu" else None
    except (OSError, ValueError):
        return None
