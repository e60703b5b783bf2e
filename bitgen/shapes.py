"""Sizes of a matrix multiplication: weight shapes, ranges of tokens, and where rows of activations lie.

Sizes: ``m`` output rows, ``k`` reduction, ``n`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitgen.errors import UsageError, unknown
from bitgen.records import load

# Kernels read whole chunks of activations: a row has room for the longest chunk (48) to begin at its last
# element.
X_PAD = 47
# Rows begin on cache lines.
X_ALIGN = 64

# Bound of the scaled in-place accumulators: field 64 * code 2 * |x| 128 = 16384 a weight. One accumulator of
# I2_S sees a quarter of k, one of T5 two fifths: 2^31 / (16384 * 2 / 5) = 327680. The plain sum alone would
# allow 2^24.
K_MAX = 1 << 18


def ceil_to(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is >= ``value``."""
    return -(-value // multiple) * multiple


def x_stride(k: int) -> int:
    """Bytes between two rows of int8 activations of length ``k``: ``k + X_PAD`` rounded up to ``X_ALIGN``.

    One ``X_ALIGN`` more where that is a multiple of 2048: rows 4 KiB apart would compete for one L1 set.
    """
    stride = ceil_to(k + X_PAD, X_ALIGN)
    return stride + X_ALIGN if stride % 2048 == 0 else stride


@dataclass(frozen=True, order=True)
class Shape:
    """A weight matrix: ``m`` output rows by ``k`` inputs."""

    m: int
    k: int

    def __post_init__(self) -> None:
        if self.m < 1 or self.k < 1:
            raise UsageError(f"shape {self.m}x{self.k}: m and k must be at least 1")
        if self.k > K_MAX:
            raise UsageError(f"shape {self.m}x{self.k}: k must be at most {K_MAX} (int32 accumulators)")
        if self.m > 1 << 31:
            raise UsageError(f"shape {self.m}x{self.k}: m must be at most 2^31")

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"3200x8640"`` (m x k)."""
        m, sep, k = text.lower().partition("x")
        if not sep or not m.strip().isdecimal() or not k.strip().isdecimal():
            raise UsageError(f"shape {text!r}: write it as MxK, for example 3200x8640")
        return cls(int(m), int(k))

    def to_plain(self) -> str:
        return self.name

    @classmethod
    def from_plain(cls, data: object) -> Shape:
        """Read "MxK", or the [m, k] of older records."""
        return cls.parse(data) if isinstance(data, str) else cls(*load(tuple[int, int], data, "it"))


@dataclass(frozen=True)
class Regime:
    """A range of n that has kernels of its own."""

    name: str
    n_min: int
    n_max: int | None


N1 = Regime("n1", 1, 1)
SMALL = Regime("small", 2, 16)
LARGE = Regime("large", 17, None)
REGIMES = (N1, SMALL, LARGE)


def regime_of(n: int) -> Regime:
    """The regime that ``n`` tokens fall into."""
    if n < 1:
        raise UsageError(f"n must be at least 1, not {n}")
    return next(r for r in reversed(REGIMES) if n >= r.n_min)


def regime_named(name: str) -> Regime:
    for regime in REGIMES:
        if regime.name == name:
            return regime
    raise unknown("regime", name, (regime.name for regime in REGIMES))
