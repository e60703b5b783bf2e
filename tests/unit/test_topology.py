"""Cores as users have them: which count, what a process may use of them, and what `detect` says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

from bitgen.cli import main
from bitgen.cpu import Topology, detect_cpu
from bitgen.cpu.linux import read_topology

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


# Listed as these machines do: hardware threads of a core side by side, or half of them behind the others.
HYBRID = machine_of([*((2 * i, 2 * i + 1) for i in range(6)), *((12 + i,) for i in range(8))])
SOCKETS = machine_of([(i, 64 + i) for i in range(64)]) | {
    "sys/devices/system/node/node0/cpulist": "0-31,64-95\n",
    "sys/devices/system/node/node1/cpulist": "32-63,96-127\n",
}
TOPOLOGIES = {
    "i7-12700H: 6 performance cores of two threads, 8 efficiency cores": (
        HYBRID | {"sys/devices/cpu_core/cpus": "0-11\n", "sys/devices/cpu_atom/cpus": "12-19\n"},
        Topology(20, 14, 14, None, (("performance", 6), ("efficiency", 8))),
        "14: one for each of 14 cores (20 hardware threads)",
    ),
    "RK3588: 4 Cortex-A55 and 4 Cortex-A76": (
        machine_of([(i,) for i in range(8)])
        | {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": "414\n" if i < 4 else "1024\n" for i in range(8)},
        Topology(8, 8, 8, None, (("capacity 1024", 4), ("capacity 414", 4))),
        "8: one for each of 8 cores",
    ),
    "two sockets of 32 cores": (
        SOCKETS,
        Topology(128, 64, 64, None, (), 2),
        "64: one for each of 64 cores (128 hardware threads)",
    ),
    "the same, a cpuset of the second socket": (
        SOCKETS | {"proc/self/status": "Cpus_allowed_list:\t32-63,96-127\n"},
        Topology(128, 64, 32, None, (), 2),
        "32: one for each of 64 cores (128 hardware threads), affinity allows 32 of them",
    ),
    "8 cores, cgroup v2 allows 2.5 CPUs": (
        machine_of([(i, 8 + i) for i in range(8)])
        | {**ONE_GROUP, "sys/fs/cgroup/cpu.max": "250000 100000\n"},
        Topology(16, 8, 8, 2.5),
        "2: one for each of 8 cores (16 hardware threads), the cgroup allows 2.5 CPUs of time",
    ),
    "a hardware thread of each of 2 cores, cgroup v1 allows half a CPU": (
        machine_of([(0, 2), (1, 3)])
        | {
            "proc/self/status": "Cpus_allowed_list:\t0-1\n",
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
        },
        Topology(4, 2, 2, 0.5),
        "1: one for each of 2 cores (4 hardware threads), the cgroup allows 0.5 CPUs of time",
    ),
    "equal capacities are one kind": (
        machine_of([(0,), (1,)])
        | {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": "1024\n" for i in range(2)},
        Topology(2, 2, 2),
        "2: one for each of 2 cores",
    ),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_threads_of_recorded_topologies(name: str, tmp_path: Path) -> None:
    files, topology, why = TOPOLOGIES[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert read_topology(tmp_path) == topology
    assert str(topology) == why
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
