"""ARM on a machine that is none: cross-compiled, executed by qemu. Nothing here is about speed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import shutil
import subprocess
from collections.abc import Collection, Iterator
from pathlib import Path

import foreign
import foreign_kernels
import numpy as np
import pytest
from compiled import QuickToolchain
from libraries import shared_cache

from bitgen.api import build
from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cli import main
from bitgen.cpu import Isa, accepted_isas, find_isa, load_isas, target_cpu, target_names
from bitgen.errors import BitgenError, ToolchainError, UsageError
from bitgen.hostcode import features_header
from bitgen.render import inherits
from bitgen.space import Space, space_for
from bitgen.spec import FAMILIES, REGIMES, KernelSpec, Shape
from bitgen.toolchain import Toolchain, find_cross_compiler, find_cross_compilers

ROOT = Path(__file__).parents[2]
MISUSE = Path(__file__).parents[1] / "data" / "library" / "misuse.c"
LEVELS = [isa for isa in load_isas() if isa.arch == "aarch64"]
CPU = target_cpu("neoverse-n1")
SHAPE = Shape(3200, 8640)
# -O1: at -O3 the instrumented kernels take minutes to compile.
SANITIZE = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# What a core of qemu's runs of each library: the ISA level of its kernels, or nothing where it is refused.
# `max` begins with SVE registers of 512 bits; of 2048 bits there are no kernels for, so NEON's serve.
LENGTH = "max,sve-default-vector-length="
CORES = ("cortex-a53", "cortex-a72", "a64fx", "cortex-a76", "neoverse-n1", "max")
DOTPROD = dict.fromkeys(("cortex-a76", "neoverse-n1", "max"), "neon_dotprod")
LENGTHS = {f"{LENGTH}16": "neon_i8mm", f"{LENGTH}32": "sve256_i8mm", f"{LENGTH}256": "neon_i8mm"}
LIBRARIES: dict[str, dict[str, str | None]] = {
    "cortex-a72": dict.fromkeys(CORES, "neon"),
    "neoverse-n1": {**dict.fromkeys(CORES), **DOTPROD},
    "neoverse-v1": {**dict.fromkeys(CORES), "max": "sve512", **LENGTHS},
}
needs_emulator = pytest.mark.skipif(foreign.why_not() is not None, reason=f"{foreign.why_not()}")
levels = pytest.mark.parametrize("isa", LEVELS, ids=lambda isa: isa.name)


def levels_but(deep: Collection[str]) -> pytest.MarkDecorator:
    """Each level; `.ci/deep` alone runs those that are ``deep``."""
    marked = [pytest.param(one, marks=[pytest.mark.deep] * (one.name in deep)) for one in LEVELS]
    return pytest.mark.parametrize("isa", marked, ids=lambda isa: isa.name)


# SVE of 128 and of 512 bits has the ops of 256 for another length, and streams of its own: the defaults of
# all families below and the vector ops are verified at each length.
one_length = levels_but(("sve128", "sve512"))


def cross_toolchain(*flags: str, cc: str | None = None) -> Toolchain:
    return QuickToolchain(
        find_cross_compiler("aarch64", "Linux", cc), shared_cache(), timeout_s=900, extra_flags=flags
    )


# ---- kernels


def defaults(isa: Isa) -> list[KernelSpec]:
    """The default of every family and regime."""
    return [space_for(f, isa, r, SHAPE, CPU).default for f in FAMILIES for r in REGIMES]


def chosen(space: Space) -> list[KernelSpec]:
    """The default, the presets, the widest int16 sums, one more; of inherited text only the default."""
    draw = random.Random(f"{space.family} {space.isa.name} {space.regime.name}")
    points = [*space.known_good, *edges(space), *draw.sample(space.points, 1)]
    return [spec for spec in dict.fromkeys(points) if spec == space.default or not inherits(spec)]


def edges(space: Space) -> Iterator[KernelSpec]:
    """The widest legal int16 sums of every algorithm and number of accumulators."""
    for algorithm in space.algorithms:
        start = next(spec for spec in space if spec.schedule.algorithm == algorithm)
        knobs = dict(start.schedule)
        if "widen_every" not in knobs:
            continue  # these products go to int32 at once
        for more in (
            [{"accumulators": accumulators} for accumulators in (1, 2, 3, 4)]
            if "accumulators" in knobs
            else [{}]
        ):
            wider = (
                space.make(algorithm, start.layout, {**knobs, **more, "widen_every": w})
                for w in range(70, 0, -1)
            )
            yield from itertools.islice((spec for spec in wider if not space.broken(spec)), 1)


def uses_the_level(spec: KernelSpec, isa: Isa) -> bool:
    """Not int16 sums where there is a dot instruction: no search would ask for them."""
    return (
        FAMILIES[spec.family].looks_up
        or not isa.native_dot4
        or dict(spec.schedule).get("widen_every", 0) == 0
    )


def exact(specs: list[KernelSpec], folder: Path) -> None:
    """On ragged shapes and worst cases, in buffers of exactly the promised bytes before a forbidden page."""
    program = foreign_kernels.build(cross_toolchain(), specs, folder / "kernels", "-static")
    count, wrong = foreign_kernels.faults(program, specs)
    assert not wrong
    assert count > 20 * len(specs)


@needs_emulator
@levels
def test_the_default_kernels_are_exact(isa: Isa, tmp_path: Path) -> None:
    """Those whose text no other level has."""
    exact([spec for spec in defaults(isa) if not inherits(spec)] or defaults(isa)[:1], tmp_path)


@needs_emulator
@one_length
def test_kernels_of_weights_in_groups_are_exact(isa: Isa, tmp_path: Path) -> None:
    """The default of every family and regime, in groups of 128; I2_S in the other sizes too."""
    specs = [
        space_for(name, isa, regime, SHAPE, CPU, group).default
        for name, family in FAMILIES.items()
        for group in family.groups
        for regime in REGIMES
        if group == 128 or regime is REGIMES[0]
    ]
    exact([spec for spec in specs if not inherits(spec)] or specs[:1], tmp_path)


@needs_emulator
@levels_but(("neon_dotprod", "sve128", "sve256_i8mm", "sve512"))
def test_kernels_of_weights_of_3_and_4_bits_are_exact(isa: Isa, tmp_path: Path) -> None:
    """Values by table in every regime, codes with offsets for one token."""
    specs = [space_for(name, isa, r, SHAPE, CPU, 32).default for name in ("t4", "t3") for r in REGIMES]
    specs += [space_for("t4", isa, regime, SHAPE, CPU, 16).default for regime in REGIMES]
    exact([*specs, space_for("q4m", isa, REGIMES[0], SHAPE, CPU, 32).default], tmp_path)


@needs_emulator
@one_length
def test_kernels_of_bits_are_exact(isa: Isa, tmp_path: Path) -> None:
    """With a scale a row and in groups of 128."""
    specs = [space_for("q1", isa, r, SHAPE, CPU, group).default for group in (0, 128) for r in REGIMES]
    exact([spec for spec in specs if not inherits(spec)] or specs[:1], tmp_path)


@pytest.mark.deep
@needs_emulator
@levels
def test_kernels_are_exact(isa: Isa, tmp_path: Path) -> None:
    """Defaults, presets, every edge of the accumulators and a draw."""
    specs = [
        spec
        for family in FAMILIES
        for regime in REGIMES
        for spec in chosen(space_for(family, isa, regime, SHAPE, CPU))
        if uses_the_level(spec, isa)
    ]
    assert len(specs) > 12
    exact(specs, tmp_path)


@needs_emulator
@pytest.mark.parametrize(
    "isa",
    [pytest.param(isa, marks=[pytest.mark.deep], id=isa.name) for isa in LEVELS if "sve" not in isa.requires],
)
def test_kernels_stay_within_their_buffers(isa: Isa, tmp_path: Path) -> None:
    """Under AddressSanitizer, which does not see what SVE loads, and UndefinedBehaviorSanitizer."""
    specs = defaults(isa)
    toolchain = cross_toolchain(*SANITIZE)
    program = foreign_kernels.build(toolchain, specs, tmp_path / "kernels", *SANITIZE)
    count, wrong = foreign_kernels.faults(program, specs, few=True)
    assert not wrong
    assert count > 10 * len(specs)


@needs_emulator
@pytest.mark.parametrize(
    ("level", "flags", "ends_with"),
    [("neon", SANITIZE, b"heap-buffer-overflow"), ("neon", ("-static",), b""), ("sve256", ("-static",), b"")],
    ids=["neon-sanitizers", "neon", "sve256"],
)
def test_the_kernels_program_sees_what_is_wrong(
    tmp_path: Path, level: str, flags: tuple[str, ...], ends_with: bytes
) -> None:
    """So that the tests above can fail: weights that are not those the answer is for, and too few of them."""
    isa = find_isa(level, LEVELS)
    spec, core = space_for("i2s", isa, REGIMES[0], SHAPE, CPU).default, foreign.core_of(isa)
    toolchain = cross_toolchain(*(flags if flags is SANITIZE else ()))
    program = foreign_kernels.build(toolchain, [spec], tmp_path / "kernels", *flags)
    case = next(case for case in foreign_kernels.cases("n1", True) if case.shape.m == 33 and not case.floats)
    good = (0).to_bytes(8, "little") + foreign_kernels.record(spec.layout, case)
    head = 8 * 16  # which kernel, and the numbers of a record
    bad = bytearray(good)
    bad[head] ^= 3
    answers = [foreign.emulate([str(program)], core, bytes(data)).stdout for data in (good, bad)]
    assert [np.frombuffer(answer, np.int64)[0] for answer in answers] == [0, 1]
    weights = int.from_bytes(good[64:72], "little")
    short = bytearray(good[: head + weights - 16] + good[head + weights :])
    short[64:72] = (weights - 16).to_bytes(8, "little")
    done = foreign.emulate([str(program)], core, bytes(short), environment={"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode
    assert not done.stdout, "it went on"
    assert ends_with in done.stderr


# ---- libraries


@pytest.fixture(
    scope="module",
    # That of the oldest core is the host code and the refusals of the others, and NEON's kernels alone.
    params=[pytest.param(one, marks=[pytest.mark.deep] if one == "cortex-a72" else []) for one in LIBRARIES],
)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A target and the library for it, as `bitgen build --target` makes it.

    Of SVE without the forward step for a model's sizes, which would be compiled and not run.
    """
    if foreign.why_not():
        pytest.skip(str(foreign.why_not()))
    name, out = request.param, tmp_path_factory.mktemp("built")
    if name != "neoverse-v1":
        return name, build("tiny", target=name, system="Linux", cc="gcc", out=out)
    target = Target.of(target_cpu(name, "Linux"))
    toolchain = cross_toolchain(cc="gcc")
    return name, write_library((), toolchain, out, f"tiny-{target.cpu.family}", target, check=False)


def example_of(bundle: Path, folder: Path, source: Path = ROOT / "examples" / "c" / "example.c") -> Path:
    """A C program linked with a library, for AArch64."""
    program = folder / source.stem
    words = [*find_cross_compiler("aarch64", "Linux", "gcc").command, "-std=c99", "-O1", "-ffp-contract=off"]
    link = [f"-L{bundle}", f"-lbitgen-{bundle.name}", f"-Wl,-rpath,{bundle}", "-lm", "-lpthread"]
    subprocess.run([*words, f"-I{bundle}", "-o", program, source, *link], check=True)
    return program


def test_a_library_runs_where_it_can_and_refuses_elsewhere(library: tuple[str, Path], tmp_path: Path) -> None:
    """On six cores: the example is exact, or says in words what is missing. No illegal instruction.

    An SVE library runs whatever the length of registers, with kernels for it where it has some.
    """
    target, bundle = library
    program = example_of(bundle, tmp_path)
    for core, level in LIBRARIES[target].items():
        done = foreign.emulate([str(program)], core)
        if level:
            said = done.stdout.decode()
            assert done.returncode == 0, f"{target} on {core}: {done.stderr.decode()}"
            assert said.endswith("OK: 1500 values equal those of the naive loop\n")
            assert f"__{level}\n" in said, f"{target} on {core} runs {said}"
        else:
            assert done.returncode == 1, f"{target} on {core} ended with {done.returncode}"
            assert b"bitgen_context_create: this CPU lacks features the library needs" in done.stderr


def test_a_library_names_what_the_core_lacks_and_runs_its_portable_kernels(
    library: tuple[str, Path], tmp_path: Path
) -> None:
    target, bundle = library
    source = tmp_path / "generic.c"
    source.write_text(
        '#include "bitgen.h"\n#include <stdio.h>\nint main(void) {\n    bitgen_context *ctx;\n'
        "    const int32_t code = bitgen_context_create(&ctx, 1, 0);\n"
        "    if (!code) bitgen_context_destroy(ctx);\n"
        "    const int32_t portable = bitgen_context_create(&ctx, 1, BITGEN_ALLOW_GENERIC);\n"
        "    const int refused = code == BITGEN_ERROR_UNSUPPORTED_CPU;\n"
        '    printf("%d %d %s\\n", refused, portable, bitgen_missing_features());\n'
        "    bitgen_context_destroy(ctx);\n    return 0;\n}\n"
    )
    program = example_of(bundle, tmp_path, source)
    missing = {
        "cortex-a72": "0 0 ",
        "neoverse-n1": "1 0 asimddp asimdrdm atomics",
        "neoverse-v1": "1 0 asimddp asimdhp asimdrdm atomics fphp i8mm sve svei8mm",
    }
    done = foreign.emulate([str(program)], "cortex-a72")
    assert done.stdout.decode() == missing[target] + "\n"
    assert foreign.emulate([str(program)], "max").stdout == b"0 0 \n"


def test_every_misuse_has_its_code(library: tuple[str, Path], tmp_path: Path) -> None:
    target, bundle = library
    if target != "neoverse-n1":
        pytest.skip("host code is the same on every level, and half a minute long")
    # "1": qemu 7.2 cannot start threads in a child of a program with threads.
    done = foreign.emulate([str(example_of(bundle, tmp_path, MISUSE)), "1"])
    assert done.stdout.startswith(b"OK: "), done.stderr


def test_the_manifest_says_what_it_is_for(library: tuple[str, Path]) -> None:
    target, bundle = library
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["arch"], manifest["system"]) == ("aarch64", "Linux")
    assert manifest["cpu_family"] == target.replace("-", "_")
    assert set(manifest["isas"]) == {level for level in LIBRARIES[target].values() if level} | {"scalar"}
    assert manifest["compiler"]["scalar"]["target"] == "aarch64-linux-gnu"


@pytest.mark.deep
@needs_emulator
@pytest.mark.skipif(shutil.which("clang") is None, reason="needs clang")
def test_clang_builds_the_same_library(tmp_path: Path) -> None:
    bundle = build("0.7B", target="armv8-a", system="Linux", cc="clang", out=tmp_path / "built")
    done = foreign.emulate([str(example_of(bundle, tmp_path))], "cortex-a53")
    assert done.stdout.endswith(b"OK: 1500 values equal those of the naive loop\n"), done.stderr


# ---- targets


@pytest.mark.parametrize("name", target_names())
def test_every_target_has_kernels_for_its_best_level(name: str) -> None:
    cpu = target_cpu(name)
    best = accepted_isas(cpu, load_isas())[0]
    assert best.name != "scalar" or not cpu.features
    for family in FAMILIES:
        for regime in REGIMES:
            space = space_for(family, best, regime, SHAPE, cpu)
            assert not space.broken(space.default)


@pytest.mark.parametrize(
    ("target", "level"),
    [
        ("armv8-a", "neon"),
        ("cortex-a72", "neon"),
        ("cortex-a76", "neon_dotprod"),
        ("neoverse-n1", "neon_dotprod"),
        ("apple-m1", "neon_dotprod"),
        ("neoverse-v1", "sve256_i8mm"),
        ("a64fx", "sve512"),
        ("neoverse-v2", "neon_i8mm"),
        ("haswell", "avx2"),
        ("zen4", "avx512_vbmi"),
        ("sapphirerapids", "amx_int8"),
    ],
)
def test_levels_of_targets(target: str, level: str) -> None:
    assert accepted_isas(target_cpu(target), load_isas())[0].name == level


def test_a_wrong_target_is_one_clear_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--model", "0.7B", "--target", "neoverse-n7"]) == UsageError.exit_code
    said = capsys.readouterr().err
    assert "unknown target 'neoverse-n7'; did you mean neoverse-n1" in said
    assert said.count("\n") == 1


def test_a_level_the_target_lacks_is_refused() -> None:
    with pytest.raises(BitgenError, match="cannot run neon_dotprod here: this CPU lacks asimddp"):
        build("0.7B", target="cortex-a72", system="Linux", isa="neon_dotprod")


def test_no_cross_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr("bitgen.toolchain.compiler._zig_command", lambda: None)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert find_cross_compilers("aarch64", "Linux") == []
    with pytest.raises(
        BitgenError, match=r"install aarch64-linux-gnu-gcc .*, or pip install ziglang"
    ) as caught:
        find_cross_compiler("aarch64", "Linux")
    assert caught.value.exit_code == ToolchainError.exit_code


@needs_emulator
def test_a_compiler_for_another_architecture_is_refused() -> None:
    with pytest.raises(BitgenError, match="makes code for aarch64-linux-gnu, not for x86_64"):
        find_cross_compiler("x86_64", "Linux", "aarch64-linux-gnu-gcc")


def test_arm_levels_by_name() -> None:
    assert find_isa("NEON-dotprod", load_isas()).name == "neon_dotprod"


# ---- macOS


def test_the_check_on_macos_asks_sysctl() -> None:
    """AT_HWCAP is Linux's. Every feature that a level requires there has a name."""
    features = sorted({name for isa in LEVELS if "sve" not in isa.name for name in isa.requires})
    text = features_header("aarch64", "Darwin", features)
    assert '"hw.optional.arm.FEAT_DotProd"' in text
    assert "auxv" not in text


@pytest.mark.deep
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs pip install ziglang")
def test_a_library_for_macos_is_a_mach_o(tmp_path: Path) -> None:
    """Compiled and linked, not executed: there is no Mac."""
    bundle = build("0.7B", target="apple-m1", system="Darwin", cc="zig", out=tmp_path / "built")
    head = (bundle / "libbitgen-0.7B-m1.dylib").read_bytes()[:16]
    # MH_MAGIC_64, CPU_TYPE_ARM64, whatever subtype, MH_DYLIB
    assert head[:8] + head[12:] == bytes.fromhex("cffaedfe 0c000001 06000000")
    assert "-install_name,@rpath/libbitgen-0.7B-m1.dylib" in (bundle / "src" / "Makefile").read_text()
