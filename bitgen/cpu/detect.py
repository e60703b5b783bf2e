"""The CPU of the machine that this process runs on."""

from __future__ import annotations

import platform
from pathlib import Path

from bitgen.cpu.cap import capped
from bitgen.cpu.linux import detect_linux, read_topology
from bitgen.cpu.machine import Cpu, Topology
from bitgen.cpu.macos import cpu_from_sysctl, run_sysctl, topology_from_sysctl
from bitgen.cpu.microarch import normal_arch
from bitgen.errors import UnsupportedError


def require_supported_os(system: str) -> None:
    """UnsupportedError unless ``system`` (as platform.system() names it) is Linux or macOS."""
    if system not in ("Linux", "Darwin"):
        hint = "; for Windows there is the C library so far, and WSL 2 works" if system == "Windows" else ""
        message = f"bitgen runs on Linux and macOS; this is {system or 'an unknown system'}{hint}"
        raise UnsupportedError(message)


def detect_cpu(root: str | Path = "/", system: str | None = None) -> Cpu:
    """The CPU of this machine within BITGEN_ISA_CAP, or on Linux of the recorded file tree below ``root``.

    What cannot be found out is left empty, never guessed: such a CPU runs the scalar level.
    UnsupportedError on systems other than Linux and macOS, UsageError for a wrong cap.
    """
    name = platform.system() if system is None else system
    require_supported_os(name)
    if name == "Darwin":
        return capped(cpu_from_sysctl(run_sysctl(), normal_arch(platform.machine())))
    if Path(root) == Path("/"):
        return capped(detect_linux(Path(root), normal_arch(platform.machine())))
    return detect_linux(Path(root))


def detect_topology(root: str | Path = "/", system: str | None = None) -> Topology:
    """The cores of this machine, or on Linux of the recorded file tree below ``root``; errors as above."""
    name = platform.system() if system is None else system
    require_supported_os(name)
    return topology_from_sysctl(run_sysctl()) if name == "Darwin" else read_topology(Path(root))
