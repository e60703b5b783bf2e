"""Bundles opened by programs without Python: what is refused, and the line that says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitgen.bundle import read_bundle, sha256_of
from bitgen.cpu import detect_cpu
from bitgen.trust import private_dir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="files are opened as Linux does"),
    pytest.mark.skipif(
        not (shutil.which("make") and shutil.which("pkg-config")), reason="needs make and pkg-config"
    ),
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "c"
CC = shutil.which("gcc") or shutil.which("clang") or "cc"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, universal_library: Path) -> Path:
    """The example of an engine's author, linked through pkg-config with a universal library."""
    made = tmp_path_factory.mktemp("engine")
    for name in ("Makefile", "open_bundle.c", "example.c"):
        shutil.copy(EXAMPLES / name, made)
    words = ["make", "-C", str(made), f"CC={CC}", "CFLAGS=-O1 -Wall -Wextra -Werror", "all"]
    environment = {**os.environ, "PKG_CONFIG_PATH": str(universal_library)}
    subprocess.run(words, env=environment, check=True, capture_output=True)
    return made


def run(folder: Path, *argv: Path, emulator: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*emulator, str(folder / "open_bundle"), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    made = private_dir(tmp_path / "bundles") / bundle.name
    shutil.copytree(bundle, made, symlinks=True)
    return made


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def library_of(path: Path) -> Path:
    name: str = json.loads((path / "manifest.json").read_text())["library"]
    return path / name


def test_pkg_config_alone_dispatches_over_all_levels(folder: Path, universal_library: Path) -> None:
    done = run(folder)
    best = next(iter(read_bundle(universal_library).manifest.isas))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"__{best}\n")
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator and detect_cpu().arch == "x86_64":
        done = run(folder, emulator=(emulator, "-cpu", "Nehalem"))
        assert done.stdout.endswith("__scalar\n")


def test_an_installed_bundle_is_opened(folder: Path, copy: Path) -> None:
    done = run(folder, copy)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OK: bitgen_")
    link = copy.with_name("link")
    link.symlink_to(copy)
    assert run(folder, link).stderr == "", "a link to the folder is followed, and what it leads to is checked"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: (p / "manifest.json").unlink(), "cannot open manifest.json: No such file"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"a": "\\'), "manifest.json is damaged"),
        (lambda p: edit(p, lambda m: m.update(abi_version=99)), "it has ABI version 99, this library"),
        (lambda p: edit(p, lambda m: m.update(library="../x.so")), "manifest.json names no library"),
        (lambda p: edit(p, lambda m: m.update(library=7)), "manifest.json names no library"),
        (lambda p: edit(p, lambda m: m.update(files={})), "manifest.json names no library"),
        (lambda p: library_of(p).unlink(), "No such file"),
        (lambda p: library_of(p).chmod(0o757), "every user can write to libbitgen-tests.so"),
        (lambda p: p.chmod(0o777), "every user can write to "),
        (lambda p: p.parent.chmod(0o777), "every user can write to "),
        (lambda p: p.joinpath("manifest.json").chmod(0o646), "every user can write to manifest.json"),
    ],
)
def test_a_bundle_that_is_wrong_is_refused_in_a_line(
    folder: Path, copy: Path, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(copy)
    done = run(folder, copy)
    assert reason in done.stderr
    assert done.stderr.endswith("; going on without it\n")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 0, "the library of the program serves"


def test_each_flipped_bit_of_a_library_is_noticed(folder: Path, copy: Path) -> None:
    library = library_of(copy)
    data = bytearray(library.read_bytes())
    for at in (0, len(data) // 2, len(data) - 1):
        data[at] ^= 1
        library.unlink()
        library.write_bytes(data)
        assert "is not the file that its manifest names" in run(folder, copy).stderr
        data[at] ^= 1
    library.unlink()
    library.write_bytes(data)
    assert run(folder, copy).stderr == ""


def test_a_library_that_is_a_link_or_of_somebody_else_is_refused(folder: Path, copy: Path) -> None:
    library = library_of(copy)
    library.rename(copy / "real.so")
    library.symlink_to("real.so")
    assert "cannot open libbitgen-tests.so" in run(folder, copy).stderr
    (copy / "real.so").replace(library)
    if os.geteuid() == 0:
        os.chown(library, 12345, 0)
        assert "belongs to another user" in run(folder, copy).stderr


def test_another_file_of_the_right_digest_is_no_library_of_bitgen(folder: Path, copy: Path) -> None:
    library = library_of(copy)
    library.write_bytes(b"no library")
    edit(copy, lambda m: m["files"].update({library.name: sha256_of(library)}))
    assert "cannot load libbitgen-tests.so" in run(folder, copy).stderr


def test_features_that_a_cpu_lacks_are_named(folder: Path, level_library: Callable[[str], Path]) -> None:
    emulator = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if emulator is None or detect_cpu().arch != "x86_64":
        pytest.skip("needs x86-64 and its emulator: apt-get install qemu-user")
    done = run(folder, level_library("avx2"), emulator=(emulator, "-cpu", "Nehalem"))
    assert done.stderr == "this CPU lacks avx2 bmi2 f16c fma; going on without it\n"
    assert done.stdout.endswith("__scalar\n")
