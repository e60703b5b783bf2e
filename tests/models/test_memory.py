"""Memory: the plan, the smallest layout where it is short, weights from disk, and the race for a layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from reference_model import small_config

from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats.weights import Weights
from bitgen.inference import disk, first_use, layouts, memory, weight_cache
from bitgen.inference.engine import Engine
from bitgen.inference.layouts import Option, options_of, settle_layouts
from bitgen.inference.packed_file import cache_entries
from bitgen.inference.synthetic import random_weights
from bitgen.progress import Progress
from bitgen.runtime import KernelTable, load
from bitgen.spec import Shape

pytestmark = pytest.mark.slow

CONFIG = small_config(hidden=160, ffn=320, head_dim=40, layers=2)
SHAPE = Shape(96, 333)


@pytest.fixture
def table(bundle: Path) -> Iterator[KernelTable]:
    with load(bundle, 2) as opened:
        yield opened


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(CONFIG, 1)


def logits(engine: Engine) -> Any:
    tokens = np.arange(7, dtype=np.int32)
    return engine.forward(tokens, tokens, np.zeros(7, np.int32), np.ones(7, bool))


def available(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: size)


def lasting(seen: list[Progress]) -> list[str]:
    return [str(each) for each in seen if each.lasting]


# ---- Layouts ----


def test_every_layout_of_a_library_gives_the_same_bits(table: KernelTable) -> None:
    rng = np.random.default_rng(0)
    w = rng.integers(-1, 2, (SHAPE.m, SHAPE.k), np.int8)
    x = rng.standard_normal((9, SHAPE.k)).astype(np.float32)
    own, first = table.layout_name(SHAPE), table.linear(w, 0.5)
    options = options_of(table)
    assert {option.name for option in options} == {"i2s_r16", "tl1_r16", "tl2_r32"}
    assert options[0].name == own
    for option in options:
        assert table.prefer(SHAPE, *option)
        assert table.layout_name(SHAPE) == option.name
        linear = table.linear(w, 0.5)
        assert linear.kernel(1).family == option.family
        assert np.array_equal(linear(x), first(x)), "packed before, and packed now"
    assert not table.prefer(SHAPE, "i2s", 17)
    assert not table.prefer(SHAPE, "no such family", 16)
    assert table.layout_name(SHAPE) == options[-1].name, "what is refused changes nothing"
    assert table.layout_name(Shape(97, 333)) == own
    assert table.prefer(SHAPE, None)
    assert table.prefer(SHAPE, None)
    assert table.layout_name(SHAPE) == own


def test_preferences_are_kept_for_many_shapes(table: KernelTable) -> None:
    shapes = [Shape(16, k) for k in range(64, 80)]
    for shape in shapes:
        assert table.prefer(shape, "i2s", 16)
    for shape in shapes[::2]:
        table.prefer(shape, None)
    own = table.layout_name(SHAPE)
    assert [table.layout_name(shape) for shape in shapes] == [own, "i2s_r16"] * 8


def largest(table: KernelTable, weights: Weights) -> None:
    """Let the model be packed in the layout that takes most."""
    for shape in weights.config.shapes:
        sizes = {}
        for option in options_of(table):
            table.prefer(shape, *option)
            sizes[option] = table.packed_bytes(shape)
        table.prefer(shape, *max(sizes, key=sizes.__getitem__))


def test_where_memory_is_short_the_smallest_layout_is_taken(
    table: KernelTable, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest(table, weights)
    whole = Engine(weights, table)
    available(monkeypatch, whole.memory.total - 1)
    seen: list[Progress] = []
    small = Engine(weights, table, progress=seen.append)
    assert small.memory.weights < whole.memory.weights
    assert np.array_equal(logits(small), logits(whole))
    short, plan = lasting(seen)
    assert re.fullmatch(
        r"memory is short: weights are packed as (tl1_r16, )?tl2_r32, the smallest here", short
    )
    assert plan.startswith(f"memory: {small.memory.total >> 20} MiB (packed weights 0, KV cache ")
    largest(table, weights)
    available(monkeypatch, small.memory.total - 1)
    with pytest.raises(
        BitgenError, match=r"^too little memory: .* or --from-disk, which reads packed weights"
    ):
        Engine(weights, table)
    available(monkeypatch, small.memory.work)
    with pytest.raises(BitgenError, match=r"^too little memory: .* or keys and values of 8 bits$"):
        Engine(weights, table)


def test_a_plan_is_told_where_it_takes_more_than_half(
    table: KernelTable, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, seen = Engine(weights, table).memory.total, list[Progress]()
    available(monkeypatch, 2 * total)
    Engine(weights, table, progress=seen.append)
    assert not lasting(seen)
    available(monkeypatch, 2 * total - 1)
    Engine(weights, table, progress=seen.append)
    assert len(lasting(seen)) == 1


# ---- From disk ----


@pytest.mark.parametrize("share", [0.0, 0.6, 1.1])
def test_weights_that_do_not_fit_come_from_disk(
    table: KernelTable,
    weights: Weights,
    bitgen_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
) -> None:
    whole = Engine(weights, table)
    plan = whole.memory
    monkeypatch.setattr(memory, "_SPARE", 0)
    monkeypatch.setattr(disk, "_PROBE_S", 0.001)
    available(monkeypatch, plan.cache + plan.work + int(share * plan.weights))
    seen: list[Progress] = []
    engine = Engine(weights, table, fingerprint="x", from_disk=True, progress=seen.append)
    assert np.array_equal(logits(engine), logits(whole))
    (entry,) = cache_entries()
    assert bitgen_home in entry.path.parents
    told = [text for text in lasting(seen) if text.startswith("from disk: ")]
    assert len(told) == (share < 1)
    assert all(re.search(r"in each step, at \S+ GB/s no more than \S+ tokens/s", text) for text in told)


@pytest.mark.usefixtures("bitgen_home")
def test_what_stays_in_memory_is_the_beginning(table: KernelTable, weights: Weights) -> None:
    groups = weight_cache.find_groups(weights)
    packed = weight_cache.pack_model(weights, table, groups, "x")
    sizes = [matrix.data.nbytes for layer in packed.layers for matrix in layer.values()]
    held, on_disk = disk.hold(packed, sum(sizes[:5]) + 1)
    kept = [memory.mapping_of(matrix.data) is None for layer in held.layers for matrix in layer.values()]
    assert kept == [True] * 5 + [False] * (len(sizes) - 5)
    assert on_disk == sum(sizes[5:])
    assert disk.hold(packed, sum(sizes))[1] == 0
    rate = disk.read_rate(cache_entries()[0].path, on_disk)
    assert rate > 0


class Usage(NamedTuple):
    free: int


def test_a_disk_that_cannot_hold_the_weights_is_told_in_a_line(
    table: KernelTable, weights: Weights, bitgen_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="give a fingerprint"):
        Engine(weights, table, from_disk=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
        with pytest.raises(FileError, match=r"^too little room in .*: packed weights take 0 MiB, 0 MiB are"):
            Engine(weights, table, fingerprint="x", from_disk=True)
    blocked = bitgen_home / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("BITGEN_HOME", str(blocked))
    with pytest.raises(BitgenError, match="blocked"):
        Engine(weights, table, fingerprint="x", from_disk=True)


# ---- The race ----


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, bitgen_home: Path) -> None:
    """Races of models however small, that take no time."""
    del bitgen_home
    monkeypatch.delenv(first_use.RACE_VARIABLE, raising=False)
    monkeypatch.setattr(layouts, "BUDGET_S", 0.0)
    for name, value in (("WORTH", 0), ("_POOL", 1 << 16)):
        monkeypatch.setattr(first_use, name, value)


@pytest.mark.usefixtures("quick")
def test_a_race_is_remembered(
    table: KernelTable, bundle: Path, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = logits(Engine(weights, table))
    own, shapes = table.layout_name(SHAPE), weights.config.shapes
    costs = {"i2s_r16": 1.0, "tl1_r16": 1.5, "tl2_r32": 1.5}
    raced: list[Shape] = []

    def fake(table: KernelTable, shape: Shape, options: list[Option], budget_s: float) -> dict[Option, float]:
        del table, budget_s
        raced.append(shape)
        return {option: costs[option.name] for option in options}

    monkeypatch.setattr(layouts, "_costs", fake)
    seen: list[Progress] = []
    settle_layouts(table, weights.config, seen.append)
    assert raced == list(shapes)
    assert {table.layout_name(shape) for shape in shapes} == {"i2s_r16"}
    (line,) = lasting(seen)
    assert "i2s_r16 instead of tl2_r32 alone, 1.50 times as fast (BITGEN_RACE=0: no race)" in line
    assert np.array_equal(logits(Engine(weights, table)), whole)
    with load(bundle, 2) as again:
        settle_layouts(again, weights.config, seen.append)
        assert again.layout_name(shapes[0]) == "i2s_r16"
    with load(bundle, 1) as alone:  # another number of threads is another race
        costs["i2s_r16"] = 1.49  # less than 2 % faster
        settle_layouts(alone, weights.config, seen.append)
        assert alone.layout_name(shapes[0]) == own
    assert raced == [*shapes, *shapes]
    assert "tl2_r32 stays" in lasting(seen)[-1]


@pytest.mark.usefixtures("quick")
def test_a_real_race_takes_its_time_and_leaves_no_preference(table: KernelTable, weights: Weights) -> None:
    options = options_of(table)
    costs = layouts._costs(table, Shape(300, 160), options, 0.0)
    assert list(costs) == options
    assert all(cost > 0 for cost in costs.values())
    assert table.layout_name(Shape(300, 160)) == options[0].name
    found = layouts.race(table, weights.config.matmuls, options)
    assert {*found} == {shape.name for shape in weights.config.shapes}


def test_what_is_not_raced(
    table: KernelTable, weights: Weights, bitgen_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise AssertionError(given)

    monkeypatch.setattr(layouts, "race", fail)
    monkeypatch.delenv(first_use.RACE_VARIABLE, raising=False)
    settle_layouts(table, weights.config)  # small models
    monkeypatch.setattr(first_use, "WORTH", 0)
    settle_layouts(table, small_config(group=64))
    with load(table.path.parent / table.path.name, 2) as same:
        monkeypatch.setattr(same, "bundle", None)
        settle_layouts(same, weights.config)  # a library that no manifest names
    monkeypatch.setenv(first_use.RACE_VARIABLE, "0")
    settle_layouts(table, weights.config)
    assert not (bitgen_home / "cache" / "races").exists()
