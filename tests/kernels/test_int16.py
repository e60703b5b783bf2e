"""int16 activations as two planes of int8: the library against numpy, whatever is multiplied with whom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_levels import LEVELS

from bitgen import runtime
from bitgen.errors import BitgenError, FileError
from bitgen.families.base import GROUPS
from bitgen.reference import INT16_MAX, grouped_int16_linear, int16_linear
from bitgen.runtime import ArgumentValueError, KernelTable

BATCHES = (1, 2, 8, 9, 40)  # 2 to 16 rows of int8 are few, more are many


@pytest.fixture(scope="module")
def table(bundle: Path) -> Iterator[KernelTable]:
    with runtime.load(bundle, 2) as opened:
        yield opened


def activations(n: int, k: int) -> np.ndarray:
    """Random, with rows of zeros, of one large value, and of magnitudes that all are the largest."""
    rng = np.random.default_rng((n, k))
    x = rng.normal(size=(n, k)).astype(np.float32)
    x[3 % n] = 0
    x[5 % n, : k // 2] = rng.choice([-1, 1], k // 2)
    x[6 % n, 0] = 1e30
    x[7 % n] = rng.choice([-1, 1], k)
    return x


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group", [0, 128])
def test_every_level_gives_the_floats_of_numpy(
    level: str, group: int, level_library: Callable[[str], Path]
) -> None:
    rng = np.random.default_rng(group)
    m, k = 70, 300
    w = rng.integers(-1, 2, (m, k), dtype=np.int8)
    scale = rng.uniform(-0.1, 0.1, (m, 3) if group else m).astype(np.float32)
    x = activations(40, k)
    expected = grouped_int16_linear(x, w, scale, group) if group else int16_linear(x, w, scale)
    with runtime.load(level_library(level), 2) as own:
        linear = own.linear(w, scale, group=group, activations="int16")
        for n in BATCHES:
            y = np.concatenate([linear(x[i : i + n]) for i in range(0, 40, n)])
            np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_of_every_size(table: KernelTable, group: int) -> None:
    rng = np.random.default_rng(group)
    w = rng.integers(-1, 2, (33, 520), dtype=np.int8)
    scale = rng.uniform(0.5, 2, (33, -(-520 // group))).astype(np.float32)
    x = activations(9, 520)
    linear = table.linear(w, scale, group=group, activations="int16")
    np.testing.assert_array_equal(linear(x), grouped_int16_linear(x, w, scale, group))
    np.testing.assert_array_equal(linear(x[0]), grouped_int16_linear(x[:1], w, scale, group)[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_scale_few_rows_and_many_tokens(table: KernelTable, threads: int) -> None:
    """So few rows that threads share tokens, which must not tear the planes of one apart."""
    w = np.random.default_rng(1).integers(-1, 2, (20, 130), dtype=np.int8)
    scale = np.array([0.25], np.float32)
    x = activations(131, 130)
    with runtime.load(table.path, threads) as own:
        linear = own.linear(w, scale, activations="int16")
        np.testing.assert_array_equal(linear(x), int16_linear(x, w, scale))
    with runtime.load(table.path, threads) as own:
        scales = np.full((20, 2), 0.25, np.float32)
        linear = own.linear(w, scales, group=128, activations="int16")
        np.testing.assert_array_equal(linear(x), grouped_int16_linear(x, w, scales, 128))


def test_tuned_shapes_go_by_the_rows_of_int8(table: KernelTable) -> None:
    """A token is two rows: the kernel for one of them is none of int16's."""
    w = np.ones((64, 128), np.int8)
    int8, int16 = (table.linear(w, 1.0, activations=a) for a in ("int8", "int16"))
    assert int16.kernel(1) == int8.kernel(2)
    assert int16.kernel(9) == int8.kernel(18)
    assert int16.kernel(1).n_min > 1


def test_the_longest_rows_at_their_bound(table: KernelTable) -> None:
    """The largest integers that there are: exact, and one column more is refused."""
    k = (2**31 - 1) // INT16_MAX
    w = np.ones((16, k), np.int8)
    w[1] = -1
    x = np.ones((1, k), np.float32)
    x[0, ::3] = -1
    linear = table.linear(w, 1.0, activations="int16")
    for sign in (1, -1):
        np.testing.assert_array_equal(linear(sign * x), int16_linear(sign * x, w, np.ones(1, np.float32)))
        same = np.full((1, k), sign, np.float32)
        np.testing.assert_array_equal(linear(same), int16_linear(same, w, np.ones(1, np.float32)))
    longer = np.ones((16, k + 1), np.int8)
    with pytest.raises(BitgenError, match="m, k or n is out of range"):
        table.linear(longer, 1.0, activations="int16")(np.ones((1, k + 1), np.float32))
    scales = np.ones((16, -(-(k + 1) // 128)), np.float32)
    grouped = table.linear(longer, scales, group=128, activations="int16")
    assert grouped(np.ones((1, k + 1), np.float32))[0, 0] == pytest.approx(k + 1, rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(table: KernelTable, bad: float) -> None:
    linear = table.linear(np.ones((16, 300), np.int8), 1.0, activations="int16")
    x = np.ones((3, 300), np.float32)
    x[1, 299] = bad
    with pytest.raises(ArgumentValueError, match="NaN or infinity"):
        linear(x)


def test_another_type_and_an_older_library_are_named(table: KernelTable) -> None:
    w: Any = np.ones((1, 4), np.int8)
    with pytest.raises(ArgumentValueError, match="activations must be int8 or int16, not 'int4'"):
        table.linear(w, 1.0, activations="int4")  # type: ignore[arg-type]

    class Older:
        bitgen_matmul = None

    library, table._lib = table._lib, Older()
    try:
        table.check_activations("int8")
        with pytest.raises(FileError, match="knows no int16 activations: build it again"):
            table.check_activations("int16")
    finally:
        table._lib = library
