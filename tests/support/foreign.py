"""Other architectures' code on this machine: cross compilers and qemu's user emulation, where installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitgen.cpu import CAP_VARIABLE, Isa
from bitgen.toolchain import Compiler, find_cross_compilers

SYSROOT = Path("/usr/aarch64-linux-gnu")
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def cross_compilers() -> list[Compiler]:
    """gcc and clang for AArch64 Linux; zig takes a minute for its first program and has tests of its own."""
    return [compiler for compiler in find_cross_compilers("aarch64", "Linux") if compiler.kind != "zig"]


def why_not() -> str | None:
    """What is missing to compile and run AArch64 programs here; None when nothing is."""
    if not cross_compilers():
        return "no cross compiler: apt-get install gcc-aarch64-linux-gnu"
    return None if QEMU else "no emulator: apt-get install qemu-user"


def core_of(isa: Isa) -> str:
    """A ``cpu`` of qemu's that runs everything ``isa`` needs, with registers of its length."""
    return f"max,sve-default-vector-length={isa.vector_bytes}" if isa.exact_vector else "max"


def emulator(cpu: str = "max") -> list[str]:
    """The words before a program's name that run it on a ``cpu`` of qemu's."""
    assert QEMU, "no emulator: apt-get install qemu-user"
    return [QEMU, "-L", str(SYSROOT), "-cpu", cpu]


def emulate(
    program: Sequence[str],
    cpu: str = "max",
    data: bytes | None = None,
    timeout_s: float = 1200,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run a program on an emulated CPU; what it says comes back as bytes."""
    command = [*emulator(cpu), *program]
    env = {**os.environ, **(environment or {})}
    env.pop(CAP_VARIABLE, None)  # the cap is a level of this machine's architecture, not of the emulated one
    env.pop(CAP_VARIABLE, None)  # the cap is a level of this machine's architecture, not of the emulated one
    return subprocess.run(command, input=data, capture_output=True, timeout=timeout_s, check=False, env=env)
