from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from libraries import toolchain_of

from bitgen.cli import main
from bitgen.cpu import ANY_ARCH, Cpu, detect_cpu, load_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.measure.harness import unit_of
from bitgen.paths import csrc_dir, templates_dir
from bitgen.render import (
    Source,
    inherits,
    ops_used,
    parse_ops,
    render_kernel,
    render_quantize,
    render_tables,
    vector_ops,
)
from bitgen.space import space_for
from bitgen.spec import FAMILIES, LARGE, N1, REGIMES, SMALL, KernelSpec, Layout, Regime, Shape
from bitgen.toolchain import Compiler, find_compilers

ROOT = Path(__file__).parents[2]
CPU = detect_cpu()
AMD, INTEL = (replace(CPU, vendor=vendor) for vendor in ("AuthenticAMD", "GenuineIntel"))
ISAS = {isa.name: isa for isa in load_isas()}
HERE = [isa.name for isa in ISAS.values() if isa.arch in (ANY_ARCH, CPU.arch)]  # what compilers here make
TABLED = [(family.name, kind) for family in FAMILIES.values() for kind, _ in family.tables]
SHAPE = Shape(3200, 8640)
WIDTH = 120  # columns of generated C; the names of kernels may be longer


def points(family: str, isa: str, regime: Regime, shape: Shape = SHAPE) -> tuple[KernelSpec, ...]:
    return space_for(family, ISAS[isa], regime, shape, CPU).points


def default(family: str, isa: str, regime: Regime, cpu: Cpu = CPU) -> KernelSpec:
    return space_for(family, ISAS[isa], regime, SHAPE, cpu).default


def kernel(
    family: str, isa: str, regime: Regime, algorithm: str, row_block: int = 16, **knobs: int
) -> KernelSpec:
    """A spec by its knobs, so that a test does not depend on what is the default."""
    space = space_for(family, ISAS[isa], regime, SHAPE, CPU)
    spec = space.make(algorithm, Layout(family, row_block), knobs)
    space.check(spec, local=False)
    return spec


def sample(count: int) -> Iterator[KernelSpec]:
    """The default of every space and ``count`` more points of each, some of them for one shape only."""
    draw = random.Random(7)
    for i, (family, isa, regime) in enumerate(product(FAMILIES, ISAS, REGIMES)):
        yield default(family, isa, regime)
        for j, spec in enumerate(draw.sample(points(family, isa, regime), count)):
            yield replace(spec, shape=Shape(530, 97)) if (i + j) % 2 else spec


# ---- a pure function of the spec

_DIGESTS = """
import hashlib, sys
from test_render import sample
from bitgen.render import render_kernel, render_quantize, render_tables
texts = [render_kernel(spec).text for spec in sample(0)]
texts += [render_quantize("avx512_vbmi").text, render_tables("tl2", "avx2").text]
print(hashlib.sha256("".join(texts).encode()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_render_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "support")))
    c = "C" if sys.prefix.isascii() else "C.UTF-8"  # Python reads .pth files in it (pip install -e)
    for seed, zone, language in (("1", "UTC", c), ("4242", "Asia/Tokyo", "C.UTF-8")):
        env = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": language, "PYTHONPATH": path}
        folder = tmp_path / seed
        folder.mkdir()
        command = [sys.executable, "-c", _DIGESTS]
        digests.add(subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True).stdout)
    assert len(digests) == 1


@cache
def everything() -> tuple[Source, ...]:
    """Two kernels of every space, and all quantisers and builders of tables."""
    helpers = [render_quantize(isa) for isa in ISAS]
    helpers += [render_tables(family, isa, kind) for isa in ISAS for family, kind in TABLED]
    return (*(render_kernel(spec) for spec in sample(1)), *helpers)


def test_text_tells_nothing_of_this_machine_and_has_no_conditions() -> None:
    known = {str(ROOT), str(Path.home()), socket.gethostname(), CPU.model_name}
    known = {word for word in known if len(word) > 6}  # a host called "vm" proves nothing
    for source in everything():
        text = source.text
        assert not re.search(r"^\s*#\s*(if|else|elif|pragma|line)", text, re.MULTILINE), source.name
        assert not re.search(r"__(DATE|TIME|FILE|TIMESTAMP)__|\b20[2-9]\d-\d\d", text), source.name
        assert not [word for word in known if word in text], source.name
        assert text.isascii()
        assert source.name in text.splitlines()[1]


@pytest.mark.parametrize("folder", [templates_dir(), csrc_dir()], ids=["templates", "csrc"])
def test_no_line_of_c_is_wider_than_a_page(folder: Path) -> None:
    files = sorted(folder.rglob("*.*"))
    assert files
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= WIDTH, f"{file}:{number}"


def test_text_is_tidy() -> None:
    for source in everything():
        heads = [f" * {source.name}", *(prototype.split("(")[0] + "(" for prototype in source.prototypes)]
        depth = 0
        for number, line in enumerate(source.text.splitlines(), 1):
            where = f"{source.name}:{number}: {line}"
            assert line == line.rstrip(), where
            assert "\t" not in line, where
            assert len(line) <= WIDTH or line.startswith((*heads, f" * {source.name}")), where
            if not line.startswith((" *", "//", "/*")):
                assert not re.search(r"\((c|i)\)|\+ 0\b|\b[01] \* \w", line), where
            if re.match(r"\s*\}", line):
                depth -= 1
            if depth and re.match(r" *(const|vb|vw|vh|for|acc|h\d)\b.*[{;]$", line):
                assert len(line) - len(line.lstrip()) >= 4 * depth, where
            depth += line.count("{") - line.count("}") + bool(re.match(r"\s*\}", line))
        assert "\n\n\n" not in source.text
        assert source.text.endswith("}\n")


# ---- it compiles


def compilers() -> list[Compiler]:
    return [c for c in find_compilers() if c.kind in ("gcc", "clang")]


def for_compiling(isa: str) -> list[Source]:
    """Defaults of an ISA level, unrolled kernels of 32-row blocks for one shape, quantiser and tables."""
    specs = [default(family, isa, regime) for family in FAMILIES for regime in REGIMES]
    for family, regime in zip(FAMILIES, (*REGIMES, LARGE, SMALL), strict=True):
        space = points(family, isa, regime)
        most = max(spec.layout.row_block for spec in space)
        wide = [spec for spec in space if spec.layout.row_block == most]
        wide.sort(key=lambda spec: -dict(spec.schedule).get("unroll", 1))
        specs.append(replace(wide[0], shape=SHAPE))
    sources = [render_kernel(spec) for spec in dict.fromkeys(specs)]
    return [*sources, render_quantize(isa), *(render_tables(family, isa, kind) for family, kind in TABLED)]


@pytest.mark.deep
@pytest.mark.slow
@pytest.mark.parametrize("isa", HERE)
def test_gcc_accepts_it_without_a_warning(isa: str) -> None:
    if not any(c.kind == "gcc" for c in compilers()):
        pytest.skip("gcc is not installed")
    toolchain = toolchain_of()  # with -Werror; gcc warns in its optimiser, so objects are made
    sources = for_compiling(isa)
    for source, made in zip(sources, toolchain.compile_objects([unit_of(s) for s in sources]), strict=True):
        assert isinstance(made, Path), f"{source.name}: {made}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=[] if isa in ("avx2", "amx_int8") else [pytest.mark.deep]) for isa in HERE],
)
def test_clang_accepts_it_without_a_warning(isa: str, tmp_path: Path) -> None:
    clang = shutil.which("clang")
    if clang is None:
        pytest.skip("clang is not installed")
    files = []
    for i, source in enumerate(for_compiling(isa)):
        unit = unit_of(source)
        files.append(tmp_path / f"{i}.c")
        files[-1].write_text(unit.text)
        for name, text in unit.headers:
            (tmp_path / name).write_text(text)
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", *ISAS[isa].cc_flags]
    run = subprocess.run([clang, *flags, *files], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[:3000]


# ---- the banner


def banner_command(text: str) -> list[str]:
    banner = text[: text.index("*/")]
    lines = banner[banner.index("bitgen render") :].split("\n\n")[0].splitlines()
    joined = []
    for line in lines:
        joined.append(line.removeprefix(" *").strip())
        if not joined[-1].endswith("\\"):
            break
    return shlex.split(" ".join(part.removesuffix("\\") for part in joined))


@pytest.mark.slow
def test_the_banners_command_makes_the_file_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert_banners(everything(), capsys)


@pytest.mark.parametrize("cpu", [AMD, INTEL], ids=lambda cpu: cpu.vendor)
def test_a_banner_holds_on_the_cpu_of_another_vendor(
    cpu: Cpu, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its default may have other knobs."""
    for module in ("bitgen.environment", "bitgen.api"):
        monkeypatch.setattr(f"{module}.detect_cpu", lambda: cpu)
    small = [render_kernel(default("i2s", "avx512_vbmi", SMALL, each)) for each in (AMD, INTEL)]
    assert small[0] != small[1]
    assert_banners(small, capsys)


def assert_banners(sources: Iterable[Source], capsys: pytest.CaptureFixture[str]) -> None:
    for source in sources:
        words = banner_command(source.text)
        assert words[:2] == ["bitgen", "render"]
        assert main(words[1:]) == 0
        assert capsys.readouterr().out == source.text


def test_the_banner_tells_the_formula_the_bound_and_the_schedule() -> None:
    text = render_kernel(
        kernel(
            "i2s",
            "avx2",
            N1,
            "direct",
            streams=2,
            nr=1,
            accumulators=2,
            widen_every=8,
            unroll=1,
            prefetch=0,
            prefetch_hint=0,
        )
    ).text
    banner = text[: text.index("*/")]
    for words in (
        "acc[n, m] = sum over k of w[m, k] * xq[n, k]",
        "y[n, m] = (float)acc[n, m] * (x_scale[n] * w_scale[m])",
        "streams = 2, nr = 1, accumulators = 2, widen_every = 8",
        "16 additions of -2048 .. 2032 give -32768 .. 32512, within -32768 .. 32767",
        "I2_S, 2.000 bits a weight; row blocks of 16, chunks of 16 along k",
        "n = 1 .. 1",
    ):
        assert words in banner
    assert "n = 17 .. any" in render_kernel(default("tl2", "avx2", LARGE)).text


# ---- vocabulary


@pytest.mark.parametrize("family", ["i2s", "t5", "tl5"])
def test_the_hint_says_where_prefetched_lines_go(family: str) -> None:
    words = ("prefetch", "prefetch_once", "prefetch_l2")
    spec = default(family, "avx512_vbmi", N1)
    for prefetch_hint, word in enumerate(words):
        text = render_kernel(
            replace(spec, schedule=spec.schedule.with_knobs(prefetch_hint=prefetch_hint))
        ).text
        assert {name for name in words if re.search(rf"\b{name}\(w", text)} == {word}


@pytest.mark.slow
def test_only_the_ops_that_are_used_are_in_the_text() -> None:
    for source in everything():
        ops = vector_ops(source.isa)
        body = source.text[source.text.index("struct bitgen_matmul {") :]
        needed = set(ops_used(ops, body))
        for name in set(ops) - {"types", "includes", "vt"}:
            definition = rf"^(OP \w+ {name}\(|typedef .*\b{name};)"
            assert (re.search(definition, source.text, re.MULTILINE) is not None) == (name in needed)


def test_parse_ops() -> None:
    assert parse_ops("no word\n//: one\na\n\n//: two\nb\nc\n") == {"one": "a\n", "two": "b\nc\n"}
    assert ops_used({"a": "b(1)", "b": "x", "c": "a"}, "int f = a(2);") == ["a", "b"]


def test_inherited_kernels() -> None:
    """VBMI changes ops that only T5, table builders and a knob use, VNNI some that every kernel uses."""
    for family in ("i2s", "tl1", "tl2"):
        for regime in REGIMES:
            assert inherits(default(family, "avx512_vbmi", regime, AMD)) == "avx512_vnni"
            assert inherits(default(family, "avx512_vnni", regime)) is None
            assert inherits(default(family, "avx512", regime)) is None  # no parent
            assert inherits(default(family, "scalar", regime)) is None
    assert inherits(default("t5", "avx512_vbmi", N1)) is None
    intel = default("i2s", "avx512_vbmi", SMALL, INTEL)  # with that knob
    assert inherits(intel) is None


# ---- errors


def test_errors() -> None:
    with pytest.raises(UsageError, match="I2_S multiplies: it has no lookup tables"):
        render_tables("i2s", "avx2")
    with pytest.raises(BitgenError, match="unknown family 'tl9'"):
        render_tables("tl9", "avx2")
    with pytest.raises(BitgenError, match=r"unknown ISA level 'avx3'.*avx2"):
        render_quantize("avx3")


def test_names_of_isa_levels_are_read_as_people_write_them() -> None:
    assert render_quantize("AVX512-VNNI") == render_quantize("avx512_vnni")
    assert render_tables("TL_2", "AVX512-VNNI") == render_tables("tl2", "avx512_vnni")
