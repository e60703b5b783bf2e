"""One library for every CPU of an architecture: each level of it computes, and features alone choose it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import libraries
import numpy as np
import pytest
from test_c_example import CC, WARNINGS, compile_program

from bitgen.bundle import KernelEntry, judge, read_bundle
from bitgen.bundle.contents import Target, choose_contents
from bitgen.bundle.elf import Requirements, read_requirements
from bitgen.bundle.transfer import committed_kernels
from bitgen.bundle.units import table_values
from bitgen.bundle.write import write_library
from bitgen.cli import main
from bitgen.cpu import CAP_VARIABLE, accepted_isas, detect_cpu, find_isa, load_isas, target_cpu
from bitgen.errors import FileError
from bitgen.formats.config import find_model
from bitgen.paths import winners_dir
from bitgen.reference import ternary_matmul
from bitgen.runtime import load
from bitgen.space import space_for
from bitgen.spec import REGIMES, SMALL, Layout, Shape, regime_named
from bitgen.winners import committed_shapes, family_winners

ROOT = Path(__file__).parents[2]
ISAS = load_isas()
LEVELS = [isa.name for isa in accepted_isas(detect_cpu(), ISAS)]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="ELF is Linux's")


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_it_holds_every_level_best_first_and_requires_none(arch: str) -> None:
    target = Target.every(arch, "Linux")
    contents = choose_contents((), target)
    levels = [isa.name for isa in reversed(ISAS) if isa.arch == arch]
    assert [isa.name for isa in contents.isas] == [*levels, "scalar"]
    values = table_values(contents)
    assert values["required"] == 0
    assert [step["isa"] for step in values["steps"]] == [*levels, "scalar"]


def test_winners_of_the_nearest_family_serve_the_levels_nobody_measured() -> None:
    target = Target.every("x86_64", "Linux")
    shapes = committed_shapes("x86_64")
    chosen = committed_kernels(target, shapes)
    assert chosen.label == "transferred"
    assert {entry.spec.isa for entry in chosen.entries} == {isa.name for isa in target.levels}
    assert {entry.shape for entry in chosen.entries} == set(shapes)
    assert "avx2: winners of zen4 (the nearest family to haswell" in chosen.origin
    entries = choose_contents(chosen.entries, target).entries
    order = [entry.spec.isa for entry in entries]
    assert order == sorted(order, key=[*(isa.name for isa in target.levels), "scalar"].index)


def test_a_family_is_labelled_by_who_was_measured() -> None:
    shapes = committed_shapes("x86_64")
    own = committed_kernels(Target.of(target_cpu("zen4")), shapes)
    assert (own.label, own.origin) == ("tuned", "winners of zen4")
    near = committed_kernels(Target.of(target_cpu("zen2")), shapes)
    assert near.label == "transferred"
    assert "moved to avx2" in near.origin
    none = committed_kernels(Target.of(target_cpu("cortex-a76")), shapes)
    assert (none.label, none.entries) == ("default", ())


@pytest.mark.slow
@pytest.mark.parametrize("cap", LEVELS)
def test_each_level_is_chosen_by_features_and_exact(
    universal_library: Path, cap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CAP_VARIABLE, cap)
    assert judge(read_bundle(universal_library), detect_cpu()).accepted
    rng = np.random.default_rng(1)
    w, xq = rng.integers(-1, 2, (100, 500), np.int8), rng.integers(-128, 128, (20, 500), np.int8)
    with load(universal_library, 2) as table:
        linear = table.linear(w, 1.0)
        for n in (1, 5, 20):
            assert linear.kernel(n).isa == cap
            assert np.array_equal(linear.accumulate(xq[:n]), ternary_matmul(xq[:n], w))


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(
    ("core", "level"), [("Nehalem", "scalar"), ("Haswell", "avx2"), ("EPYC", "avx2"), ("max", "avx2")]
)
def test_emulated_cpus_get_their_level(
    universal_library: Path, core: str, level: str, tmp_path: Path
) -> None:
    """No word of Python: what the library sees is the emulated CPU's cpuid."""
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if detect_cpu().arch != "x86_64" or emulator is None:
        pytest.skip("needs x86-64 and its emulator: apt-get install qemu-user")
    source = ROOT / "examples" / "c" / "example.c"
    program = compile_program(source, universal_library, tmp_path, CC, *WARNINGS)
    environment = {"PATH": "/nonexistent"}
    done = subprocess.run(
        [emulator, "-cpu", core, program], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("OK: 1500 values equal those of the naive loop\n")
    held = level if level in LEVELS else "scalar"
    assert done.stdout.splitlines()[0].endswith(f"__{held}")


@pytest.mark.slow
@LINUX
def test_the_label_of_a_cpu_ranks_schedules_of_one_level(tmp_path: Path) -> None:
    """Each CPU takes what won on its family, others what won on none in particular; features come first."""
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if detect_cpu().arch != "x86_64" or emulator is None:
        pytest.skip("needs x86-64 and its emulator: apt-get install qemu-user")
    shape = Shape(300, 640)  # of the example, times 5 tokens
    space = space_for("i2s", find_isa("avx2", ISAS), SMALL, shape, target_cpu("haswell"))
    legal = [spec for spec in space if spec.layout == Layout("i2s", 16)][:3]
    families = dict(zip(("", "zen", "haswell"), legal, strict=True))
    choices = [KernelEntry(spec, shape, 1, cpu_family=family) for family, spec in families.items()]
    target = Target.every("x86_64", "Linux", [isa for isa in ISAS if isa.name in ("scalar", "avx2")])
    toolchain = replace(libraries.toolchain_of(), strip=True)
    made = write_library(choices, toolchain, tmp_path, "ranked", target, check=False, release=True)
    assert [kernel.cpu_family for kernel in read_bundle(made).manifest.kernels[:3]] == list(families)
    program = compile_program(ROOT / "examples" / "c" / "example.c", made, tmp_path, CC, *WARNINGS)
    chosen = {}
    for core, family in (("Haswell", "haswell"), ("EPYC", "zen"), ("Broadwell", ""), ("Nehalem", None)):
        done = subprocess.run(
            [emulator, "-cpu", core, program], capture_output=True, text=True, check=False, env={}
        )
        assert done.stdout.endswith("OK: 1500 values equal those of the naive loop\n"), done.stderr
        chosen[core] = done.stdout.splitlines()[0].rpartition(" ")[2]
        if family is not None:
            assert chosen[core] == families[family].name
    assert chosen["Nehalem"].endswith("__scalar")


def test_winners_of_two_families_of_one_level_are_both_in_it(tmp_path: Path) -> None:
    target, shape = Target.every("x86_64", "Linux"), Shape(3200, 3200)
    shutil.copy(winners_dir() / "zen4.json", tmp_path)
    text = (tmp_path / "zen4.json").read_text()
    (tmp_path / "icelake.json").write_text(text.replace('"cpu_family": "zen4"', '"cpu_family": "icelake"'))
    chosen = committed_kernels(target, [shape], tmp_path)
    best = [entry for entry in chosen.entries if entry.spec.isa == "avx512_vbmi"]
    assert {"", "icelake", "zen4"} <= {entry.cpu_family for entry in best}
    for family in ("icelake", "zen4"):
        own = family_winners(family, tmp_path)
        mine = [entry.spec for entry in best if entry.cpu_family == family]
        assert mine == [job.spec for job in own if job.shape == shape]
    assert {"icelake", "zen4"} <= set(choose_contents(chosen.entries, target).cpu_families)


def test_a_cpu_of_no_known_family_gets_layouts_and_not_the_knobs_of_another() -> None:
    """Of two vendors' CPUs at one level: prompts with the other's knobs took 1.30 times as long."""
    target = Target.every("x86_64", "Linux")
    entries = committed_kernels(target, find_model("3B").shapes).entries
    anyone = [e for e in entries if e.spec.isa == "avx512_vbmi" and not e.cpu_family]
    for entry in anyone:
        assert entry.shape is not None
        regime, isa = regime_named(entry.spec.regime), find_isa(entry.spec.isa, ISAS)
        space = space_for(entry.spec.family, isa, regime, entry.shape, target_cpu("sapphirerapids"))
        assert entry.spec.schedule == space.default.schedule
    assert {entry.spec.regime for entry in anyone} == {regime.name for regime in REGIMES}


def test_a_family_whose_tiles_are_hidden_has_kernels_of_its_own() -> None:
    """Virtual machines often hide AMX: then the next level is the best, and the label still ranks."""
    target = Target.every("x86_64", "Linux")
    entries = committed_kernels(target, find_model("3B").shapes).entries
    levels = {e.spec.isa for e in entries if e.cpu_family == "emeraldrapids"}
    assert levels == {"amx_int8", "avx512_vbmi"}
    assert {e.spec.isa for e in entries if e.cpu_family == "zen4"} == {"avx512_vbmi"}


@pytest.mark.slow
@LINUX
def test_the_tag_of_a_wheel_is_what_the_library_asks_for(universal_library: Path, tmp_path: Path) -> None:
    library = read_bundle(universal_library).library
    found = read_requirements(library)
    assert found.arch == detect_cpu().arch
    assert "libc.so.6" in found.needed
    assert found.glibc is not None
    assert found.wheel_tag.startswith(f"py3-none-manylinux_{found.glibc[0]}_{max(17, found.glibc[1])}_")
    data = library.read_bytes()
    for size in (0, 5, 64, len(data) // 2):
        (tmp_path / "cut.so").write_bytes(data[:size])
        with pytest.raises(FileError, match="is no shared library"):
            read_requirements(tmp_path / "cut.so")


@pytest.mark.parametrize(
    ("versions", "needed", "tag"),
    [
        ({"GLIBC_2.2.5", "GLIBC_2.17"}, "libc.so.6", "manylinux_2_17_x86_64.manylinux2014_x86_64"),
        ({"GLIBC_2.3.4"}, "libc.so.6", "manylinux_2_17_x86_64.manylinux2014_x86_64"),
        ({"GLIBC_2.34", "GLIBC_2.4"}, "libc.so.6", "manylinux_2_34_x86_64"),
        (set(), "libc.so", "musllinux_1_2_x86_64"),
    ],
)
def test_wheel_tags(versions: set[str], needed: str, tag: str) -> None:
    asks = Requirements("x86_64", (needed,), tuple((needed, version) for version in sorted(versions)))
    assert asks.wheel_tag == f"py3-none-{tag}"


@pytest.mark.slow
def test_bundles_race_and_the_winner_is_remembered(
    universal_library: Path, bundle: Path, bitgen_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (universal_library, bundle):
        (bitgen_home / "generated").mkdir(exist_ok=True)
        shutil.copytree(path, bitgen_home / "generated" / path.name, symlinks=True)
    assert main(["bundle", "pick", "--measure", "-o", "json"]) == 0
    picked = json.loads(capsys.readouterr().out)["candidates"]
    times = [row["race_us"] for row in picked if row["state"] != "rejected"]
    assert len(times) == 2
    assert times == sorted(times), "the fastest first"
    assert [row["state"] for row in picked] == ["chosen", "accepted"]
    assert main(["bundle", "pick", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == picked[0]["bundle"]
