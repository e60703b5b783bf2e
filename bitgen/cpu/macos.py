"""macOS: the output of sysctl -> Cpu, with the feature names of Linux."""

from __future__ import annotations

import re

from bitgen.cpu.features import sysctl_features
from bitgen.cpu.machine import Cache, Cpu, Topology
from bitgen.cpu.microarch import family_label, load_cpu_families

# macOS names -> the names of Linux; what is not listed differs in case only.
_X86 = {"avx1.0": "avx", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "avx512vnni": "avx512_vnni"}


def cpu_from_sysctl(text: str, arch: str) -> Cpu:
    """The CPU of the output of ``sysctl hw machdep.cpu``; ``arch`` is that of this process (Rosetta)."""
    values = _values(text)

    def number(*keys: str) -> int:
        return next((int(values[key]) for key in keys if values.get(key, "").isdigit()), 0)

    words = " ".join(values.get(f"machdep.cpu.{key}", "") for key in ("features", "leaf7_features")).lower()
    features = {_X86.get(word, word) for word in words.split()}
    features |= sysctl_features(values) if arch == "aarch64" else frozenset()
    brand = values.get("machdep.cpu.brand_string", "unknown")
    logical = number("hw.logicalcpu") or number("machdep.cpu.thread_count") or 1
    physical = number("hw.physicalcpu") or number("machdep.cpu.core_count") or logical
    line = number("hw.cachelinesize") or 64
    # perflevel0 are the performance cores; Intel Macs and old systems only have the plain keys.
    sizes = (
        (1, "Data", number("hw.perflevel0.l1dcachesize", "hw.l1dcachesize"), 1),
        (
            2,
            "Unified",
            number("hw.perflevel0.l2cachesize", "hw.l2cachesize"),
            number("hw.perflevel0.cpusperl2"),
        ),
        (3, "Unified", number("hw.l3cachesize"), logical),
    )
    apple = re.match(r"Apple (M\d+)", brand)
    vendor = values.get("machdep.cpu.vendor") or ("Apple" if apple else "unknown")
    numbers = {"vendor_id": vendor, "cpu family": values.get("machdep.cpu.family", "6")}
    numbers |= {key: values.get(f"machdep.cpu.{key}", "") for key in ("model", "stepping")}
    if apple and arch == "aarch64":
        label = apple[1].lower()
    else:
        label = family_label(numbers, arch, frozenset(features), load_cpu_families())
    return Cpu(
        os="Darwin",
        arch=arch,
        vendor=vendor,
        model_name=brand,
        family=label,
        features=frozenset(features),
        logical_cpus=logical,
        physical_cores=physical,
        usable_threads=physical,
        caches=tuple(Cache(lvl, kind, size, line, shared or 1) for lvl, kind, size, shared in sizes if size),
    )


def topology_from_sysctl(text: str) -> Topology:
    """The cores of the same output. macOS binds no process to some of them, and has no quotas."""
    values = _values(text)

    def number(key: str, default: int) -> int:
        return int(values[key]) if values.get(key, "").isdigit() else default

    logical = number("hw.logicalcpu", 1)
    cores = number("hw.physicalcpu", logical)
    levels = range(number("hw.nperflevels", 2))
    kinds = tuple(
        (values.get(f"hw.perflevel{level}.name", "").lower() or f"level {level}", count)
        for level in levels
        if (count := number(f"hw.perflevel{level}.physicalcpu", 0))
    )
    return Topology(logical, cores, cores, kinds=kinds if len(kinds) > 1 else (), hardware=logical)


def _values(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def run_sysctl() -> str:
    import subprocess  # 5 ms that Linux need not pay

    try:
        command = ["/usr/sbin/sysctl", "hw", "machdep.cpu"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
