"""BITGEN_ISA_CAP: a capped process on this CPU acts as one on a small CPU, in Python and in C."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_kernels import RIGHT, Broken, source_of, spec_of
from libraries import toolchain_of

from bitgen.bundle import read_bundle
from bitgen.bundle.contents import Target, choose_contents
from bitgen.bundle.units import table_values
from bitgen.cli import main
from bitgen.cpu import CAP_VARIABLE, Cpu, accepted_isas, capped, detect_cpu, find_isa, load_isas, target_cpu
from bitgen.environment import Environment
from bitgen.errors import BitgenError, UnsupportedError, UsageError
from bitgen.measure import LocalRunner, Status
from bitgen.runtime import KernelTable, load
from bitgen.space import space_for
from bitgen.spec import N1, Shape

LEVELS = [isa.name for isa in load_isas()]
# Of the CPU the tests run on, itself capped or not, weakest first.
ACCEPTED = tuple(isa.name for isa in reversed(accepted_isas(detect_cpu(), load_isas())))
BEST = ACCEPTED[-1]
ALLOW_GENERIC, ONLY_GENERIC = 1, 2
UNSUPPORTED_CPU, ISA_CAP = 14, 20


@pytest.fixture
def cap(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    return lambda level: monkeypatch.setenv(CAP_VARIABLE, level)


def at_most(cpu: Cpu, level: str) -> list[str]:
    """The levels of ``cpu``, weakest first, up to ``level`` in the order of configs/isas.yaml."""
    names = [isa.name for isa in reversed(accepted_isas(cpu, load_isas()))]
    return [name for name in names if LEVELS.index(name) <= LEVELS.index(level)]


@pytest.mark.parametrize(
    "name",
    ["nehalem", "zen", "zen4", "sapphirerapids", "arrowlake", "zen5_guest", "neoverse_n1", "neoverse_v2"],
)
def test_a_capped_cpu_runs_exactly_the_levels_up_to_the_cap(
    name: str, recorded_cpu: Callable[[str], Cpu], cap: Callable[[str], None]
) -> None:
    cpu = recorded_cpu(name)
    for isa in load_isas():
        if isa.arch in ("any", cpu.arch):
            cap(isa.name)
            small = capped(cpu)
            assert [i.name for i in reversed(accepted_isas(small, load_isas()))] == at_most(cpu, isa.name)
            assert replace(small, features=cpu.features, sve_bytes=cpu.sve_bytes) == cpu, (
                "nothing else changes"
            )


@pytest.mark.parametrize("vector_bytes", [0, 16, 32, 64])
def test_sve_is_capped_by_the_length_of_its_registers_too(
    vector_bytes: int, cap: Callable[[str], None]
) -> None:
    requires = frozenset().union(*(isa.requires for isa in load_isas() if isa.arch == "aarch64"))
    cpu = replace(target_cpu("neoverse-v1"), features=requires, sve_bytes=vector_bytes)
    for isa in load_isas():
        if isa.arch in ("any", "aarch64"):
            cap(isa.name)
            found = [i.name for i in reversed(accepted_isas(capped(cpu), load_isas()))]
            assert found == at_most(cpu, isa.name)


def test_recordings_and_named_targets_are_not_capped(
    recorded_cpu: Callable[[str], Cpu], cap: Callable[[str], None]
) -> None:
    cap("scalar")
    assert "avx512f" in recorded_cpu("zen4").features
    assert "asimd" in target_cpu("neoverse-n1").features


def test_levels_the_fingerprint_and_refusals_are_those_of_the_small_cpu(cap: Callable[[str], None]) -> None:
    large, kernel = (
        Environment(),
        space_for("i2s", find_isa("scalar", load_isas()), N1, Shape(64, 64), detect_cpu()).default,
    )
    before = large.fingerprints(kernel)
    cap("scalar")
    small = Environment()
    assert [isa.name for isa in accepted_isas(small.cpu, small.isas)] == ["scalar"]
    assert small.isa(None).name == "scalar"
    assert (small.fingerprints(kernel) == before) == (BEST == "scalar")
    by_hand = replace(large.cpu, features=small.cpu.features, sve_bytes=small.cpu.sve_bytes)
    assert Environment(target=by_hand).fingerprints(kernel) == small.fingerprints(kernel), (
        "as if the CPU were like that"
    )
    for level in ACCEPTED[1:]:
        with pytest.raises(BitgenError, match="this CPU runs scalar") as caught:
            small.isa(level)
        assert caught.value.exit_code == UnsupportedError.exit_code


@pytest.mark.parametrize(
    ("level", "message"), [("avx1024", "unknown ISA level 'avx1024'"), ("foreign", "this CPU is ")]
)
def test_a_wrong_cap_is_refused_in_one_line(
    level: str, message: str, cap: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    if level == "foreign":
        level = next(isa.name for isa in load_isas() if isa.arch not in ("any", detect_cpu().arch))
    cap(level)
    assert main(["detect"]) == UsageError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"bitgen: {CAP_VARIABLE}: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--isa-cap", "scalar", "detect"],
        ["detect", "--isa-cap", "Scalar"],
        ["--isa-cap", "avx1024", "detect", "--isa-cap=scalar"],
    ],
    ids=["before", "after", "both"],
)
def test_the_option_stands_before_or_after_the_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.environ.get(CAP_VARIABLE)
    assert main([*words, "-o", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["isa_cap"] == "scalar"
    assert [row["isa"] for row in found["isas"] if row["state"] == "accepted"] == ["scalar"]
    assert main(words) == 0
    assert "ISA cap" in capsys.readouterr().out
    assert os.environ.get(CAP_VARIABLE) == before


def test_detect_says_nothing_of_a_cap_that_is_not_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CAP_VARIABLE, raising=False)
    main(["detect", "-o", "json"])
    assert json.loads(capsys.readouterr().out)["isa_cap"] is None
    main(["detect"])
    assert "ISA cap" not in capsys.readouterr().out


def test_what_a_process_starts_inherits_the_cap(cap: Callable[[str], None]) -> None:
    code = "from multiprocessing import get_context as c; from bitgen.cpu import *\n"
    code += "def f(_): return [i.name for i in accepted_isas(detect_cpu(), load_isas())]\n"
    code += "if __name__ == '__main__': print(f(0), *c('fork').Pool(1).map(f, [0]))"
    cap("scalar")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['scalar'] ['scalar']\n"


# ---- the library


@pytest.fixture(scope="module")
def library(level_library: Callable[[str], Path]) -> Path:
    """A library without tuned kernels for the best level of this CPU."""
    return level_library(BEST)


def created(library: Any, flags: int) -> int:
    return int(library.bitgen_context_create(ctypes.byref(ctypes.c_void_p()), 1, flags))


def test_the_library_sees_the_small_cpu(library: Path, cap: Callable[[str], None]) -> None:
    file = ctypes.CDLL(str(read_bundle(library).library))
    assert created(file, 0) == 0
    cap("scalar")
    refused = UNSUPPORTED_CPU if BEST != "scalar" else 0
    assert [created(file, flags) for flags in (0, ALLOW_GENERIC, ONLY_GENERIC)] == [refused, 0, 0]
    for name in (BEST, BEST.upper().replace("_", "-"), ""):
        cap(name)
        assert created(file, 0) == 0
    other = next(isa.name for isa in load_isas() if isa.arch not in ("any", detect_cpu().arch))
    for name in ("avx1024", BEST + "_", BEST[:-1], other):
        cap(name)
        assert [created(file, flags) for flags in (0, 1, 2)] == [ISA_CAP] * 3


@pytest.mark.skipif(BEST == "scalar", reason="no level is left out: this CPU runs scalar only")
def test_python_refuses_or_falls_back_as_the_library_does(library: Path, cap: Callable[[str], None]) -> None:
    cap("scalar")
    with pytest.raises(BitgenError, match=r"this CPU \(\w+\) lacks ") as caught:
        load(library, 1)
    assert caught.value.exit_code == UnsupportedError.exit_code
    with pytest.raises(BitgenError, match=rf"lacks .*\({CAP_VARIABLE} is scalar\)") as caught:
        KernelTable(read_bundle(library).library, 1)
    assert caught.value.exit_code == UnsupportedError.exit_code
    with load(library, 1, generic="fallback") as table:
        linear = table.linear(np.ones((16, 64), np.int8), 1.0)
        assert linear.kernel(1).isa == "scalar"
    cap("avx1024")
    with pytest.raises(BitgenError, match="holds no ISA level") as caught:
        load(library, 1, generic="only")
    assert caught.value.exit_code == UsageError.exit_code


@pytest.mark.slow  # it compiles and measures
@pytest.mark.skipif(BEST == "scalar", reason="no level is left out: this CPU runs scalar only")
def test_the_measuring_worker_acts_as_the_small_cpu(
    library: Path, cap: Callable[[str], None], tmp_path: Path
) -> None:
    """A kernel that is right only where the library refuses the CPU, asked by the process that measures."""
    create = f'dlsym(dlopen("{read_bundle(library).library}", RTLD_NOW), "bitgen_context_create")'
    refused = f"((int (*)(void **, int, int))(uintptr_t){create})(&context, 1, 0) == {UNSUPPORTED_CPU}"
    edits = {"PRELUDE": "#include <dlfcn.h>", "START": f"void *context; if (!({refused})) return;"}
    spec = spec_of(RIGHT)
    kernel = source_of(spec, Broken("right on a small CPU", edits, Status.OK))

    def found() -> Status:
        with LocalRunner(
            toolchain_of(), detect_cpu(), render=lambda _: kernel, lock_folder=tmp_path
        ) as runner:
            (answer,) = runner.verify([spec])
        return answer.status

    assert found() is Status.INCORRECT
    cap("scalar")
    assert found() is Status.OK


def test_a_library_knows_the_levels_it_does_not_hold() -> None:
    cpu = detect_cpu()
    values = table_values(choose_contents([], Target.of(cpu, "scalar")))
    levels = [isa.name for isa in load_isas() if isa.arch in ("any", cpu.arch)]
    assert [row["isa"] for row in values["isa_caps"]] == levels
    held = table_values(choose_contents([], Target.of(cpu, BEST)))
    masks = {row["isa"]: row["mask"] for row in held["isa_caps"]}
    assert masks[BEST] == max(masks.values())
    assert masks["scalar"] == 0
