"""CPU features (configs/cpu_features.yaml): where a CPU tells about them, and what compilers call them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from bitgen.errors import UsageError
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

ANY_ARCH = "any"
_END, _HWCAP = 0, {16: 1, 26: 2}  # types of entries: AT_NULL, AT_HWCAP, AT_HWCAP2


@dataclass(frozen=True)
class X86Feature:
    """A bit of cpuid, and the bits of XCR0 (``state``) that the system must save; see cpu_features.yaml."""

    leaf: int
    subleaf: int
    register: Literal["eax", "ebx", "ecx", "edx"]
    bit: int
    state: int = 0
    flag: str = ""  # of gcc, behind -m; empty: no level may require it


@dataclass(frozen=True)
class ArmFeature:
    """A bit of AT_HWCAP (``hwcap`` 1) or AT_HWCAP2 (2); see configs/cpu_features.yaml."""

    hwcap: Literal[1, 2]
    bit: int
    flag: str = ""  # of gcc, behind -march=...+; empty: the architecture has it


@dataclass(frozen=True)
class FeatureTable:
    """The whole file."""

    x86_64: dict[str, X86Feature]
    aarch64: dict[str, ArmFeature]
    aarch64_darwin: dict[str, str]


def feature_table(file: Path | None = None) -> FeatureTable:
    """The rows of ``file`` (default: configs/cpu_features.yaml); FileError when it is wrong."""
    return _table(file if file is not None else configs_dir() / "cpu_features.yaml")


@cache
def _table(path: Path) -> FeatureTable:
    return load(FeatureTable, load_yaml(path), str(path))


def compiler_flags(
    arch: str, march: str | None, features: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(flags for gcc and clang, flags for ``zig cc``) that let a compiler use ``features`` and no more.

    ``march``: what ARM's features are added to: armv8.2-a. UsageError for a feature without a row.
    """
    if arch == ANY_ARCH:
        return (), ("-mcpu=baseline",)
    table = feature_table()
    rows: Mapping[str, X86Feature | ArmFeature] = table.x86_64 if arch == "x86_64" else table.aarch64
    missing = [name for name in features if name not in rows]
    if missing:
        raise UsageError(f"no row under {arch} in cpu_features.yaml for {', '.join(missing)}")
    flags = [rows[name].flag for name in features if rows[name].flag]
    zig = "".join("+" + flag.replace("-", "_") for flag in flags)
    if arch == "x86_64":
        return tuple(f"-m{flag}" for flag in flags), (f"-mcpu=x86_64{zig}",)
    if march is None:
        raise UsageError("march must be given, or a level that it extends")
    version = march.removeprefix("arm").replace(".", "_").replace("-", "")
    return (f"-march={'+'.join([march, *flags])}",), (f"-mcpu=generic+{version}{zig}",)


def told_features(arch: str, system: str) -> frozenset[str]:
    """The features that a library can ask its CPU for on a system: macOS names fewer than Linux."""
    table = feature_table()
    if arch == "aarch64":
        return frozenset(table.aarch64_darwin if system == "Darwin" else table.aarch64)
    return frozenset(table.x86_64)


def sysctl_features(values: Mapping[str, str]) -> frozenset[str]:
    """The features, in the names of /proc/cpuinfo, of the settings of macOS's sysctl (name -> value)."""
    names = feature_table().aarch64_darwin
    return frozenset(name for name, key in names.items() if values.get(f"hw.optional.arm.{key}") == "1")


def hwcap_features(auxv: bytes) -> frozenset[str]:
    """The features, in the names of /proc/cpuinfo, that an auxiliary vector of aarch64 advertises.

    ``auxv`` is /proc/self/auxv: pairs (type, value) of little-endian uint64. Only the features are known that
    configs/cpu_features.yaml lists, by which a library checks its CPU; no other one matters.
    """
    words: dict[int, int] = {}
    for kind, value in struct.iter_unpack("<QQ", auxv[: len(auxv) // 16 * 16]):
        if kind == _END:
            break
        if kind in _HWCAP:
            words[_HWCAP[kind]] = value
    if not words:
        return frozenset()
    rows = feature_table().aarch64
    return frozenset(name for name, row in rows.items() if words.get(row.hwcap, 0) >> row.bit & 1)
