"""Real control groups, where this process may make some: what a process in one of them finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path("/sys/fs/cgroup")
# Where the group lies and what is written to its files.
REAL_GROUPS = {
    "v2, half a CPU": (_ROOT, {"cpu.max": "50000 100000"}),
    "v1, half a CPU": (_ROOT / "cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
    "v2, a cpuset of one": (_ROOT, {"cpuset.cpus": "CPU"}),
    "v1, a cpuset of one": (_ROOT / "cpuset", {"cpuset.mems": "0", "cpuset.cpus": "CPU"}),
}
_JOIN = "import os, pathlib, sys; pathlib.Path(sys.argv[1], 'cgroup.procs').write_text(str(os.getpid()))\n"


def run_in_group(name: str, code: str) -> str:
    """What Python code prints in one of `REAL_GROUPS`; the test is skipped where it cannot be made."""
    parent, values = REAL_GROUPS[name]
    group = parent / f"bitgen-test-{os.getpid()}"
    if not (parent / "cgroup.procs").exists():
        pytest.skip(f"{parent} is no control group")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        for file, value in values.items():
            if not (group / file).exists():
                pytest.skip(f"there is no {file} here")
            (group / file).write_text(value.replace("CPU", str(min(os.sched_getaffinity(0)))))
        command = [sys.executable, "-c", _JOIN + code, str(group)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    finally:
        group.rmdir()
