"""What is known about a machine's CPU: plain records, nothing that reads or guesses."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from itertools import accumulate

# What to assume when the system does not tell. Small L1 and L2 keep blocks in cache everywhere; a large last
# level keeps "cold" timings cold.
_L1D_BYTES, _L2_BYTES, _LLC_BYTES = 32 << 10, 256 << 10, 32 << 20


@dataclass(frozen=True)
class Cache:
    """One cache as a core sees it; ``shared_by`` logical CPUs use the same one."""

    level: int
    type: str  # Data, Instruction, Unified
    size_bytes: int
    line_bytes: int
    shared_by: int


@dataclass(frozen=True)
class Topology:
    """The cores of a machine and what of them this process may use.

    ``cores``: physical ones; ``allowed``: those with a logical CPU in the process's affinity (a cpuset,
    taskset), and ``hardware`` these logical CPUs; ``quota``: CPUs' worth of time that its cgroup may use,
    None for no limit. Of the allowed cores: ``kinds``: by kind, the fastest first, where they differ;
    ``caches``: by the last-level cache that they share, where there are several; ``nodes``: NUMA nodes.
    """

    logical: int
    cores: int
    allowed: int
    quota: float | None = None
    kinds: tuple[tuple[str, int], ...] = ()
    nodes: int = 1
    hardware: int = 1
    caches: tuple[int, ...] = ()

    @property
    def threads(self) -> int:
        """How many threads are the default: one an allowed core, within the quota.

        Rounded down: a thread beyond the quota is stopped and stalls the others at the next barrier.
        """
        return max(1, self.allowed if self.quota is None else min(self.allowed, int(self.quota)))

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of threads of which any may be the fastest, the default first.

        Fewer where memory is read as fast by some of the cores (halves, three times) or slow cores hold fast
        ones up (the fastest kinds alone); more where a core has several hardware threads.
        """
        most = max(1, self.hardware if self.quota is None else min(self.hardware, int(self.quota)))
        kinds = accumulate(count for _, count in self.kinds)
        wanted = (self.threads, *kinds, most, *(self.threads >> i for i in (1, 2, 3)))
        return tuple(dict.fromkeys(count for count in wanted if 1 <= count <= most))

    def __str__(self) -> str:
        """Why so many threads, in a line."""
        reasons = [f"one for each of {self.cores} cores"]
        if self.logical > self.cores:
            reasons[0] += f" ({self.logical} hardware threads)"
        if self.allowed < self.cores:
            reasons.append(f"affinity allows {self.allowed} of them")
        if self.quota is not None:
            reasons.append(f"the cgroup allows {self.quota:g} CPUs of time")
        return f"{self.threads}: {', '.join(reasons)}"


@dataclass(frozen=True)
class Cpu:
    """One machine's CPU. ``features`` has the names of /proc/cpuinfo, also on macOS.

    ``family`` is a label (zen5, haswell; the architecture when unknown): for people and as the key of shared
    winners, never for deciding what runs. ``usable_threads`` is the number of physical cores this process may
    use: within its affinity and its cgroup's quota, at least 1.
    """

    os: str
    arch: str
    vendor: str
    model_name: str
    family: str
    features: frozenset[str]
    logical_cpus: int
    physical_cores: int
    usable_threads: int
    caches: tuple[Cache, ...] = ()
    sve_bytes: int = 0  # of an SVE register, as the system gives them to this process; 0 without SVE

    @property
    def l1d_bytes(self) -> int:
        """Level 1 data cache of a core; 32 KiB when the system does not tell."""
        return next((c.size_bytes for c in self._data_caches if c.level == 1), _L1D_BYTES)

    @property
    def l2_bytes(self) -> int:
        """Level 2 cache as a core sees it; 256 KiB when the system does not tell."""
        return next((c.size_bytes for c in self._data_caches if c.level == 2), _L2_BYTES)

    @property
    def llc_bytes(self) -> int:
        """The last-level cache a core can use, one instance; 32 MiB when the system does not tell."""
        llc = self._llc
        return llc.size_bytes if llc else _LLC_BYTES

    @property
    def llc_total_bytes(self) -> int:
        """All instances of the last-level cache together (chiplets, sockets)."""
        llc = self._llc
        return llc.size_bytes * math.ceil(self.logical_cpus / llc.shared_by) if llc else _LLC_BYTES

    @property
    def _data_caches(self) -> tuple[Cache, ...]:
        return tuple(sorted((c for c in self.caches if c.type != "Instruction"), key=lambda c: c.level))

    @property
    def _llc(self) -> Cache | None:
        # A machine that tells only about L1 has not told about its last level.
        return next((c for c in reversed(self._data_caches) if c.level >= 2), None)


def cpu_key(cpu: Cpu) -> str:
    """Stands for a CPU and the threads it gives: times of another one do not count."""
    parts = (cpu.os, cpu.arch, cpu.family, cpu.model_name, sorted(cpu.features), cpu.sve_bytes)
    return hashlib.sha256(repr((*parts, cpu.usable_threads)).encode()).hexdigest()[:16]
