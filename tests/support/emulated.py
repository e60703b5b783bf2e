"""A CPU that is not here: AMX-INT8 and AVX-VNNI carried out in software (data/emulator), for a whole process.

    python tests/support/emulated.py pytest tests/kernels/test_exact.py -k amx_int8
    python tests/support/emulated.py bitgen verify --isa avx_vnni

The process and its children run with the emulator preloaded and find the features in /proc/cpuinfo. A library
they build asks cpuid, which cannot be emulated, so it asks for a feature that every CPU has instead.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bitgen.cpu import cap_note, capped, detect_cpu, find_isa, load_isas

SOURCE = Path(__file__).parents[1] / "data" / "emulator" / "emulator.c"
VARIABLE = "BITGEN_TEST_EMULATED"  # the features that this process and its children are to have
FEATURES = ("avx_vnni", "amx_tile", "amx_int8")
FLAGS = ("-std=gnu11", "-O3", "-mavx2", "-fwrapv", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
CPUINFO = Path("/proc/cpuinfo")


def lacking() -> tuple[str, ...]:
    """The features of the two extensions that this CPU does not have."""
    own = set(CPUINFO.read_text(encoding="utf-8").split()) if CPUINFO.exists() else set()
    return tuple(feature for feature in FEATURES if feature not in own)


def missing_for(level: str) -> str | None:
    """Why ``level`` cannot be emulated here: this CPU must have the rest of what it needs. None if it can."""
    if why_not() is not None:
        return why_not()
    cpu = detect_cpu()
    completed = capped(replace(cpu, features=cpu.features | set(FEATURES)))
    rest = ", ".join(sorted(find_isa(level, load_isas()).requires - completed.features))
    return f"{level} cannot be emulated here: this CPU lacks {rest}{cap_note()}" if rest else None


def why_not() -> str | None:
    """What is missing to emulate them here; None when nothing is."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "AMX and AVX-VNNI are emulated on x86-64 Linux"
    if "avx2" not in detect_cpu().features:
        return f"this CPU lacks avx2, in which the emulator is written{cap_note()}"
    return None


def build(folder: Path, cc: Iterable[str] = ("cc",)) -> Path:
    """The emulator as a library to preload."""
    library = folder / "emulator.so"
    subprocess.run([*cc, *FLAGS, "-o", library, SOURCE, "-ldl"], check=True)
    return library


def environment(library: Path, features: Iterable[str]) -> dict[str, str]:
    """The environment of a process with ``features`` that this CPU lacks."""
    return {**os.environ, "LD_PRELOAD": str(library), VARIABLE: " ".join(features)}


def pretend() -> None:
    """In a process with the emulator: detect its features, build libraries that find them, be patient."""
    import bitgen.hostcode
    from bitgen.cpu import linux
    from bitgen.measure import runner

    features = os.environ[VARIABLE].split()
    read, rows = linux._read, bitgen.hostcode.feature_rows

    def cpuinfo_with_features(file: Path) -> str:
        text = read(file)
        return re.sub(r"(?m)^(flags\s*:.*)$", rf"\1 {' '.join(features)}", text) if file == CPUINFO else text

    def rows_that_hold(
        arch: str, names: Iterable[str], file: Path | None = None, *, system: str = "Linux"
    ) -> list[dict[str, Any]]:
        always = rows(arch, ["pni"], file, system=system)[0]
        found = rows(arch, names, file, system=system)
        return [{**always, "name": r["name"]} if r["name"] in features else r for r in found]

    linux._read = cpuinfo_with_features
    bitgen.hostcode.feature_rows = rows_that_hold
    vars(runner)["TimingPolicy"] = partial(runner.TimingPolicy, check_timeout_s=600.0)


def main(words: list[str]) -> int:
    """Run ``bitgen ...`` or ``pytest ...`` on the emulated CPU."""
    if VARIABLE not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            env = environment(build(Path(folder)), lacking())
            return subprocess.run([sys.executable, __file__, *words], env=env, check=False).returncode
    programs: dict[str, Callable[[list[str]], int]] = {"bitgen": _bitgen, "pytest": _pytest}
    return programs[words[0]](words[1:])


def _bitgen(words: list[str]) -> int:
    pretend()
    from bitgen.cli import main as bitgen

    return int(bitgen(words) or 0)


def _pytest(words: list[str]) -> int:
    import pytest

    return int(pytest.main(["-n0", *words]))  # conftest.py pretends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
