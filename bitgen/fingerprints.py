"""What a kernel's timing depends on besides its spec: a record made under another fingerprint is stale.

A kernel's own text counts and that of the helpers whose time is part of its own, so an edit of one template
leaves the records of all other kernels valid. Comments, white space and the kernel's name do not count.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bitgen.cpu import Cpu, Isa
from bitgen.errors import BitgenError
from bitgen.measure.harness import timed_texts
from bitgen.render import Source, render_kernel, render_quantize, render_tables
from bitgen.spec import KernelSpec
from bitgen.toolchain import Toolchain

_NOT_CODE = re.compile(r"(?:/\*.*?\*/|//[^\n]*|\s)+", re.DOTALL)


@dataclass(frozen=True)
class Fingerprint:
    """The parts, each a short text or a digest."""

    cpu: str  # family, model and features
    compiler: str  # its version, and the flags of the kernel's ISA level
    kernel: str  # the code of the kernel, of the quantiser and of what builds its tables
    harness: str  # what calls and times it

    @property
    def digest(self) -> str:
        """16 hex digits that stand for all parts."""
        return _digest(tuple(vars(self).values()))

    def differences(self, other: Fingerprint) -> list[str]:
        """The names of the parts that differ."""
        return [name for name, part in vars(self).items() if part != getattr(other, name)]


Fingerprints = Callable[[KernelSpec], Fingerprint]  # of a kernel, as it would be made here and now


def fingerprints(cpu: Cpu, isas: Iterable[Isa], toolchain: Toolchain) -> Fingerprints:
    """The fingerprints of kernels on ``cpu``. One that cannot be rendered has no ``kernel``."""
    version = toolchain.compiler.version.splitlines()[0]
    compilers = {isa.name: f"{version} {_digest(toolchain.fingerprint(isa))}" for isa in isas}
    own = cpu_text(cpu)
    harness = _digest([_NOT_CODE.sub(" ", text) for text in timed_texts(cpu.arch)])

    helpers = functools.cache(_helpers)

    @functools.cache
    def fingerprint(spec: KernelSpec) -> Fingerprint:
        try:
            kernel = _code(render_kernel(spec))
            algorithm = spec.schedule.algorithm if spec.table_bytes else None
            digest = _digest([kernel, *helpers(spec.isa, spec.family, algorithm)])
        except (BitgenError, LookupError):  # an old record's: a family, a level or a knob that is no more
            digest = ""
        return Fingerprint(own, compilers.get(spec.isa, ""), digest, harness)

    return fingerprint


def cpu_text(cpu: Cpu) -> str:
    """The part of a fingerprint that stands for ``cpu``: its family, its model, a digest of its features."""
    return f"{cpu.family} {cpu.model_name} {_digest(sorted(cpu.features))}"


def _helpers(isa: str, family: str, algorithm: str | None) -> list[str]:
    """What runs with every kernel: the quantiser, and the builder of its lookup tables if it reads any."""
    sources = [render_quantize(isa), *([render_tables(family, isa, algorithm)] if algorithm else [])]
    return [_code(source) for source in sources]


def _code(source: Source) -> str:
    return _NOT_CODE.sub(" ", source.text).strip().replace(source.name, "NAME")


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
