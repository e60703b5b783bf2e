"""What every step works with: the CPU, ISA levels, a compiler, the records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bitgen.cpu import Cpu, Isa, accepted_isas, detect_cpu, load_isas, require_isa
from bitgen.errors import UsageError
from bitgen.fingerprints import Fingerprints, fingerprints
from bitgen.paths import tune_logs_dir
from bitgen.space import Space, space_for
from bitgen.spec import Shape, regime_named
from bitgen.store import RecordStore
from bitgen.toolchain import Toolchain, find_compiler, find_cross_compiler


@dataclass(frozen=True)
class Environment:
    """What every step works with: this CPU, the ISA levels, a compiler, and the folder of records.

    ``cc`` names a compiler (None: $CC, gcc, clang, zig); ``logs`` is the folder of records. ``target`` is the
    CPU to build for, None: this machine's.
    """

    cc: str | None = None
    logs: Path | None = None
    target: Cpu | None = None

    @cached_property
    def cpu(self) -> Cpu:
        return self.target or detect_cpu()

    @cached_property
    def isas(self) -> tuple[Isa, ...]:
        return load_isas()

    @cached_property
    def toolchain(self) -> Toolchain:
        if self.is_foreign:
            return Toolchain(find_cross_compiler(self.cpu.arch, self.cpu.os, self.cc))
        return Toolchain(find_compiler(self.cc))

    @cached_property
    def is_foreign(self) -> bool:
        """Whether this machine can neither compile for the CPU without a cross compiler nor run its code."""
        if self.target is None:
            return False
        here = detect_cpu()
        return (here.arch, here.os) != (self.cpu.arch, self.cpu.os)

    def runs(self, isa: Isa) -> bool:
        """Whether this machine can execute kernels of ``isa``."""
        return not self.is_foreign and isa in accepted_isas(detect_cpu(), self.isas)

    @cached_property
    def store(self) -> RecordStore:
        return RecordStore(tune_logs_dir(self.logs) / f"{self.cpu.family}.jsonl")

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """What the timing of a kernel depends on besides its spec; under another fingerprint it is stale."""
        return fingerprints(self.cpu, self.isas, self.toolchain)

    def isa(self, name: str | None) -> Isa:
        """The named ISA level, which this CPU must run; None: the best one it runs."""
        return require_isa(name, self.cpu, self.isas) if name else accepted_isas(self.cpu, self.isas)[0]

    def space(self, family: str, isa: Isa, regime: str, shape: Shape, group: int = 0) -> Space:
        return space_for(family, isa, regime_named(regime), shape, self.cpu, group)


def check_threads(counts: Iterable[int], cpu: Cpu) -> None:
    """UsageError for a number of threads that this CPU cannot run at once."""
    most = max(cpu.logical_cpus, cpu.usable_threads)
    for count in counts:
        if not 1 <= count <= most:
            raise UsageError(f"--threads {count}: this CPU runs 1 to {most} at once")
