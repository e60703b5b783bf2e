"""Kernels equal the numpy reference bit for bit: chosen schedules in measuring processes, drawn data here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_specs import DEEP_VARIABLE, SHAPE, chosen, edges, for_one_shape, in_turn
from hypothesis import example, given, settings
from hypothesis import strategies as st
from libraries import flags_for, toolchain_of
from loaded import load_units

from bitgen.cpu import ANY_ARCH, Accepted, Isa, accepted_isas, detect_cpu, load_isas, resolve_isas
from bitgen.errors import BitgenError
from bitgen.measure import Status
from bitgen.measure.candidates import support_units
from bitgen.measure.cases import EDGES, TOKENS, cases_of
from bitgen.measure.harness import unit_of
from bitgen.measure.runner import LocalRunner, TimingPolicy, Verification
from bitgen.measure.verify import SweepCounts, exact_sweep, own_points, sweep
from bitgen.reference import linear, pack, quantize_activations, scale_output, ternary_matmul
from bitgen.render import inherits, render_kernel
from bitgen.space import space_for
from bitgen.spec import (
    FAMILIES,
    LARGE,
    N1,
    REGIMES,
    SMALL,
    KernelSpec,
    Regime,
    Shape,
    regime_of,
    x_stride,
)
from bitgen.toolchain import Prototype, Toolchain

pytestmark = pytest.mark.slow

CPU = detect_cpu()
LEVELS = {decision.isa.name: decision for decision in resolve_isas(CPU, load_isas())}
ISAS = {isa.name: isa for isa in accepted_isas(CPU, load_isas())}
levels = pytest.mark.parametrize(
    "isa_name", [isa.name for isa in load_isas() if isa.arch in (ANY_ARCH, CPU.arch)]
)
families = pytest.mark.parametrize("family", FAMILIES)

SAMPLE, SEED = 1, 20
# gcc takes 8.4 s at -O3 and 0.6 s at -Og for a scalar kernel of TL5 in groups. What users get, at -O3, drawn
# problems are multiplied with below, and `.ci/deep` verifies all of it.
SCALAR = () if os.environ.get(DEEP_VARIABLE) else ("-Og",)
EXAMPLES = 25 if os.environ.get(DEEP_VARIABLE) else 8  # of drawn problems, a kernel
PATIENT = TimingPolicy(check_timeout_s=120, timeout_s=600)  # nothing here hangs; a loaded machine is slow


@pytest.fixture(scope="module")
def runner_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LocalRunner]]:
    """A function from flags to a runner that compiles with them.

    Nothing is timed here, so the lock is not the machine's; a runner holds its own until it is closed.
    """
    with ExitStack() as opened:

        @cache
        def runner(*flags: str) -> LocalRunner:
            locks = tmp_path_factory.mktemp("locks")
            local = LocalRunner(toolchain_of(*flags), CPU, policy=PATIENT, lock_folder=locks)
            return opened.enter_context(local)

        yield runner


@pytest.fixture
def level_runner(isa_name: str, runner_of: Callable[..., LocalRunner]) -> LocalRunner:
    return runner_of(*(SCALAR if isa_name == "scalar" else flags_for(isa_name)))


@pytest.fixture
def level_toolchain(isa_name: str) -> Toolchain:
    return toolchain_of(*flags_for(isa_name))


def runnable(name: str) -> Isa:
    decision = LEVELS[name]
    if not isinstance(decision, Accepted):
        pytest.skip(f"{name}: {decision.reason}")
    return decision.isa


def verified(runner: LocalRunner, specs: Sequence[KernelSpec], request: pytest.FixtureRequest) -> SweepCounts:
    """All of them are exact; how many goes into the line at the end of the test run."""
    counts = sweep(runner, specs)
    request.node.user_properties.append(("exact", (counts.schedules, counts.cases)))
    failed = (f"{p.spec.name}: {p.status.value}: {p.detail}" for p in counts.failures)
    assert not counts.failures, "\n".join(failed)
    return counts


# ---- schedules


@levels
@families
def test_schedules_are_exact(
    family: str, isa_name: str, level_runner: LocalRunner, request: pytest.FixtureRequest
) -> None:
    """Defaults, of presets, overflow edges and other points one each, on ragged shapes and at the bounds."""
    isa = runnable(isa_name)
    specs = [spec for regime in REGIMES for spec in chosen(family, isa, regime, CPU, SAMPLE, SEED)]
    counts = verified(level_runner, specs, request)
    assert counts.schedules == len(specs)
    assert {spec.regime for spec in specs} == {regime.name for regime in REGIMES}
    assert counts.cases >= sum(len(cases_of(spec.regime, deep=True)) for spec in specs)


@levels
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.groups])
def test_schedules_of_weights_in_groups_are_exact(
    family: str, isa_name: str, level_runner: LocalRunner, request: pytest.FixtureRequest
) -> None:
    """Defaults, a preset or another point at the group size of models; defaults at the others, `in_turn`.

    Those have no text of the parent level.
    """
    isa, sizes = runnable(isa_name), FAMILIES[family].groups
    specs = [spec for regime in REGIMES for spec in chosen(family, isa, regime, CPU, SAMPLE, SEED, 128)]
    turns = ((regime, g) for i, g in enumerate(sizes) for regime in REGIMES if in_turn(isa, regime, i))
    others = [space_for(family, isa, regime, SHAPE, CPU, group).default for regime, group in turns]
    specs += [spec for spec in others if not inherits(spec)]
    verified(level_runner, list(dict.fromkeys(specs)), request)


@levels
def test_kernels_of_weights_of_3_and_4_bits_are_exact(
    isa_name: str, level_runner: LocalRunner, request: pytest.FixtureRequest
) -> None:
    """The defaults whose text is the level's own, second group sizes `in_turn`.

    `.ci/deep` runs all schedules of these families.
    """
    isa = runnable(isa_name)
    specs = [space_for(name, isa, r, SHAPE, CPU, 32).default for name in ("q4m", "t4") for r in REGIMES]
    specs += [space_for("t3", isa, r, SHAPE, CPU, 32).default for r in REGIMES]
    specs.append(space_for("q4", isa, N1, SHAPE, CPU, 64).default)
    second = ((name, group, r) for name, group in (("t3", 128), ("t4", 16)) for r in REGIMES)
    specs += [space_for(n, isa, r, SHAPE, CPU, g).default for n, g, r in second if in_turn(isa, r, g)]
    verified(level_runner, [spec for spec in specs if not inherits(spec)] or specs[:1], request)


@levels
@pytest.mark.parametrize("group", [0, 128])
def test_kernels_of_bits_are_exact(
    group: int, isa_name: str, level_runner: LocalRunner, request: pytest.FixtureRequest
) -> None:
    """With a scale a row and in groups: defaults, a preset, an edge and other points."""
    isa = runnable(isa_name)
    specs = [spec for regime in REGIMES for spec in chosen("q1", isa, regime, CPU, SAMPLE, SEED, group)]
    verified(level_runner, list(dict.fromkeys(specs)), request)


@levels
def test_kernels_for_one_shape_are_exact(
    isa_name: str, level_runner: LocalRunner, request: pytest.FixtureRequest
) -> None:
    specs = for_one_shape(runnable(isa_name), FAMILIES, CPU)
    counts = verified(level_runner, specs, request)
    assert counts.schedules == len(specs) >= len(FAMILIES)
    assert {spec.regime for spec in specs} == {regime.name for regime in REGIMES}


def test_every_overflow_edge_is_among_the_schedules() -> None:
    """Each family with each number of accumulators has a schedule that one more addition would break."""
    found = {
        (spec.family, spec.schedule.algorithm, dict(spec.schedule).get("accumulators"))
        for family in FAMILIES
        for regime in REGIMES
        for spec in edges(space_for(family, ISAS["scalar"], regime, Shape(3200, 8640), CPU))
    }
    assert found >= {("i2s", "direct", accumulators) for accumulators in (1, 2, 3, 4)} | {
        ("t5", "direct", 1),
        ("t5", "direct", 2),
    }
    assert found >= {("tl1", "direct", None), ("tl2", "direct", None)}
    assert found >= {("tl5", "wide", None), ("tl5", "split", None)}
    assert found >= {(family, "panel", None) for family in FAMILIES}


def test_the_cases_reach_the_edges() -> None:
    for regime in REGIMES:
        cases = cases_of(regime.name, deep=True)
        assert {case.name for case in cases} >= {*EDGES, "random", "zero x", "zero w", "one product"}
        for n in TOKENS[regime.name]:
            assert {case.name for case in cases if case.n == n} >= {*EDGES, "zero x", "one product"}
            assert regime_of(n) == regime
        shapes = {case.shape for case in cases}
        assert {Shape(1, 1), Shape(5, 127)} <= shapes
        assert max(shape.k for shape in shapes) > 1920, "no shape is longer than every cache block"
    assert max(case.n for case in cases_of("large", deep=True)) > 512, "no batch is longer than a panel's"


# ---- a sweep can fail


def test_a_sweep_of_nothing_fails(runner_of: Callable[..., LocalRunner]) -> None:
    runner = runner_of()
    with pytest.raises(BitgenError, match="no kernel to verify"):
        sweep(runner, [])
    with pytest.raises(BitgenError, match="no kernel to verify"):
        exact_sweep(runner, CPU, [], list(FAMILIES))
    with pytest.raises(BitgenError, match="no kernel to verify"):
        exact_sweep(runner, CPU, ["scalar"], [], sample=3)


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("i2s", "vw_sub(acc, vw_splat(a->x_sum[token]))", "acc"),
        ("tl1", "hi_r0_t0 = vh_add(hi_r0_t0,", "hi_r0_t0 = vh_add(vh_zero(),"),
        ("tl2", "vw_add(acc_r0_t0, ones0)", "acc_r0_t0"),
        ("t5", "vb_avg(vb_avg(packed0, vb_splat(0)), packed0)", "packed0"),
        (
            "tl5",
            "const vb low = vb_flip(vb_lut128(table, v), negative)",
            "const vb low = vb_lut128(table, v)",
        ),
    ],
)
def test_a_wrong_kernel_is_found(family: str, old: str, new: str, tmp_path: Path) -> None:
    """The default with one operation left out."""
    spec = space_for(family, ISAS["scalar"], N1, Shape(3200, 8640), CPU).default

    def broken(one: KernelSpec) -> Any:
        source = render_kernel(one)
        assert old in source.text
        # Used all the same, so that no compiler warns.
        text = source.text.replace(old, new)
        return type(source)(source.name, text, source.isa, source.prototypes)

    with LocalRunner(
        toolchain_of(*SCALAR, strict=False), CPU, policy=PATIENT, render=broken, lock_folder=tmp_path
    ) as runner:
        (found,) = runner.verify([spec])
    assert found.status is Status.INCORRECT, found


def test_an_overflow_beyond_the_rule_is_found(tmp_path: Path) -> None:
    """One chunk more between two widenings than the rule allows wraps around, and the cases see it."""
    for family, widen_every in (("i2s", 17), ("tl1", 64), ("tl2", 22), ("t5", 13), ("tl5", 13)):
        space = space_for(family, ISAS["scalar"], N1, Shape(3200, 8640), CPU)
        spec = next(edges(space))
        assert spec.schedule["widen_every"] == widen_every - 1
        beyond = KernelSpec(
            spec.family, spec.isa, spec.regime, spec.layout, spec.schedule.with_knobs(widen_every=widen_every)
        )
        assert space.broken(beyond)
        with LocalRunner(toolchain_of(*SCALAR), CPU, policy=PATIENT, lock_folder=tmp_path) as runner:
            found: list[Verification] = list(runner.verify([spec, beyond]))
        assert [one.status for one in found] == [Status.OK, Status.INCORRECT]
        assert "all w" in found[1].detail or "no product cancels" in found[1].detail


def test_inherited_kernels_are_counted_and_not_compiled_again() -> None:
    if "avx512_vbmi" not in ISAS:
        pytest.skip("this CPU lacks avx512_vbmi, whose kernels of three bits are those of avx512_vnni")
    names = ("avx512_vnni", "avx512_vbmi")
    points = [spec for isa in names for spec in space_for("t3", ISAS[isa], N1, Shape(64, 640), CPU, 128)]
    assert {spec.isa for spec in own_points(points)} == {"avx512_vnni"}
    alone = [spec for spec in points if spec.isa == "avx512_vbmi"]
    assert own_points(alone) == alone, "a parent that is not verified verifies nothing"


# ---- drawn shapes and values, called in this process


@dataclass(frozen=True)
class Called:
    """The default kernel of a family, ISA level and regime, with its level's quantiser and table builder."""

    spec: KernelSpec
    kernel: Any
    support: Any

    def quantize(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """``x`` float32 (n, k), rows contiguous: xq padded to x_stride, scales, sums, return codes."""
        ffi, function = self.support.ffi, getattr(self.support.lib, f"bitgen_quantize__{self.spec.isa}")
        n, k = x.shape
        xq = np.full((n, x_stride(k) + 64), 99, np.int8)
        scales, sums, codes = np.zeros(n, np.float32), np.zeros(n, np.int32), []
        for i in range(n):
            codes.append(
                function(
                    ffi.cast("const float *", x[i].ctypes.data),
                    k,
                    x_stride(k),
                    ffi.cast("int8_t *", xq[i].ctypes.data),
                    ffi.cast("float *", scales[i:].ctypes.data),
                    ffi.cast("int32_t *", sums[i:].ctypes.data),
                )
            )
        assert (xq[:, x_stride(k) :] == 99).all(), "it writes behind the row"
        return aligned_copy(xq[:, : x_stride(k)]), scales, sums, codes

    def tables(self, xq: np.ndarray, k: int) -> np.ndarray:
        """The lookup tables of padded rows: uint8 (n, chunks * table_bytes)."""
        stride = self.spec.layout.chunks(k) * self.spec.table_bytes
        tables = aligned_zeros((len(xq), stride + 64))
        tables[:, stride:] = 77
        function = getattr(self.support.lib, Prototype.parse(self.spec.tables_prototype or "").name)
        for i in range(len(xq)):
            function(
                self._pointer(self.support, "const int8_t *", xq[i]),
                k,
                self._pointer(self.support, "uint8_t *", tables[i]),
            )
        assert (tables[:, stride:] == 77).all(), "it writes behind the tables"
        return aligned_copy(tables[:, :stride])

    def run(
        self, xq: np.ndarray, sums: np.ndarray, w: np.ndarray, scales: tuple[np.ndarray, np.ndarray] | None
    ) -> np.ndarray:
        """Acc (n, m), or y (n, m) with ``scales`` of x and of w (one, or one a row)."""
        (m, k), n = w.shape, len(xq)
        packed = aligned_copy(pack(self.spec.layout, w))
        tables = self.tables(xq, k) if self.spec.table_bytes else None
        scratch = aligned_zeros((max(64, getattr(self.kernel.lib, f"{self.spec.name}_scratch")(m, k, n)),))
        out = np.full((n, m + 3), -7, np.int32 if scales is None else np.float32)
        x_scale, w_scale = scales or (np.ones(n, np.float32), np.ones(1, np.float32))

        def pointer(ctype: str, array: np.ndarray | None) -> Any:
            return self._pointer(self.kernel, ctype, array)

        call = self.kernel.ffi.new(
            "struct bitgen_matmul *",
            {
                "w": pointer("const uint8_t *", packed),
                "x": pointer("const int8_t *", xq),
                "x_sum": pointer("const int32_t *", sums),
                "tables": pointer("const uint8_t *", tables),
                "x_scale": pointer("const float *", x_scale),
                "w_scale": pointer("const float *", w_scale),
                "acc": pointer("int32_t *", out if scales is None else None),
                "y": pointer("float *", None if scales is None else out),
                "scratch": pointer("void *", scratch),
                "x_stride": xq.shape[1],
                "table_stride": tables.shape[1] if tables is not None else 0,
                "w_scale_stride": int(len(w_scale) > 1),
                "out_stride": m + 3,
                "m": m,
                "k": k,
                "n": n,
                "row_begin": 0,
                "row_end": m,
            },
        )
        getattr(self.kernel.lib, self.spec.name)(call)
        assert (out[:, m:] == -7).all(), "it writes behind the rows"
        return out[:, :m]

    def _pointer(self, kernels: Any, ctype: str, array: np.ndarray | None) -> Any:
        return kernels.ffi.NULL if array is None else kernels.ffi.cast(ctype, array.ctypes.data)


def aligned_zeros(shape: tuple[int, ...], dtype: Any = np.uint8) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    zeros: np.ndarray = memory[start : start + size].view(dtype).reshape(shape)
    return zeros


def aligned_copy(array: np.ndarray) -> np.ndarray:
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


@cache
def called(toolchain: Toolchain, family: str, isa: str, regime: str) -> Called:
    space = space_for(family, ISAS[isa], next(r for r in REGIMES if r.name == regime), Shape(4096, 4096), CPU)
    units = [unit_of(render_kernel(space.default))]
    support = load_units(toolchain, support_units(isa))
    return Called(space.default, load_units(toolchain, units), support)


@st.composite
def problems(draw: st.DrawFn, regime: Regime) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """W int8 (m, k) and xq int8 (n, k): random, biased, or at the extremes."""
    n = draw(st.integers(regime.n_min, regime.n_max or 40))
    m, k = draw(st.integers(1, 70)), draw(st.one_of(st.integers(1, 130), st.integers(1, 2100)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights = draw(st.sampled_from([(-1, 0, 1), (-1, 1), (0,), (1,), (-1,), (0, 0, 0, 1)]))
    values = draw(st.sampled_from([range(-128, 128), (-128, 127), (-128,), (127,), (0,), (0, 0, 0, -128)]))
    return rng.choice(np.array(weights, np.int8), (m, k)), rng.choice(np.array(values, np.int8), (n, k)), rng


@levels
@families
@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_drawn_problems_are_exact(
    family: str, isa_name: str, regime: Regime, level_toolchain: Toolchain
) -> None:
    runnable(isa_name)
    matmul = called(level_toolchain, family, isa_name, regime.name)

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(problem=problems(regime))
    def run(problem: tuple[np.ndarray, np.ndarray, np.random.Generator]) -> None:
        w, x, rng = problem
        padded = aligned_zeros((len(x), x_stride(x.shape[1])), np.int8)
        padded[:, : x.shape[1]] = x
        sums = x.sum(axis=1, dtype=np.int32)
        expected = ternary_matmul(x, w)
        np.testing.assert_array_equal(matmul.run(padded, sums, w, None), expected)
        x_scale = rng.uniform(1e-6, 10, len(x)).astype(np.float32)
        w_scale = rng.uniform(1e-3, 1, rng.choice([1, len(w)])).astype(np.float32)
        y = matmul.run(padded, sums, w, (x_scale, w_scale))
        np.testing.assert_array_equal(y, scale_output(expected, x_scale, w_scale))

    run()


@levels
def test_from_floats_to_floats(isa_name: str, level_toolchain: Toolchain) -> None:
    """Quantise, build tables, multiply, scale: the bits of reference.linear; zero rows, unaligned input."""
    runnable(isa_name)
    for family in FAMILIES:
        for n, regime in ((1, N1), (5, SMALL), (19, LARGE)):
            matmul = called(level_toolchain, family, isa_name, regime.name)
            for m, k in ((1, 1), (33, 100), (50, 641)):
                rng = np.random.default_rng((n, m, k))
                memory = rng.standard_normal(n * k + 3).astype(np.float32)
                x = memory[3:].reshape(n, k)  # 4-byte aligned, no more
                x[n // 2] = 0
                w = rng.integers(-1, 2, (m, k), dtype=np.int8)
                w_scale = rng.uniform(0.01, 1, m).astype(np.float32)
                xq, x_scale, sums, codes = matmul.quantize(x)
                assert codes == [0] * n
                y = matmul.run(xq, sums, w, (x_scale, w_scale))
                np.testing.assert_array_equal(y, linear(x, w, w_scale))
                assert not y[n // 2].any()


floats = st.one_of(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-5, 127.0, 63.5, -63.5, 0.5, 1.5, 2.5, float(np.float32(1e-38))]),
)


@levels
def test_drawn_activations_are_quantised_as_the_reference_does(
    isa_name: str, level_toolchain: Toolchain
) -> None:
    runnable(isa_name)
    quantiser = called(level_toolchain, "i2s", isa_name, "n1")

    @settings(max_examples=150, deadline=None, database=None)
    @given(row=st.lists(floats, min_size=1, max_size=70), offset=st.integers(0, 15))
    @example(row=[0.0] * 33, offset=1)
    @example(row=[127.0, *(i + 0.5 for i in range(-60, 60))], offset=0)
    @example(row=[float(np.finfo(np.float32).max)] * 3, offset=0)
    @example(row=[float(np.finfo(np.float32).smallest_subnormal)], offset=0)
    def run(row: list[float], offset: int) -> None:
        memory = np.full(
            len(row) + offset + 1, np.nan, np.float32
        )  # behind the row stands what it must not read
        x = memory[offset : offset + len(row)]
        x[:] = row
        xq, x_scale, sums, codes = quantiser.quantize(x[None, :])
        expected, scale = quantize_activations(x[None, :])
        assert codes == [0]
        np.testing.assert_array_equal(xq[:, : len(row)], expected)
        assert not xq[:, len(row) :].any()
        assert x_scale.view(np.int32) == scale.view(np.int32)
        assert sums[0] == expected.sum()

    run()


@levels
def test_nan_and_infinity_are_told(isa_name: str, level_toolchain: Toolchain) -> None:
    runnable(isa_name)
    quantiser = called(level_toolchain, "i2s", isa_name, "n1")
    for k in (1, 15, 16, 17, 64, 100):
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            for at in {0, k // 2, k - 1}:
                x = np.ones((1, k), np.float32)
                x[0, at] = bad
                assert quantiser.quantize(x)[3] == [1]
