"""The pool and bitgen_run, driven by a kernel that is plainly right (tests/data/host/driver.c)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from compiled import need_sanitizers
from libraries import EMPTY_TABLE, shared_cache, toolchain_of
from loaded import load_units

from bitgen.bundle.contents import Target, choose_contents
from bitgen.bundle.units import library_units_of
from bitgen.cpu import CAP_VARIABLE, detect_cpu
from bitgen.errors import BitgenError
from bitgen.hostcode import (
    ARCHS,
    CpuChecks,
    csrc_text,
    features_header,
    host_headers,
    host_unit,
    library_headers,
    library_units,
    run_units,
)
from bitgen.paths import configs_dir
from bitgen.reference import linear, pack, ternary_matmul
from bitgen.spec import FAMILIES, Family, Layout, Shape, x_stride
from bitgen.toolchain import Compiler, Prototype, Toolchain, Unit, find_compiler, find_compilers

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parents[1] / "data" / "host" / "driver.c"
LAYOUT = Layout("i2s", 16)
NOT_TERNARY, NOT_FINITE, BUSY, FORKED = 10, 11, 12, 13


@pytest.fixture(scope="module")
def driver() -> Any:
    arch = detect_cpu().arch
    text = DRIVER.read_text(encoding="utf-8")
    declared = re.findall(r"^BITGEN_API ([^{]*?)\s*\{", text, flags=re.MULTILINE)
    unit = host_unit("driver", text, host_headers(arch))
    functions = tuple(Prototype.parse(" ".join(d.split())) for d in declared)
    unit = replace(unit, functions=functions)
    toolchain = toolchain_of()
    return load_units(toolchain, [*run_units(arch), unit])


@pytest.fixture(params=[1, 2, 5])
def context(request: pytest.FixtureRequest, driver: Any) -> Iterator[Any]:
    out = driver.ffi.new("void **")
    assert driver.lib.test_open(out, request.param) == 0
    yield out[0]
    driver.lib.test_close(out[0])


def random_case(m: int, k: int, n: int, seed: int = 0) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    w = rng.integers(-1, 2, (m, k), dtype=np.int8)
    packed = np.zeros(LAYOUT.packed_bytes(Shape(m, k)) + 64, np.uint8)
    packed = packed[-packed.ctypes.data % 64 :][: LAYOUT.packed_bytes(Shape(m, k))]
    packed[:] = pack(LAYOUT, w)
    return SimpleNamespace(
        w=w,
        packed=packed,
        x=rng.normal(size=(n, k)).astype(np.float32),
        xq=rng.integers(-128, 128, (n, k), dtype=np.int8),
    )


def run(
    driver: Any, ctx: Any, case: Any, *, exact: bool, scale: Any = None, grain: int = 16, tables: bool = False
) -> Any:
    (n, k), m = case.x.shape, len(case.w)
    ffi = driver.ffi
    w_scale = np.atleast_1d(np.float32(0.5) if scale is None else scale)
    out = np.zeros((n, m), np.int32 if exact else np.float32)
    code = driver.lib.test_run(
        ctx,
        grain,
        tables,
        ffi.from_buffer("uint8_t[]", case.packed),
        ffi.from_buffer("float[]", w_scale),
        int(len(w_scale) > 1),
        ffi.NULL if exact else ffi.from_buffer("float[]", case.x),
        ffi.from_buffer("int8_t[]", case.xq) if exact else ffi.NULL,
        n,
        m,
        k,
        ffi.NULL if exact else ffi.from_buffer("float[]", out),
        ffi.from_buffer("int32_t[]", out) if exact else ffi.NULL,
    )
    assert driver.lib.test_bad_ranges() == 0
    return code, out


@pytest.mark.parametrize("n", [1, 2, 7, 17, 33, 130])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 127), (48, 200), (300, 640)])
def test_integers_and_floats_equal_the_reference(driver: Any, context: Any, m: int, k: int, n: int) -> None:
    case = random_case(m, k, n)
    code, acc = run(driver, context, case, exact=True)
    assert code == 0
    assert np.array_equal(acc, ternary_matmul(case.xq, case.w))
    for scale in (None, np.linspace(0.1, 2, m).astype(np.float32)):
        code, y = run(driver, context, case, exact=False, scale=scale, grain=32, tables=True)
        expected = linear(case.x, case.w, np.atleast_1d(np.float32(0.5) if scale is None else scale))
        assert code == 0
        assert np.array_equal(y, expected)


def test_many_tokens_go_in_batches_and_stay_exact(driver: Any, context: Any) -> None:
    # 4 KiB of tables a 16-column chunk and 64 tokens at least a batch: 2000 tokens are several batches.
    case = random_case(20, 1000, 2000)
    code, acc = run(driver, context, case, exact=True, tables=True)
    assert code == 0
    assert np.array_equal(acc, ternary_matmul(case.xq, case.w))
    assert driver.lib.test_calls() >= 2


def test_a_matrix_with_few_rows_is_split_over_tokens(driver: Any) -> None:
    out = driver.ffi.new("void **")
    assert driver.lib.test_open(out, 4) == 0
    driver.lib.test_calls()
    case = random_case(16, 4000, 128)
    code, acc = run(driver, out[0], case, exact=True)
    assert (code, driver.lib.test_calls()) == (0, 4)
    assert np.array_equal(acc, ternary_matmul(case.xq, case.w))
    driver.lib.test_close(out[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 40])
def test_what_is_not_finite_is_an_error_and_the_context_lives_on(
    driver: Any, context: Any, bad: float, n: int
) -> None:
    case = random_case(16, 700, n)
    case.x[n - 1, 699] = bad
    assert run(driver, context, case, exact=False)[0] == NOT_FINITE
    case.x[n - 1, 699] = 0
    assert run(driver, context, case, exact=False)[0] == 0


def test_a_busy_context_refuses(driver: Any, context: Any) -> None:
    case = random_case(16, 16, 1)
    driver.lib.test_set_busy(context, 1)
    assert run(driver, context, case, exact=True)[0] == BUSY
    driver.lib.test_set_busy(context, 0)
    assert run(driver, context, case, exact=True)[0] == 0


def test_a_forked_child_is_refused_and_may_close(driver: Any, context: Any) -> None:
    case = random_case(16, 16, 1)
    assert run(driver, context, case, exact=True)[0] == 0
    child = os.fork()
    if child == 0:
        code = run(driver, context, case, exact=True)[0]
        driver.lib.test_close(context)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == FORKED
    assert run(driver, context, case, exact=True)[0] == 0


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_every_item_of_a_loop_runs_once(driver: Any, threads: int) -> None:
    for items, claim in ((1, 1), (2, 1), (7, 3), (64, 1), (1000, 7)):
        assert driver.lib.test_pool(threads, items, claim, 50, 0) == 0
    # Pauses longer than the spinning: the threads sleep in between and have to be woken.
    assert driver.lib.test_pool(threads, 100, 1, 10, 1_000_000) == 0


PACK_TEST = """
int32_t test_pack(const char *family, int32_t row_block, int32_t k_chunk, int32_t chunk_bytes,
                  int32_t trailer_bytes, int32_t group, int32_t group_bytes, const int8_t *w,
                  const float *scales, int32_t scale_type, int64_t m, int64_t k, uint8_t *blocks)
{
    const struct bitgen_layout layout = {family, row_block, k_chunk, chunk_bytes, trailer_bytes,
                                         group, group_bytes, 0};
    const struct bitgen_weights weights = {
        .w = w, .scales = scales, .scale_type = scale_type, .m = m, .k = k};
    struct bitgen_pool *pool;
    if (bitgen_pool_create(&pool, 2)) return -1;
    int32_t code = bitgen_pack_layout(pool, &layout, &weights, blocks);
    bitgen_pool_destroy(pool);
    return code;
}
"""


@pytest.fixture(scope="module")
def packer() -> Any:
    units = {unit.name: unit for unit in library_units(detect_cpu().arch, "Linux", CpuChecks(), EMPTY_TABLE)}
    prototype = PACK_TEST.partition("{")[0].strip()
    text = f"{units['pack'].text}\n{prototype};\n{PACK_TEST}"
    tested = replace(units["pack"], text=text, functions=(Prototype.parse(prototype),), flags=())
    toolchain = toolchain_of()
    return load_units(toolchain, [units["pool"], tested])


@pytest.mark.parametrize("units", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_is_packed_as_numpy_packs_it(packer: Any, family: str, units: int) -> None:
    facts = FAMILIES[family]
    layout = Layout(family, units * facts.rows)
    rng = np.random.default_rng(3)
    for m, k in ((1, 1), (16, 48), (33, 95), (64, 240), (100, 503), (7, 960), (150, 20)):
        w = rng.integers(-1, 2, (m, k), dtype=np.int8)
        expected = pack(layout, w)
        code, blocks = c_pack(packer, layout, facts, w)
        assert code == 0
        assert np.array_equal(blocks, expected)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize(("family", "group"), [(name, g) for name, f in FAMILIES.items() for g in f.groups])
def test_layouts_in_groups_are_packed_as_numpy_packs_them(
    packer: Any, family: str, group: int, half: bool
) -> None:
    facts = FAMILIES[family]
    layout = Layout(family, 2 * facts.rows, group)
    rng = np.random.default_rng(4)
    for m, k in ((1, 1), (33, 95), (150, 384)):
        w = rng.integers(-1, 2, (m, k), dtype=np.int8)
        scales = rng.normal(size=(m, layout.groups(k))).astype(np.float32)
        scales = scales.astype(np.float16).astype(np.float32) if half else scales
        code, blocks = c_pack(packer, layout, facts, w, scales, half)
        assert code == 0
        assert np.array_equal(blocks, pack(layout, w, scales, half=half))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_that_is_not_ternary_is_found(packer: Any, family: str) -> None:
    facts = FAMILIES[family]
    layout = Layout(family, facts.rows)
    for value in [v for v in range(-128, 128) if abs(v) > 1]:
        w = np.zeros((17, 50), np.int8)
        w[value % 17, value % 50] = value
        assert c_pack(packer, layout, facts, w)[0] == NOT_TERNARY, value


def c_pack(
    packer: Any,
    layout: Layout,
    facts: Family,
    w: np.ndarray,
    scales: np.ndarray | None = None,
    half: bool = False,
) -> tuple[int, np.ndarray]:
    blocks = np.full(layout.packed_bytes(Shape(*w.shape), 2 if half else 4), 0xA5, np.uint8)
    code = packer.lib.test_pack(
        packer.ffi.new("char[]", facts.name.encode()),
        layout.row_block,
        facts.k_chunk,
        facts.chunk_bytes,
        facts.trailer_bytes,
        layout.group,
        facts.group_bytes(layout.group) if layout.group else 0,
        packer.ffi.from_buffer("int8_t[]", w),
        packer.ffi.NULL if scales is None else packer.ffi.from_buffer("float[]", scales),
        half,
        *w.shape,
        packer.ffi.from_buffer("uint8_t[]", blocks),
    )
    return code, blocks


def test_row_strides_are_those_of_the_spec(driver: Any) -> None:
    for k in (1, 17, 18, 2001, 2002, 2048, 6144, 8640, 12288, 262144):
        assert driver.lib.test_x_stride(k) == x_stride(k)


@pytest.mark.parametrize("arch", ARCHS)
def test_generated_host_code_has_no_conditionals(arch: str) -> None:
    texts = {name: text for name, text in host_headers(arch) if name != "bitgen.h"}
    texts |= {unit.name: unit.text for unit in run_units(arch)}
    for name, text in texts.items():
        assert not re.search(r"^\s*#\s*(if|ifdef|ifndef)\b", text, flags=re.MULTILINE), name


CPU_PROGRAM = """
#include <stdio.h>
int main(void)
{
    uint64_t found = bitgen_cpu_features();
    for (int32_t i = 0; i < bitgen_feature_count; ++i)
        if (found >> i & 1) puts(bitgen_feature_names[i]);
    return 0;
}
"""


def test_the_check_of_the_cpu_agrees_with_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CAP_VARIABLE, raising=False)  # a cap hides features of the system, not of this check
    cpu = detect_cpu()
    if cpu.arch not in ARCHS or not cpu.features:
        pytest.skip(f"nothing to compare with: {cpu.arch}, {len(cpu.features)} features")
    known = yaml.safe_load((configs_dir() / "cpu_features.yaml").read_text(encoding="utf-8"))[cpu.arch]
    headers = (*all_headers(), ("features.h", features_header(cpu.arch, "Linux", known)))
    table = Unit("cpu", csrc_text(f"cpu_{cpu.arch}.c") + CPU_PROGRAM, headers=headers)
    assert set(run_program(tmp_path, [table]).split()) == set(known) & cpu.features


POOL_PROGRAM = (Path(__file__).parents[1] / "data" / "host" / "pool.c").read_text()


def test_the_pool_has_no_data_race(tmp_path: Path) -> None:
    need_sanitizers(find_compiler().command, ["-fsanitize=thread"])
    pool = next(unit for unit in run_units(detect_cpu().arch) if unit.name == "pool")
    program = Unit("main", POOL_PROGRAM, headers=all_headers())
    said = run_program(tmp_path, [pool, program], "-fsanitize=thread", "-g")
    assert int(said) == 4 * sum(1 + loop * 13 for loop in range(300))


NODES_PROGRAM = (Path(__file__).parents[1] / "data" / "host" / "nodes.c").read_text()
# CPUs of each node's list; where the caller runs; the nodes as threads see them; of 1 to 5 threads the node
# of each, and how many of ten pages and 100 bytes each node's threads read.
TWO_NODES = [
    "0; 41060",
    "0 1; 24576 16484",
    "0 0 1; 28672 12388",
    "0 0 1 1; 24576 16484",
    "0 0 0 1 1; 28672 12388",
]
NODES = {
    "two sockets": (
        ["0-1,4-5", "2-3,6-7"],
        0,
        " 0 1 4 5 | 2 3 6 7",
        TWO_NODES,
    ),
    "the caller is on the second": (
        ["0-1,4-5", "2-3,6-7"],
        7,
        " 2 3 6 7 | 0 1 4 5",
        TWO_NODES,
    ),
    "a cpuset with one core of the second, CPUs of others, memory alone": (
        ["0-2,64", "", "7,9-12", "20-30"],
        2,
        " 0 1 2 | 7",
        [
            "0; 41060",
            "0 0; 41060",
            "0 0 1; 28672 12388",
            "0 0 0 1; 32768 8292",
            "0 0 0 0 1; 36864 4196",
        ],
    ),
    "one node": (["0-7"], 1, " 0 1 2 3 4 5 6 7", [f"{'0 ' * i}0; 41060" for i in range(5)]),
    "none are told": ([], 0, "", []),
}


@pytest.mark.skipif(sys.platform != "linux", reason="NUMA is Linux's here")
@pytest.mark.parametrize("name", NODES)
def test_threads_and_copies_are_spread_over_nodes(name: str, tmp_path: Path) -> None:
    """Recorded machines: no machine of several nodes was at hand. The copies run on this one."""
    lists, here, seen, threads = NODES[name]
    for node, cpus in enumerate(lists):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus + "\n")
    defines = f'\n#define FOLDER "{tmp_path}"\n#define HERE {here}\n'
    nodes = Unit("nodes", csrc_text("nodes_linux.c") + defines + NODES_PROGRAM, headers=all_headers())
    said = run_program(tmp_path, [*run_units(detect_cpu().arch), nodes]).splitlines()
    assert said == [seen, *threads, "1 0", "2 0", "0"]


def all_headers() -> tuple[tuple[str, str], ...]:
    return library_headers(detect_cpu().arch)


def run_program(folder: Path, units: list[Unit], *flags: str) -> str:
    """Compile units to a program and run it: what it printed."""
    for unit in units:
        for name, text in (*unit.headers, (f"{unit.name}.c", unit.text)):
            (folder / name).write_text(text, encoding="utf-8")
    sources = [f"{unit.name}.c" for unit in units]
    command = [*find_compiler().command, "-std=c11", "-O1", *flags, "-o", "program", *sources, "-lpthread"]
    subprocess.run(command, cwd=folder, check=True, timeout=900)
    done = subprocess.run([folder / "program"], capture_output=True, text=True, timeout=900, check=False)
    if "ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip(
            "this kernel randomises addresses in a way that this compiler's ThreadSanitizer does not know"
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("compiler", find_compilers(), ids=lambda compiler: compiler.kind)
def test_host_code_compiles_without_a_warning(compiler: Compiler, tmp_path: Path) -> None:
    cpu = detect_cpu()
    units = library_units(
        cpu.arch, cpu.os, CpuChecks(), EMPTY_TABLE
    )  # tests/kernels/test_library.py compiles a table with rows
    units = tuple(unit for unit in units if unit.name != "table")
    toolchain = Toolchain(compiler, cache_dir=tmp_path, werror=True, extra_flags=("-Wpedantic", "-Wshadow"))
    for result in toolchain.compile_objects(units):
        assert isinstance(result, Path), result


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    [c for c in find_compilers() if c.kind != "zig" and c != find_compiler()],
    ids=lambda compiler: compiler.kind,
)
def test_forward_passes_compile_without_a_warning(compiler: Compiler) -> None:
    """By compilers besides the one that makes libraries of tests, of which no warning passes."""
    contents = choose_contents((), Target.of(detect_cpu()))
    steps = [unit for unit in library_units_of(contents) if unit.name.startswith("bitgen_step_")]
    assert len(steps) == len({step.isa for step in contents.steps}) > 0
    level = "-O1" if compiler.kind == "gcc" else "-O0"  # gcc finds some warnings while it optimises
    toolchain = Toolchain(compiler, shared_cache(), timeout_s=900, werror=True, extra_flags=(level,))
    for result in toolchain.compile_objects(steps):
        assert isinstance(result, Path), result


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(BitgenError, match="no host code for riscv64"):
        host_headers("riscv64")
