from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitgen.cpu import Cache, Cpu, Isa, detect_cpu, load_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.families.tl5 import SPLIT_RADIX
from bitgen.records import dump, load
from bitgen.render import render_kernel
from bitgen.space import Space, int16_sums, space_for
from bitgen.spec import (
    FAMILIES,
    K_MAX,
    LARGE,
    N1,
    REGIMES,
    SMALL,
    KernelSpec,
    Layout,
    Regime,
    Schedule,
    Shape,
)

pytestmark = pytest.mark.slow

ISAS = {isa.name: isa for isa in load_isas()}
CPU = detect_cpu()
SHAPE = Shape(3200, 8640)
COMBINATIONS = [(f, isa, r) for f in FAMILIES for isa in ISAS.values() for r in REGIMES]
combinations = pytest.mark.parametrize(
    ("family", "isa", "regime"), COMBINATIONS, ids=[f"{f}-{isa.name}-{r.name}" for f, isa, r in COMBINATIONS]
)


@cache
def space_of(family: str, isa: Isa | str, regime: Regime, shape: Shape = SHAPE, cpu: Cpu = CPU) -> Space:
    return space_for(family, ISAS[isa] if isinstance(isa, str) else isa, regime, shape, cpu)


def changed(spec: KernelSpec, **knobs: int) -> KernelSpec:
    return replace(spec, schedule=spec.schedule.with_knobs(**knobs))


# ---- the points


@combinations
def test_points_are_legal_and_distinct(family: str, isa: Isa, regime: Regime) -> None:
    space = space_of(family, isa, regime)
    points = list(space)
    assert len(points) == len(space) > 1
    assert len(set(points)) == len(points)
    assert len({spec.name for spec in points}) == len(points), "two kernels share a C name"
    assert all(not space.broken(spec) for spec in points)
    assert set(space.known_good) <= set(points)
    assert space.default in points
    assert {spec.layout for spec in points} == set(space.layouts), "a layout without kernels"
    assert {spec.schedule.algorithm for spec in points} == set(space.algorithms)
    for spec in points:
        assert re.fullmatch(r"[a-z_][a-z0-9_]*", spec.name)
        assert load(KernelSpec, dump(spec), "spec") == spec
        assert spec.shape is None


@combinations
def test_every_layout_has_a_kernel_for_every_regime(family: str, isa: Isa, regime: Regime) -> None:
    """A layout is chosen before schedules: each must be readable in all regimes, at every shape."""
    blocks = {64} if family == "tl5" else {16, 32}
    for shape in (Shape(1, 1), Shape(530, 97), Shape(3200, K_MAX)):
        points = space_of(family, isa, regime, shape).points
        assert {spec.layout.row_block for spec in points} == blocks


@settings(max_examples=12, deadline=None)
@given(m=st.integers(1, 1 << 31), k=st.one_of(st.integers(1, 300), st.integers(1, K_MAX)))
def test_every_shape_has_a_default(m: int, k: int) -> None:
    for family, isa, regime in COMBINATIONS:
        space = space_for(family, isa, regime, Shape(m, k), CPU)
        assert not space.broken(space.default)
        assert space.default in space.known_good


@pytest.mark.parametrize("name", ["nehalem", "zen", "zen4", "sapphirerapids", "skylake_avx512", "zen5_guest"])
def test_every_cpu_has_a_default(name: str, recorded_cpu: Callable[[str], Cpu]) -> None:
    cpu = recorded_cpu(name)
    for family, isa, regime in COMBINATIONS:
        for shape in (Shape(1, 1), Shape(17, 127), SHAPE, Shape(1, K_MAX)):
            assert space_of(family, isa, regime, shape, cpu).default


def test_a_cpu_of_unknown_caches_has_a_default() -> None:
    cpu = replace(CPU, caches=())
    for family, isa, regime in COMBINATIONS:
        for shape in (Shape(1, 1), SHAPE, Shape(1, K_MAX)):
            assert space_of(family, isa, regime, shape, cpu).default


def test_the_presets_of_bitnet_cpp_are_tried() -> None:
    """BM x BK cache blocks with bm rows in registers, for the lookup families at n = 1."""
    for family in ("tl1", "tl2"):
        blocks = {
            (spec.schedule["mc"], spec.schedule["kc"]) for spec in space_of(family, "avx2", N1).known_good
        }
        assert {(160, 96), (320, 96), (320, 192)} & blocks


def test_the_same_space_every_time() -> None:
    for family, isa, regime in COMBINATIONS:
        assert space_of(family, isa, regime).points == space_for(family, isa, regime, SHAPE, CPU).points


# ---- the rules


def one(
    family: str, isa: str, regime: Regime, algorithm: str, shape: Shape = SHAPE
) -> tuple[Space, KernelSpec]:
    """A space and its first point of an algorithm, in the narrow layout."""
    space = space_of(family, isa, regime, shape)
    points = (spec for spec in space if spec.schedule.algorithm == algorithm)
    return space, next(spec for spec in points if spec.layout == space.layouts[0])


BREAKING = [
    ("i2s", "avx2", N1, "direct", {"widen_every": 17}, "int16 partial sums"),
    ("i2s", "avx2", N1, "direct", {"accumulators": 2, "widen_every": 9}, "int16 partial sums"),
    ("i2s", "avx2", N1, "direct", {"accumulators": 4, "widen_every": 2}, "int16 partial sums"),
    ("i2s", "avx2", LARGE, "panel", {"widen_every": 65}, "int16 partial sums"),
    ("tl1", "avx512", N1, "direct", {"widen_every": 64}, "int16 partial sums"),
    ("tl2", "avx512", N1, "direct", {"widen_every": 22}, "int16 partial sums"),
    ("tl1", "avx512", N1, "direct", {"widen_every": 0}, "widen_every must be at least 1"),
    ("tl5", "avx512_vbmi", N1, "wide", {"widen_every": 13}, "int16 partial sums"),
    ("tl5", "avx2", SMALL, "split", {"widen_every": 0}, "widen_every must be at least 1"),
    ("tl5", "avx512_vbmi", SMALL, "wide", {"streams": 4, "nr": 4}, "registers of avx512_vbmi"),
    ("tl5", "avx2", SMALL, "split", {"streams": 4, "nr": 4}, "registers of avx2"),
    ("tl2", "avx512_vbmi", SMALL, "direct", {"widen_every": 0}, "widen_every must be at least 1"),
    ("i2s", "avx2", SMALL, "direct", {"nr": 16}, "registers of avx2"),
    ("i2s", "avx512_vnni", SMALL, "direct", {"streams": 8, "nr": 8}, "registers of avx512_vnni"),
    ("i2s", "avx512_vnni", LARGE, "panel", {"mr": 128, "mc": 128, "nr": 12}, "registers of avx512_vnni"),
    ("i2s", "avx512_vnni", LARGE, "panel", {"kc": 17}, "kc must be 0"),
    ("i2s", "amx_int8", LARGE, "tiles", {"kc": 80}, "kc of tiles must be a multiple of 64"),
    ("t5", "amx_int8", LARGE, "tiles", {"kc": 640 + 64}, "kc of tiles must be a multiple of 320"),
    ("i2s", "amx_int8", LARGE, "tiles", {"mr": 64, "nr": 32, "mc": 64}, "4 tiles of sums"),
    ("i2s", "amx_int8", SMALL, "tiles", {"streams": 5}, "4 tiles of sums"),
    ("i2s", "amx_int8", SMALL, "tiles", {"ahead": 2}, "ahead of tiles must be 0 or 1"),
    ("i2s", "amx_int8", LARGE, "tiles", {"nr": 8}, "nr of tiles must be 16 or 32"),
    ("i2s", "amx_int8", LARGE, "tiles", {"mr": 32, "mc": 80}, "multiple of mr"),
    ("i2s", "amx_int8", LARGE, "tiles", {"mc": 1 << 18, "kc": 960}, "quarter of the L2 cache"),
    ("i2s", "neon_i8mm", LARGE, "mmla", {"kc": 80}, "kc of mmla must be a multiple of 64"),
    ("t5", "neon_i8mm", SMALL, "mmla", {"kc": 640 + 64}, "kc of mmla must be a multiple of 320"),
    ("i2s", "neon_i8mm", LARGE, "mmla", {"nr": 5}, "nr of mmla must be 4, 6, ... 16"),
    ("i2s", "neon_i8mm", LARGE, "mmla", {"nr": 8}, "registers of neon_i8mm"),
    ("i2s", "neon_i8mm", LARGE, "mmla", {"mc": 72}, "multiple of mr"),
    ("i2s", "avx512_vnni", LARGE, "panel", {"kc": 8640}, "kc must be below k = 8640"),
    ("tl2", "avx512", N1, "direct", {"mc": 128, "kc": 64}, "kc must be 0"),
    ("tl1", "avx512", N1, "direct", {"mc": 128, "kc": 0}, "give both, or neither"),
    ("tl1", "avx512", N1, "direct", {"mc": 0, "kc": 960}, "give both, or neither"),
    (
        "tl1",
        "avx512",
        N1,
        "direct",
        {"streams": 4, "mc": 160, "kc": 96},
        "multiple of the rows walked at once",
    ),
    ("i2s", "avx512", LARGE, "panel", {"mr": 64, "mc": 96}, "multiple of mr"),
    ("i2s", "avx512", LARGE, "panel", {"mr": 32, "mc": 0, "kc": 0}, "multiple of mr"),
    ("i2s", "avx512", LARGE, "panel", {"mc": 1 << 18, "kc": 960}, "quarter of the L2 cache"),
    ("i2s", "avx512", N1, "direct", {"streams": 0}, "must be 1 .. 16"),
    ("i2s", "avx512", N1, "direct", {"streams": -1}, "must be 1 .. 16"),
    ("i2s", "scalar", N1, "direct", {"streams": 17}, "must be 1 .. 16"),
    ("tl1", "avx512", N1, "direct", {"unroll": 0}, "must be 1 .. 16"),
    ("tl1", "avx512", N1, "direct", {"unroll": 10**9}, "must be 1 .. 16"),
    ("i2s", "avx512", SMALL, "direct", {"nr": 17}, "must be 1 .. 16"),
    ("i2s", "avx512", N1, "direct", {"nr": 0}, "must be 1 .. 16"),
    ("i2s", "avx512", N1, "direct", {"accumulators": 5}, "accumulators of direct must be 1 .. 4"),
    ("i2s", "avx512", N1, "direct", {"accumulators": 0}, "accumulators of direct must be 1 .. 4"),
    ("i2s", "avx512", LARGE, "panel", {"mr": 24}, "mr of panel must be 16, 32, ... 256"),
    ("i2s", "avx512", LARGE, "panel", {"mr": 0}, "mr of panel must be 16, 32, ... 256"),
    ("i2s", "avx512", LARGE, "panel", {"mr": 512, "mc": 512}, "mr of panel must be 16, 32, ... 256"),
    ("i2s", "avx512", N1, "direct", {"prefetch": -64}, "must be 0 .. "),
    ("i2s", "avx512", N1, "direct", {"prefetch": 10**12}, "must be 0 .. "),
    ("tl1", "avx512", N1, "direct", {"widen_every": -1}, "must be 0 .. "),
]


@pytest.mark.parametrize(("family", "isa", "regime", "algorithm", "knobs", "told"), BREAKING)
def test_a_broken_rule_is_quoted(
    family: str, isa: str, regime: Regime, algorithm: str, knobs: dict[str, int], told: str
) -> None:
    space, legal = one(family, isa, regime, algorithm)
    assert not space.broken(legal)
    bad = changed(legal, **knobs)
    assert any(told in rule.text for rule in space.broken(bad)), [r.text for r in space.broken(bad)]
    with pytest.raises(UsageError, match=re.escape(told)) as caught:
        space.check(bad)
    assert bad.schedule.name in caught.value.message
    assert bad not in space.points


def test_blocks_of_groups_need_not_fill_tiles() -> None:
    """T5's chunks fill five tiles at 320 columns; a group of 128 is two tiles whatever its chunks are."""
    one_scale = {spec.schedule["kc"] for spec in space_of("t5", "amx_int8", LARGE) if "kc" in spec.knobs}
    assert one_scale == {0, 640, 960, 1920}
    space = space_for("t5", ISAS["amx_int8"], LARGE, SHAPE, CPU, 128)
    tiles = [spec for spec in space if spec.schedule.algorithm == "tiles"]
    assert {spec.schedule["kc"] for spec in tiles} == {0, 512, 640, 1024, 1920}
    assert space.default.schedule.algorithm == "tiles"
    assert (space.default.schedule["mc"], space.default.schedule["kc"]) == (512, 512)
    assert any("multiple of the group, 128" in rule.text for rule in space.broken(changed(tiles[0], kc=960)))


def test_all_broken_rules_are_quoted_together() -> None:
    space, legal = one("tl2", "avx512", N1, "direct")
    with pytest.raises(BitgenError, match=r"int16 partial sums.*; .*both, or neither.*; kc must be 0"):
        space.check(changed(legal, widen_every=40, kc=50))


def test_rules_about_this_machine_and_shape_are_told_apart() -> None:
    """`bitgen render` writes a kernel that is right, whatever the caches of the CPU it runs on."""
    space, legal = one("i2s", "avx512", LARGE, "panel")
    for knobs in ({"mc": 1 << 18, "kc": 960}, {"kc": 8640}):
        assert all(rule.local for rule in space.broken(changed(legal, **knobs)))
        space.check(changed(legal, **knobs), local=False)
    for knobs in ({"kc": 17}, {"mc": 0}, {"nr": 99}):
        with pytest.raises(BitgenError):
            space.check(changed(legal, **knobs), local=False)


def test_foreign_specs_are_not_legal() -> None:
    space = space_of("i2s", "avx512", N1)
    spec = space.default
    for other in (
        replace(spec, isa="avx2"),
        replace(spec, regime="small"),
        replace(spec, layout=Layout("i2s", 48)),
        replace(spec, family="tl1", layout=Layout("tl1", 16)),
        replace(spec, schedule=Schedule("outer", spec.schedule.knobs)),
        replace(spec, schedule=Schedule("direct", spec.schedule.knobs[:-1])),
        replace(spec, schedule=Schedule("direct", (*spec.schedule.knobs, ("tile", 3)))),
    ):
        assert space.broken(other)


def mutants(space: Space, spec: KernelSpec) -> Iterator[KernelSpec]:
    """Specs near a legal one, most of them wrong; also of a knob that its schedule leaves out."""
    values = (-1, 0, 1, 3, 4, 16, 24, 64, 66, 960, 1 << 19, 1 << 21)
    algorithm = spec.schedule.algorithm
    own = {name: spec.knobs[name] for name in space.knobs(algorithm)}
    for name, value in product(own, values):
        yield space.make(algorithm, spec.layout, {**own, name: value})
    knobs = dict(spec.schedule)
    if "affine" in own:
        yield space.make(algorithm, spec.layout, {**own, "affine": 1, "accumulators": 2})
    if "mr" in knobs:
        yield changed(spec, mr=256, mc=256, nr=16)
        yield changed(spec, mc=1 << 18, mr=16)
    if "streams" in knobs and "nr" in knobs:
        yield changed(spec, streams=16, nr=16)
    if "pack" in knobs:
        yield changed(spec, mr=64, nr=32)
    yield replace(spec, layout=Layout(spec.family, 192))
    yield replace(spec, isa="none")
    yield replace(spec, schedule=Schedule("none", ()))


def cpu_with_l2(size_bytes: int) -> Cpu:
    """This CPU, but for the size of its L2, on which the legal panels depend."""
    return replace(CPU, caches=(Cache(1, "Data", 32 << 10, 64, 1), Cache(2, "Unified", size_bytes, 64, 1)))


@pytest.mark.parametrize("l2_kib", [512, 2048])
@combinations
def test_every_rule_can_be_broken(family: str, isa: Isa, regime: Regime, l2_kib: int) -> None:
    """A rule that nothing breaks is no rule.

    A small L2 may leave an algorithm with rules but without a known good schedule (64 rows of k = 8640 do not
    fit into three quarters of 512 KiB): then another legal one of that algorithm is spoiled.
    """
    space = space_of(family, isa, regime, cpu=cpu_with_l2(l2_kib << 10))
    legal = {spec.schedule.algorithm: spec for spec in space.known_good}
    if set(legal) != set(space.algorithms):
        legal = {spec.schedule.algorithm: spec for spec in space} | legal
    broken = {
        rule.text
        for spec in (*space.known_good, *legal.values())
        for mutant in mutants(space, spec)
        for rule in space.broken(mutant)
    }
    assert broken == {rule.text for rule in (*space.bounds, *space.rules)}


# ---- the accumulator bound, computed again from the definitions of the families


def extremes(values: Iterator[int]) -> tuple[int, int]:
    found = list(values)
    return min(found), max(found)


def pair_extremes(scale: int) -> tuple[int, int]:
    """Two products of codes 0, 1, 2 in place and activations."""
    codes, xs = (0, scale, 2 * scale), (-128, 0, 127)
    return extremes(a * x + b * y for a, b, x, y in product(codes, codes, xs, xs))


@cache
def entry_extremes(g: int, mirrored: bool) -> tuple[int, int]:
    """Sums of g activations with signs; a mirrored table holds v >= 0 and flips all bits for v < 0."""
    xs, signs = (-128, 0, 127), (-1, 0, 1)
    sums = []
    for w in product(signs, repeat=g):
        first = next((sign for sign in w if sign), 0)
        for x in product(xs, repeat=g):
            entry = sum(a * b for a, b in zip(w, x, strict=True))
            sums.append(~-entry if mirrored and first < 0 else entry)
    return min(sums), max(sums)


def lane_extremes(spec: KernelSpec) -> tuple[int, int]:
    """The least and largest sum in any int16 lane between two widenings."""
    family, s = FAMILIES[spec.family], dict(spec.schedule)
    if spec.schedule.algorithm == "panel":
        low, high = pair_extremes(1)
        return s["widen_every"] * low, s["widen_every"] * high
    if spec.table_bytes:
        # 16 rows in four lanes: each lane of a row takes a quarter of a chunk's groups; 64 rows of TL5: all.
        low, high = entry_extremes(family.g, family.name in ("tl2", "tl5"))
        adds = s["widen_every"] * family.k_chunk // family.g // (64 // family.rows)
        return adds * low, adds * high
    # Every field is one addition a chunk.
    totals = dict.fromkeys(range(s["accumulators"]), (0, 0))
    for f in range(family.k_chunk // 4):
        a = accumulator(f, s["accumulators"])
        low, high = pair_extremes(4**a)
        totals[a] = (totals[a][0] + s["widen_every"] * low, totals[a][1] + s["widen_every"] * high)
    return min(low for low, _ in totals.values()), max(high for _, high in totals.values())


def accumulator(f: int, accumulators: int) -> int:
    """Where field f goes, at scale 4^a: it is masked in place, shifted so scales stay below 4^accumulators.

    A fifth field stands where the fourth does.
    """
    return 3 % accumulators if f == 4 else f % accumulators


@combinations
def test_no_legal_schedule_can_overflow_int16(family: str, isa: Isa, regime: Regime) -> None:
    counted = 0
    for shape in (SHAPE, Shape(8640, 3200), Shape(530, 97)):
        for spec in space_of(family, isa, regime, shape):
            if not dict(spec.schedule).get("widen_every"):
                assert int16_sums(spec) is None
                continue
            low, high = lane_extremes(spec)
            assert low >= -32768, spec
            assert high <= 32767, spec
            counted += 1
    needs = FAMILIES[family].looks_up or isa.name == "scalar" or not isa.native_dot4
    assert counted or not needs or regime is LARGE, "nothing was counted"


@pytest.mark.parametrize(
    ("family", "isa", "regime", "algorithm", "accumulators", "most"),
    [
        ("i2s", "avx2", N1, "direct", 1, 16),
        ("i2s", "avx2", N1, "direct", 2, 8),
        ("i2s", "avx2", N1, "direct", 3, 4),
        ("i2s", "avx2", N1, "direct", 4, 1),
        ("i2s", "avx2", LARGE, "panel", None, 64),
        ("tl1", "avx2", N1, "direct", None, 63),
        ("tl2", "avx2", N1, "direct", None, 21),
        ("tl2", "avx2", LARGE, "panel", None, 64),
        ("t5", "avx2", N1, "direct", 1, 12),
        ("t5", "neon", N1, "direct", 3, 4),
        ("tl5", "avx2", N1, "split", None, 12),
        ("tl5", "avx512_vbmi", N1, "wide", None, 12),
    ],
)
def test_the_rule_allows_exactly_what_fits(
    family: str, isa: str, regime: Regime, algorithm: str, accumulators: int | None, most: int
) -> None:
    space, legal = one(family, isa, regime, algorithm)
    spec = changed(legal, **({"accumulators": accumulators} if accumulators else {}))
    for widen_every in range(1, 70):
        candidate = changed(spec, widen_every=widen_every)
        low, high = lane_extremes(candidate)
        fits = low >= -32768 and high <= 32767
        assert fits == (widen_every <= most)
        assert fits != any("int16" in rule.text for rule in space.broken(candidate)), widen_every


def configurations(family: str) -> dict[tuple[str, tuple[tuple[str, int], ...]], KernelSpec]:
    """A kernel of each algorithm with each way to accumulate in int16."""
    return {
        (
            spec.schedule.algorithm,
            tuple((n, v) for n, v in spec.schedule if n in ("accumulators", "widen_every")),
        ): spec
        for isa in ISAS.values()
        for regime in REGIMES
        for spec in space_of(family, isa, regime)
        if dict(spec.schedule).get("widen_every") and dict(spec.schedule).get("unroll", 1) == 1
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_adds_as_often_as_the_bound_assumes(family: str) -> None:
    """Count the int16 additions of a turn of the inner loop in the C text itself."""
    found = configurations(family)
    assert found
    for spec in found.values():
        additions_are_those_of_the_bound(spec)


def additions_are_those_of_the_bound(spec: KernelSpec) -> None:
    text = render_kernel(spec).text
    addition = r"\b((?:sum16|lo)_r0_t0(?:_f\d)?) = (?:vh_add|vp_add|vp_add_field)\(\1,"
    first = re.search(addition, text)
    assert first, spec.name
    body = text[first.start() : text.index("\n}\n", first.start())]
    found = re.findall(addition, body)
    most = max(found.count(name) for name in set(found))
    sums = int16_sums(spec)
    assert sums is not None
    assert sums.additions == most * spec.schedule["widen_every"], spec.name


def test_the_digits_of_a_chunk_of_split_sums_fit_int8() -> None:
    """Four groups, each a sum of three weights and one of two: from every value that an entry can have."""

    def digits(g: int) -> tuple[tuple[int, int], tuple[int, int]]:
        low, high = [], []
        for entry in range(-128 * g, 128 * g + 1):
            high.append((11 * entry + 128) >> 8)
            low.append(entry - SPLIT_RADIX * high[-1])
        return extremes(iter(low)), extremes(iter(high))

    (low3, high3), (low2, high2) = digits(3), digits(2)
    assert (low3[0] + low2[0], low3[1] + low2[1]) == (-30, 29)
    assert (high3[0] + high2[0], high3[1] + high2[1]) == (-27, 28)
    groups = FAMILIES["tl5"].k_chunk // FAMILIES["tl5"].g
    assert groups * 30 <= 127 < (groups + 1) * 30
    text = render_kernel(one("tl5", "avx2", N1, "split")[1]).text
    body = text[text.index("static void tile") :]
    assert len(re.findall(r"\blow_r0_t0 = vb_(?:sign|add)\(", body)) == groups


@combinations
def test_int32_sums_fit_for_the_largest_k(family: str, isa: Isa, regime: Regime) -> None:
    f = FAMILIES[family]
    for spec in space_of(family, isa, regime):
        accumulators = dict(spec.schedule).get("accumulators", 1)
        fields = f.k_chunk // 4
        for a in range(accumulators):
            mine = sum(accumulator(f, accumulators) == a for f in range(fields))
            scale = 4**a if accumulators > 1 else 1
            assert -K_MAX * mine // fields * 2 * scale * 128 >= -(2**31)
            assert K_MAX * mine // fields * 2 * scale * 127 < 2**31


# ---- what there is not


def test_unknown_family() -> None:
    with pytest.raises(BitgenError, match="unknown family 'tl3'; did you mean t3 or tl5 or tl2"):
        space_of("tl3", "avx2", N1)


def test_a_missing_algorithm_names_those_there_are() -> None:
    with pytest.raises(BitgenError, match="I2_S for large has no algorithm 'direct'; it has panel, tiles"):
        space_of("i2s", "amx_int8", LARGE).knobs("direct")
    with pytest.raises(BitgenError, match="TL1 for n1 has no algorithm 'panel'; it has direct"):
        space_of("tl1", "avx2", N1).make("panel", Layout("tl1", 16), {})


def test_make_refuses_unknown_and_missing_knobs() -> None:
    space = space_of("i2s", "avx2", N1)
    values = dict(space.default.schedule)
    with pytest.raises(BitgenError, match="direct has no knob tile; it has streams, nr"):
        space.make("direct", Layout("i2s", 16), {**values, "tile": 3})
    with pytest.raises(BitgenError, match="direct needs a value for accumulators, nr"):
        space.make(
            "direct", Layout("i2s", 16), {n: v for n, v in values.items() if n not in ("accumulators", "nr")}
        )
    with pytest.raises(BitgenError, match="tl1_r16 is not a layout of i2s"):
        space.make("direct", Layout("tl1", 16), values)


def test_widen_is_offered_only_where_it_can_help() -> None:
    """A dot instruction adds to int32 by itself; without one, int16 sums are shorter."""
    for family, isa, regime in COMBINATIONS:
        for spec in space_of(family, isa, regime):
            if spec.schedule.algorithm in ("tiles", "mmla"):
                continue  # they add to int32 at once
            if isa.native_dot4 and not spec.table_bytes:
                assert spec.schedule["widen_every"] == 0
            elif isa.name != "scalar":
                assert spec.schedule["widen_every"] > 0
