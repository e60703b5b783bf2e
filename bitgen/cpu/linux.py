"""Linux: /proc and /sys below a root -> Cpu. Everything that interprets text is a pure function of it.

Whether the operating system saves AVX and AVX-512 registers is not asked separately: Linux clears the flags
in /proc/cpuinfo when it does not (XCR0).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from bitgen.cpu.features import hwcap_features
from bitgen.cpu.machine import Cache, Cpu, Topology
from bitgen.cpu.microarch import family_label, load_cpu_families, normal_arch


def detect_linux(root: Path, machine: str | None = None) -> Cpu:
    """The CPU described by the files below ``root``; what they do not tell is left empty, never guessed.

    ``machine`` is the architecture of this process where ``root`` is the running system's: an emulator shows
    it the /proc/cpuinfo of its host, which then counts processors and says no more.
    """
    processors = parse_cpuinfo(_read(root / "proc/cpuinfo"))
    if not processors and root == Path("/"):
        processors = _ask_py_cpuinfo()
    if machine and _shows_another(processors, machine):
        processors = [{"processor": processor["processor"]} for processor in processors]
    topology = read_topology(root, processors)
    features = processor_features(processors)
    arch = _arch_of(processors, features, machine or normal_arch(platform.machine()))
    if arch == "aarch64" and not features:
        features = hwcap_features(_read_bytes(root / "proc/self/auxv"))
    # The last processor: where ARM mixes cores, the big ones come last.
    last = processors[-1] if processors else {}
    vendor = last.get("vendor_id") or last.get("CPU implementer") or "unknown"
    family = family_label(last, arch, features, load_cpu_families())
    return Cpu(
        os="Linux",
        arch=arch,
        vendor=vendor,
        model_name=last.get("model name") or family.replace("_", " ").title(),
        family=family,
        features=features,
        logical_cpus=topology.logical,
        physical_cores=topology.cores,
        usable_threads=topology.threads,
        caches=read_caches(root, min(_allowed(root, _online(processors)))),
        sve_bytes=sve_bytes(root) if "sve" in features else 0,
    )


def read_topology(root: Path, processors: Sequence[Mapping[str, str]] | None = None) -> Topology:
    """The cores below ``root``; ``processors``: what `parse_cpuinfo` gave, where that is known."""
    if processors is None:
        processors = parse_cpuinfo(_read(root / "proc/cpuinfo"))
    online = _online(processors)
    cores = _core_of_each_cpu(root, processors, online)
    allowed = {cpu: cores[cpu] for cpu in sorted(_allowed(root, online))}
    return Topology(
        logical=len(online),
        cores=len(set(cores.values())),
        allowed=len(set(allowed.values())),
        quota=cgroup_cpu_quota(root),
        kinds=_kinds_of(root, allowed),
        nodes=max(1, len(read_nodes(root, allowed))),
        hardware=len(allowed),
        caches=_caches_of(root, allowed),
    )


def allowed_cpus(root: Path = Path("/")) -> set[int]:
    """The logical CPUs that this process may run on."""
    return _allowed(root, _online(parse_cpuinfo(_read(root / "proc/cpuinfo"))))


def read_nodes(root: Path, allowed: Iterable[int]) -> list[set[int]]:
    """Those of the ``allowed`` logical CPUs that each NUMA node has, in the nodes' order; none without."""
    folders = sorted(
        (root / "sys/devices/system/node").glob("node[0-9]*"), key=lambda folder: int(folder.name[4:])
    )
    found = (set(parse_cpu_list(_read(folder / "cpulist"))) & set(allowed) for folder in folders)
    return [cpus for cpus in found if cpus]


def busy_seconds(cpus: Iterable[int], root: Path = Path("/")) -> float | None:
    """Seconds that these logical CPUs have spent on any work, or were kept from it by a hypervisor.

    None where /proc/stat does not tell.
    """
    wanted, ticks = {f"cpu{cpu}" for cpu in cpus}, []
    for line in _read(root / "proc/stat").splitlines():
        name, *numbers = line.split()
        if name in wanted and len(numbers) > 7:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, numbers[:8])
            ticks.append(user + nice + system + interrupts + soft + stolen)
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if ticks else None


def _online(processors: Sequence[Mapping[str, str]]) -> list[int]:
    return [int(p["processor"]) for p in processors if p.get("processor", "").isdigit()] or [0]


def _allowed(root: Path, online: Sequence[int]) -> set[int]:
    """The logical CPUs in this process's affinity."""
    return set(parse_cpu_list(_status_field(root, "Cpus_allowed_list"))) & set(online) or set(online)


def _kinds_of(root: Path, cores: Mapping[int, object]) -> tuple[tuple[str, int], ...]:
    """How many cores are of which kind, the fastest first; empty where all are alike or nothing tells.

    Intel's hybrid CPUs have a list of logical CPUs a kind, ARM's kernel a capacity of each, 1024 at most.
    """
    kinds: dict[str, set[object]] = {}
    for name, device in (("performance", "cpu_core"), ("efficiency", "cpu_atom")):
        listed = parse_cpu_list(_read(root / "sys/devices" / device / "cpus"))
        kinds[name] = {cores[cpu] for cpu in listed if cpu in cores}
    if not any(kinds.values()):
        capacities = {cpu: _read(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in cores}
        known = sorted({int(text) for text in capacities.values() if text.isdigit()}, reverse=True)
        kinds = {
            f"capacity {value}": {cores[cpu] for cpu, text in capacities.items() if text == str(value)}
            for value in known
        }
    found = tuple((name, len(which)) for name, which in kinds.items() if which)
    return found if len(found) > 1 else ()


def _caches_of(root: Path, cores: Mapping[int, object]) -> tuple[int, ...]:
    """How many cores share each last-level cache, the largest first; empty where all share one."""
    shared: dict[str, set[object]] = {}
    for cpu, core in cores.items():
        levels = {
            _read(index / "level"): _read(index / "shared_cpu_list")
            for index in (root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")
        }
        if last := levels[max(levels)] if levels else "":
            shared.setdefault(last, set()).add(core)
    return tuple(sorted(map(len, shared.values()), reverse=True)) if len(shared) > 1 else ()


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """The processors of /proc/cpuinfo, each as key -> value; other blocks are dropped."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
        processor = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in processor:
            blocks.append(processor)
    return blocks


def processor_features(processors: Sequence[Mapping[str, str]]) -> frozenset[str]:
    """What *all* processors advertise: a thread may run on any of them, and cores may differ."""
    sets = [frozenset((p.get("flags") or p.get("Features") or "").split()) for p in processors]
    return frozenset.intersection(*sets) if sets else frozenset()


def parse_cpu_list(text: str) -> list[int]:
    """The numbers of a list: "0-2,8" -> [0, 1, 2, 8]. Malformed parts are dropped."""
    cpus: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if found:
            cpus.extend(range(int(found[1]), int(found[2] or found[1]) + 1))
    return cpus


def parse_size(text: str) -> int:
    """The bytes of "48K", "1M" or "64"; 0 when it is none of these."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else 0


def read_caches(root: Path, cpu: int) -> tuple[Cache, ...]:
    """The caches of one logical CPU, from sysfs below ``root``; empty when sysfs does not tell."""
    caches = []
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        level, size = _read(index / "level"), parse_size(_read(index / "size"))
        if level.isdigit() and size:
            caches.append(
                Cache(
                    level=int(level),
                    type=_read(index / "type") or "Unified",
                    size_bytes=size,
                    line_bytes=parse_size(_read(index / "coherency_line_size")) or 64,
                    shared_by=len(parse_cpu_list(_read(index / "shared_cpu_list"))) or 1,
                )
            )
    return tuple(caches)


def sve_bytes(root: Path) -> int:
    """Bytes of an SVE register as programs start with them; 0 when the system does not tell."""
    return parse_size(_read(root / "proc/sys/abi/sve_default_vector_length"))


def cgroup_cpu_quota(root: Path) -> float | None:
    """CPUs' worth of time this process may use, from cgroup v1 and v2; None when unlimited.

    A limit of any ancestor holds for its children, so the smallest one counts.
    """
    quotas = map(_quota_of, _cgroup_folders(root, "cpu", ("cpu", "cpu,cpuacct", "cpuacct,cpu")))
    return min((quota for quota in quotas if quota is not None), default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take without swapping; None when the system does not tell.

    What /proc/meminfo calls available, or less where a cgroup (v1 or v2) allows less; pages of files that the
    system would give up count as free in both.
    """
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    rooms = [_room_of(folder) for folder in _cgroup_folders(root, "memory", ("memory",))]
    known = [room for room in rooms if room is not None] + ([int(found[1]) << 10] if found else [])
    return min(known, default=None)


def _room_of(folder: Path) -> int | None:
    """The bytes that a cgroup still allows; None where it has no limit."""
    limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
    used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
    if not (limit.isdigit() and used.isdigit()):
        return None  # "max", or another folder
    files = re.findall(r"^(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return max(0, int(limit) - int(used) + sum(map(int, files)))


def _cgroup_folders(root: Path, controller: str, mounts: Sequence[str]) -> Iterator[Path]:
    """The folders of this process's cgroup and of its ancestors: of version 2, and of v1's ``mounts``."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            bases: Sequence[str] = ("unified", "")
        elif controller in controllers.split(","):
            bases = mounts
        else:
            continue
        # Inside a container the path may name a folder only the host sees; then its ancestors still count.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in bases:
            for depth in range(len(parts), -1, -1):
                yield root.joinpath("sys/fs/cgroup", base, *parts[:depth])


def _quota_of(folder: Path) -> float | None:
    """The limit of one cgroup folder: cpu.max is "max 100000" or "150000 100000"; v1 has two files."""
    limit, _, period = _read(folder / "cpu.max").partition(" ")
    if not limit:
        limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    is_limit = limit.isdigit() and period.isdigit() and int(period) > 0  # "max" and "-1" are none
    return int(limit) / int(period) if is_limit else None


def _core_of_each_cpu(
    root: Path, processors: Sequence[Mapping[str, str]], online: Sequence[int]
) -> dict[int, object]:
    """Logical CPU -> something equal for the hardware threads of one core.

    From sysfs, else from the ids in /proc/cpuinfo (x86), else each logical CPU counts as a core.
    """
    by_number = {p.get("processor"): p for p in processors}
    cores: dict[int, object] = {}
    for cpu in online:
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        processor = by_number.get(str(cpu), {})
        if siblings:
            cores[cpu] = siblings
        elif "core id" in processor:
            cores[cpu] = (processor.get("physical id"), processor["core id"])
        else:
            cores[cpu] = cpu
    return cores


def _arch_of(processors: Sequence[Mapping[str, str]], features: frozenset[str], machine: str) -> str:
    """Of the recorded processors where they tell, else ``machine``."""
    if _is_arm(processors):
        return "aarch64" if "asimd" in features else "arm"  # a 32-bit ARM kernel says neon, not asimd
    return "x86_64" if "lm" in features else machine


def _is_arm(processors: Sequence[Mapping[str, str]]) -> bool:
    return any("CPU implementer" in processor for processor in processors)


def _shows_another(processors: Sequence[Mapping[str, str]], machine: str) -> bool:
    """Whether /proc/cpuinfo is that of an x86 for a process of aarch64, or the reverse."""
    is_x86 = "lm" in processor_features(processors)
    return (machine == "aarch64" and is_x86) or (machine == "x86_64" and _is_arm(processors))


def _status_field(root: Path, field: str) -> str:
    for line in _read(root / "proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == field:
            return value.strip()
    return ""


def _read(file: Path) -> str:
    """The text of a small file, stripped; empty when there is none or it may not be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _ask_py_cpuinfo() -> list[dict[str, str]]:
    """One processor as py-cpuinfo sees it (1.2 s), for systems without /proc/cpuinfo; empty when it fails."""
    try:
        import cpuinfo

        info = cpuinfo.get_cpu_info()
        processor = {
            "processor": "0",
            "vendor_id": str(info.get("vendor_id_raw", "")),
            "model name": str(info.get("brand_raw", "")),
            "flags": " ".join(info.get("flags", ())),
        }
    except Exception:  # it raises plain Exception for CPUs it does not know
        return []
    count = int(info.get("count", 1))
    return [{**processor, "processor": str(number)} for number in range(count)]
