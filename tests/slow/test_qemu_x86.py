"""Smaller x86 CPUs than this one, as qemu's user emulation shows them to a program (not by the cap).

Python, numpy and a prebuilt library run in it, so the check of the CPU is that of the library: cpuid is the
emulated CPU's. /proc/cpuinfo is the host's, so what Python detects by itself is not looked at here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitgen.cpu import CAP_VARIABLE
from bitgen.errors import UnsupportedError
from bitgen.paths import models_dir

QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static") or ""
EXAMPLE = json.loads((models_dir() / "tiny.json").read_text(encoding="utf-8"))["greedy"][0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        (platform.system(), platform.machine()) != ("Linux", "x86_64"),
        reason="qemu-x86_64 runs this machine's own Python only on x86-64 Linux",
    ),
    pytest.mark.skipif(not QEMU, reason="no emulator: apt-get install qemu-user"),
]


def run_tiny(core: str | None, library: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """``bitgen run -m tiny`` with ``library`` on a core of qemu's, or (None) on this CPU."""
    emulator = [QEMU, "-cpu", core, "-0", sys.executable] if core else []
    words = ["run", "-m", "tiny", "--library", str(library), "-t", "1", "--temp", "0", "--no-perf"]
    prompt = ["-p", EXAMPLE["prompt"], "-n", str(len(EXAMPLE["tokens"]))]
    env = {name: value for name, value in os.environ.items() if name not in (CAP_VARIABLE, "LD_PRELOAD")}
    if core:  # OpenBLAS, which numpy brings, takes the emulated Nehalem of some hosts for more than it is
        env["OPENBLAS_CORETYPE"] = core
    return subprocess.run(
        [*emulator, sys.executable, "-m", "bitgen", *words, *prompt],
        env={**env, "BITGEN_HOME": str(home)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(("core", "level"), [("Haswell", "avx2"), ("Nehalem", "scalar")])
def test_a_small_cpu_writes_the_recorded_text(
    core: str, level: str, level_library: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run_tiny(core, level_library(level), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (EXAMPLE["prompt"] + EXAMPLE["text"]).strip()


def test_the_text_is_that_of_this_cpu(level_library: Callable[[str], Path], tmp_path: Path) -> None:
    """The library for every CPU, on this one: what the emulated ones are compared with."""
    done = run_tiny(None, level_library("scalar"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (EXAMPLE["prompt"] + EXAMPLE["text"]).strip()


def test_a_cpu_without_avx2_refuses_its_library_in_one_line(
    level_library: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run_tiny("Nehalem", level_library("avx2"), tmp_path)
    assert done.returncode == UnsupportedError.exit_code, "and no SIGILL"
    assert done.stdout == ""
    assert done.stderr.startswith("bitgen: cannot use ")
    assert done.stderr.endswith("this CPU lacks avx2 bmi2 f16c fma\n")
    assert done.stderr.count("\n") == 1
