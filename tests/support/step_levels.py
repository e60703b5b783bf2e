"""Untuned libraries of every ISA level this CPU runs, and one with all of them, built once a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from libraries import QUICK, flags_for, made_once, toolchain_of

from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cpu import Rejected, accepted_isas, cap_note, detect_cpu, load_isas, resolve_isas
from bitgen.runtime import KernelTable, load

LEVELS = [isa.name for isa in load_isas() if isa.arch in ("any", detect_cpu().arch)]


def level_library(factory: pytest.TempPathFactory, level: str) -> Path:
    """The bundle of a library whose kernels and step are those of ``level``; skips where it cannot run."""
    for decision in resolve_isas(detect_cpu(), load_isas()):
        if decision.isa.name == level and isinstance(decision, Rejected):
            pytest.skip(f"cannot run {level} here: {decision.reason}{cap_note()}")

    def write(folder: Path) -> None:
        target = Target.of(detect_cpu(), level)
        write_library((), toolchain_of(*flags_for(level)), folder, name, target, check=False)

    name = f"step-{level}"
    return made_once(factory, name, write)


def tables(library: Callable[[str], Path]) -> Iterator[Callable[..., KernelTable]]:
    """A function from a level (the best here) and threads (2) to a table: opened once, closed at the end."""
    best = accepted_isas(detect_cpu(), load_isas())[0].name
    opened: dict[tuple[str, int], KernelTable] = {}

    def table(level: str = best, threads: int = 2) -> KernelTable:
        if (level, threads) not in opened:
            opened[level, threads] = load(library(level), threads)
        return opened[level, threads]

    yield table
    for each in opened.values():
        each.close()


def universal_library(factory: pytest.TempPathFactory) -> Path:
    """The bundle of a universal library with the levels that this CPU runs, and no winners."""
    cpu, isas = detect_cpu(), load_isas()
    held = [isa for isa in isas if isa in accepted_isas(cpu, isas)]
    name = f"universal-{cpu.arch}"

    def write(folder: Path) -> None:
        target = Target.every(cpu.arch, cpu.os, held)
        toolchain = replace(toolchain_of(*QUICK), strip=True)
        write_library((), toolchain, folder, name, target, check=False, release=True)

    return made_once(factory, name, write)
