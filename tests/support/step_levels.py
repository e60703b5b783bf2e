"""Untuned libraries of every ISA level this CPU runs, and one with all of them, built once a session."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from libraries import session_folder, users_toolchain

from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cpu import Rejected, accepted_isas, cap_note, detect_cpu, load_isas, resolve_isas

LEVELS = [isa.name for isa in load_isas() if isa.arch in ("any", detect_cpu().arch)]


def level_library(factory: pytest.TempPathFactory, level: str) -> Path:
    """The bundle of a library whose kernels and step are those of ``level``; skips where it cannot run."""
    for decision in resolve_isas(detect_cpu(), load_isas()):
        if decision.isa.name == level and isinstance(decision, Rejected):
            pytest.skip(f"cannot run {level} here: {decision.reason}{cap_note()}")
    return _library(session_folder(factory), level)


@cache
def _library(folder: Path, level: str) -> Path:
    # One for each worker of a parallel run; they share what is compiled.
    out = folder / os.environ.get("PYTEST_XDIST_WORKER", "main")
    target = Target.of(detect_cpu(), level)
    return write_library((), users_toolchain(), out, f"step-{level}", target, check=False)


def universal_library(factory: pytest.TempPathFactory) -> Path:
    """The bundle of a universal library with the levels that this CPU runs, and no winners."""
    return _universal(session_folder(factory))


@cache
def _universal(folder: Path) -> Path:
    out = folder / os.environ.get("PYTEST_XDIST_WORKER", "main")
    cpu, isas = detect_cpu(), load_isas()
    held = [isa for isa in isas if isa in accepted_isas(cpu, isas)]
    target = Target.every(cpu.arch, cpu.os, held)
    name = f"universal-{cpu.arch}"
    toolchain = replace(users_toolchain(), strip=True)
    return write_library((), toolchain, out, name, target, check=False, release=True)
