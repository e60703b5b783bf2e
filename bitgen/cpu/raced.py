"""Numbers of threads that were raced on this machine, as `bitgen.inference.thread_race` remembers them.

::

    CACHE/races/threads-MACHINE-WORK.json      digests: CPU and cores; library and shapes
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitgen.cpu.detect import detect_cpu, detect_topology
from bitgen.cpu.machine import Topology, cpu_key
from bitgen.errors import BitgenError
from bitgen.paths import cache_dir
from bitgen.records import load, load_json


@dataclass(frozen=True)
class Raced:
    """What a race found for a model on ``cpu``: a session on ``threads``, and by the number of threads.

    ``default``: of the library; ``costs_ns``: by the names of the numbers.
    """

    cpu: str
    model: str
    threads: int
    default: int
    costs_ns: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """What was chosen and why, in a line."""
        own = self.costs_ns.get(str(self.default), 0.0)
        others = {count: own / cost for count, cost in self.costs_ns.items() if count != str(self.default)}
        speeds = ", ".join(f"{count} {speed:.2f} times as fast" for count, speed in others.items())
        what = "stay" if self.threads == self.default else f"instead of {self.default}"
        return f"{self.threads} {what} ({speeds if own else 'undecided: they are too slow to be raced'})"


def race_file(cores: Topology, work: str) -> Path:
    """Where a race of ``work`` is remembered, for a process that may use ``cores`` of this machine.

    They count by kinds, not by numbers: a cpuset of other, equal cores is the same machine.
    """
    machine = hashlib.sha256(f"{cpu_key(detect_cpu())} {cores!r}".encode()).hexdigest()[:16]
    return cache_dir() / "races" / f"threads-{machine}-{work}.json"


def recall(file: Path) -> Raced | None:
    """What a file remembers; None where there is none, or it is damaged."""
    try:
        return load(Raced, load_json(file), str(file))
    except BitgenError:
        return None


def raced_here() -> list[Raced]:
    """What races found on this machine with what this process may use of it."""
    pattern = race_file(detect_topology(), "*")
    return [raced for file in sorted(pattern.parent.glob(pattern.name)) if (raced := recall(file))]
