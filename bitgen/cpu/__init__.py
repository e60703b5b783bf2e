"""What this CPU is, which ISA levels it can run, best first, and why not the others.

Detection shows what the CPU *advertises*: tuning and building confirm a level by executing it in a child
process, because hypervisors were seen that advertise what they do not run.
"""

from __future__ import annotations

import platform
from pathlib import Path

from bitgen.errors import UnsupportedError
from bitgen.target.cpu import Cache, Cpu
from bitgen.target.darwin import cpu_from_sysctl, run_sysctl
from bitgen.target.family import normal_arch
from bitgen.target.hwcap import ArmFeature
from bitgen.target.isa import (
    ANY_ARCH,
    Accepted,
    Isa,
    Rejected,
    accepted_isas,
    find_isa,
    load_isas,
    require_isa,
    resolve_isas,
)
from bitgen.target.linux import detect_linux
from bitgen.target.named import target_cpu, target_names

__all__ = [
    "ANY_ARCH",
    "Accepted",
    "ArmFeature",
    "Cache",
    "Cpu",
    "Isa",
    "Rejected",
    "accepted_isas",
    "detect_cpu",
    "find_isa",
    "load_isas",
    "require_isa",
    "require_supported_os",
    "resolve_isas",
    "target_cpu",
    "target_names",
]


def require_supported_os(system: str) -> None:
    """UnsupportedError unless ``system`` (as platform.system() names it) is Linux or macOS."""
    if system not in ("Linux", "Darwin"):
        hint = " (its Linux subsystem WSL 2 works)" if system == "Windows" else ""
        message = f"bitgen runs on Linux and macOS; this is {system or 'an unknown system'}{hint}"
        raise UnsupportedError(message)


def detect_cpu(root: str | Path = "/", system: str | None = None) -> Cpu:
    """The CPU of this machine, or on Linux of the recorded file tree below ``root``.

    UnsupportedError on systems other than Linux and macOS. What cannot be found out is left
    empty, never guessed: such a CPU runs the scalar level.
    """
    name = platform.system() if system is None else system
    require_supported_os(name)
    if name == "Darwin":
        return cpu_from_sysctl(run_sysctl(), normal_arch(platform.machine()))
    here = Path(root) == Path("/")
    return detect_linux(Path(root), normal_arch(platform.machine()) if here else None)
