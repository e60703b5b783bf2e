"""How systems tell a process which features an ARM CPU has, other than by /proc/cpuinfo."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

_END, _HWCAP = 0, {16: 1, 26: 2}  # types of entries: AT_NULL, AT_HWCAP, AT_HWCAP2


@dataclass(frozen=True)
class ArmFeature:
    """A bit of AT_HWCAP (``hwcap`` 1) or AT_HWCAP2 (2); see configs/cpu_features.yaml."""

    hwcap: Literal[1, 2]
    bit: int


@dataclass(frozen=True)
class _ArmRows:
    aarch64: dict[str, ArmFeature]
    aarch64_darwin: dict[str, str]


def _rows() -> _ArmRows:
    path = configs_dir() / "cpu_features.yaml"
    table = load_yaml(path)
    return load(_ArmRows, {key: table[key] for key in ("aarch64", "aarch64_darwin")}, str(path))


def sysctl_features(values: Mapping[str, str]) -> frozenset[str]:
    """The features, in the names of /proc/cpuinfo, of the settings of macOS's sysctl (name -> value)."""
    names = _rows().aarch64_darwin
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
    rows = _rows().aarch64
    return frozenset(name for name, row in rows.items() if words.get(row.hwcap, 0) >> row.bit & 1)
