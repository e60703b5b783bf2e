"""The CPU family label: zen5, haswell, neoverse_n1. For people and as a key of winners, no more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitgen.cpu.named import target_cpu, target_names
from bitgen.errors import BitgenError
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

_ARCHS = {"amd64": "x86_64", "x64": "x86_64", "arm64": "aarch64"}


def normal_arch(machine: str) -> str:
    """The name this project uses for what platform.machine() says: x86_64, aarch64, ..."""
    name = machine.lower()
    return _ARCHS.get(name, name)


@dataclass(frozen=True)
class CpuFamily:
    """One line of configs/cpu_families.yaml. Hexadecimal numbers and ranges: "55", "30-4f 60-7f".

    ``lacks``: features that none of them has, newer ones as a rule.
    """

    label: str
    vendor: str
    family: int
    models: str
    steppings: str = "0-ff"
    lacks: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        try:
            ranges = (*self.model_ranges, *self.stepping_ranges)
        except ValueError as error:
            raise BitgenError(f"models and steppings must be hexadecimal ranges: {error}") from error
        if any(first > last for first, last in ranges):
            raise BitgenError("models and steppings must be ranges first-last")

    @property
    def model_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of each range of models."""
        return tuple(map(_bounds, self.models.split()))

    @property
    def stepping_ranges(self) -> tuple[tuple[int, int], ...]:
        """(first, last) of each range of steppings."""
        return tuple(map(_bounds, self.steppings.split()))

    def holds(self, vendor: str, family: int, model: int, stepping: int) -> bool:
        """Whether a CPU with these numbers belongs to the family."""
        same = (self.vendor, self.family) == (vendor, family)
        return same and _within(model, self.model_ranges) and _within(stepping, self.stepping_ranges)


@dataclass(frozen=True)
class _File:
    cpu_families: tuple[CpuFamily, ...]


def load_cpu_families(file: Path | None = None) -> tuple[CpuFamily, ...]:
    """The families of ``file`` (default: configs/cpu_families.yaml); BitgenError when it is wrong."""
    return _read(file) if file is not None else _own_families(configs_dir() / "cpu_families.yaml")


@cache
def _own_families(path: Path) -> tuple[CpuFamily, ...]:
    """An installation's own file is read once: 20 ms, and opening a library detects the CPU twice."""
    return _read(path)


def _read(path: Path) -> tuple[CpuFamily, ...]:
    return load(_File, load_yaml(path), str(path)).cpu_families


def family_label(
    processor: Mapping[str, str], arch: str, features: frozenset[str], families: Iterable[CpuFamily]
) -> str:
    """The label of one processor of /proc/cpuinfo: by ``families``, else archspec's, else ``arch``.

    By numbers first, because a hypervisor hides features at will and archspec judges by features. Numbers
    that the features contradict are a hypervisor's too: then features decide.
    """
    vendor = (processor.get("vendor_id") or processor.get("CPU implementer") or "").strip()
    numbers = _numbers(processor)
    if numbers is not None:
        for family in families:
            if family.holds(vendor.lower() if vendor.startswith("0x") else vendor, *numbers):
                if not family.lacks & features:
                    return family.label
                if nearest := _nearest_target(vendor, arch, features):
                    return nearest
    return _archspec_label(vendor, processor.get("CPU part", ""), arch, features) or arch


def _nearest_target(vendor: str, arch: str, features: frozenset[str]) -> str | None:
    """The family of the vendor's target that has most of these features and no other; None: there is none."""
    known = (target_cpu(name) for name in target_names())
    fitting = [cpu for cpu in known if (cpu.vendor, cpu.arch) == (vendor, arch) and cpu.features <= features]
    nearest = max(fitting, key=lambda cpu: len(cpu.features), default=None)
    return nearest.family if nearest else None


def _numbers(processor: Mapping[str, str]) -> tuple[int, int, int] | None:
    """(family, model, stepping); None when the text does not hold them."""
    try:
        if "CPU implementer" in processor:
            return int(processor["CPU architecture"], 0), int(processor["CPU part"], 0), 0
        return int(processor["cpu family"]), int(processor["model"]), int(processor.get("stepping") or "0")
    except (KeyError, ValueError):
        return None


def _archspec_label(vendor: str, part: str, arch: str, features: frozenset[str]) -> str | None:
    """The newest CPU of this vendor archspec knows whose features are all here; None when there is none.

    archspec.cpu.host() would look at this machine; the label of a recorded one needs the same rule as a pure
    function.
    """
    try:
        from archspec.cpu import TARGETS  # 25 ms, and only for a CPU the table above does not list
        from archspec.cpu.schema import TARGETS_JSON

        maker = TARGETS_JSON["conversions"]["arm_vendors"].get(vendor, vendor)
        root = TARGETS[arch]
        if features & {"pni", "ssse3"}:
            features |= {"sse3"}  # Linux calls it pni, archspec's tables do not
        fitting = [t for t in TARGETS.values() if root in t.ancestors and t.features <= features]
        known = [t for t in fitting if t.vendor == maker and getattr(t, "cpu_part", "") in ("", part)]
        generic = max((t for t in fitting if t.vendor == "generic"), key=_depth, default=root)
        # A CPU older than the generic level reached is one whose successors hide a feature.
        newest = max((t for t in known if t > generic or arch == "aarch64"), key=_depth, default=None)
        return str(newest.name) if newest is not None else None
    except Exception:  # a label is never worth a failure, whatever a new release of archspec raises
        return None


def _depth(target: object) -> tuple[int, int]:
    return len(target.ancestors), len(target.features)  # type: ignore[attr-defined]


def _bounds(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first, 16), int(last or first, 16)


def _within(number: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(first <= number <= last for first, last in ranges)
