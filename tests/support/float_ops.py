"""The meaning of the float ops (templates/isa/*.h) in numpy; test_vector_ops.py tries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def fma(a: Array, b: Array, c: Array) -> Array:
    """The float32 nearest to a * b + c, rounded once.

    The product is exact in float64. The float64 sum is made odd where it is not exact, so that rounding it
    again to float32 cannot fall on a tie that is none.
    """
    x, y = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = x + y
    part = total - x
    error = (x - (total - part)) + (y - part)
    even = (total.view(np.int64) & 1) == 0
    nudge = np.isfinite(total) & np.isfinite(error) & (error != 0) & even
    odd = np.where(nudge, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)
    return odd.astype(np.float32)


def greater(a: Array, b: Array) -> Array:
    return np.where(a > b, a, b)


def tree(combine: Callable[[Array, Array], Array], v: Array) -> Array:
    while len(v) > 1:
        v = combine(v[: len(v) // 2], v[len(v) // 2 :])
    top: Array = v[0]
    return top


def to_f16(p: Array, v: Array) -> None:
    halves = v.astype(np.float16)
    bits = halves.view(np.uint16).copy()
    raw = v.view(np.uint32)
    nan = np.isnan(v)  # a quiet NaN with the sign and the upper bits of the payload, as F16C makes it
    bits[nan] = (raw[nan] >> 16 & 0x8000 | 0x7E00 | raw[nan] >> 13 & 0x3FF).astype(np.uint16)
    p[:] = bits.view(np.uint8)


def store(p: Array, v: Array) -> None:
    p[:] = v.view(np.uint8)


FLOAT_MEANINGS: dict[str, Callable[..., Any]] = {
    "vf_store": store,
    "vf_add": lambda a, b: a + b,
    "vf_sub": lambda a, b: a - b,
    "vf_div": lambda a, b: a / b,
    "vf_fma": fma,
    "vf_max": greater,
    "vf_zero_below": lambda v, x, limit: np.where(x < limit, np.float32(0), v),
    "vf_blend_n": lambda v, rest, n: np.where(np.arange(16) < n, v, rest),
    "vf_pow2": lambda n: ((n.astype(np.int64) + 127) << 23).astype(np.uint32).view(np.float32),
    "vf_hsum": lambda v: tree(np.add, v),
    "vf_hmax": lambda v: tree(greater, v),
    "vf_from_f16": lambda p: p.view(np.float16).astype(np.float32),
    "vf_to_f16": to_f16,
    "vf_from_bf16": lambda p: (p.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    "vf_splat_f16": lambda p: np.full(16, p.view(np.float16).astype(np.float32)),
    "vw_load_s8": lambda p: p.view(np.int8).astype(np.int32),
    "vw_load_u8": lambda p: p.astype(np.int32),
    "vw_and": lambda a, b: a & b,
    "vw_shl": lambda v, bits: (v.astype(np.int64) << int(bits)).astype(np.uint32).view(np.int32),
}

# Halfway cases of float32 -> float16, and the edges of its subnormal and infinite ranges.
HALVES = [
    1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-11 + 2.0**-23, 65504.0, 65519.996, 65520.0, 65536.0, 2.0**-14,
    2.0**-14 - 2.0**-25, 2.0**-14 - 2.0**-26, 2.0**-24, 2.0**-25, 2.0**-25 + 2.0**-40, 1.5 * 2.0**-24,
    2.5 * 2.0**-24, 1e-30, 1e-41, 0.0, 3.14159, 1000.123,
]  # fmt: skip

FLOAT_DOMAINS: dict[tuple[str, str], list[Any]] = {
    ("vf_pow2", "n"): list(range(-126, 128)),
    ("vf_to_f16", "v"): [*HALVES, *(-v for v in HALVES), np.inf, -np.inf, np.nan],
}
FLOAT_RANGES: dict[tuple[str, str], range] = {
    ("vf_blend_n", "n"): range(17),
    ("vw_shl", "bits"): range(32),
}
FLOAT_EXTENTS: dict[str, Callable[[dict[str, Any]], int]] = {
    "vf_from_f16": lambda _: 32,
    "vf_to_f16": lambda _: 32,
    "vf_from_bf16": lambda _: 32,
    "vf_splat_f16": lambda _: 2,
    "vw_load_s8": lambda _: 16,
    "vw_load_u8": lambda _: 16,
}
