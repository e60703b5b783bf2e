"""What this CPU is, which ISA levels it can run, best first, and why not the others.

Detection shows what the CPU *advertises*: tuning and building confirm a level by executing it in a child
process, because hypervisors were seen that advertise what they do not run.
"""

from __future__ import annotations

import platform
from pathlib import Path

from bitgen.errors import UnsupportedError
from bitgen.target.cap import CapRow, cap_rows, capped, isa_cap
from bitgen.target.cpu import Cache, Cpu
from bitgen.target.darwin import cpu_from_sysctl, run_sysctl
from bitgen.target.family import normal_arch
from bitgen.target.hwcap import ArmFeature
from bitgen.target.isa import (
    ANY_ARCH,
    CAP_VARIABLE,
    Accepted,
    Isa,
    Rejected,
    accepted_isas,
    cap_note,
    find_isa,
    load_isas,
    require_isa,
    resolve_isas,
)
from bitgen.target.linux import detect_linux
from bitgen.target.named import target_cpu, target_names

__all__ = [
    "ANY_ARCH",
    "CAP_VARIABLE",
    "Accepted",
    "ArmFeature",
    "Cache",
    "CapRow",
    "Cpu",
    "Isa",
    "Rejected",
    "accepted_isas",
    "cap_note",
    "cap_rows",
    "detect_cpu",
    "find_isa",
    "isa_cap",
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
