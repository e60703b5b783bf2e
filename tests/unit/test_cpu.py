from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bitgen
import bitgen.cpu.linux
from bitgen.cpu import (
    Accepted,
    Cache,
    Cpu,
    accepted_isas,
    detect_cpu,
    find_isa,
    load_isas,
    require_isa,
    require_supported_os,
    resolve_isas,
)
from bitgen.cpu.features import hwcap_features
from bitgen.cpu.linux import (
    available_memory,
    cgroup_cpu_quota,
    detect_linux,
    parse_cpu_list,
    parse_cpuinfo,
    parse_size,
    processor_features,
    read_caches,
)
from bitgen.cpu.macos import cpu_from_sysctl
from bitgen.cpu.microarch import CpuFamily, family_label, load_cpu_families
from bitgen.errors import BitgenError, FileError, UnsupportedError, UsageError
from bitgen.paths import configs_dir
from bitgen.records import dump

Detect = Callable[[str], Cpu]
RECORDED = Path(__file__).parents[1] / "data" / "cpuinfo"

ARM = ("neon", "neon_dotprod", "sve128", "neon_i8mm", "sve256", "sve256_i8mm", "sve512")
X86 = ("scalar", "avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_vbmi", "amx_int8")
ICELAKE_ON = ("avx512_vbmi", "avx512_vnni", "avx512", "avx2", "scalar")
ALL = ("avx512_vbmi", "avx512_vnni", "avx512", "avx_vnni", "avx2", "scalar")
HASWELL_ON = ("avx2", "scalar")
DOTPROD_ON = ("neon_dotprod", "neon", "scalar")

# recording -> family, architecture, ISA levels it runs, strongest first
MACHINES = {
    "nehalem": ("nehalem", "x86_64", ("scalar",)),
    "ivybridge": ("ivybridge", "x86_64", ("scalar",)),
    "piledriver": ("piledriver", "x86_64", ("scalar",)),
    "haswell": ("haswell", "x86_64", HASWELL_ON),
    "broadwell": ("broadwell", "x86_64", HASWELL_ON),
    "zen": ("zen", "x86_64", HASWELL_ON),
    "zen2": ("zen2", "x86_64", HASWELL_ON),
    "zen3": ("zen3", "x86_64", HASWELL_ON),
    "raptorlake": ("raptorlake", "x86_64", ("avx_vnni", "avx2", "scalar")),
    "arrowlake": ("arrowlake", "x86_64", ("avx_vnni", "avx2", "scalar")),
    "skylake_avx512": ("skylake_avx512", "x86_64", ("avx512", "avx2", "scalar")),
    "cascadelake": ("cascadelake", "x86_64", ("avx512_vnni", "avx512", "avx2", "scalar")),
    "zen4": ("zen4", "x86_64", ICELAKE_ON),
    "sapphirerapids": ("sapphirerapids", "x86_64", ("amx_int8", *ALL)),
    "zen5": ("zen5", "x86_64", ALL),
    "zen5_guest": ("zen5", "x86_64", ALL),
    "rocketlake_guest": ("sapphirerapids", "x86_64", ("amx_int8", *ALL)),
    "cortex_a72": ("cortex_a72", "aarch64", ("neon", "scalar")),
    "cortex_a76": ("cortex_a76", "aarch64", DOTPROD_ON),
    "neoverse_n1": ("neoverse_n1", "aarch64", DOTPROD_ON),
    "neoverse_v2": ("neoverse_v2", "aarch64", ("neon_i8mm", *DOTPROD_ON)),
    "apple_m1": ("m1", "aarch64", DOTPROD_ON),
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def reasons(cpu: Cpu) -> dict[str, str]:
    decisions = resolve_isas(cpu, load_isas())
    return {d.isa.name: "" if isinstance(d, Accepted) else d.reason for d in decisions}


# ---- Recorded machines --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_recorded_machine(recorded_cpu: Detect, name: str) -> None:
    cpu = recorded_cpu(name)
    family, arch, runs = MACHINES[name]
    assert (cpu.family, cpu.arch, cpu.os) == (family, arch, "Linux")
    assert tuple(isa.name for isa in accepted_isas(cpu, load_isas())) == runs


def test_every_linux_recording_is_tested() -> None:
    recorded = {file.stem for file in RECORDED.glob("*.txt") if not file.stem.startswith("macos_")}
    assert recorded == set(MACHINES)


def test_rejections_name_exactly_what_is_missing(recorded_cpu: Detect) -> None:
    assert reasons(recorded_cpu("nehalem"))["avx2"] == "this CPU lacks avx2, bmi2, f16c, fma"
    assert reasons(recorded_cpu("piledriver"))["avx2"] == "this CPU lacks avx2, bmi2"
    assert reasons(recorded_cpu("zen3"))["avx_vnni"] == "this CPU lacks avx_vnni"
    assert reasons(recorded_cpu("raptorlake"))["avx512"] == (
        "this CPU lacks avx512bw, avx512dq, avx512f, avx512vl"
    )
    assert reasons(recorded_cpu("skylake_avx512"))["avx512_vnni"] == "this CPU lacks avx512_vnni"
    assert reasons(recorded_cpu("cascadelake"))["avx512_vbmi"] == "this CPU lacks avx512vbmi, gfni"
    assert reasons(recorded_cpu("zen4"))["avx_vnni"] == "this CPU lacks avx_vnni"
    assert reasons(recorded_cpu("neoverse_n1"))["avx2"] == "it is for x86_64, this CPU is aarch64"
    assert reasons(recorded_cpu("cortex_a72"))["neon_dotprod"] == (
        "this CPU lacks asimddp, asimdrdm, atomics"
    )
    assert reasons(recorded_cpu("apple_m1"))["neon_i8mm"] == "this CPU lacks i8mm"
    why = reasons(recorded_cpu("zen5"))
    assert {why[name] for name in ALL} == {""}
    assert why["amx_int8"] == "this CPU lacks amx_int8, amx_tile"
    assert {why[name] for name in ARM} == {"it is for aarch64, this CPU is x86_64"}


def test_decisions_are_strongest_first_and_cover_every_level(recorded_cpu: Detect) -> None:
    isas = load_isas()
    decisions = resolve_isas(recorded_cpu("skylake_avx512"), isas)
    assert [d.isa for d in decisions] == list(reversed(isas))


def test_identity_of_a_guest(recorded_cpu: Detect) -> None:
    cpu = recorded_cpu("zen5_guest")
    assert (cpu.vendor, cpu.model_name) == ("AuthenticAMD", "AMD EPYC")
    assert (cpu.logical_cpus, cpu.physical_cores, cpu.usable_threads) == (2, 2, 2)


def test_numbers_that_the_features_contradict_name_no_family(recorded_cpu: Detect) -> None:
    """A guest that calls itself a Rocket Lake and has the tile registers of a Sapphire Rapids."""
    cpu = recorded_cpu("rocketlake_guest")
    assert {"amx_int8", "avx512_fp16", "avx_vnni"} <= cpu.features
    assert cpu.family == "sapphirerapids"
    assert "rocketlake" in {family.label for family in load_cpu_families()}


@pytest.mark.parametrize(
    ("model", "extra", "label"),
    [
        ("167", "", "rocketlake"),  # a guest with less than its CPU has keeps its name
        ("167", "avx2 fma f16c bmi2", "rocketlake"),
        ("63", "avx2 fma f16c bmi2 avx512f avx512bw avx512vl avx512dq avx512cd", "skylake_avx512"),
        ("63", "avx2 fma f16c bmi2 avx512f", "haswell"),  # no CPU is this: the nearest below it
        ("143", "avx2 amx_tile", "sapphirerapids"),
    ],
)
def test_features_decide_where_numbers_lie(model: str, extra: str, label: str) -> None:
    processor = {"vendor_id": "GenuineIntel", "cpu family": "6", "model": model, "stepping": "1"}
    assert family_label(processor, "x86_64", frozenset(extra.split()), load_cpu_families()) == label


def test_no_recorded_cpu_has_what_its_family_lacks(recorded_cpu: Detect) -> None:
    lacks = {family.label: family.lacks for family in load_cpu_families()}
    honest = [name for name in MACHINES if name != "rocketlake_guest"]
    assert not [name for name in honest if lacks.get(MACHINES[name][0], set()) & recorded_cpu(name).features]


def test_arm_boards_count_processors_and_get_a_name(recorded_cpu: Detect) -> None:
    cpu = recorded_cpu("cortex_a76")
    assert (cpu.logical_cpus, cpu.physical_cores, cpu.model_name) == (4, 4, "Cortex A76")
    assert "asimddp" in cpu.features
    assert "asimddp" not in recorded_cpu("cortex_a72").features
    assert {"i8mm", "sve2"} <= recorded_cpu("neoverse_v2").features


def test_this_machine_is_detected() -> None:
    cpu = detect_cpu()
    assert 1 <= cpu.usable_threads <= cpu.physical_cores <= cpu.logical_cpus
    assert accepted_isas(cpu, load_isas())[-1].name == "scalar"
    assert set(dump(cpu)) == {field.name for field in dataclasses.fields(Cpu)}
    assert dump(cpu)["features"] == sorted(cpu.features)


# ---- Linux: topology, affinity, quota, caches ------------------------------------------------------


def x86_processors(*ids: tuple[int, int], flags: str = "lm avx2") -> str:
    """/proc/cpuinfo with one processor for each (physical id, core id)."""
    block = "processor : {}\nvendor_id : X\nphysical id : {}\ncore id : {}\nflags : {}\n"
    return "\n".join(block.format(i, package, core, flags) for i, (package, core) in enumerate(ids))


def test_hyperthreads_count_once(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/cpuinfo": x86_processors((0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1))})
    cpu = detect_cpu(root, "Linux")
    assert (cpu.logical_cpus, cpu.physical_cores, cpu.usable_threads) == (6, 4, 4)


def test_sysfs_knows_cores_better_than_cpuinfo(tmp_path: Path) -> None:
    files = {"proc/cpuinfo": x86_processors((0, 0), (0, 1), (0, 2), (0, 3))}
    for cpu_number, siblings in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        files[f"sys/devices/system/cpu/cpu{cpu_number}/topology/thread_siblings_list"] = siblings + "\n"
    assert detect_cpu(write(tmp_path, files), "Linux").physical_cores == 2


def test_affinity_limits_threads_not_cores(tmp_path: Path) -> None:
    cpuinfo = x86_processors((0, 0), (0, 1), (0, 2), (0, 3), (0, 0), (0, 1), (0, 2), (0, 3))
    status = "Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t1-2,5\n"  # 1 and 5 are one core
    root = write(tmp_path, {"proc/cpuinfo": cpuinfo, "proc/self/status": status})
    cpu = detect_cpu(root, "Linux")
    assert (cpu.logical_cpus, cpu.physical_cores, cpu.usable_threads) == (8, 4, 2)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3.0),
        (  # the smallest limit of all ancestors
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/../../a\n", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5),
        (  # version 1, both controllers mounted together
            {
                "proc/self/cgroup": "5:memory:/m\n4:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (  # version 1, unlimited; the folder of the host is not visible here
            {
                "proc/self/cgroup": "1:cpu:/docker/1\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        (  # another controller's quota is not ours
            {
                "proc/self/cgroup": "1:cpuset:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "nonsense\n0::/\n", "sys/fs/cgroup/cpu.max": "100 0"}, None),
    ],
)
def test_cgroup_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cgroup_cpu_quota(write(tmp_path, files)) == quota


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal:  9 kB\nMemAvailable:       4 kB\n"}, 4096),
        (  # a cgroup allows less; its pages of files can be given up
            {
                "proc/meminfo": "MemAvailable: 4 kB\n",
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/a/memory.max": "3000\n",
                "sys/fs/cgroup/a/memory.current": "2500\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 700\nactive_file 11\n",
            },
            1211,
        ),
        (  # no limit here, the parent's is used up; version 1 below
            {
                "proc/meminfo": "MemAvailable: 4 kB\n",
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "1\n",
                "sys/fs/cgroup/a/memory.max": "10\n",
                "sys/fs/cgroup/a/memory.current": "12\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "3:memory:/m\n",
                "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "100\n",
                "sys/fs/cgroup/memory/m/memory.usage_in_bytes": "60\n",
            },
            40,
        ),
    ],
)
def test_available_memory(tmp_path: Path, files: dict[str, str], available: int | None) -> None:
    assert available_memory(write(tmp_path, files)) == available


@pytest.mark.parametrize(("limit", "threads"), [("250000", 2), ("50000", 1), ("900000", 4), ("max", 4)])
def test_quota_limits_threads(tmp_path: Path, limit: str, threads: int) -> None:
    files = {
        "proc/cpuinfo": x86_processors((0, 0), (0, 1), (0, 2), (0, 3)),
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": f"{limit} 100000\n",
    }
    assert detect_cpu(write(tmp_path, files), "Linux").usable_threads == threads


def cache_files(cpu: int, *caches: tuple[int, str, str, str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for index, (level, kind, size, shared) in enumerate(caches):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
        files |= {f"{folder}/level": f"{level}\n", f"{folder}/type": f"{kind}\n"}
        files |= {f"{folder}/size": f"{size}\n", f"{folder}/shared_cpu_list": f"{shared}\n"}
        files[f"{folder}/coherency_line_size"] = "64\n"
    return files


def test_caches_of_chiplets(tmp_path: Path) -> None:
    # Two chiplets of two cores each, every one with its own L3.
    files = {"proc/cpuinfo": x86_processors((0, 0), (0, 1), (0, 2), (0, 3))}
    levels = ((1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "512K"), (3, "Unified", "16M"))
    for cpu_number in range(4):
        chiplet = "0-1" if cpu_number < 2 else "2-3"
        shared = [str(cpu_number)] * 3 + [chiplet]
        files |= cache_files(cpu_number, *((*c, s) for c, s in zip(levels, shared, strict=True)))
    cpu = detect_cpu(write(tmp_path, files), "Linux")
    assert (cpu.l1d_bytes, cpu.l2_bytes, cpu.llc_bytes) == (32 << 10, 512 << 10, 16 << 20)
    assert cpu.llc_total_bytes == 32 << 20
    assert cpu.caches[3] == Cache(3, "Unified", 16 << 20, 64, 2)


def test_caches_are_those_of_an_allowed_cpu(tmp_path: Path) -> None:
    files = {
        "proc/cpuinfo": x86_processors((0, 0), (0, 1)),
        "proc/self/status": "Cpus_allowed_list:\t1\n",
        **cache_files(0, (1, "Data", "32K", "0")),
        **cache_files(1, (1, "Data", "48K", "1")),
    }
    assert detect_cpu(write(tmp_path, files), "Linux").l1d_bytes == 48 << 10


def test_missing_caches_have_sane_sizes(tmp_path: Path) -> None:
    cpu = detect_cpu(write(tmp_path, {"proc/cpuinfo": x86_processors((0, 0))}), "Linux")
    assert cpu.caches == ()
    assert cpu.l1d_bytes < cpu.l2_bytes < cpu.llc_bytes == cpu.llc_total_bytes
    two_levels = dataclasses.replace(
        cpu, caches=(Cache(2, "Unified", 1 << 20, 64, 1), Cache(1, "Data", 1 << 14, 64, 1))
    )
    assert (two_levels.l1d_bytes, two_levels.l2_bytes, two_levels.llc_bytes) == (1 << 14, 1 << 20, 1 << 20)


def test_unreadable_cache_entries_are_skipped(tmp_path: Path) -> None:
    files = cache_files(0, (1, "Data", "32K", "0"), (2, "Unified", "lots", "0"))
    files |= {"sys/devices/system/cpu/cpu0/cache/index9/level": "x"}
    assert [cache.level for cache in read_caches(write(tmp_path, files), 0)] == [1]


def test_differing_cores_offer_only_what_all_have() -> None:
    processors = parse_cpuinfo("processor : 0\nFeatures : a b\n\nprocessor : 1\nFeatures : b c\n")
    assert processor_features(processors) == {"b"}
    assert processor_features([]) == frozenset()


def test_cpuinfo_keeps_values_with_colons_and_drops_the_board() -> None:
    text = "processor\t: 0\nmodel name\t: a: b\n\nprocessor\t: 1\n\nHardware\t: X\nModel\t: Y\n"
    assert parse_cpuinfo(text) == [{"processor": "0", "model name": "a: b"}, {"processor": "1"}]
    assert parse_cpuinfo("") == []


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-2,8", [0, 1, 2, 8]), ("3\n", [3]), ("", []), ("x,1", [1]), ("4-2", [])]
)
def test_parse_cpu_list(text: str, cpus: list[int]) -> None:
    assert parse_cpu_list(text) == cpus


@pytest.mark.parametrize(
    ("text", "size"), [("48K", 49152), ("1M\n", 1 << 20), ("64", 64), ("2G", 2 << 30), ("", 0), ("K", 0)]
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_32_bit_arm_kernel_is_not_aarch64(tmp_path: Path) -> None:
    text = "processor : 0\nFeatures : half thumb neon vfpv4 crc32\nCPU implementer : 0x41\nCPU part : 0xd08\n"
    cpu = detect_cpu(write(tmp_path, {"proc/cpuinfo": text}), "Linux")
    assert cpu.arch == "arm"
    assert [isa.name for isa in accepted_isas(cpu, load_isas())] == ["scalar"]


def test_an_empty_machine_runs_scalar(tmp_path: Path) -> None:
    cpu = detect_cpu(tmp_path, "Linux")
    assert (cpu.features, cpu.vendor, cpu.logical_cpus, cpu.usable_threads) == (frozenset(), "unknown", 1, 1)
    assert [isa.name for isa in accepted_isas(cpu, load_isas())] == ["scalar"]


def auxv(hwcap: int, hwcap2: int | None) -> bytes:
    """An auxiliary vector: AT_PAGESZ, AT_HWCAP, AT_HWCAP2 where the kernel has it, AT_NULL, and rubbish."""
    pairs = [(6, 4096), (16, hwcap), *([] if hwcap2 is None else [(26, hwcap2)]), (0, 0), (16, 2**64 - 1)]
    return b"".join(struct.pack("<QQ", *pair) for pair in pairs)


# AT_HWCAP and AT_HWCAP2 of qemu 7.2's cores, AT_HWCAP of a Raspberry Pi 4 kernel
HWCAPS = {
    "cortex-a72": (0x8FB, 0x0, {"asimd", "crc32"}),
    "raspberry-pi-4": (0x887, None, {"asimd", "crc32"}),
    "neoverse-n1": (0x119FFB, 0x0, {"asimd", "crc32", "atomics", "fphp", "asimdhp", "asimdrdm", "asimddp"}),
}


@pytest.mark.parametrize("name", HWCAPS)
def test_features_from_the_kernels_bits(name: str) -> None:
    first, second, features = HWCAPS[name]
    assert hwcap_features(auxv(first, second)) == features


@pytest.mark.parametrize("data", [b"", b"\0" * 15, auxv(0, 0)[:16], struct.pack("<QQ", 0, 0)])
def test_a_vector_without_bits_has_no_features(data: bytes) -> None:
    assert hwcap_features(data) == frozenset()


def test_an_emulated_process_is_not_its_host(tmp_path: Path) -> None:
    """qemu 7.2 shows an aarch64 process the /proc/cpuinfo of the x86 machine, and the right vector."""
    root = write(tmp_path, {"proc/cpuinfo": x86_processors((0, 0), (0, 1), flags="lm avx2 fma f16c bmi2")})
    (root / "proc/self").mkdir()
    (root / "proc/self/auxv").write_bytes(auxv(0x119FFB, 1 << 13))
    cpu = detect_linux(root, "aarch64")
    assert (cpu.arch, cpu.family, cpu.vendor, cpu.logical_cpus) == ("aarch64", "aarch64", "unknown", 2)
    assert [isa.name for isa in accepted_isas(cpu, load_isas()) if isa.name in (*X86, *ARM)] == [
        "neon_i8mm",
        "neon_dotprod",
        "neon",
        "scalar",
    ]
    assert detect_linux(root, "x86_64").family == "x86_64"
    assert [isa.name for isa in accepted_isas(detect_linux(root), load_isas())] == ["avx2", "scalar"]


def test_an_arm_host_of_an_x86_process_offers_nothing(tmp_path: Path) -> None:
    text = (RECORDED / "neoverse_n1.txt").read_text(encoding="utf-8")
    cpu = detect_linux(write(tmp_path, {"proc/cpuinfo": text}), "x86_64")
    assert (cpu.arch, cpu.features) == ("x86_64", frozenset())


def test_py_cpuinfo_answers_where_proc_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import cpuinfo

    info = {"vendor_id_raw": "V", "brand_raw": "B", "flags": ["lm", "avx2"], "count": 2}
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: info)
    processors = bitgen.cpu.linux._ask_py_cpuinfo()
    assert [p["processor"] for p in processors] == ["0", "1"]
    assert processor_features(processors) == {"lm", "avx2"}

    def fail() -> None:
        raise Exception("py-cpuinfo currently only works on X86 and some ARM")

    monkeypatch.setattr(cpuinfo, "get_cpu_info", fail)
    assert bitgen.cpu.linux._ask_py_cpuinfo() == []


# ---- macOS -----------------------------------------------------------------------------------------


def test_apple_silicon() -> None:
    cpu = cpu_from_sysctl((RECORDED / "macos_m3.txt").read_text(encoding="utf-8"), "aarch64")
    assert (cpu.os, cpu.arch, cpu.vendor, cpu.model_name) == ("Darwin", "aarch64", "Apple", "Apple M3 Max")
    assert (cpu.family, cpu.logical_cpus, cpu.physical_cores) == ("m3", 14, 14)
    assert {"asimd", "asimddp", "i8mm", "bf16"} <= cpu.features
    assert "sme" not in cpu.features
    assert (cpu.l1d_bytes, cpu.l2_bytes, cpu.llc_bytes) == (128 << 10, 16 << 20, 16 << 20)
    assert cpu.caches[0].line_bytes == 128


def test_intel_mac() -> None:
    cpu = cpu_from_sysctl((RECORDED / "macos_haswell.txt").read_text(encoding="utf-8"), "x86_64")
    assert (cpu.family, cpu.vendor) == ("haswell", "GenuineIntel")
    assert {"avx", "sse4_2"} <= cpu.features
    assert [isa.name for isa in accepted_isas(cpu, load_isas())] == ["avx2", "scalar"]


def test_rosetta_is_x86_without_avx() -> None:
    cpu = cpu_from_sysctl("machdep.cpu.brand_string: Apple M1\nmachdep.cpu.features: SSE4.2\n", "x86_64")
    assert (cpu.arch, cpu.logical_cpus) == ("x86_64", 1)
    assert [isa.name for isa in accepted_isas(cpu, load_isas())] == ["scalar"]


@pytest.mark.parametrize("system", ["Windows", "FreeBSD", "CYGWIN_NT-10.0", ""])
def test_other_systems_are_refused(system: str) -> None:
    with pytest.raises(UnsupportedError, match="bitgen runs on Linux and macOS; this is"):
        detect_cpu(system=system or "Plan 9")
    with pytest.raises(BitgenError, match=f"this is {system or 'an unknown system'}"):
        require_supported_os(system)


@pytest.mark.parametrize("name", ["load", "LLM", "tune", "build"])
def test_python_on_windows_is_told_in_a_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before modules are imported that Windows does not have (grp, pwd)."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "grp", None)
    with pytest.raises(UnsupportedError, match="for Windows there is the C library so far"):
        getattr(bitgen, name)


def test_supported_systems_pass() -> None:
    require_supported_os("Linux")
    require_supported_os("Darwin")


# ---- ISA levels ---------------------------------------------------------------------------------------


def test_isas_in_order_with_their_vocabularies() -> None:
    vocabularies = {isa.name: isa.headers for isa in load_isas()}
    assert tuple(vocabularies) == X86 + ARM
    assert vocabularies == {
        "scalar": ("scalar",),
        "avx2": ("avx2",),
        "avx_vnni": ("avx2", "avx_vnni"),
        "avx512": ("avx512",),
        "avx512_vnni": ("avx512", "avx512_vnni"),
        "avx512_vbmi": ("avx512", "avx512_vnni", "avx512_vbmi"),
        "amx_int8": ("avx512", "avx512_vnni", "avx512_vbmi", "amx_int8"),
        "neon": ("neon",),
        "neon_dotprod": ("neon", "neon_dotprod"),
        "neon_i8mm": ("neon", "neon_dotprod", "neon_i8mm"),
        "sve128": ("sve",),
        "sve256": ("sve",),
        "sve256_i8mm": ("sve", "sve_i8mm"),
        "sve512": ("sve",),
    }


def test_flags_are_as_recorded() -> None:
    """They are keys of caches and of measurements: a spelling that changes throws both away."""
    recorded = json.loads((RECORDED.parent / "isa_flags.json").read_text(encoding="utf-8"))
    assert recorded == {
        isa.name: {
            "requires": sorted(isa.requires),
            "cc_flags": [*isa.cc_flags],
            "zig_flags": [*isa.zig_flags],
        }
        for isa in load_isas()
    }


@pytest.mark.parametrize("isa", [i for i in load_isas() if i.name in X86], ids=lambda isa: isa.name)
def test_every_feature_a_compiler_may_use_is_required(isa: bitgen.cpu.Isa) -> None:
    spelled = {feature.replace("_", ""): feature for feature in isa.requires}
    machine = [flag for flag in isa.cc_flags if not flag.startswith("-mprefer")]
    assert {flag.removeprefix("-m").replace("-", "") for flag in machine} == set(spelled)
    assert "-march=native" not in isa.cc_flags + isa.zig_flags
    base, *added = isa.zig_flags[0].split("+")
    assert base == ("-mcpu=x86_64" if added else "-mcpu=baseline")
    assert {name.replace("_", "") for name in added} == set(spelled)
    assert isa.zig_flags[1:] == tuple(flag for flag in isa.cc_flags if flag.startswith("-mprefer"))


@pytest.mark.parametrize("isa", [i for i in load_isas() if i.name in ARM], ids=lambda isa: isa.name)
def test_every_feature_of_an_arm_level_is_required(isa: bitgen.cpu.Isa) -> None:
    """-march names a level of the architecture and additions: 8.2 has what 8.1 made mandatory."""
    march, mcpu = isa.cc_flags[0], isa.zig_flags[0]
    length = [f"-msve-vector-bits={8 * isa.vector_bytes}"] if isa.exact_vector else []
    assert [*isa.cc_flags[1:]] == [*isa.zig_flags[1:]] == length
    level, *added = march.removeprefix("-march=").split("+")
    mandatory = {"armv8-a": {"asimd"}, "armv8.2-a": {"asimd", "crc32", "atomics", "asimdrdm"}}[level]
    names = {"dotprod": {"asimddp"}, "sve": {"sve", "fphp", "asimdhp"}}
    if isa.exact_vector:
        names["i8mm"] = {"i8mm", "svei8mm"}
    assert isa.requires == mandatory.union(*(names.get(name, {name}) for name in added))
    name = level.removeprefix("arm").replace("-", "").replace(".", "_")
    assert mcpu == "+".join(["-mcpu=generic", name, *added])


def test_vector_width_and_dot4() -> None:
    isas = {isa.name: isa for isa in load_isas()}
    assert {name for name, isa in isas.items() if isa.native_dot4} == {
        "avx_vnni",
        "avx512_vnni",
        "avx512_vbmi",
        "amx_int8",
        "neon_dotprod",
        "neon_i8mm",
        "sve128",
        "sve256",
        "sve256_i8mm",
        "sve512",
    }
    assert {name for name, isa in isas.items() if isa.tiles} == {"scalar", "amx_int8"}
    assert {name for name, isa in isas.items() if isa.mmla} == {"scalar", "neon_i8mm", "sve256_i8mm"}
    assert {name for name, isa in isas.items() if isa.tile_registers} == {"amx_int8"}
    assert [isas[name].vector_bytes for name in ("scalar", "avx2", "avx_vnni", "avx512")] == [8, 32, 32, 64]
    smaller = ("neon", "neon_dotprod", "sve128", "sve256", "sve512")
    assert {name: isa.code_max for name, isa in isas.items() if isa.code_max != 128} == dict.fromkeys(
        smaller, 127
    )


@pytest.mark.parametrize(
    ("length", "best", "why_not_256"),
    [
        ("32\n", "sve256_i8mm", ""),
        ("16\n", "neon_i8mm", "it needs SVE registers of 256 bits, here they have 128"),
        ("64\n", "sve512", "it needs SVE registers of 256 bits, here they have 512"),
        ("128\n", "neon_i8mm", "it needs SVE registers of 256 bits, here they have 1024"),
        ("", "neon_i8mm", "it needs SVE registers of 256 bits, here they have an unknown number of"),
    ],
)
def test_the_system_says_how_long_sve_registers_are(
    tmp_path: Path, length: str, best: str, why_not_256: str
) -> None:
    cpuinfo = (RECORDED / "neoverse_v2.txt").read_text(encoding="utf-8")
    files = {"proc/cpuinfo": cpuinfo, "proc/sys/abi/sve_default_vector_length": length}
    cpu = detect_cpu(write(tmp_path, files), "Linux")
    assert accepted_isas(cpu, load_isas())[0].name == best
    assert reasons(cpu)["sve256"] == why_not_256


def test_sve_registers_are_none_without_sve(tmp_path: Path) -> None:
    cpuinfo = (RECORDED / "cortex_a76.txt").read_text(encoding="utf-8")
    cpu = detect_cpu(
        write(tmp_path, {"proc/cpuinfo": cpuinfo, "proc/sys/abi/sve_default_vector_length": "32"}), "Linux"
    )
    assert cpu.sve_bytes == 0
    assert reasons(cpu)["sve256"] == "this CPU lacks sve"


def test_levels_of_an_arm_mac() -> None:
    cpu = cpu_from_sysctl((RECORDED / "macos_m3.txt").read_text(encoding="utf-8"), "aarch64")
    assert next(isa.name for isa in accepted_isas(cpu, load_isas())) == "neon_i8mm"


def test_find_isa_is_forgiving_and_helpful() -> None:
    assert find_isa("AVX512-VNNI", load_isas()).name == "avx512_vnni"
    with pytest.raises(UsageError, match=r"unknown ISA level 'avx51'; did you mean avx512"):
        find_isa("avx51", load_isas())
    with pytest.raises(BitgenError, match="there are scalar, avx2"):
        find_isa("qqq", load_isas())


def test_require_isa_says_why_not_and_what_instead(recorded_cpu: Detect) -> None:
    cpu = recorded_cpu("haswell")
    assert require_isa("avx2", cpu, load_isas()).name == "avx2"
    with pytest.raises(UnsupportedError) as error:
        require_isa("avx_vnni", cpu, load_isas())
    assert error.value.message == (
        "cannot run avx_vnni here: this CPU lacks avx_vnni; this CPU runs avx2, scalar"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("extends: avx2", "extends: avx3", "isas.avx_vnni: what it extends, 'avx3', must stand before it"),
        ("extends: avx2", "extends: avx2\n    arch: any", "isas.avx_vnni: arch must be that of avx2"),
        ("    arch: x86_64\n", "", "isas.avx2: arch and registers must be given, or a level"),
        ("registers: {count: 0, bytes: 8}", "", "isas.scalar: arch and registers must be given"),
        ("march: armv8-a", "", "isas.neon: march must be given, or a level that it extends"),
        ("[avx_vnni]", "[avx_vnny]", "isas.avx_vnni: no row under x86_64 in cpu_features.yaml for avx_vnny"),
        ("lookups", "lookup", "isas.scalar: unknown key 'lookup'; did you mean lookups?"),
        ("bytes: 8", "bytes: eight", "bytes must be a whole number"),
    ],
)
def test_wrong_isa_files_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (configs_dir() / "isas.yaml").read_text(encoding="utf-8")
    assert old in text
    file = write(tmp_path, {"isas.yaml": text.replace(old, new)}) / "isas.yaml"
    with pytest.raises(FileError) as error:
        load_isas(file)
    assert message in error.value.message
    assert str(file) in error.value.message


# ---- Family labels ------------------------------------------------------------------------------------


def test_unlisted_cpus_get_archspecs_label() -> None:
    for name in ("haswell", "skylake_avx512", "zen4", "neoverse_n1", "neoverse_v2"):
        processor = parse_cpuinfo((RECORDED / f"{name}.txt").read_text(encoding="utf-8"))[0]
        arch = "aarch64" if "CPU part" in processor else "x86_64"
        assert family_label(processor, arch, processor_features([processor]), ()) == name


def test_a_cpu_nobody_knows_is_its_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert family_label({}, "x86_64", frozenset(), load_cpu_families()) == "x86_64"
    assert family_label({"vendor_id": "X"}, "riscv64", frozenset(), ()) == "riscv64"
    import archspec.cpu

    monkeypatch.delattr(archspec.cpu, "TARGETS")
    assert family_label({"vendor_id": "GenuineIntel"}, "x86_64", frozenset(), ()) == "x86_64"


def test_labels_separate_steppings_and_models() -> None:
    families = load_cpu_families()

    def label(model: int, stepping: int) -> str:
        text = {
            "vendor_id": "GenuineIntel",
            "cpu family": "6",
            "model": str(model),
            "stepping": str(stepping),
        }
        return family_label(text, "x86_64", frozenset(), families)

    assert [label(85, 4), label(85, 7), label(85, 11)] == ["skylake_avx512", "cascadelake", "cooperlake"]
    assert label(0xCF, 2) == "emeraldrapids"


def test_no_cpu_belongs_to_two_families() -> None:
    families = load_cpu_families()
    for vendor, family in {(f.vendor, f.family) for f in families}:
        for model in range(0x1000):
            for stepping in range(16) if model == 0x55 else (0,):
                holders = [f.label for f in families if f.holds(vendor, family, model, stepping)]
                assert len(holders) <= 1, (vendor, family, hex(model), stepping, holders)


@pytest.mark.parametrize("models", ["zz", "4-2", "1-2-3"])
def test_wrong_family_ranges_are_refused(models: str) -> None:
    with pytest.raises(BitgenError, match="models and steppings must be"):
        CpuFamily("x", "v", 6, models)


# ---- The package's own door -------------------------------------------------------------------------


def test_the_public_names_are_lazy_and_complete() -> None:
    assert all(getattr(bitgen, name) is not None for name in bitgen._HOME)
    assert bitgen.detect_cpu is detect_cpu
    assert set(bitgen._HOME) <= set(dir(bitgen))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bitgen.nonsense
    code = "import sys, bitgen; print(sorted(m for m in sys.modules if m.startswith('bitgen.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_heavy_libraries_are_not_loaded_to_detect() -> None:
    heavy = ("numpy", "optuna", "jinja2", "cffi", "cpuinfo", "archspec")
    code = f"import sys, bitgen; bitgen.detect_cpu(); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = done.stdout.strip()
    # A CPU the table does not list may ask archspec (25 ms), and one without /proc/cpuinfo py-cpuinfo.
    assert loaded in ("[]", "['archspec']", "['cpuinfo', 'archspec']")
