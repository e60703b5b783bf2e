"""What a release promises of its libraries: they run on old systems and on small CPUs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import foreign
import libraries
import pytest
from compiled import QuickToolchain
from distributions import rewritten
from exact_specs import DEEP_VARIABLE
from model_files import preset_yaml

from bitgen.bundle.contents import Target, choose_contents
from bitgen.bundle.elf import read_requirements
from bitgen.bundle.manifest import read_bundle, sha256_of
from bitgen.bundle.rebuild import rebuild
from bitgen.bundle.units import library_units_of
from bitgen.bundle.write import write_library
from bitgen.cli import main
from bitgen.cpu import CAP_VARIABLE, detect_cpu, load_isas
from bitgen.errors import FileError
from bitgen.hostcode import Headers, kernel_headers, step_headers
from bitgen.toolchain import Compiler, Toolchain, Unit, find_compiler, find_cross_compilers, release_compiler

ROOT = Path(__file__).parents[2]
WIDE = re.compile(r"%[yz]mm|%k[1-7]")  # registers that only AVX and AVX-512 have


def host_objects(compiler: Compiler) -> list[Path]:
    """The host code of a library for every x86-64, compiled: all that runs before a level is chosen."""
    isas = [isa for isa in load_isas() if isa.generic or isa.name == "avx2"]
    units = library_units_of(choose_contents((), Target.every("x86_64", "Linux", isas)))
    toolchain = Toolchain(compiler, cache_dir=libraries.shared_cache(), timeout_s=900)
    return toolchain.objects([unit for unit in units if unit.isa is None])


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump (binutils)")
@pytest.mark.parametrize(
    "compiler", find_cross_compilers("x86_64", "Linux"), ids=lambda compiler: compiler.kind
)
def test_host_code_has_no_wide_register(compiler: Compiler) -> None:
    objects = host_objects(compiler)
    listed = [
        subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", file],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for file in objects
    ]
    assert sum("<bitgen_context_create>:" in text for text in listed) == 1
    assert not [text for text in listed if WIDE.search(text)]


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_the_release_compiler_asks_for_old_symbols_only(arch: str, tmp_path: Path) -> None:
    """Zig links the pool, the mappings and the mathematics of host code against glibc 2.17."""
    if "zig" not in {compiler.kind for compiler in find_cross_compilers(arch, "Linux")}:
        pytest.skip("needs pip install ziglang")
    compiler = release_compiler(arch, "Linux")
    assert compiler.kind == "zig"
    isas = [isa for isa in load_isas() if isa.generic]
    contents = choose_contents((), Target.every(arch, "Linux", isas))
    toolchain = Toolchain(compiler, cache_dir=libraries.shared_cache(), timeout_s=900, strip=True)
    objects = toolchain.objects(library_units_of(contents))
    asks = read_requirements(toolchain.link_shared(objects, tmp_path / "library.so"))
    assert asks.arch == arch
    assert asks.glibc is not None
    assert asks.glibc <= (2, 17)
    assert asks.wheel_tag == f"py3-none-manylinux_2_17_{arch}.manylinux2014_{arch}"


# ---- other machines: the same library text, as programs in C see it


def universal(compiler: Compiler, arch: str, levels: Sequence[str], out: Path) -> Path:
    isas = [isa for isa in load_isas() if isa.name in ("scalar", *levels)]
    toolchain = QuickToolchain(compiler, cache_dir=libraries.shared_cache(), timeout_s=900, strip=True)
    target = Target.every(arch, "Linux", isas)
    return write_library((), toolchain, out, f"universal-{arch}", target, check=False, release=True)


def example_of(bundle: Path, compiler: Compiler, folder: Path) -> Path:
    program = folder / "example"
    link = [f"-L{bundle}", f"-lbitgen-{bundle.name}", f"-Wl,-rpath,{bundle}", "-lm", "-lpthread"]
    words = [*compiler.command, "-std=c99", "-O1", "-ffp-contract=off", f"-I{bundle}", "-o", str(program)]
    subprocess.run([*words, str(ROOT / "examples" / "c" / "example.c"), *link], check=True)
    return program


def test_on_arm_the_level_of_the_core_is_chosen(tmp_path: Path) -> None:
    """On three of qemu's cores, one with SVE registers of 32 bytes. test_arm compiles these levels too."""
    if reason := foreign.why_not():
        pytest.skip(reason)
    cores = {
        "cortex-a72": "scalar",
        "neoverse-n1": "neon_dotprod",
        "max,sve-default-vector-length=32": "sve256_i8mm",
    }
    compiler = foreign.cross_compilers()[0]
    bundle = universal(compiler, "aarch64", list(cores.values()), tmp_path)
    program = example_of(bundle, compiler, tmp_path)
    for core, level in cores.items():
        done = foreign.emulate([str(program)], core)
        said = done.stdout.decode()
        assert done.returncode == 0, f"{core}: {done.stderr.decode()}"
        assert said.endswith("OK: 1500 values equal those of the naive loop\n")
        assert said.splitlines()[0].endswith(f"__{level}"), core


def test_the_musl_variant_runs_under_musls_loader(tmp_path: Path) -> None:
    loader = Path("/lib/ld-musl-x86_64.so.1")
    if platform.machine() != "x86_64" or not loader.exists():
        pytest.skip("needs x86-64 and musl: apt-get install musl")
    compiler = release_compiler("x86_64", "Linux", libc="gnu")
    if compiler.kind != "zig":
        pytest.skip("needs pip install ziglang")
    compiler = release_compiler("x86_64", "Linux", libc="musl")
    bundle = universal(compiler, "x86_64", ["avx2"], tmp_path)
    asks = read_requirements(bundle / f"libbitgen-{bundle.name}.so")
    assert (asks.glibc, asks.wheel_tag) == (None, "py3-none-musllinux_1_2_x86_64")
    program = example_of(bundle, compiler, tmp_path)
    done = subprocess.run([str(loader), str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("OK: 1500 values equal those of the naive loop\n")


# ---- bitgen bundle make


RAGGED = libraries.RAGGED
SIZES = {"hidden": RAGGED.hidden, "ffn": RAGGED.ffn, "layers": 1, "kv_heads": 1, "vocab": 97}
SIZES |= {"heads": RAGGED.q_rows // RAGGED.head_dim, "head_dim": RAGGED.head_dim}
TARGET = {"x86_64": "x86-64", "aarch64": "armv8-a"}.get(platform.machine(), "")
NATIVE = pytest.mark.skipif(
    sys.platform != "linux" or not TARGET or not (shutil.which("gcc") or shutil.which("clang")),
    reason="needs Linux and gcc or clang",
)


def bitgen(home: Path, *argv: str | Path, umask: int = 0o022, **environment: str) -> str:
    env = {**os.environ, "BITGEN_HOME": str(home), **environment}
    env.pop(CAP_VARIABLE, None)
    command = [sys.executable, "-m", "bitgen", *map(str, argv)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, umask=umask, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def make(home: Path, out: Path, umask: int = 0o022, **environment: str) -> list[Path]:
    """A release of scalar kernels alone, each file of it by name."""
    cc = "gcc" if shutil.which("gcc") else "clang"
    home.mkdir(parents=True, exist_ok=True)
    model = home / "ragged.yaml"  # its forward step is that of other tests
    model.write_text(preset_yaml("tests/ragged", **SIZES))
    words = ("--model", str(model), "--families", TARGET, "--cc", cc, "--release", "1.2.0")
    said = bitgen(home, "bundle", "make", *words, "-o", out, umask=umask, **environment)
    assert "default" in said
    return sorted(path for path in out.iterdir() if path.is_file())


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    make(libraries.share_cache(folder / "home"), folder / "dist")
    return folder / "dist"


@pytest.fixture(scope="module")
def compiled_again(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Libraries that are built again share with one another what they compile, and with nothing else.

    But for the forward steps and the kernels of all families but one, which are nine tenths of the time:
    `.ci/deep release` compiles those again too.
    """
    folder = tmp_path_factory.mktemp("again")
    shared = re.compile(
        r"bitgen_(?!quantize|i2s_\w+_r16_(direct|panel))"
    )  # of I2_S only those without groups

    def headers_of(unit: Unit) -> Headers:
        return step_headers() if unit.stem.startswith("bitgen_step_") else kernel_headers()

    class Again(Toolchain):
        def objects(self, units: Sequence[Unit]) -> list[Path]:
            if os.environ.get(DEEP_VARIABLE):
                return super().objects(units)
            before = Toolchain(
                self.compiler, libraries.shared_cache(), strip=self.strip, kernels=self.kernels
            )
            known = [unit for unit in units if shared.match(unit.stem)]
            others = [unit for unit in units if unit not in known]
            as_built = [replace(unit, headers=headers_of(unit)) for unit in known]
            made = [*before.objects(as_built), *super().objects(others)]
            found = dict(zip([*known, *others], made, strict=True))
            return [found[unit] for unit in units]

    def toolchain(compiler: Compiler, _scratch: Path, **options: Any) -> Toolchain:
        return Again(compiler, folder, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitgen.bundle.rebuild.Toolchain", toolchain)
        yield


@NATIVE
def test_builds_in_other_folders_times_and_umasks_give_the_same_bytes(release: Path, tmp_path: Path) -> None:
    """Of the same objects; that a compiler makes these again is the next test's."""
    home = libraries.share_cache(tmp_path / "other home")
    c = "C" if sys.prefix.isascii() else "C.UTF-8"  # Python reads .pth files in it (pip install -e)
    again = make(home, tmp_path / "elsewhere", 0o077, TZ="Asia/Tokyo", LC_ALL=c)
    first = {path.name: path.read_bytes() for path in release.iterdir() if path.is_file()}
    assert len(first) == 2, "a zip and a wheel"
    assert {path.name: path.read_bytes() for path in again} == first


@NATIVE
@pytest.mark.usefixtures("compiled_again", "bitgen_home")
def test_anybody_can_build_a_release_again(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `compiled_again` says is compiled again, elsewhere and in another time zone."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "C")
    (archive,) = release.glob("*.zip")
    verify = ("bundle", "verify", "--rebuild", "--allow-unsigned")
    assert main([*verify, str(archive)]) == 0
    said = capsys.readouterr().out
    assert f"ragged-{TARGET}: built again, the same library, sha256 " in said

    def sha(data: bytes) -> bytes:
        return hashlib.sha256(data).hexdigest().encode()

    def edit(files: dict[str, bytes]) -> None:
        """Another C text, and every digest above it as it should be: only a second build can tell."""
        folder, before = f"ragged-{TARGET}", dict(files)
        source = f"{folder}/src/library.c"
        files[source] = files[source].replace(b"no error", b"no harm")
        assert files[source] != before[source]
        for name in (source, f"{folder}/manifest.json", "provenance.json"):
            for above in (f"{folder}/manifest.json", "provenance.json", "index.json"):
                files[above] = files[above].replace(sha(before[name]), sha(files[name]))

    changed = rewritten(archive, tmp_path / "changed.zip", edit)
    assert main([*verify, str(changed)]) == FileError.exit_code
    said = capsys.readouterr().err
    assert re.search(r"built again from its C text with .* the library has the sha256", said)
    assert said.count("\n") == 1


@NATIVE
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("clang")), reason="needs gcc and clang")
@pytest.mark.usefixtures("compiled_again")
def test_kernels_and_host_code_may_have_compilers_of_their_own(tmp_path: Path) -> None:
    """As releases have them: zig for host code and linking, gcc for ISA levels."""
    host, kernels = find_compiler("clang"), find_compiler("gcc")
    toolchain = Toolchain(host, libraries.shared_cache(), strip=True, kernels=kernels)
    target = Target.of(detect_cpu(), "scalar")
    made = read_bundle(write_library((), toolchain, tmp_path, "mixed", target, release=True))
    compilers = {name: facts["compiler"] for name, facts in made.manifest.compiler.items()}
    assert compilers == {"scalar": "gcc", "host": "clang"}
    assert rebuild(made) == sha256_of(made.library)


@NATIVE
def test_pip_installs_a_wheel_of_bundles_and_bitgen_reads_it_in_place(release: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    (wheel,) = release.glob("*.whl")
    assert wheel.name.startswith("bitgen_kernels_ragged-1.2.0-py3-none-manylinux_2_")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "-q", "install", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(wheel)], check=True)
    assert not list(site.rglob("*.c")), "C text is in the zip"
    picked = json.loads(bitgen(tmp_path, "bundle", "pick", "-o", "json", PYTHONPATH=str(site)))
    (candidate,) = picked["candidates"]
    assert Path(picked["chosen"]) == site / "bitgen_kernels_ragged" / f"ragged-{TARGET}"
    assert (candidate["from"], candidate["key"]) == ("bitgen_kernels_ragged 1.2.0", "a package of pip")
    index = hashlib.sha256((site / "bitgen_kernels_ragged" / "index.json").read_bytes()).hexdigest()
    bitgen(tmp_path, "trust", "revoke", index)
    picked = json.loads(bitgen(tmp_path, "bundle", "pick", "-o", "json", PYTHONPATH=str(site)))
    assert picked["chosen"] is None
    assert "this index was revoked" in picked["candidates"][0]["reason"]
