"""The library from C: the example, the header in both languages, every misuse, and the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import libraries
import pytest
from compiled import QuickToolchain, need_sanitizers

from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cpu import Isa, detect_cpu
from bitgen.toolchain import Compiler, find_compiler, find_compilers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MISUSE = Path(__file__).parents[1] / "data" / "library" / "misuse.c"
SANITIZE = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
CC = shutil.which("gcc") or shutil.which("clang") or "cc"


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.skipif(
    not (shutil.which("make") and shutil.which("pkg-config")), reason="needs make and pkg-config"
)
def test_the_example_builds_with_pkg_config_and_agrees_with_its_naive_loop(
    bundle: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"  # the bundle may lie anywhere
    shutil.copytree(bundle, moved, symlinks=True)
    folder = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "c", folder, ignore=shutil.ignore_patterns("example"))
    run(["make", "-C", str(folder), f"CC={CC}", "BUNDLE=../moved", "CFLAGS=-O1 -Wall -Wextra -Werror"])
    said = run([str(folder / "example")])
    assert said.endswith("OK: 1500 values equal those of the naive loop\n")
    assert "300 x 640 times 5 tokens on" in said


def test_the_header_is_c99(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "header.c"
    source.write_text('#include "bitgen.h"\n#include "bitgen.h"\nint main(void) { return BITGEN_OK; }\n')
    flags = ["-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    run([CC, *flags, f"-I{bundle}", str(source)])


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_header_is_cpp17_and_links(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "header.cpp"
    source.write_text(
        '#include "bitgen.h"\n#include <cstdio>\nint main() {\n    bitgen_context *ctx = nullptr;\n'
        "    const int32_t code = bitgen_context_create(&ctx, 1, 0);\n    bitgen_context_destroy(ctx);\n"
        "    std::puts(bitgen_error_message(code));\n    return code;\n}\n"
    )
    flags = ["-std=c++17", "-pedantic-errors", "-Wall", "-Wextra", "-Werror"]
    program = compile_program(source, bundle, tmp_path, "g++", *flags)
    assert run([str(program)]) == "no error\n"


def compile_program(source: Path, bundle: Path, folder: Path, compiler: str, *flags: str) -> Path:
    program = folder / source.stem
    library = f"-lbitgen-{bundle.name}"
    options = [f"-I{bundle}", f"-L{bundle}", library, f"-Wl,-rpath,{bundle}", "-lm", "-lpthread"]
    run([compiler, *flags, "-o", str(program), str(source), *options])
    return program


WARNINGS = ("-std=c99", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


def test_every_misuse_has_its_code(bundle: Path, tmp_path: Path) -> None:
    program = compile_program(MISUSE, bundle, tmp_path, CC, *WARNINGS)
    assert run([str(program)]).startswith("OK: ")


class SanitizedHost(QuickToolchain):
    """Code for an ISA level is that of other tests: test_sanitizers has its kernels with sanitizers."""

    def flags(self, isa: Isa | None) -> tuple[str, ...]:
        flags = super().flags(isa)
        return flags if isa is None else flags[: -len(SANITIZE)]


@pytest.mark.parametrize(
    "compiler", [one for one in find_compilers() if one.kind != "zig"], ids=lambda compiler: compiler.kind
)
def test_every_misuse_has_its_code_under_sanitizers(compiler: Compiler, tmp_path: Path) -> None:
    """The same library, its host code compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

    By each compiler, as clang sees more: an offset to a null pointer, also of zero.
    """
    need_sanitizers(compiler.command, SANITIZE)
    cpu = detect_cpu()
    toolchain = SanitizedHost(
        compiler, libraries.shared_cache(), timeout_s=900, extra_flags=SANITIZE, kernels=find_compiler()
    )
    # Its self-test would need the sanitizer's runtime in the Python process.
    made = write_library(
        libraries.choices(cpu), toolchain, tmp_path, "sanitized", Target.of(cpu), check=False
    )
    program = compile_program(MISUSE, made, tmp_path, *compiler.command, *WARNINGS, *SANITIZE)
    assert run([str(program)], ASAN_OPTIONS="detect_leaks=1").startswith("OK: ")
