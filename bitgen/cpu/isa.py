"""ISA levels (configs/isas.yaml), and which of them a CPU can run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitgen.cpu.features import ANY_ARCH as ANY_ARCH
from bitgen.cpu.features import compiler_flags
from bitgen.cpu.machine import Cpu
from bitgen.errors import BitgenError, FileError, UnsupportedError, UsageError, unknown
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

CAP_VARIABLE = "BITGEN_ISA_CAP"  # see bitgen/cpu/cap.py


@dataclass(frozen=True)
class Registers:
    """Vector registers: how many, 0 where blocks are arrays in memory, and the bytes of one."""

    count: int
    bytes: int


@dataclass(frozen=True)
class Dot:
    """How four products of bytes are added to an int32.

    ``native``: by one instruction. ``codes``: the largest unsigned byte that is multiplied exactly.
    ``sums_bytes``: of the registers of a block of int16 sums of products.
    """

    native: bool = False
    codes: int = 128
    sums_bytes: int = 64


@dataclass(frozen=True)
class Isa:
    """One ISA level kernels are generated for; see configs/isas.yaml for the meaning of each field."""

    name: str
    arch: str
    parent: str | None  # whose header has the ops that this level's lacks
    requires: frozenset[str]
    cc_flags: tuple[str, ...]
    zig_flags: tuple[str, ...]
    headers: tuple[str, ...]  # names of the headers below templates/isa/, base first, own last
    registers: Registers
    dot: Dot = Dot()
    lookups: tuple[int, ...] = (16,)
    tiles: bool = False
    mmla: bool = False
    affine: bool = False
    exact_vector: bool = False

    @property
    def generic(self) -> bool:
        """Whether it is plain C: a fallback and an oracle, whose registers are the compiler's matter."""
        return self.registers.count == 0

    @property
    def register_count(self) -> int:
        return self.registers.count

    @property
    def vector_bytes(self) -> int:
        return self.registers.bytes

    @property
    def block_registers(self) -> int:
        """Registers that hold one block of 64 bytes."""
        return max(1, 64 // self.registers.bytes)

    @property
    def native_dot4(self) -> bool:
        return self.dot.native

    @property
    def adds_dots(self) -> bool:
        """Whether products go to int32 at once at no cost: by an instruction, or in plain C."""
        return self.dot.native or self.generic

    @property
    def code_max(self) -> int:
        return self.dot.codes

    @property
    def sums_bytes(self) -> int:
        return self.dot.sums_bytes

    @property
    def lookup_max(self) -> int:
        """The largest table of bytes that one instruction looks up."""
        return max(self.lookups)

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


# What a level has from the one that it extends, unless it says so itself.
_CAPABILITIES = ("dot", "lookups", "tiles", "mmla", "affine", "exact_vector")


@dataclass(frozen=True)
class _Entry:
    """A level as isas.yaml writes it: what is None is the base's, or the default of `Isa`."""

    arch: str | None = None
    extends: str | None = None
    complete_header: bool = False
    features: tuple[str, ...] = ()
    march: str | None = None
    flags: tuple[str, ...] = ()
    header: str | None = None
    registers: Registers | None = None
    dot: Dot | None = None
    lookups: tuple[int, ...] | None = None
    tiles: bool | None = None
    mmla: bool | None = None
    affine: bool | None = None
    exact_vector: bool | None = None


@dataclass(frozen=True)
class _IsaFile:
    isas: dict[str, _Entry]


@dataclass(frozen=True)
class _Level:
    """An ISA level with what its children inherit besides: features in order, architecture, options."""

    isa: Isa
    features: tuple[str, ...]
    march: str | None
    options: tuple[str, ...]


def load_isas(file: Path | None = None) -> tuple[Isa, ...]:
    """The ISA levels of ``file`` (default: configs/isas.yaml), weakest first.

    FileError when the file is wrong: also when a level does not stand behind what it extends, or a feature
    has no row in configs/cpu_features.yaml.
    """
    return _read_isas(file) if file is not None else _own_isas(configs_dir() / "isas.yaml")


@cache
def _own_isas(path: Path) -> tuple[Isa, ...]:
    """An installation's own file is read once: 70 ms."""
    return _read_isas(path)


def _read_isas(path: Path) -> tuple[Isa, ...]:
    levels: dict[str, _Level] = {}
    for name, entry in load(_IsaFile, load_yaml(path), str(path)).isas.items():
        where = f"{path}: isas.{name}"
        if entry.extends is not None and entry.extends not in levels:
            raise FileError(f"{where}: what it extends, {entry.extends!r}, must stand before it")
        try:
            levels[name] = _level(name, entry, levels[entry.extends] if entry.extends else None)
        except BitgenError as error:
            raise FileError(f"{where}: {error.message}") from error
    return tuple(level.isa for level in levels.values())


def _level(name: str, entry: _Entry, above: _Level | None) -> _Level:
    """The level of an entry; ``above``: what it extends."""
    arch = entry.arch or (above.isa.arch if above else None)
    registers = entry.registers or (above.isa.registers if above else None)
    if arch is None or registers is None:
        raise UsageError("arch and registers must be given, or a level that it extends")
    if above and arch != above.isa.arch:
        raise UsageError(f"arch must be that of {above.isa.name}, which it extends")
    given = {key: getattr(entry, key) for key in _CAPABILITIES}
    capabilities: dict[str, Any] = {key: getattr(above.isa, key) for key in given} if above else {}
    capabilities |= {key: value for key, value in given.items() if value is not None}
    features = (*(above.features if above else ()), *entry.features)
    march = entry.march or (above.march if above else None)
    options = (*(above.options if above else ()), *entry.flags)
    length = (f"-msve-vector-bits={8 * registers.bytes}",) if capabilities.get("exact_vector") else ()
    cc_flags, zig_flags = compiler_flags(arch, march, features)
    parent = above.isa if above and not entry.complete_header else None
    isa = Isa(
        name=name,
        arch=arch,
        parent=parent.name if parent else None,
        requires=frozenset(features),
        cc_flags=(*cc_flags, *options, *length),
        zig_flags=(*zig_flags, *options, *length),
        headers=(*(parent.headers if parent else ()), entry.header or name),
        registers=registers,
        **capabilities,
    )
    return _Level(isa, features, march, options)


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
