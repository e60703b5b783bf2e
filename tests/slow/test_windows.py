"""The library on Windows: built by zig, its programs run by Wine. Nobody has run them under Windows."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import libraries
import pytest

from bitgen.bundle import KernelEntry, judge, read_bundle, sha256_of
from bitgen.bundle.contents import Target
from bitgen.bundle.rebuild import rebuild
from bitgen.bundle.write import exported, write_library
from bitgen.cpu import CAP_VARIABLE, accepted_isas, detect_cpu, load_isas, target_cpu
from bitgen.errors import UnsupportedError
from bitgen.hostcode import CpuChecks, kernel_unit, library_headers, library_units, run_units
from bitgen.render import isa_named, render_kernel
from bitgen.space import space_for
from bitgen.spec import N1, SMALL, KernelSpec, Layout, Regime, Shape
from bitgen.toolchain import Compiler, Toolchain, find_cross_compilers

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "library"
WINE = next(filter(None, map(shutil.which, ("wine64", "/usr/lib/wine/wine64"))), None)
SPILLS, FLAGS = Shape(100, 500), ("-std=c99", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86-64"),
    pytest.mark.skipif(WINE is None, reason="needs Wine: apt-get install wine64"),
]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def zig() -> Compiler:
    found = find_cross_compilers("x86_64", "Windows")
    if not found:
        pytest.skip("needs pip install ziglang")
    return found[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a program of Windows in a home of its own; keywords are environment variables."""
    prefix = tmp_path_factory.mktemp("wine")
    base = {name: value for name, value in os.environ.items() if name not in (CAP_VARIABLE, "DISPLAY")}
    base |= {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}

    # Making the home says so on stderr, once.
    subprocess.run([str(WINE), "cmd", "/c", "exit"], env=base, capture_output=True, check=False)

    def run(program: Path, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(WINE), program.name, *argv],
            cwd=program.parent,
            env={**base, **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    yield run
    server = shutil.which("wineserver64") or shutil.which("/usr/lib/wine/wineserver64")
    if server:
        subprocess.run([server, "-k"], env=base, check=False)


def widest(layout: Layout, regime: Regime) -> KernelSpec:
    """The schedule of a layout at AVX2 that keeps most accumulators: more than there are registers."""
    isa = next(isa for isa in load_isas() if isa.name == "avx2")
    space = space_for(layout.family, isa, regime, SPILLS, target_cpu("haswell", "Windows"))
    legal = [spec for spec in space if spec.layout == layout and not space.broken(spec)]
    return max(legal, key=lambda spec: prod(spec.knobs.get(knob, 1) for knob in ("streams", "nr")))


def toolchain_of(compiler: Compiler) -> Toolchain:
    return Toolchain(compiler, libraries.shared_cache(), timeout_s=900, strip=True)


@pytest.fixture(scope="module")
def bundle(zig: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A universal library of AVX2 and scalar code, with kernels that spill for one shape."""
    isas = [isa for isa in load_isas() if isa.name in ("scalar", "avx2")]
    layout = Layout("i2s", 16)
    choices = [KernelEntry(widest(layout, regime), SPILLS, 2) for regime in (N1, SMALL)]
    target = Target.every("x86_64", "Windows", isas)
    out = tmp_path_factory.mktemp("windows")
    return write_library(choices, toolchain_of(zig), out, "win", target, check=False, release=True)


@pytest.fixture(scope="module")
def program(bundle: Path, zig: Compiler, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function that compiles a C file beside the library, which is where Windows looks for it."""
    folder = tmp_path_factory.mktemp("programs")
    shutil.copy(read_bundle(bundle).library, folder)

    def build(source: Path) -> Path:
        made = folder / f"{source.stem}.exe"
        if not made.exists():
            words = [*zig.command, *FLAGS, f"-I{bundle}", str(source), f"-L{bundle}", "-lbitgen-win"]
            subprocess.run([*words, "-lpthread", "-o", str(made)], check=True)
        return made

    return build


LEVELS = [isa.name for isa in accepted_isas(detect_cpu(), load_isas()) if isa.name in ("avx2", "scalar")]


def test_the_folder_has_what_a_program_links_with(bundle: Path) -> None:
    names = {path.name for path in bundle.iterdir()}
    assert names == {"bitgen-win.dll", "bitgen-win.lib", "bitgen.h", "bitgen.pc", "manifest.json", "src"}
    assert "rpath" not in (bundle / "bitgen.pc").read_text()
    manifest = read_bundle(bundle).manifest
    assert (manifest.system, manifest.library, list(manifest.isas)) == (
        "Windows",
        "bitgen-win.dll",
        ["avx2", "scalar"],
    )
    decision = judge(read_bundle(bundle), detect_cpu())
    assert (decision.accepted, decision.reason.split(",")[0]) == (False, "it is for Windows on x86_64")


def test_it_shows_the_functions_of_its_header_alone(bundle: Path) -> None:
    if not shutil.which("objdump"):
        pytest.skip("needs objdump (binutils)")
    words = ["objdump", "-p", str(read_bundle(bundle).library)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    shown = set(re.findall(r"\bbitgen_\w+$", said, flags=re.MULTILINE))
    assert shown == set(exported((bundle / "bitgen.h").read_text()))
    needed = set(re.findall(r"DLL Name: (\S+)", said))
    assert all(name.lower().startswith(("kernel32", "api-ms-win-crt-", "ntdll")) for name in needed), needed


def test_kernels_that_spill_align_the_stack(zig: Compiler) -> None:
    """Windows aligns it to 16 bytes; a register of 32 must be put at a multiple of its size."""
    if not shutil.which("objdump"):
        pytest.skip("needs objdump (binutils)")
    unit = kernel_unit(render_kernel(widest(Layout("i2s", 16), SMALL)), isa_named("avx2"))
    made = toolchain_of(zig).compile_object(unit)
    words = ["objdump", "-d", "--no-show-raw-insn", str(made)]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    spilled = re.findall(r"(vmov\w+)\s+%ymm\d+,[-x0-9a-f]*\(%r[sb]p\)", said)
    assert spilled, "no register is spilled: another schedule is needed to show this"
    assert re.search(r"and\s+\$0xffffffffffffffe0,%rsp", said) or not {"vmovaps", "vmovdqa"} & set(spilled)


@pytest.mark.parametrize("level", LEVELS)
def test_the_example_agrees_with_its_naive_loop(
    run: Run, program: Callable[[Path], Path], level: str
) -> None:
    done = run(program(ROOT / "examples" / "c" / "example.c"), **{CAP_VARIABLE: level})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("OK: 1500 values equal those of the naive loop\n")
    assert done.stdout.splitlines()[0].endswith(f"__{level}")


@pytest.mark.parametrize("level", LEVELS)
def test_every_misuse_has_its_code_and_sums_are_exact(
    run: Run, program: Callable[[Path], Path], level: str
) -> None:
    """Among its shapes is the one of the kernels that spill; two threads ask one context at once."""
    done = run(program(DATA / "misuse.c"), **{CAP_VARIABLE: level})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OK: "), done.stdout


def test_a_wrong_cap_is_an_error_there_too(run: Run, program: Callable[[Path], Path]) -> None:
    done = run(program(ROOT / "examples" / "c" / "example.c"), **{CAP_VARIABLE: "neon"})
    assert done.returncode == 1
    assert "BITGEN_ISA_CAP holds no ISA level of this CPU's architecture" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="compared with Linux")
def test_it_computes_the_bits_that_linux_computes(
    run: Run, program: Callable[[Path], Path], level_library: Callable[[str], Path], tmp_path: Path
) -> None:
    """Products, scales of groups (fused multiply-add of the C library) and a forward pass, by each level."""
    compiler = shutil.which("gcc") or shutil.which("clang") or pytest.skip("needs gcc or clang")
    library = level_library("scalar")
    here = f"-Wl,-rpath,{library}", f"-lbitgen-{library.name}"
    words = [
        compiler,
        *FLAGS,
        f"-I{library}",
        str(DATA / "sums.c"),
        f"-L{library}",
        *here,
    ]
    subprocess.run([*words, "-o", str(tmp_path / "sums")], check=True)
    expected = subprocess.run([tmp_path / "sums"], capture_output=True, text=True, check=True).stdout
    assert expected.count("\n") == 26
    for level in LEVELS:
        done = run(program(DATA / "sums.c"), **{CAP_VARIABLE: level})
        assert (done.stdout, done.stderr) == (expected, ""), level


def test_the_pool_runs_every_item_once(run: Run, zig: Compiler, tmp_path: Path) -> None:
    pool = next(unit for unit in run_units("x86_64", "Windows") if unit.name == "pool")
    text_of_pool = (DATA.parent / "host" / "pool.c").read_text()
    for name, text in (
        *library_headers("x86_64", "Windows"),
        ("pool.c", pool.text),
        ("main.c", text_of_pool),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    words = [*zig.command, "-std=c11", "-O1", "-o", "pool.exe", "pool.c", "main.c"]
    subprocess.run(words, cwd=tmp_path, check=True)
    done = run(tmp_path / "pool.exe")
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) == 4 * sum(1 + loop * 13 for loop in range(300))


def test_host_code_compiles_without_a_warning(zig: Compiler) -> None:
    made = library_units("x86_64", "Windows", CpuChecks(), libraries.EMPTY_TABLE)
    units = [unit for unit in made if unit.name != "table"]
    toolchain = replace(toolchain_of(zig), werror=True, extra_flags=("-Wpedantic", "-Wshadow", "-O1"))
    for result in toolchain.compile_objects(units):
        assert isinstance(result, Path), result


@pytest.mark.deep
def test_anybody_can_build_it_again(bundle: Path) -> None:
    assert rebuild(read_bundle(bundle)) == sha256_of(read_bundle(bundle).library)


def test_a_zip_is_all_that_a_program_needs(bundle: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tools" / "wheels.py"), "--bundle", str(bundle), "-o", str(tmp_path)]
    subprocess.run(words, check=True, capture_output=True)
    (made,) = tmp_path.iterdir()
    with zipfile.ZipFile(made) as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    assert made.name.endswith("-windows-x86_64.zip")
    assert files.keys() == {
        *("bitgen-win.dll", "bitgen-win.lib", "bitgen.h", "bitgen.pc", "manifest.json"),
        *("example.c", "README.txt", "LICENSE"),
    }
    assert b"under Wine" in files["README.txt"]


def test_other_machines_with_windows_have_no_library() -> None:
    with pytest.raises(UnsupportedError, match="no libraries are built for Windows on aarch64"):
        find_cross_compilers("aarch64", "Windows")
