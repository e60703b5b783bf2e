"""Writing a library: what it holds, that it appears whole or not at all, and each refusal one line."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import libraries
import numpy as np
import pytest
from libraries import TL1_LAYOUT, TL1_SHAPE, TL2_LAYOUT, TL2_SHAPE

from bitgen.abi import ABI_VERSION
from bitgen.bundle import DEFAULT, PORTABLE, TUNED, KernelEntry, read_bundle, sha256_of, write
from bitgen.bundle.contents import DEFAULT_LAYOUT, Contents, Target, choose_contents, common_layouts
from bitgen.bundle.units import library_units_of, table_values
from bitgen.bundle.write import write_library
from bitgen.cpu import Cpu, Isa, detect_cpu, load_isas
from bitgen.errors import BitgenError, FileError, UnsupportedError
from bitgen.hostcode import feature_rows, features_header
from bitgen.reference import ternary_matmul
from bitgen.render import render_kernel
from bitgen.runtime import KernelTable, load
from bitgen.spec import LARGE, N1, REGIMES, SMALL, KernelSpec, Layout, Shape
from bitgen.toolchain import CompileError, Toolchain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cpu() -> Cpu:
    return detect_cpu()


@pytest.fixture
def toolchain() -> Toolchain:
    return libraries.toolchain_of()


@pytest.fixture
def portable(cpu: Cpu) -> Target:
    """A target that every machine runs and that compiles in a second: scalar kernels only."""
    return Target.of(cpu, "scalar")


# ---- contents ----


def test_every_layout_has_kernels_for_every_regime_on_both_levels(cpu: Cpu) -> None:
    contents = choose_contents(libraries.choices(cpu), Target.of(cpu))
    plain = (TL2_LAYOUT, TL1_LAYOUT, DEFAULT_LAYOUT)
    others = (replace(DEFAULT_LAYOUT, group=group) for group in (32, 64, 128, 256))
    by_table = ((kind, g) for kind in ("t4", "t3") for g in (16, 32, 64, 128, 256) if (kind, g) != ("t3", 16))
    kinds = (("q4", 32), ("q4m", 32), *by_table, ("q1", 0), ("q1", 128))
    coded = (Layout(kind, 16, group) for kind, group in kinds)
    common = common_layouts(contents.target)
    grouped = list(dict.fromkeys([*common, *others, *coded]))
    assert contents.layouts == (*plain, *grouped)
    generic = {
        (e.spec.layout, e.spec.regime, e.spec.isa, e.role) for e in contents.entries if e.role != TUNED
    }
    native = contents.target.isa.name
    assert generic == {
        *((layout, regime.name, native, DEFAULT) for layout in (*plain, *common) for regime in REGIMES),
        *((layout, regime.name, "scalar", PORTABLE) for layout in plain for regime in REGIMES),
        *((layout, LARGE.name, "scalar", PORTABLE) for layout in grouped),
    }
    assert contents.any_n == {
        e.spec for e in contents.entries if e.role == PORTABLE and e.spec.layout not in plain
    }
    roles = [entry.role for entry in contents.entries]
    assert roles == sorted(roles, key=[TUNED, DEFAULT, PORTABLE].index)
    assert [(e.shape, e.threads) for e in contents.entries if e.role == TUNED] == [
        (choice.shape, choice.threads) for choice in libraries.choices(cpu)
    ]


def test_a_scalar_library_holds_each_kernel_once(portable: Target) -> None:
    contents = choose_contents([], portable)
    assert {entry.spec.isa for entry in contents.entries} == {"scalar"}
    assert len(contents.specs) == 3 + 3 + 3 + 3 + 7 + 4 + 1, (
        "I2_S; its groups of 128; bits in them; portable: 32, 64, 256; 4 bits; 3 bits; rows of bits"
    )
    assert len({source.name for source in contents.sources}) == len(contents.sources)


def test_a_generic_choice_takes_the_place_of_the_default(cpu: Cpu) -> None:
    spec = libraries.spec_for(TL1_LAYOUT, N1, TL1_SHAPE, cpu, 1)
    contents = choose_contents([KernelEntry(spec)], Target.of(cpu))
    assert contents.entries[0].spec == spec
    assert (contents.entries[0].role, contents.entries[0].shape) == (DEFAULT, None)
    # Shapes nobody tuned are packed in its layout, because it comes first.
    assert contents.layouts[0] == TL1_LAYOUT


def test_one_shape_cannot_have_two_layouts(cpu: Cpu) -> None:
    choices = [
        KernelEntry(libraries.spec_for(TL2_LAYOUT, N1, TL2_SHAPE, cpu), TL2_SHAPE, 2),
        KernelEntry(libraries.spec_for(TL1_LAYOUT, LARGE, TL2_SHAPE, cpu), TL2_SHAPE, 2),
    ]
    with pytest.raises(BitgenError, match="kernels for 100x500 read two layouts, tl2_r32 and tl1_r16"):
        choose_contents(choices, Target.of(cpu))
    # Another number of threads is another choice.
    choose_contents([choices[0], replace(choices[1], threads=1)], Target.of(cpu))


def test_wrong_choices_cannot_be_made(cpu: Cpu) -> None:
    spec = libraries.spec_for(TL1_LAYOUT, N1, TL1_SHAPE, cpu)
    for shape, threads in ((TL1_SHAPE, 0), (None, 1), (TL1_SHAPE, -1)):
        with pytest.raises(BitgenError, match="threads >= 1"):
            KernelEntry(spec, shape, threads)
    with pytest.raises(BitgenError, match="was made for another shape"):
        KernelEntry(replace(spec, shape=TL2_SHAPE), TL1_SHAPE, 1)


def test_only_kernels_that_look_up_get_tables(cpu: Cpu) -> None:
    panel = libraries.spec_for(TL1_LAYOUT, LARGE, TL1_SHAPE, cpu)
    direct = libraries.spec_for(TL1_LAYOUT, N1, TL1_SHAPE, cpu)
    assert panel.schedule.algorithm in ("panel", "tiles")
    assert direct.schedule.algorithm == "direct"
    assert (panel.table_bytes, direct.table_bytes) == (0, 256)
    assert "a->tables" not in render_kernel(panel).text
    assert "a->tables" in render_kernel(direct).text


# ---- the written bundle ----


def test_the_bundle_is_complete_and_describes_itself(bundle: Path, cpu: Cpu) -> None:
    manifest = read_bundle(bundle).manifest
    assert (manifest.model, manifest.cpu_family, manifest.arch) == ("tests", cpu.family, cpu.arch)
    assert manifest.features == frozenset(Target.of(cpu).isa.requires)
    files = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert files == {*manifest.files, "manifest.json", f"{manifest.library}.{ABI_VERSION}"}
    assert {name: sha256_of(bundle / name) for name in manifest.files} == dict(manifest.files)
    for kernel in manifest.kernels:
        assert kernel.sha256 == render_kernel(kernel.spec).digest
    text = (bundle / "manifest.json").read_text()
    assert str(Path.home()) not in text
    assert json.loads(text)["compiler"][Target.of(cpu).isa.name]["flags"]


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm")
def test_only_the_public_functions_are_visible(bundle: Path) -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(read_bundle(bundle).library)],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    header = (bundle / "bitgen.h").read_text()
    public = set(re.findall(r"\b(bitgen_\w+)\(", header.partition("ABI begins")[2])) - {
        "bitgen_error_message()"
    }
    declared = {name for name in public if re.search(rf"BITGEN_API [^;]*\b{name}\(", header)}
    assert {line.split()[-1] for line in listed.splitlines()} == declared
    assert len(declared) == 38


def test_generated_files_hold_no_conditionals_and_no_paths(bundle: Path) -> None:
    sources = sorted((bundle / "src").glob("*.[ch]"))
    assert len(sources) > 20
    for source in sources:
        text = source.read_text()
        found = re.findall(r"^[ \t]*#[ \t]*(?:if|ifdef|ifndef|else|elif)\b.*", text, flags=re.MULTILINE)
        allowed = ["#ifndef BITGEN_H", "#ifdef __cplusplus", "#ifdef _WIN32", "#else", "#ifdef __cplusplus"]
        assert found == (allowed if source.name == "bitgen.h" else []), source.name
        assert str(bundle.parent) not in text


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_the_sources_make_the_same_library_without_bitgen(
    toolchain: Toolchain, portable: Target, tmp_path: Path
) -> None:
    quick = replace(toolchain, extra_flags=("-O0",))  # all is compiled again, and nobody times it
    made = write_library([], quick, tmp_path, "portable", portable)
    command = ["make", "-C", str(made / "src"), f"CC={toolchain.compiler.name}"]
    subprocess.run(command, capture_output=True, check=True)
    name = "libbitgen-portable.so"
    assert (made / "src" / name).read_bytes() == (made / name).read_bytes()


def test_the_table_of_kernels_is_a_pure_function(cpu: Cpu) -> None:
    texts = {
        tuple((unit.name, unit.text) for unit in library_units_of(contents))
        for contents in (choose_contents(libraries.choices(cpu), Target.of(cpu)) for _ in range(2))
    }
    assert len(texts) == 1


# ---- the check of the CPU ----


def missing_feature(cpu: Cpu) -> str:
    for row in ("amx_int8", "avx_vnni_int8", "avx512_bf16", "gfni", "avx2"):
        if row not in cpu.features:
            return row
    return ""


def needing(isas: Sequence[Isa], name: str, feature: str) -> tuple[Isa, ...]:
    """The ISA levels, one of them requiring one more feature."""
    return tuple(replace(i, requires=i.requires | {feature}) if i.name == name else i for i in isas)


def test_a_library_for_another_cpu_is_refused_and_may_fall_back(
    cpu: Cpu, toolchain: Toolchain, tmp_path: Path
) -> None:
    feature = missing_feature(cpu)
    if cpu.arch != "x86_64" or not feature:
        pytest.skip(f"no feature that this CPU ({cpu.family}) lacks is known to the check")
    isas = needing(load_isas(), "avx2", feature)
    target = Target(replace(cpu, family="other"), isas[[i.name for i in isas].index("avx2")], isas)
    bundle = write_library([], toolchain, tmp_path, "other", target, check=False)
    with pytest.raises(UnsupportedError, match=rf"it is for other, this CPU \(\w+\) lacks {feature}"):
        load(bundle)
    # The library alone knows as much: it asks the CPU before anything special runs.
    library_file = read_bundle(bundle).library
    capped = r"([\w ]* \(BITGEN_ISA_CAP is \w+\))?"  # which may hide more than that
    with pytest.raises(UnsupportedError, match=rf"cannot use \S+: this CPU lacks {feature}{capped}$"):
        KernelTable(library_file, 1)
    with load(bundle, 2, generic="fallback") as table:
        w = np.random.default_rng(0).integers(-1, 2, (40, 100), dtype=np.int8)
        linear = table.linear(w, 1.0)
        for n in (1, 4, 20):
            xq = np.random.default_rng(n).integers(-128, 128, (n, 100), dtype=np.int8)
            assert np.array_equal(linear.accumulate(xq), ternary_matmul(xq, w))
            assert linear.kernel(n).isa == "scalar"


def test_every_required_feature_can_be_checked() -> None:
    for isa in load_isas():
        if isa.arch != "any":
            assert [row["name"] for row in feature_rows(isa.arch, sorted(isa.requires))] == sorted(
                isa.requires
            )


def test_a_feature_without_a_row_is_named() -> None:
    with pytest.raises(FileError, match="no row under x86_64 for teleport"):
        feature_rows("x86_64", ["avx2", "teleport"])


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_feature_masks_count_the_rows(arch: str, cpu: Cpu) -> None:
    contents = choose_contents([], Target.of(cpu))
    values = table_values(contents)
    for isa, entry in zip(contents.isas, values["isas"], strict=True):
        assert {f for i, f in enumerate(contents.features) if entry["mask"] >> i & 1} == isa.requires
    assert "bitgen_feature_count = 0" in features_header(arch, "Linux", [])


# ---- refusals ----


def assert_nothing_left(folder: Path, *expected: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "x/y", "$(x)"])
def test_a_name_that_cannot_be_a_file_is_refused(
    name: str, toolchain: Toolchain, portable: Target, tmp_path: Path
) -> None:
    with pytest.raises(BitgenError, match="cannot name files"):
        write_library([], toolchain, tmp_path, name, portable)
    assert_nothing_left(tmp_path)


def test_an_older_bundle_is_replaced_and_other_folders_are_not(
    toolchain: Toolchain, portable: Target, tmp_path: Path
) -> None:
    first = write_library([], toolchain, tmp_path, "kernels", portable, model="old")
    (first / "extra").touch()
    second = write_library([], toolchain, tmp_path, "kernels", portable, model="new")
    assert first == second
    assert read_bundle(second).manifest.model == "new"
    assert not (second / "extra").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    with pytest.raises(BitgenError, match="exists and is not a bundle"):
        write_library([], toolchain, tmp_path, "mine", portable)
    assert (mine / "thesis.tex").exists()
    assert_nothing_left(tmp_path, "kernels", "mine")


def test_the_threads_that_won_are_the_default_on_as_many_cores(
    toolchain: Toolchain, portable: Target, cpu: Cpu, tmp_path: Path
) -> None:
    # One more than there are cores: nobody's default but the tuned one.
    won = cpu.usable_threads + 1
    elsewhere = replace(portable, cpu=replace(cpu, usable_threads=cpu.usable_threads + 2))
    for name, target, expected in (("here", portable, won), ("elsewhere", elsewhere, cpu.usable_threads)):
        made = write_library([], toolchain, tmp_path, name, target, threads=won)
        manifest = read_bundle(made).manifest
        assert (manifest.threads, manifest.cores) == (won, target.cpu.usable_threads)
        with load(made) as table:
            assert table.threads == expected
        with load(made, 1) as table:
            assert table.threads == 1


def test_a_folder_that_cannot_be_made_is_one_line(
    toolchain: Toolchain, portable: Target, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="cannot write to"):
        write_library([], toolchain, tmp_path / "file" / "out", "kernels", portable)


def test_a_full_disk_leaves_the_older_bundle(
    toolchain: Toolchain, portable: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_library([], toolchain, tmp_path, "kernels", portable, model="old")

    def full(*_args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "_write_sources", full)
    with pytest.raises(FileError, match="the disk is full; choose another folder with --out"):
        write_library([], toolchain, tmp_path, "kernels", portable, model="new")
    assert read_bundle(folder).manifest.model == "old"
    assert_nothing_left(tmp_path, "kernels")


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "*x_sum = sum;",
            "*x_sum = sum + 1;",
            "failed its self-test: bitgen_i2s_n1.* computes wrong results",
        ),
        (
            "batch->kernel->run(&a);",
            "__builtin_trap();",
            r"died in its self-test \(signal (4|5)\): this CPU may",
        ),
    ],
)
def test_a_library_that_is_wrong_or_dies_is_not_kept(
    right: str,
    wrong: str,
    message: str,
    toolchain: Toolchain,
    portable: Target,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = library_units_of

    def edited(contents: Contents) -> Any:
        units = tuple(replace(unit, text=unit.text.replace(right, wrong)) for unit in real(contents))
        assert units != real(contents)
        return units

    monkeypatch.setattr(write, "library_units_of", edited)
    with pytest.raises(BitgenError, match=message):
        write_library([], toolchain, tmp_path, "broken", portable)
    assert_nothing_left(tmp_path)


def test_a_compile_error_is_passed_on(
    toolchain: Toolchain, portable: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = library_units_of
    monkeypatch.setattr(
        write, "library_units_of", lambda c: tuple(replace(u, text=u.text + "\n}") for u in real(c))
    )
    with pytest.raises(CompileError):
        write_library([], toolchain, tmp_path, "kernels", portable)
    assert_nothing_left(tmp_path)


def test_an_unknown_system_or_architecture_is_named(cpu: Cpu, toolchain: Toolchain, tmp_path: Path) -> None:
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"os": "Plan 9"}, "not for Plan 9"),
        ({"arch": "riscv64"}, "no host code for riscv64"),
    )
    for change, message in changes:
        target = Target.of(replace(cpu, **change), "scalar")
        with pytest.raises(BitgenError, match=message):
            write_library([], toolchain, tmp_path, "kernels", target)


def test_small_kernels_for_other_shapes_are_legal(cpu: Cpu) -> None:
    """What `_default_spec` gives for every layout and regime renders, so any combination can be built."""
    for isa in ("scalar", Target.of(cpu).isa.name):
        target = Target.of(cpu, isa)
        for layout in (TL1_LAYOUT, TL2_LAYOUT, DEFAULT_LAYOUT, replace(DEFAULT_LAYOUT, row_block=32)):
            choice = KernelEntry(_some_spec(layout, target), Shape(7, 7), 1)
            contents = choose_contents([choice], target)
            assert {spec.regime for spec in contents.specs if spec.layout == layout} == {
                "n1",
                "small",
                "large",
            }


def _some_spec(layout: Any, target: Target) -> KernelSpec:
    return libraries.spec_for(layout, SMALL, Shape(4096, 4096), target.cpu)
