"""ISA levels (configs/isas.yaml), and which of them a CPU can run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitgen.cpu.machine import Cpu
from bitgen.errors import FileError, UnsupportedError, unknown
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

ANY_ARCH = "any"
CAP_VARIABLE = "BITGEN_ISA_CAP"  # see bitgen/cpu/cap.py


@dataclass(frozen=True)
class Isa:
    """One ISA level kernels are generated for; see configs/isas.yaml for the meaning of each field."""

    name: str
    arch: str
    parent: str | None
    requires: frozenset[str]
    cc_flags: tuple[str, ...]
    zig_flags: tuple[str, ...]
    vocabulary: tuple[str, ...]  # names of the headers below templates/isa/, base first, own last
    native_dot4: bool
    vector_bytes: int
    code_max: int = 128
    tiles: bool = False
    mmla: bool = False
    exact_vector: bool = False
    lut_bytes: int = 16
    sums_bytes: int = 64

    @property
    def tile_registers(self) -> frozenset[str]:
        """The features whose registers the system gives a process only when asked: AMX."""
        return frozenset(feature for feature in self.requires if feature.startswith("amx_"))


@dataclass(frozen=True)
class Accepted:
    """The CPU advertises everything ``isa`` needs."""

    isa: Isa


@dataclass(frozen=True)
class Rejected:
    """The CPU cannot run ``isa``, because of ``reason``."""

    isa: Isa
    reason: str


@dataclass(frozen=True)
class _IsaEntry:
    arch: str
    requires: frozenset[str]
    cc_flags: tuple[str, ...]
    zig_flags: tuple[str, ...]
    native_dot4: bool
    vector_bytes: int
    parent: str | None = None
    words: str | None = None
    code_max: int = 128
    tiles: bool = False
    mmla: bool = False
    exact_vector: bool = False
    lut_bytes: int = 16
    sums_bytes: int = 64


@dataclass(frozen=True)
class _IsaFile:
    isas: dict[str, _IsaEntry]


def load_isas(file: Path | None = None) -> tuple[Isa, ...]:
    """The ISA levels of ``file`` (default: configs/isas.yaml), weakest first.

    FileError when the file is wrong: also when a parent does not stand before its child, is of
    another architecture, or requires something the child does not.
    """
    return _read_isas(file) if file is not None else _own_isas(configs_dir() / "isas.yaml")


@cache
def _own_isas(path: Path) -> tuple[Isa, ...]:
    """The levels of the installation, read once: 70 ms."""
    return _read_isas(path)


def _read_isas(path: Path) -> tuple[Isa, ...]:
    isas: dict[str, Isa] = {}
    for name, entry in load(_IsaFile, load_yaml(path), str(path)).isas.items():
        where = f"{path}: isas.{name}"
        words = entry.words or name
        vocabulary: tuple[str, ...] = (words,)
        if entry.parent is not None:
            parent = isas.get(entry.parent)
            if parent is None:
                raise FileError(f"{where}: the parent {entry.parent!r} must stand before it")
            if parent.arch != entry.arch or not parent.requires <= entry.requires:
                message = f"{where}: arch and requires must include those of the parent {parent.name}"
                raise FileError(message)
            vocabulary = (*parent.vocabulary, words)
        isas[name] = Isa(
            name=name,
            arch=entry.arch,
            parent=entry.parent,
            requires=entry.requires,
            cc_flags=entry.cc_flags,
            zig_flags=entry.zig_flags,
            vocabulary=vocabulary,
            native_dot4=entry.native_dot4,
            vector_bytes=entry.vector_bytes,
            code_max=entry.code_max,
            tiles=entry.tiles,
            mmla=entry.mmla,
            exact_vector=entry.exact_vector,
            lut_bytes=entry.lut_bytes,
            sums_bytes=entry.sums_bytes,
        )
    return tuple(isas.values())


def resolve_isas(cpu: Cpu, isas: Iterable[Isa]) -> list[Accepted | Rejected]:
    """Each of ``isas`` (given weakest first) accepted, or rejected with the reason; strongest first."""
    return [_judge(cpu, isa) for isa in reversed(tuple(isas))]


def accepted_isas(cpu: Cpu, isas: Iterable[Isa]) -> tuple[Isa, ...]:
    """The levels ``cpu`` can run, strongest first."""
    return tuple(d.isa for d in resolve_isas(cpu, isas) if isinstance(d, Accepted))


def find_isa(name: str, isas: Iterable[Isa]) -> Isa:
    """The level called ``name`` ("AVX512-VNNI" finds avx512_vnni); UsageError when none is."""
    known = {isa.name: isa for isa in isas}
    folded = name.lower().replace("-", "_")
    if folded in known:
        return known[folded]
    raise unknown("ISA level", name, known)


def require_isa(name: str, cpu: Cpu, isas: Sequence[Isa]) -> Isa:
    """The level called ``name`` if ``cpu`` can run it.

    UsageError for an unknown name, UnsupportedError (with the reason) for one it cannot run.
    """
    decision = _judge(cpu, find_isa(name, isas))
    if isinstance(decision, Accepted):
        return decision.isa
    runnable = ", ".join(isa.name for isa in accepted_isas(cpu, isas))
    message = f"cannot run {decision.isa.name} here: {decision.reason}; this CPU runs {runnable}"
    raise UnsupportedError(message)


def cap_note() -> str:
    """For messages about what this CPU lacks: that a cap is on, and which; empty without one."""
    cap = os.environ.get(CAP_VARIABLE, "")
    return f" ({CAP_VARIABLE} is {cap})" if cap else ""


def _judge(cpu: Cpu, isa: Isa) -> Accepted | Rejected:
    if isa.arch not in (ANY_ARCH, cpu.arch):
        return Rejected(isa, f"it is for {isa.arch}, this CPU is {cpu.arch}")
    missing = sorted(isa.requires - cpu.features)
    if missing:
        return Rejected(isa, f"this CPU lacks {', '.join(missing)}")
    if isa.exact_vector and cpu.sve_bytes != isa.vector_bytes:
        here = 8 * cpu.sve_bytes or "an unknown number of"
        return Rejected(isa, f"it needs SVE registers of {8 * isa.vector_bytes} bits, here they have {here}")
    return Accepted(isa)
