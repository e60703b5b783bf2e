"""BITGEN_ISA_CAP: a large CPU acts as a small one, in Python and in every library.

The cap is an ISA level. What levels after it in configs/isas.yaml require, and none up to it does, is dropped
from the features that are detected, so everything derived from them (accepted levels, records and their
fingerprints, bundles) is that of a smaller CPU. It is an environment variable, which workers, commands and
libraries inherit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bitgen.cpu.isa import ANY_ARCH, CAP_VARIABLE, Isa, find_isa, load_isas
from bitgen.cpu.machine import Cpu
from bitgen.errors import BitgenError, UsageError


@dataclass(frozen=True)
class CapRow:
    """What a CPU capped at ``isa`` keeps of the features that levels require, and how long its SVE may be."""

    isa: Isa
    features: frozenset[str]
    sve_bytes: int


def cap_rows(arch: str, isas: Iterable[Isa]) -> tuple[CapRow, ...]:
    """A row for each level of ``arch``, in the order of ``isas``: of level i what levels 0 .. i require."""
    rows: list[CapRow] = []
    features: frozenset[str] = frozenset()
    sve_bytes = 0
    for isa in isas:
        if isa.arch in (ANY_ARCH, arch):
            features |= isa.requires
            sve_bytes = max(sve_bytes, isa.vector_bytes if isa.exact_vector else 0)
            rows.append(CapRow(isa, features, sve_bytes))
    return tuple(rows)


def isa_cap() -> Isa | None:
    """The level of BITGEN_ISA_CAP, None when it is empty or not set.

    UsageError when there is no such level.
    """
    name = os.environ.get(CAP_VARIABLE, "")
    if not name:
        return None
    try:
        return find_isa(name, load_isas())
    except BitgenError as error:
        raise UsageError(f"{CAP_VARIABLE}: {error.message}") from error


def capped(cpu: Cpu) -> Cpu:
    """``cpu`` as BITGEN_ISA_CAP wants it seen.

    UsageError when the variable holds no level, or one of another architecture.
    """
    cap = isa_cap()
    if cap is None:
        return cpu
    rows = cap_rows(cpu.arch, load_isas())
    kept = next((row for row in rows if row.isa == cap), None)
    if kept is None:
        levels = ", ".join(row.isa.name for row in rows)
        message = (
            f"{CAP_VARIABLE}: {cap.name} is for {cap.arch}, this CPU is {cpu.arch}; its levels are {levels}"
        )
        raise UsageError(message)
    return replace(
        cpu,
        features=cpu.features - (rows[-1].features - kept.features),
        sve_bytes=cpu.sve_bytes if cpu.sve_bytes <= kept.sve_bytes else 0,
    )
