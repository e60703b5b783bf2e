"""What a release promises of its libraries: they run on old systems and on small CPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import libraries
import pytest

from bitgen.bundle.contents import Target, choose_contents
from bitgen.bundle.elf import read_requirements
from bitgen.bundle.units import library_units_of
from bitgen.cpu import load_isas
from bitgen.toolchain import Compiler, Toolchain, find_cross_compilers, release_compiler

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
    compiler = release_compiler(arch, "Linux")
    if compiler.kind != "zig":
        pytest.skip("needs pip install ziglang")
    isas = [isa for isa in load_isas() if isa.generic]
    contents = choose_contents((), Target.every(arch, "Linux", isas))
    toolchain = Toolchain(compiler, cache_dir=libraries.shared_cache(), timeout_s=900, strip=True)
    objects = toolchain.objects(library_units_of(contents))
    asks = read_requirements(toolchain.link_shared(objects, tmp_path / "library.so"))
    assert asks.arch == arch
    assert asks.glibc is not None
    assert asks.glibc <= (2, 17)
    assert asks.wheel_tag == f"py3-none-manylinux_2_17_{arch}.manylinux2014_{arch}"
