"""CPUs known by name (configs/targets.yaml), to build libraries for machines that are not here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitgen.cpu.machine import Cache, Cpu
from bitgen.errors import unknown
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

_VENDORS = {"AMD": "AuthenticAMD", "Intel": "GenuineIntel"}  # as cpuid names them


@dataclass(frozen=True)
class _Entry:
    arch: str
    family: str
    model_name: str
    features: frozenset[str]
    l1d_kib: int
    l2_kib: int
    llc_kib: int
    cores: int
    sve_bytes: int = 0

    def cpu(self, system: str) -> Cpu:
        sizes = (
            (1, "Data", self.l1d_kib, 1),
            (2, "Unified", self.l2_kib, 1),
            (3, "Unified", self.llc_kib, self.cores),
        )
        return Cpu(
            os=system,
            arch=self.arch,
            vendor=_VENDORS.get(maker := self.model_name.partition(" ")[0], maker),
            model_name=self.model_name,
            family=self.family,
            features=self.features,
            logical_cpus=self.cores,
            physical_cores=self.cores,
            usable_threads=self.cores,
            caches=tuple(Cache(level, kind, kib << 10, 64, shared) for level, kind, kib, shared in sizes),
            sve_bytes=self.sve_bytes,
        )


@dataclass(frozen=True)
class _File:
    targets: dict[str, _Entry]


def target_names() -> tuple[str, ...]:
    """The CPUs `target_cpu` knows."""
    return tuple(_targets(configs_dir() / "targets.yaml"))


def target_cpu(name: str, system: str = "Linux") -> Cpu:
    """The CPU called ``name`` ("neoverse-n1", "Neoverse_N1") under ``system`` (Linux or Darwin).

    UsageError when there is none of this name.
    """
    known = _targets(configs_dir() / "targets.yaml")
    folded = name.lower().replace("_", "-")
    if folded in known:
        return known[folded].cpu(system)
    raise unknown("target", name, known)


@cache
def _targets(path: Path) -> dict[str, _Entry]:
    return load(_File, load_yaml(path), str(path)).targets
