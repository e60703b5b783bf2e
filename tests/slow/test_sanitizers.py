"""Generated C under AddressSanitizer and UndefinedBehaviorSanitizer, in a program of its own.

Buffers end where their allocation ends. What the sanitizers do not see, masked loads and stores, meets the
unmapped pages of the exactness tests.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from compiled import QuickToolchain, need_sanitizers
from libraries import shared_cache

from bitgen.cpu import Accepted, Isa, detect_cpu, load_isas, resolve_isas
from bitgen.reference import pack
from bitgen.render import Source, inherits, matmul_struct, render_kernel, render_quantize, render_tables
from bitgen.space import space_for
from bitgen.spec import FAMILIES, REGIMES, KernelSpec, Layout, Shape, regime_named, x_stride
from bitgen.toolchain import Compiler, Prototype, Unit

CPU = detect_cpu()
LEVELS = {decision.isa.name: decision for decision in resolve_isas(CPU, load_isas())}
FLAGS = ("-std=gnu11", "-g1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
DRIVER = Path(__file__).parents[1] / "data" / "sanitizers" / "driver.c"
PROBLEMS = [
    (1, 1, 1),
    (5, 127, 1),
    (33, 100, 3),
    (48, 197, 16),
    (65, 1000, 1),
    (17, 1000, 7),
    (70, 97, 17),
    (20, 1930, 33),
]
LAYOUTS = [Layout(family.name, rows * family.rows) for family in FAMILIES.values() for rows in (1, 2)]


def runnable(name: str) -> Isa:
    decision = LEVELS[name]
    if not isinstance(decision, Accepted):
        pytest.skip(f"{name}: {decision.reason}")
    return decision.isa


def specs_of(isa: Isa) -> list[KernelSpec]:
    """The defaults, and of each family one kernel of its largest row blocks that cuts k where it can.

    Without those that have the text of the level's parent.
    """
    specs = []
    for family in FAMILIES:
        for regime in REGIMES:
            specs.append(space_for(family, isa, regime, Shape(3200, 8640), CPU).default)
        space = space_for(family, isa, REGIMES[1], Shape(3200, 8640), CPU)
        wide = [spec for spec in space if spec.layout == space.layouts[-1]]
        wide.sort(
            key=lambda spec: (
                spec.schedule.algorithm,
                not dict(spec.schedule).get("kc"),
                dict(spec.schedule).get("nr", 1),
            )
        )
        specs.append(wide[0])
    distinct = list(dict.fromkeys(specs))
    return [spec for spec in distinct if not inherits(spec)] or distinct  # a text is run once


def kernel_row(spec: KernelSpec) -> str:
    family, regime = FAMILIES[spec.family], regime_named(spec.regime)
    tables = Prototype.parse(spec.tables_prototype).name if spec.tables_prototype else "NULL"
    return (
        f'    {{"{spec.name}", {spec.name}, {spec.name}_scratch, bitgen_quantize__{spec.isa}, {tables}, '
        f"{LAYOUTS.index(spec.layout)}, {spec.layout.row_block}, {family.k_chunk}, {spec.table_bytes}, "
        f"{regime.n_min}, {regime.n_max or 1 << 30}}},"
    )


def kernels_header(specs: Sequence[KernelSpec], sources: Sequence[Source]) -> str:
    lines = ["#include <stdint.h>", matmul_struct()]
    lines += [f"{prototype};" for source in sources for prototype in source.prototypes]
    lines += [
        "static const struct kernel {",
        "    const char *name;",
        "    void (*run)(const struct bitgen_matmul *);",
        "    int64_t (*scratch)(int64_t, int64_t, int64_t);",
        "    int32_t (*quantize)(const float *, int64_t, int64_t, int8_t *, float *, int32_t *);",
        "    void (*tables)(const int8_t *, int64_t, uint8_t *);",
        "    int64_t layout, row_block, k_chunk, table_bytes, n_min, n_max;",
        "} kernels[] = {",
        *map(kernel_row, specs),
        "};",
    ]
    return "\n".join(lines) + "\n"


def write_problems(path: Path) -> int:
    """The file that the driver reads."""
    with path.open("wb") as file:
        file.write(struct.pack("<q", len(PROBLEMS)))
        for m, k, n in PROBLEMS:
            rng = np.random.default_rng((m, k, n))
            w = rng.integers(-1, 2, (m, k), dtype=np.int8)
            x = rng.standard_normal((n, k)).astype(np.float32)
            x[n // 2, ::3] = 0
            file.write(struct.pack("<4q", m, k, n, x_stride(k)) + w.tobytes() + x.tobytes())
            file.write(struct.pack("<q", len(LAYOUTS)))
            for index, layout in enumerate(LAYOUTS):
                packed = pack(layout, w)
                file.write(struct.pack("<2q", index, packed.size) + packed.tobytes())
    return len(PROBLEMS)


@dataclass(frozen=True)
class Program:
    path: Path
    problems: Path
    kernels: int

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {
            **os.environ,
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [str(self.path), str(self.problems), *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)


def build(isa: Isa, folder: Path) -> Program:
    """Everything of an ISA level in one program; skips where the compiler has no sanitizers."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed")
    need_sanitizers([gcc], SANITIZERS)
    specs = specs_of(isa)
    sources = [render_kernel(spec) for spec in specs]
    sources += [
        render_quantize(isa.name),
        *(render_tables(f.name, isa.name, kind) for f in FAMILIES.values() for kind, _ in f.tables),
    ]
    header = kernels_header(specs, sources)
    # The blocks of the scalar level are arrays: instrumented and optimised, a file takes gcc minutes. The
    # kernels of the others take 4.9 s a level at -Og, at -O1 15 s (AVX-512 VBMI).
    optimised = "-O0" if isa.name == "scalar" else "-Og"
    toolchain = QuickToolchain(
        Compiler("gcc", (gcc,)),
        cache_dir=shared_cache(),
        timeout_s=900,
        extra_flags=(*FLAGS, *SANITIZERS, optimised),
    )
    units = [Unit("driver", DRIVER.read_text(), headers=(("kernels.h", header),), flags=("-O1",))]
    units += [Unit(source.name, source.text, isa) for source in sources]
    objects = toolchain.objects(units)
    program = folder / "driver"
    subprocess.run([gcc, *SANITIZERS, *objects, "-lm", "-o", program], check=True)
    problems = folder / "problems.bin"
    write_problems(problems)
    return Program(program, problems, len(specs))


@pytest.fixture(scope="module")
def program_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Isa], Program]:
    return cache(lambda isa: build(isa, tmp_path_factory.mktemp(f"sanitized-{isa.name}")))


@pytest.mark.parametrize(
    "name",
    [
        # the text of these is that of others but for a few ops
        pytest.param(isa.name, marks=[pytest.mark.deep] if isa.name in ("avx_vnni", "avx512") else [])
        for isa in load_isas()
    ],
)
def test_generated_code_is_clean(name: str, program_of: Callable[[Isa], Program]) -> None:
    program = program_of(runnable(name))
    run = program.run()
    assert run.returncode == 0, run.stdout + run.stderr[:4000]
    assert run.stderr == ""
    runs = int(run.stdout.split()[0])
    assert runs >= program.kernels, "some kernel was not run"


@pytest.mark.parametrize("buffer", ["w", "x", "x_sum", "x_scale", "floats", "tables", "scratch"])
def test_a_buffer_too_small_is_noticed(buffer: str, program_of: Callable[[Isa], Program]) -> None:
    """The scalar kernels, whose every access is instrumented: these tests can fail."""
    program = program_of(runnable("scalar"))
    run = program.run(buffer)
    assert run.returncode != 0
    # a 64-byte read of which only the last byte is behind the buffer is an "unknown-crash"
    known = r"AddressSanitizer: (heap-buffer-overflow|unknown-crash)"
    assert re.search(known, run.stderr), run.stdout + run.stderr[:2000]
