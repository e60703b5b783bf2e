"""A model's ternary matrices packed for the kernels of a library, and its LM head as int8.

Both take seconds to minutes, so they are kept on disk and mapped the next time (`packed_file`).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.families.base import COMMON_GROUP, TERNARY, Codes
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.weights import DenseMatrix, Weights
from bitgen.inference.memory import mapping_of
from bitgen.inference.packed_file import Bytes, Pieces, cached, check_disk, key_of, path_of
from bitgen.progress import Progress, Report
from bitgen.runtime import Groups, KernelTable, aligned_bytes
from bitgen.spec import Shape

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]

# Weights decoded at once: 8 MiB as int8, so that what is not yet packed stays small beside a model. Rows come
# in multiples of 256, which every layout's row block divides.
_SLAB = 1 << 23
_SLAB_ROWS = 256


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix as the kernels read it: ``data`` uint8, 64-byte aligned; ``scale`` float32 (m,) or (1,).

    Scales of groups lie among the data, and ``scale`` is empty.
    """

    shape: Shape
    data: Bytes
    scale: Floats
    group: int


PackedLayer: TypeAlias = Mapping[str, PackedMatrix]  # by the roles of the config's matmuls


@dataclass(frozen=True)
class PackedModel:
    """All ternary matrices of a model."""

    layers: tuple[PackedLayer, ...]
    head: PackedMatrix | None  # None: the head is in a format of floats
    path: Path | None = None  # the file they are mapped from


@dataclass(frozen=True)
class QuantizedLmHead:
    """An LM head as int8: w is about ``data * scale[:, None]``.

    ``error`` is the root mean square of what rounding changed, relative to that of the weights: logits are
    off by about this share of their spread. ``bound * |x|`` is more than the two logits of a row, of w and of
    the int8, differ for any hidden state x, and ``norm * |x - y|`` more than those of the int8 by x and by y
    (docs/reference/screened-head.md).
    """

    data: NDArray[np.int8]  # (vocab, hidden)
    scale: Floats  # (vocab,)
    bound: Floats  # (vocab,)
    norm: Floats  # (vocab,) at least the norm of data * scale
    error: float


_PACKING = "packing weights for these kernels, once"
_HEAD = "head"

_Slab: TypeAlias = "tuple[NDArray[np.int8], Floats | None] | Codes"  # rows with the scales of their groups
GroupsOf: TypeAlias = Mapping[str, Groups | None]  # by the name of a matrix; None: it has a scale a row


def find_groups(weights: Weights, fingerprint: str | None = None) -> GroupsOf:
    """How the scales of each matrix run. Where finding it may read all of a model the cache keeps it."""
    matrices = named_matrices(weights)
    if all(matrix.groups is None for matrix in matrices.values()):
        fingerprint = None

    def make() -> Iterator[tuple[str, Bytes]]:
        found = [_groups_of(m, weights.group_of(m)) for m in matrices.values()]
        numbers = [(0, 0) if g is None else (g.group, int(g.half)) for g in found]
        yield "groups", np.array(numbers, np.int32).view(np.uint8).reshape(-1)

    pieces = cached(
        key_of(fingerprint, "groups", weights.config.group, COMMON_GROUP, list(matrices)),
        weights.config.name or weights.config.architecture,
        make,
        lambda found: found["groups"].size == 8 * len(matrices),
    )
    numbers = pieces["groups"].view(np.int32).reshape(-1, 2).tolist()
    return {
        name: Groups(group, bool(half), matrices[name].weights) if group else None
        for name, (group, half) in zip(matrices, numbers, strict=True)
    }


def _groups_of(matrix: TernaryMatrix, group: int) -> Groups | None:
    """Those of a matrix that runs in groups of ``group``: half floats where all its scales are."""
    if not group:
        return None
    m, step = matrix.shape.m, _rows_at_once(matrix.shape)
    if matrix.weights != TERNARY:
        rows = (matrix.coded(begin, min(begin + step, m), group) for begin in range(0, m, step))
        values = (one for part in rows for one in (part.scales, part.offsets) if one is not None)
        half = all(Groups.of(one, group).half for one in values)
        return Groups(group, half, matrix.weights)
    half = all(
        Groups.of(matrix.scales(begin, min(begin + step, m), group), group).half
        for begin in range(0, m, step)
    )
    return Groups(group, half)


def named_matrices(weights: Weights) -> dict[str, TernaryMatrix]:
    """All ternary matrices by their names in the cache."""
    matrices = {
        f"{i}.{role}": matrix
        for i, layer in enumerate(weights.layers)
        for role, matrix in layer.as_run(weights.config).items()
    }
    return matrices if weights.ternary_head is None else {**matrices, _HEAD: weights.ternary_head}


def pack_model(
    weights: Weights,
    table: KernelTable,
    groups: GroupsOf,
    fingerprint: str | None = None,
    progress: Report | None = None,
    *,
    from_disk: bool = False,
) -> PackedModel:
    """The packed matrices of a model: mapped from the cache, or packed now and kept there.

    ``fingerprint`` identifies the model file; None: nothing is read from the cache or written to it. Where
    the cache cannot be written (a full disk, a read-only home) the packed weights stay in memory;
    ``from_disk``: there would be no room for them, and it is a FileError.
    """
    matrices = named_matrices(weights)
    layouts = {
        name: (m.shape.name, table.layout_name(m.shape, groups[name]), _scale_type(groups[name]))
        for name, m in matrices.items()
    }
    key = key_of(fingerprint, "layers", layouts)

    def make() -> Iterator[tuple[str, Bytes]]:
        if from_disk:
            check_disk(packed_bytes(weights, table, groups))
        return _pack(matrices, table, groups, progress, lambda: release_pages(weights.embedding.data))

    pieces = cached(
        key,
        weights.config.name or weights.config.architecture,
        make,
        lambda found: all(_is_valid(found, name, m, groups[name], table) for name, m in matrices.items()),
        must_write=from_disk,
    )

    def made(name: str) -> PackedMatrix:
        used = groups[name]
        scale = pieces[f"{name}.scale"].view(np.float32)
        return PackedMatrix(matrices[name].shape, pieces[name], scale, used.group if used else 0)

    roles = [matmul.role for matmul in weights.config.layer_matmuls]
    layers = ({role: made(f"{i}.{role}") for role in roles} for i in range(len(weights.layers)))
    head = made(_HEAD) if _HEAD in matrices else None
    return PackedModel(tuple(layers), head, None if key is None else path_of(key))


def pack_matrix(matrix: TernaryMatrix, table: KernelTable, group: int) -> PackedMatrix:
    """One matrix packed in memory, in groups of ``group`` (0: none)."""
    used = _groups_of(matrix, group)
    pieces = dict(_pack({"": matrix}, table, {"": used}, None, lambda: None))
    return PackedMatrix(
        matrix.shape, pieces[""], pieces[".scale"].view(np.float32), used.group if used else 0
    )


def _scale_type(groups: Groups | None) -> str:
    return "a row" if groups is None else "f16" if groups.half else "f32"


def quantize_lm_head(
    head: DenseMatrix,
    table: KernelTable,
    fingerprint: str | None = None,
    progress: Report | None = None,
    model: str = "",
) -> QuantizedLmHead:
    """An LM head as int8 with a scale a row, from the cache or made now; the arguments of `pack_model`."""
    rows, cols = head.shape
    pieces = cached(
        key_of(fingerprint, "head", [head.type, rows, cols]),
        model,
        lambda: _quantize(head, table, progress),
        lambda found: (
            [found[n].size for n in ("data", "scale", "bound", "norm", "error")]
            == [rows * cols, rows * 4, rows * 4, rows * 4, 8]
        ),
    )
    return QuantizedLmHead(
        pieces["data"].view(np.int8).reshape(rows, cols),
        pieces["scale"].view(np.float32),
        pieces["bound"].view(np.float32),
        pieces["norm"].view(np.float32),
        float(pieces["error"].view(np.float64)[0]),
    )


def packed_bytes(weights: Weights, table: KernelTable, groups: GroupsOf) -> int:
    """Bytes of the packed weights and scales of a model; nothing is packed."""
    return sum(
        table.packed_bytes(m.shape, groups[name]) + (0 if groups[name] else m.shape.m * 4)
        for name, m in named_matrices(weights).items()
    )


# ---- making the pieces ----


def _pack(
    matrices: Mapping[str, TernaryMatrix],
    table: KernelTable,
    groups: GroupsOf,
    progress: Report | None,
    release: Callable[[], None],
) -> Iterator[tuple[str, Bytes]]:
    """Packed weights and scales of each matrix, in order. Decoding runs ahead, on threads of its own."""
    from concurrent.futures import ThreadPoolExecutor  # 4 ms that a model that was packed need not pay

    total = sum(table.packed_bytes(m.shape, groups[name]) for name, m in matrices.items())
    done = 0
    with ThreadPoolExecutor(max(1, table.threads)) as pool:
        for name, matrix in matrices.items():
            used = groups[name]
            packed = aligned_bytes(table.packed_bytes(matrix.shape, used))
            scale = pool.submit(_row_scales, matrix, used)
            for begin, rows in _slabs(matrix, used, pool, ahead=table.threads):
                if isinstance(rows, Codes) and used is not None:
                    end = begin + len(rows.codes)
                    table.pack_codes(rows, begin, matrix.shape, packed, used)
                elif not isinstance(rows, Codes):
                    end = begin + len(rows[0])
                    table.pack_rows(rows[0], begin, matrix.shape, packed, used, rows[1])
                if progress:
                    share = end / matrix.shape.m
                    progress(Progress(_PACKING, done + packed.size * share, total, "bytes"))
            done += packed.size
            yield name, packed
            yield f"{name}.scale", scale.result().view(np.uint8)
            release()


def _row_scales(matrix: TernaryMatrix, groups: Groups | None) -> Floats:
    return np.empty(0, np.float32) if groups else matrix.scale


def release_pages(data: Bytes) -> None:
    """Let go of the pages of a mapped file that were read so far, if ``data`` is a view of one.

    They stay in the system's cache of files; without this a model file that was read once, to pack its
    weights, would count as this process's memory for as long as it runs.
    """
    file = mapping_of(data)
    if file is not None and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


def _rows_at_once(shape: Shape) -> int:
    return max(1, _SLAB // (shape.k * _SLAB_ROWS)) * _SLAB_ROWS


def _slabs(
    matrix: TernaryMatrix, groups: Groups | None, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[int, _Slab]]:
    """(first row, rows) of all rows, decoded ``ahead`` slabs before."""
    m, step = matrix.shape.m, _rows_at_once(matrix.shape)
    begins = list(range(0, m, step))
    pending: list[Future[_Slab]] = []

    def decode(begin: int, end: int) -> _Slab:
        if groups and matrix.weights != TERNARY:
            return matrix.coded(begin, end, groups.group)
        scales = np.ascontiguousarray(matrix.scales(begin, end, groups.group)) if groups else None
        return np.ascontiguousarray(matrix.rows(begin, end)), scales

    for i, begin in enumerate(begins):
        while len(pending) <= ahead and i + len(pending) < len(begins):
            low = begins[i + len(pending)]
            pending.append(pool.submit(decode, low, min(low + step, m)))
        yield begin, pending.pop(0).result()


def _quantize(head: DenseMatrix, table: KernelTable, progress: Report | None) -> Iterator[tuple[str, Bytes]]:
    """int8 rows, scales, bounds, norms, the relative error: as activations are quantised, a row at a time."""
    ffi, lib, context = table.native
    rows, cols = head.shape
    data = np.empty((rows, cols), np.int8)
    scale, bound, norm = (np.empty(rows, np.float32) for _ in range(3))
    step = max(1, (1 << 22) // cols)
    changed = size = 0.0
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        w = np.ascontiguousarray(head.rows(begin, end))
        code = lib.bitgen_quantize(
            context,
            ffi.from_buffer("float[]", w),
            end - begin,
            cols,
            ffi.from_buffer("int8_t[]", data[begin:end]),
            ffi.from_buffer("float[]", scale[begin:end]),
        )
        if code == lib.BITGEN_ERROR_NOT_FINITE:
            raise FileError(f"{head.name} holds NaN or infinity; the file is damaged")
        table.check(code)
        w = w.astype(np.float64)
        near = data[begin:end] * scale[begin:end, None].astype(np.float64)
        squares = [np.square(values).sum(axis=1) for values in (w - near, w, near)]
        bound[begin:end] = _screen_bound(squares, cols)
        norm[begin:end] = _at_least(np.sqrt(squares[2]) * (1 + 1e-9))
        changed += float(squares[0].sum())
        size += float(squares[1].sum())
        if progress:
            progress(Progress("quantizing the LM head, once", end * cols, rows * cols, "bytes"))
    yield "data", data.view(np.uint8).reshape(-1)
    yield "scale", scale.view(np.uint8)
    yield "bound", bound.view(np.uint8)
    yield "norm", norm.view(np.uint8)
    yield "error", np.array([(changed / size) ** 0.5 if size else 0.0]).view(np.uint8)


def _screen_bound(squares: Sequence[Doubles], k: int) -> Floats:
    """What times |x| bounds how far logits differ, of the squared norms of w - near, w and near, a row each.

    |w - near| + c u (|w| + |near|), u = 2^-24: a logit is rounded k / 16 times in a lane, 4 times in the sum
    of lanes and once by the scale; c = k / 16 + 8 leaves room for the rounding of these norms. Rounded up.
    """
    off, w, near = map(np.sqrt, squares)
    rounding = (-(-k // 16) + 8) * 2.0**-24
    bound = off * (1 + 1e-9) + rounding * (w + near) * 1.01
    return _at_least(bound)


def _at_least(values: Doubles) -> Floats:
    return np.nextafter(values.astype(np.float32), np.float32(np.inf))


def _is_valid(
    pieces: Pieces, name: str, matrix: TernaryMatrix, groups: Groups | None, table: KernelTable
) -> bool:
    sizes = (0,) if groups else (4, 4 * matrix.shape.m)
    return table.is_packed(pieces[name], matrix.shape) and pieces[f"{name}.scale"].size in sizes
