"""Untuned libraries of every ISA level this CPU runs, built once a session."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from libraries import session_folder, users_toolchain

from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cpu import Rejected, cap_note, detect_cpu, load_isas, resolve_isas

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
