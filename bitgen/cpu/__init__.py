"""What this CPU is, which ISA levels it can run, best first, and why not the others.

Detection shows what the CPU *advertises*: tuning and building confirm a level by executing it in a child
process, because hypervisors were seen that advertise what they do not run.
"""

from __future__ import annotations

from bitgen.cpu.cap import CapRow, cap_rows, capped, isa_cap
from bitgen.cpu.detect import detect_cpu, detect_topology, require_supported_os
from bitgen.cpu.features import ANY_ARCH, ArmFeature, FeatureTable, X86Feature, feature_table, told_features
from bitgen.cpu.isa import (
    CAP_VARIABLE,
    Accepted,
    Dot,
    Isa,
    Registers,
    Rejected,
    accepted_isas,
    cap_note,
    find_isa,
    load_isas,
    require_isa,
    resolve_isas,
)
from bitgen.cpu.machine import Cache, Cpu, Topology, cpu_key
from bitgen.cpu.named import target_cpu, target_names

__all__ = [
    "ANY_ARCH",
    "CAP_VARIABLE",
    "Accepted",
    "ArmFeature",
    "Cache",
    "CapRow",
    "Cpu",
    "Dot",
    "FeatureTable",
    "Isa",
    "Registers",
    "Rejected",
    "Topology",
    "X86Feature",
    "accepted_isas",
    "cap_note",
    "cap_rows",
    "capped",
    "cpu_key",
    "detect_cpu",
    "detect_topology",
    "feature_table",
    "find_isa",
    "isa_cap",
    "load_isas",
    "require_isa",
    "require_supported_os",
    "resolve_isas",
    "target_cpu",
    "target_names",
    "told_features",
]
