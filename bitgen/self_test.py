"""Compare a library with numpy: ``python -m bitgen.self_test PATH``, which `bitgen build` runs in a process.

Whatever the library does, it does not do it to whoever built it.
"""

from __future__ import annotations

import sys

import numpy as np

from bitgen.errors import BitgenError
from bitgen.families.base import GROUPS
from bitgen.reference import grouped_int16_linear, grouped_linear, int16_linear, ternary_matmul
from bitgen.reference import linear as reference_linear
from bitgen.runtime import KernelTable, load
from bitgen.spec import REGIMES, Shape


def self_test(table: KernelTable, seed: int = 0) -> int:
    """Compare what the table chooses for each regime with numpy, on ragged shapes and those it was tuned for.

    Returns the number of matmuls compared. BitgenError at the first difference.
    """
    rng = np.random.default_rng(seed)
    tuned = {kernel.shape for kernel in table.kernels if kernel.shape}
    shapes = [Shape(5, 127), Shape(33, 200), *sorted(tuned)]
    count = 0
    for shape in shapes:
        w = rng.integers(-1, 2, (shape.m, shape.k), dtype=np.int8)
        scale = rng.uniform(0.5, 2, shape.m).astype(np.float32)
        linear = table.linear(w, scale)
        rows = rng.choice(shape.m, min(shape.m, 64), replace=False)
        for n in (regime.n_min for regime in REGIMES):
            xq = rng.integers(-128, 128, (n, shape.k), dtype=np.int8)
            x = rng.normal(size=(n, shape.k)).astype(np.float32)
            exact = np.array_equal(linear.accumulate(xq)[:, rows], ternary_matmul(xq, w[rows]))
            if not exact or not np.array_equal(linear(x)[:, rows], reference_linear(x, w[rows], scale[rows])):
                raise BitgenError(f"{linear.kernel(n).name} computes wrong results for {shape.name}, n = {n}")
            count += 2
    return count + _test_groups(table, rng) + _test_int16(table, rng)


def _test_groups(table: KernelTable, rng: np.random.Generator) -> int:
    """The same of weights in groups, whose last one is not whole; scales are half floats, then floats."""
    count, shape = 0, Shape(33, 200)
    w = rng.integers(-1, 2, (shape.m, shape.k), dtype=np.int8)
    for group in GROUPS:
        scale = rng.uniform(0.5, 2, (shape.m, -(-shape.k // group))).astype(np.float32)
        for scales in (scale.astype(np.float16).astype(np.float32), scale):
            linear = table.linear(w, scales, group=group)
            for n in (regime.n_min for regime in REGIMES):
                x = rng.normal(size=(n, shape.k)).astype(np.float32)
                if not np.array_equal(linear(x), grouped_linear(x, w, scales, group)):
                    raise BitgenError(f"{linear.kernel(n).name} computes wrong results, n = {n}")
                count += 1
    return count


def _test_int16(table: KernelTable, rng: np.random.Generator) -> int:
    """The same of int16 activations, two rows of int8 for each token, with groups and without."""
    count, shape = 0, Shape(33, 200)
    w = rng.integers(-1, 2, (shape.m, shape.k), dtype=np.int8)
    scale = rng.uniform(0.5, 2, (shape.m, 2)).astype(np.float32)
    rows = np.ascontiguousarray(scale[:, 0])
    for n in (regime.n_min for regime in REGIMES):
        x = rng.normal(size=(n, shape.k)).astype(np.float32)
        for linear, expected in (
            (table.linear(w, rows, activations="int16"), int16_linear(x, w, rows)),
            (table.linear(w, scale, group=128, activations="int16"), grouped_int16_linear(x, w, scale, 128)),
        ):
            if not np.array_equal(linear(x), expected):
                raise BitgenError(f"{linear.kernel(n).name} computes wrong int16 results, n = {n}")
            count += 1
    return count


def _main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m bitgen.self_test LIBRARY-OR-BUNDLE", file=sys.stderr)
        return 2
    try:
        count = 0
        for threads in (1, 2):
            with load(arguments[0], threads) as table:
                count += self_test(table)
    except BitgenError as error:
        print(error.message, file=sys.stderr)
        return error.exit_code
    print(f"{count} matmuls equal numpy")
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
