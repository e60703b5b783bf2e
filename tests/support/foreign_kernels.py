"""Kernels for another architecture, compared with numpy in an emulator."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import foreign
import numpy as np

from bitgen.hostcode import kernel_unit
from bitgen.measure.cases import (
    Case,
    case_activations,
    case_codes,
    case_integers,
    case_weights,
    cases_of,
)
from bitgen.reference import (
    group_sums,
    pack,
    pack_codes,
    scale_codes,
    scale_groups,
    scale_output,
    ternary_matmul,
)
from bitgen.render import Source, isa_named, matmul_struct, render_kernel, render_tables
from bitgen.spec import EVERY_FAMILY, KernelSpec, Layout, x_stride
from bitgen.toolchain import Prototype, Toolchain, Unit

DRIVER = Path(__file__).parents[1] / "data" / "foreign" / "kernels.c"
WHAT = ("", "a wrong value", "a value outside the output's columns", "a value outside the range of rows")


def build(toolchain: Toolchain, specs: Sequence[KernelSpec], program: Path, *flags: str) -> Path:
    """One program with all of ``specs``; ``flags`` are the linker's."""
    builders = dict.fromkeys((s.family, s.isa, s.schedule.algorithm) for s in specs if s.table_bytes)
    sources = [*map(render_kernel, specs), *(render_tables(*which) for which in builders)]
    units = [_unit(source) for source in sources]
    prototypes = [function.declaration for unit in units for function in unit.functions]
    rows = ", ".join(f"{{{s.name}, {s.name}_scratch, {_tables(s)}, {s.table_bytes}}}" for s in specs)
    header = "\n".join(
        (
            matmul_struct(),
            *prototypes,
            "struct kernel {",
            "    void (*run)(const struct bitgen_matmul *);",
            "    int64_t (*scratch)(int64_t, int64_t, int64_t);",
            "    void (*tables)(const int8_t *, int64_t, uint8_t *);",
            "    int64_t table_bytes;",
            "};",
            f"static const struct kernel kernels[] = {{{rows}}};",
            "",
        )
    )
    driver = Unit("driver", DRIVER.read_text(), headers=(("kernels.h", header),))
    objects = toolchain.objects([*units, driver])
    subprocess.run(
        [*toolchain.compiler.command, *flags, "-o", program, *map(str, objects), "-lm"], check=True
    )
    return program


def _unit(source: Source) -> Unit:
    return kernel_unit(source, isa_named(source.isa))


def _tables(spec: KernelSpec) -> str:
    return Prototype.parse(spec.tables_prototype).name if spec.tables_prototype else "0"


def faults(program: Path, specs: Sequence[KernelSpec], few: bool = False) -> tuple[int, list[str]]:
    """How many products the kernels of ``program`` were given, and what is wrong; ``few``: the small ones.

    The kernels are all of one ISA level.
    """
    asked = [(spec, case) for spec in specs for case in cases(spec.regime, few)]
    asked = [  # kernels of weights in groups give floats
        (spec, replace(case, floats=case.floats or spec.layout.group > 0)) for spec, case in asked
    ]
    data = b"".join(struct.pack("=q", specs.index(spec)) + record(spec.layout, case) for spec, case in asked)
    cpu = foreign.core_of(isa_named(specs[0].isa))
    done = foreign.emulate([str(program)], cpu, data, environment={"ASAN_OPTIONS": "detect_leaks=0"})
    answers = np.frombuffer(done.stdout[: len(done.stdout) // 16 * 16], np.int64).reshape(-1, 2)
    wrong = [
        f"{spec.name}: {case.title}: {WHAT[code]} at {where}"
        for (spec, case), (code, where) in zip(asked, answers, strict=False)
        if code
    ]
    if done.returncode or len(answers) < len(asked):
        spec, case = asked[min(len(answers), len(asked) - 1)]
        said = done.stderr.decode(errors="replace")[:2000]
        wrong.append(f"{spec.name}: {case.title}: the program ended with {done.returncode}: {said}")
    return len(asked), wrong


@lru_cache
def cases(regime: str, few: bool) -> tuple[Case, ...]:
    """The exactness cases of a regime; ``few``: the small ones, for a sanitizer's speed."""
    return tuple(
        case for case in cases_of(regime) if not few or case.shape.m * case.shape.k * case.n < 150_000
    )


@cache
def record(layout: Layout, case: Case) -> bytes:
    """A product as kernels.c reads it, without the number of its kernel."""
    m, k, n = case.shape.m, case.shape.k, case.n
    w, xq = case_weights(case), case_activations(case)
    rng = np.random.default_rng([m, k, n])
    x_scale, w_scale = (rng.uniform(0.001, 0.1, count).astype(np.float32) for count in (n, m if n % 2 else 1))
    x = np.zeros((n, x_stride(layout.columns(k))), np.int8)
    x[:, :k] = xq
    sums: np.ndarray = xq.sum(axis=1, dtype=np.int32)
    expected: np.ndarray
    if layout.group:
        groups, halves = layout.groups(k), n % 2 == 1
        shapes = (n, groups), (m, groups)
        x_scale, scales = (rng.uniform(0.001, 0.1, shape).astype(np.float32) for shape in shapes)
        if halves:
            scales = scales.astype(np.float16).astype(np.float32)
        w_scale = np.empty(0, np.float32)
        if EVERY_FAMILY[layout.family].is_ternary:
            packed = pack(layout, w, scales, half=halves)
            expected = scale_groups(xq, w, x_scale, scales, layout.group)
        else:
            codes = replace(case_codes(layout, case, halves), scales=scales)
            packed = pack_codes(layout, codes, half=halves)
            expected = scale_codes(xq, codes, x_scale, layout)
        whole = layout.group - EVERY_FAMILY[layout.family].tail(layout.group)
        grouped = (groups, layout.group, 2 if halves else 4, whole, layout.chunks(k) // groups)
        sums = group_sums(xq, layout.group)
    else:
        acc = ternary_matmul(xq, case_integers(layout, case))
        expected = scale_output(acc, x_scale, w_scale) if case.floats else acc
        is_ternary = EVERY_FAMILY[layout.family].is_ternary
        packed = pack(layout, w) if is_ternary else pack_codes(layout, case_codes(layout, case, half=True))
        grouped = (1, 0, 0, k, 0)
    half = -(-m // layout.row_block) // 2 * layout.row_block if case.split else 0
    table_stride = layout.chunks(k) * max((size for _, size in EVERY_FAMILY[layout.family].tables), default=0)
    numbers = (case.floats, m, k, n, x.shape[1], table_stride, m + 3, len(packed), len(w_scale), half)
    arrays = (packed, x, sums, x_scale, w_scale, expected)
    return struct.pack("=15q", *map(int, (*numbers, *grouped))) + b"".join(a.tobytes() for a in arrays)
