"""A matrix as its file holds it: a promise to decode rows, never a decoded copy.

Reading a block of rows costs memory for that block only. What a read finds wrong in the file (a code that is
not ternary, scales that differ within a row) is a BitgenError of that read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.families.base import COMMON_GROUP, Codes
from bitgen.families.base import TERNARY as TERNARY_WEIGHTS
from bitgen.formats.code_rows import CHANGES, code_floats, common_kind, joined_codes
from bitgen.formats.config import Floats
from bitgen.formats.ternary import Ternary
from bitgen.spec import EVERY_FAMILY, Shape

BINARY = "q1"  # of `Family.weights`: -1 and 1


@dataclass(frozen=True)
class GroupScales:
    """Scales of groups of weights along k.

    ``find_size()`` gives the weights of a group, 0 where a row has one scale only; it may have to read the
    whole matrix. ``decode(begin, end)`` gives the scales of rows [begin, end), float32 (end - begin, ceil(k /
    size)).
    """

    find_size: Callable[[], int]
    decode: Callable[[int, int], Floats]


@dataclass(frozen=True)
class TernaryMatrix:
    """W = w times its scales, w int8 (m, k) in {-1, 0, 1}: one a row, or one for each ``group`` along k.

    ``decode(begin, end)`` gives the rows [begin, end) of w. ``find_scale()`` gives the scales of rows, (m,)
    or (1,) float32; it may have to read the whole matrix (values stored as floats), so `scale` calls it when
    it is first asked for and remembers it; a cache of packed weights should keep the scales too. ``groups``
    gives those of groups. ``floats(begin, end)`` gives the values of rows where the file stores floats: these
    may be no ternary ones, and then only `values` can be read. All raise BitgenError when the file does not
    hold what it claims. Any number of threads may read. ``binary``: no weight is zero, and kernels of bits
    multiply them.
    """

    name: str  # of the tensor, or of the tensors that were stacked
    shape: Shape
    decode: Callable[[int, int], Ternary] = field(repr=False)
    find_scale: Callable[[], Floats] = field(repr=False)
    groups: GroupScales | None = field(default=None, repr=False)
    floats: Callable[[int, int], Floats] | None = field(default=None, repr=False, kw_only=True)
    binary: bool = field(default=False, kw_only=True)

    @property
    def weights(self) -> str:
        """What they are, `Family.weights`."""
        return BINARY if self.binary else TERNARY_WEIGHTS

    @cached_property
    def group(self) -> int:
        """Weights along k that share a scale; 0: all of a row."""
        return 0 if self.groups is None else self.groups.find_size()

    @property
    def kernel_group(self) -> int:
        """The groups in which kernels run it: ternary ones of more than 128 weights as several of 128.

        Every library has kernels of its ISA level for those: 3 % more bytes, where portable kernels took 76
        times as long.
        """
        return min(self.group, COMMON_GROUP) if self.weights == TERNARY_WEIGHTS else self.group

    @cached_property
    def scale(self) -> Floats:
        """float32 (m,), or (1,) for one scale of the whole matrix; finite. BitgenError: it has groups."""
        if self.group:
            raise BitgenError(f"{self.name} has a scale for each {self.group} weights, not one a row")
        scale = np.ascontiguousarray(self.find_scale(), dtype=np.float32).reshape(-1)
        if scale.size not in (1, self.shape.m):
            raise BitgenError(f"{self.name}: {scale.size} scales for {self.shape.m} rows")
        scale.flags.writeable = False
        return self._finite(scale)

    def scales(self, begin: int, end: int, group: int | None = None) -> Floats:
        """Of the rows [begin, end): float32 (end - begin, ceil(k / group)), (end - begin, 1) for group 0.

        ``group`` is a finer one than that of the matrix, which it must divide; None: the matrix's own.
        """
        own, wanted = self.group, self.group if group is None else group
        if own == 0:
            scale = self.scale if self.scale.size == 1 else self.scale[begin:end]
            count = -(-self.shape.k // wanted) if wanted else 1
            return np.broadcast_to(scale[:, None], (end - begin, count))
        if self.groups is None or wanted == 0 or own % wanted:
            raise BitgenError(f"{self.name}: groups of {own} weights are no groups of {wanted}")
        found = self._finite(self.groups.decode(begin, end))
        return np.repeat(found, own // wanted, axis=1)[:, : -(-self.shape.k // wanted)]

    def _finite(self, scale: Floats) -> Floats:
        if not np.isfinite(scale).all():
            raise FileError(f"{self.name}: a scale is NaN or infinite; the file is damaged")
        return scale

    def rows(self, begin: int, end: int) -> Ternary:
        """w[begin:end], int8 (end - begin, k)."""
        if not 0 <= begin <= end <= self.shape.m:
            raise BitgenError(f"{self.name}: there are no rows {begin}..{end} in {self.shape.name}")
        if begin == end:
            return np.empty((0, self.shape.k), np.int8)
        return self.decode(begin, end)

    def coded(self, begin: int, end: int, group: int) -> Codes:
        """The rows [begin, end) as kernels of codes take them, with a scale for each ``group`` weights.

        BitgenError: they are ternary.
        """
        if not self.binary:
            raise BitgenError(f"{self.name} is ternary: it has no codes")
        scales = np.ascontiguousarray(self.scales(begin, end, group))
        return Codes((self.rows(begin, end) > 0).view(np.uint8), scales)

    def values(self, begin: int, end: int) -> Floats:
        """W[begin:end], float32 (end - begin, k): each weight times its scale, or the floats of the file."""
        if self.floats is not None:
            return self.floats(begin, end)
        scales = self.scales(begin, end)
        if self.group:
            scales = np.repeat(scales, self.group, axis=1)[:, : self.shape.k]
        return self.rows(begin, end) * scales

    def scaled(self, factor: Floats) -> TernaryMatrix:
        """The matrix times ``factor``, float32 (1,) or (m,)."""

        def decode(begin: int, end: int) -> Floats:
            rows = factor if factor.size == 1 else factor[begin:end]
            return self.scales(begin, end) * rows[:, None]

        def values(begin: int, end: int) -> Floats:
            return self.values(begin, end) * (factor if factor.size == 1 else factor[begin:end, None])

        return self._with(self.decode, lambda: self.scale * factor, decode, values)

    def reordered(self, order: NDArray[np.int64]) -> TernaryMatrix:
        """Row i of the result is row order[i]. Cheap where ``order`` moves rows only a short way."""
        if sorted(order.tolist()) != list(range(self.shape.m)):
            raise BitgenError(f"{self.name}: not an order of its {self.shape.m} rows")

        def moved(read: Callable[[int, int], NDArray[Any]]) -> Callable[[int, int], NDArray[Any]]:
            def decode(begin: int, end: int) -> NDArray[Any]:
                wanted = order[begin:end]
                low = int(wanted.min())
                return read(low, int(wanted.max()) + 1)[wanted - low]

            return decode

        def find_scale() -> Floats:
            return self.scale if self.scale.size == 1 else self.scale[order]

        return self._with(moved(self.rows), find_scale, moved(self.scales), moved(self.values))

    def slice(self, begin: int, end: int) -> TernaryMatrix:
        """The rows [begin, end) as a matrix, with one scale where all of them share it."""

        def find_scale() -> Floats:
            part = self.scale if self.scale.size == 1 else self.scale[begin:end]
            return part[:1] if (part == part[0]).all() else part

        def decode(first: int, last: int) -> Ternary:
            return self.rows(begin + first, begin + last)

        def scales(first: int, last: int) -> Floats:
            return self.scales(begin + first, begin + last)

        def values(first: int, last: int) -> Floats:
            return self.values(begin + first, begin + last)

        return replace(self._with(decode, find_scale, scales, values), shape=Shape(end - begin, self.shape.k))

    def _with(
        self,
        decode: Callable[[int, int], Ternary],
        find_scale: Callable[[], Floats],
        scales: Callable[[int, int], Floats],
        values: Callable[[int, int], Floats],
    ) -> TernaryMatrix:
        """The same matrix, its rows or scales changed."""
        groups = None if self.groups is None else GroupScales(lambda: self.group, scales)
        floats = None if self.floats is None else values
        return TernaryMatrix(
            self.name, self.shape, decode, find_scale, groups, floats=floats, binary=self.binary
        )

    @classmethod
    def stack(cls, parts: Sequence[TernaryMatrix]) -> TernaryMatrix:
        """The rows of all ``parts``, one below the other, with a scale a row, or groups that fit all."""
        coded = [part for part in parts if isinstance(part, CodedMatrix)]
        if coded and len(coded) < len(parts):
            raise FileError(f"{', '.join(part.name for part in parts)}: some are ternary, some have 4 bits")
        if coded:
            return CodedMatrix.joined(coded)
        k = parts[0].shape.k
        if any(part.shape.k != k for part in parts):
            raise BitgenError(f"{', '.join(part.name for part in parts)}: they do not share their input")
        starts = np.cumsum([0, *(part.shape.m for part in parts)]).tolist()

        def joined(begin: int, end: int, read: Callable[[TernaryMatrix, int, int], NDArray[Any]]) -> Any:
            blocks = []
            for part, start in zip(parts, starts, strict=False):
                low, high = max(begin, start), min(end, start + part.shape.m)
                if low < high:
                    blocks.append(read(part, low - start, high - start))
            return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

        def find_scale() -> Floats:
            return np.concatenate([np.broadcast_to(part.scale, (part.shape.m,)) for part in parts])

        @cache
        def find_size() -> int:
            return math.gcd(*(part.group for part in parts))

        def scales(begin: int, end: int) -> Floats:
            made: Floats = joined(begin, end, lambda part, low, high: part.scales(low, high, find_size()))
            return made

        def floats(begin: int, end: int) -> Floats:
            made: Floats = joined(begin, end, cls.values)
            return made

        return cls(
            "+".join(part.name for part in parts),
            Shape(starts[-1], k),
            lambda begin, end: joined(begin, end, cls.rows),
            find_scale,
            None if all(part.groups is None for part in parts) else GroupScales(find_size, scales),
            floats=None if all(part.floats is None for part in parts) else floats,
            binary=all(part.binary for part in parts),
        )

    @classmethod
    def of(cls, w: Ternary, scale: Floats | float, name: str = "w", group: int = 0) -> TernaryMatrix:
        """A matrix in memory, scale (1,), (m,), or (m, ceil(k / group)): for tests and random models."""
        values = np.atleast_1d(np.asarray(scale, np.float32))
        groups = GroupScales(lambda: group, lambda begin, end: values[begin:end]) if group else None
        return cls(name, Shape(*w.shape), lambda begin, end: w[begin:end], lambda: values, groups)


@dataclass(frozen=True)
class CodedMatrix(TernaryMatrix):
    """A matrix of codes in groups, which kernels of ``weights`` multiply (`Family.weights`).

    ``codes(begin, end)`` gives rows with scales, offsets and tables. Kinds that another holds exactly become
    that kind where both are in one matrix or one model (`as_kind`).
    """

    codes: Callable[[int, int], Codes] = field(default=None, repr=False)  # type: ignore[assignment]
    kind: str = field(default="q4", kw_only=True)

    @classmethod
    def make(
        cls, name: str, shape: Shape, kind: str, group: int, codes: Callable[[int, int], Codes]
    ) -> CodedMatrix:
        """The matrix of codes; ``kind``: of `Family.weights`."""

        def none() -> Floats:
            raise BitgenError(f"{name} has a scale for each {group} weights, not one a row")

        scales = GroupScales(lambda: group, lambda begin, end: codes(begin, end).scales)
        return cls(
            name,
            shape,
            lambda begin, end: codes(begin, end).codes.view(np.int8),
            none,
            scales,
            codes,
            kind=kind,
        )

    @property
    def weights(self) -> str:
        return self.kind

    def _checked(self, begin: int, end: int) -> Codes:
        made = self.codes(begin, end)
        self._finite(made.scales)
        if made.offsets is not None:
            self._finite(made.offsets)
        return made

    def coded(self, begin: int, end: int, group: int = 0) -> Codes:
        """The rows [begin, end) as kernels take them, in the groups that they have."""
        del group
        return self._checked(begin, end)

    def values(self, begin: int, end: int) -> Floats:
        return code_floats(self._checked(begin, end), self.group, EVERY_FAMILY[self.kind].bias)

    def as_kind(self, kind: str) -> CodedMatrix:
        """The same weights as another kind. FileError where that does not hold them."""
        if kind == self.kind:
            return self
        change = CHANGES.get((self.kind, kind))
        if change is None:
            raise FileError(f"{self.name}: {self.kind.upper()} weights are no {kind.upper()} ones")
        return self.make(
            self.name, self.shape, kind, self.group, lambda begin, end: change(self.codes(begin, end))
        )

    def scaled(self, factor: Floats) -> TernaryMatrix:
        def read(begin: int, end: int) -> Codes:
            rows, by = self.codes(begin, end), factor if factor.size == 1 else factor[begin:end, None]
            offsets = None if rows.offsets is None else rows.offsets * by
            return replace(rows, scales=rows.scales * by, offsets=offsets)

        return self.make(self.name, self.shape, self.kind, self.group, read)

    def reordered(self, order: NDArray[np.int64]) -> TernaryMatrix:
        def moved(begin: int, end: int) -> Codes:
            wanted = order[begin:end]
            low = int(wanted.min())
            rows = self.codes(low, int(wanted.max()) + 1)
            if rows.selectors is not None:
                raise BitgenError(f"{self.name}: 16 rows share a table, so rows cannot move")
            at = wanted - low
            offsets = None if rows.offsets is None else rows.offsets[at]
            return replace(rows, codes=rows.codes[at], scales=rows.scales[at], offsets=offsets)

        return self.make(self.name, self.shape, self.kind, self.group, moved)

    def slice(self, begin: int, end: int) -> TernaryMatrix:
        shape = Shape(end - begin, self.shape.k)
        return self.make(
            self.name, shape, self.kind, self.group, lambda low, high: self.codes(begin + low, begin + high)
        )

    @classmethod
    def joined(cls, parts: Sequence[CodedMatrix]) -> CodedMatrix:
        """The rows of all ``parts``, one below the other, as the kind that holds them all."""
        name, k = "+".join(part.name for part in parts), parts[0].shape.k
        kind, group = common_kind(part.kind for part in parts), parts[0].group
        if any((part.shape.k, part.group) != (k, group) for part in parts):
            raise BitgenError(f"{name}: they do not share their input, or their groups")
        own = [part.as_kind(kind) for part in parts]
        starts = np.cumsum([0, *(part.shape.m for part in own)]).tolist()

        def read(begin: int, end: int) -> Codes:
            blocks = [
                part.codes(max(begin, start) - start, min(end, start + part.shape.m) - start)
                for part, start in zip(own, starts, strict=False)
                if max(begin, start) < min(end, start + part.shape.m)
            ]
            return blocks[0] if len(blocks) == 1 else joined_codes(name, blocks)

        return cls.make(name, Shape(starts[-1], k), kind, group, read)
