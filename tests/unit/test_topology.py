"""Cores as users have them: which count, what a process may use of them, and what `detect` says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import pytest
from control_groups import REAL_GROUPS, run_in_group

from bitgen.cli import main
from bitgen.cpu import Topology, detect_cpu, detect_topology
from bitgen.cpu.linux import busy_seconds, read_nodes, read_topology
from bitgen.cpu.macos import topology_from_sysctl

ONE_GROUP = {"proc/self/cgroup": "0::/\n"}


def machine_of(cores: Sequence[tuple[int, ...]]) -> dict[str, str]:
    """A machine with these hardware threads of each core."""
    cpus = sorted(chain.from_iterable(cores))
    files = {"proc/cpuinfo": "\n".join(f"processor : {cpu}\nflags : lm\n" for cpu in cpus)}
    for core in cores:
        for cpu in core:
            folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
            files[f"{folder}/thread_siblings_list"] = ",".join(map(str, core)) + "\n"
    return files


def caches_of(*groups: Sequence[int]) -> dict[str, str]:
    """A last-level cache for each group of logical CPUs, and a level 1 for each CPU."""
    files = {}
    for group in groups:
        for cpu in group:
            folder = f"sys/devices/system/cpu/cpu{cpu}/cache"
            for index, level, shared in ((0, 1, [cpu]), (3, 3, group)):
                files[f"{folder}/index{index}/level"] = f"{level}\n"
                files[f"{folder}/index{index}/size"] = "32768K\n"
                files[f"{folder}/index{index}/shared_cpu_list"] = ",".join(map(str, shared)) + "\n"
    return files


def capacities(*values: int) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": f"{value}\n" for i, value in enumerate(values)}


def allowing(cpus: str) -> dict[str, str]:
    return {"proc/self/status": f"Cpus_allowed_list:\t{cpus}\n"}


def write(root: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


# Listed as these machines do: hardware threads of a core side by side, or half of them behind the others.
HYBRID = machine_of([*((2 * i, 2 * i + 1) for i in range(6)), *((12 + i,) for i in range(8))]) | {
    "sys/devices/cpu_core/cpus": "0-11\n",
    "sys/devices/cpu_atom/cpus": "12-19\n",
}
ARROW = machine_of([(i,) for i in range(24)]) | {
    "sys/devices/cpu_core/cpus": "0-7\n",
    "sys/devices/cpu_atom/cpus": "8-23\n",
}
SOCKETS = machine_of([(i, 64 + i) for i in range(64)]) | {
    "sys/devices/system/node/node0/cpulist": "0-31,64-95\n",
    "sys/devices/system/node/node1/cpulist": "32-63,96-127\n",
}
CHIPLETS = machine_of([(i, 16 + i) for i in range(16)]) | caches_of(
    [*range(8), *range(16, 24)], [*range(8, 16), *range(24, 32)]
)
TOPOLOGIES = {
    "i7-12700H: 6 performance cores of two threads, 8 efficiency cores": (
        HYBRID,
        Topology(20, 14, 14, None, (("performance", 6), ("efficiency", 8)), hardware=20),
        "14: one for each of 14 cores (20 hardware threads)",
        (14, 6, 20, 7, 3, 1),
    ),
    "the same, a cpuset of three of its efficiency cores": (
        HYBRID | allowing("13,15,17"),
        Topology(20, 14, 3, hardware=3),
        "3: one for each of 14 cores (20 hardware threads), affinity allows 3 of them",
        (3, 1),
    ),
    "the same, a hardware thread of two performance cores, two efficiency cores": (
        HYBRID | allowing("0,2,12-13"),
        Topology(20, 14, 4, None, (("performance", 2), ("efficiency", 2)), hardware=4),
        "4: one for each of 14 cores (20 hardware threads), affinity allows 4 of them",
        (4, 2, 1),
    ),
    "Core Ultra 9 285K: 8 performance cores of one thread, 16 efficiency cores": (
        ARROW,
        Topology(24, 24, 24, None, (("performance", 8), ("efficiency", 16)), hardware=24),
        "24: one for each of 24 cores",
        (24, 8, 12, 6, 3),
    ),
    "RK3588: 4 Cortex-A55 and 4 Cortex-A76": (
        machine_of([(i,) for i in range(8)]) | capacities(414, 414, 414, 414, 1024, 1024, 1024, 1024),
        Topology(8, 8, 8, None, (("capacity 1024", 4), ("capacity 414", 4)), hardware=8),
        "8: one for each of 8 cores",
        (8, 4, 2, 1),
    ),
    "Snapdragon 888: a Cortex-X1, 3 Cortex-A78, 4 Cortex-A55": (
        machine_of([(i,) for i in range(8)]) | capacities(250, 250, 250, 250, 800, 800, 800, 1024),
        Topology(8, 8, 8, None, (("capacity 1024", 1), ("capacity 800", 3), ("capacity 250", 4)), hardware=8),
        "8: one for each of 8 cores",
        (8, 1, 4, 2),
    ),
    "Ryzen 9 7950X: two chiplets of 8 cores": (
        CHIPLETS,
        Topology(32, 16, 16, hardware=32, caches=(8, 8)),
        "16: one for each of 16 cores (32 hardware threads)",
        (16, 32, 8, 4, 2),
    ),
    "the same, a cpuset of the first chiplet": (
        CHIPLETS | allowing("0-7,16-23"),
        Topology(32, 16, 8, hardware=16),
        "8: one for each of 16 cores (32 hardware threads), affinity allows 8 of them",
        (8, 16, 4, 2, 1),
    ),
    "the same, a cpuset across both, as a container manager counts": (
        CHIPLETS | allowing("4-9"),
        Topology(32, 16, 6, hardware=6, caches=(4, 2)),
        "6: one for each of 16 cores (32 hardware threads), affinity allows 6 of them",
        (6, 3, 1),
    ),
    "EPYC 7282: four pairs of 4 cores with a cache each, one node": (
        machine_of([(i, 16 + i) for i in range(16)])
        | caches_of(*([*range(i, i + 4), *range(16 + i, 20 + i)] for i in range(0, 16, 4)))
        | {"sys/devices/system/node/node0/cpulist": "0-31\n"},
        Topology(32, 16, 16, hardware=32, caches=(4, 4, 4, 4)),
        "16: one for each of 16 cores (32 hardware threads)",
        (16, 32, 8, 4, 2),
    ),
    "two sockets of 32 cores": (
        SOCKETS,
        Topology(128, 64, 64, None, (), 2, hardware=128),
        "64: one for each of 64 cores (128 hardware threads)",
        (64, 128, 32, 16, 8),
    ),
    "the same, a cpuset of the second socket": (
        SOCKETS | allowing("32-63,96-127"),
        Topology(128, 64, 32, hardware=64),
        "32: one for each of 64 cores (128 hardware threads), affinity allows 32 of them",
        (32, 64, 16, 8, 4),
    ),
    "the same, one with memory alone (CXL)": (
        SOCKETS | {"sys/devices/system/node/node2/cpulist": "\n"},
        Topology(128, 64, 64, None, (), 2, hardware=128),
        "64: one for each of 64 cores (128 hardware threads)",
        (64, 128, 32, 16, 8),
    ),
    "8 cores, cgroup v2 allows 2.5 CPUs": (
        machine_of([(i, 8 + i) for i in range(8)])
        | {**ONE_GROUP, "sys/fs/cgroup/cpu.max": "250000 100000\n"},
        Topology(16, 8, 8, 2.5, hardware=16),
        "2: one for each of 8 cores (16 hardware threads), the cgroup allows 2.5 CPUs of time",
        (2, 1),
    ),
    "8 cores, a service of cgroup v2 below a slice that allows 6 CPUs, itself 12": (
        machine_of([(i, 8 + i) for i in range(8)])
        | {
            "proc/self/cgroup": "0::/system.slice/a.service\n",
            "sys/fs/cgroup/system.slice/cpu.max": "600000 100000\n",
            "sys/fs/cgroup/system.slice/a.service/cpu.max": "1200000 100000\n",
        },
        Topology(16, 8, 8, 6.0, hardware=16),
        "6: one for each of 8 cores (16 hardware threads), the cgroup allows 6 CPUs of time",
        (6, 3, 1),
    ),
    "4 cores, cgroup v2 allows 12 CPUs: no limit of cores, and one of hardware threads": (
        machine_of([(i, 4 + i, 8 + i, 12 + i) for i in range(4)])
        | {**ONE_GROUP, "sys/fs/cgroup/cpu.max": "1200000 100000\n"},
        Topology(16, 4, 4, 12.0, hardware=16),
        "4: one for each of 4 cores (16 hardware threads), the cgroup allows 12 CPUs of time",
        (4, 12, 2, 1),
    ),
    "a hardware thread of each of 2 cores, cgroup v1 allows half a CPU": (
        machine_of([(0, 2), (1, 3)])
        | allowing("0-1")
        | {
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
        Topology(4, 2, 2, 0.5, hardware=2),
        "1: one for each of 2 cores (4 hardware threads), the cgroup allows 0.5 CPUs of time",
        (1,),
    ),
    "a container of cgroup v1 whose path only the host sees": (
        machine_of([(i,) for i in range(8)])
        | {
            "proc/self/cgroup": "5:cpuset:/docker/f00\n4:cpu,cpuacct:/docker/f00\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        Topology(8, 8, 8, 4.0, hardware=8),
        "4: one for each of 8 cores, the cgroup allows 4 CPUs of time",
        (4, 2, 1),
    ),
    "equal capacities are one kind": (
        machine_of([(0,), (1,)]) | capacities(1024, 1024),
        Topology(2, 2, 2, hardware=2),
        "2: one for each of 2 cores",
        (2, 1),
    ),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_threads_of_recorded_topologies(name: str, tmp_path: Path) -> None:
    files, topology, why, counts = TOPOLOGIES[name]
    write(tmp_path, files)
    assert detect_topology(tmp_path, "Linux") == topology
    assert str(topology) == why
    assert topology.counts == counts
    assert detect_cpu(tmp_path, "Linux").usable_threads == topology.threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_detect_says_what_affinity_allows(capsys: pytest.CaptureFixture[str]) -> None:
    before = os.sched_getaffinity(0)
    whole = read_topology(Path("/"))
    try:
        os.sched_setaffinity(0, {min(before)})
        assert read_topology(Path("/")).allowed == 1
        assert main(["detect"]) == 0
    finally:
        os.sched_setaffinity(0, before)
    text = capsys.readouterr().out
    assert f"1: one for each of {whole.cores} cores" in text
    assert ("affinity allows 1 of them" in text) == (whole.cores > 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_below_taskset_has_other_cores() -> None:
    """A real one: what a shell's `taskset` gives is what a new process finds."""
    if (taskset := shutil.which("taskset")) is None:
        pytest.skip("taskset is not installed")
    code = "from bitgen.cpu import detect_topology as d; t = d(); print(t.allowed, t.hardware, *t.counts)"
    cpu = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        [taskset, "-c", cpu, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1", "1"]


@pytest.mark.parametrize("name", REAL_GROUPS)
def test_a_process_in_a_control_group(name: str) -> None:
    code = "from bitgen.cpu import detect_topology as d; print(d().quota, d().threads)"
    assert run_in_group(name, code) == f"{0.5 if 'half' in name else None} 1"


def test_cores_of_a_mac() -> None:
    text = (Path(__file__).parents[1] / "data/cpuinfo/macos_m3.txt").read_text(encoding="utf-8")
    found = topology_from_sysctl(text)
    assert found == Topology(14, 14, 14, None, (("performance", 10), ("efficiency", 4)), hardware=14)
    assert found.counts == (14, 10, 7, 3, 1)


def test_nodes_of_a_process(tmp_path: Path) -> None:
    write(tmp_path, SOCKETS | {"sys/devices/system/node/node10/cpulist": "128\n"})
    assert read_nodes(tmp_path, {0, 40, 128}) == [{0}, {40}, {128}]  # 10 behind 1
    assert read_nodes(tmp_path, {40, 41}) == [{40, 41}]
    assert read_nodes(tmp_path / "nowhere", {0}) == []


def test_busy_seconds(tmp_path: Path) -> None:
    """Of the CPUs that are asked for: everything but idle and waiting for disks, which are 4th and 5th."""
    ticks = os.sysconf("SC_CLK_TCK")
    lines = [
        "cpu  9 9 9 9 9 9 9 9 0 0",
        "cpu0 1 2 3 1000 1000 4 5 6 0 0",
        "cpu1 10 0 0 7 7 0 0 0 0 0",
        "intr 1",
    ]
    write(tmp_path, {"proc/stat": "\n".join(lines) + "\n"})
    assert busy_seconds([0], tmp_path) == 21 / ticks
    assert busy_seconds([0, 1, 2], tmp_path) == 31 / ticks
    assert busy_seconds([5], tmp_path) is None
    assert busy_seconds([0], tmp_path / "nowhere") is None
