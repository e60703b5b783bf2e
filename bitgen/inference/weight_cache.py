"""A model's ternary matrices packed for the kernels of a library, kept on disk and mapped the next time.

A weight cache file holds what follows from a model file and a library's layouts, nothing else: its name is a
digest of the model file's fingerprint and of the layout of every matrix. It is written beside its final name
and renamed, so it is whole or not there, and it is only a cache: deleting it costs the time to pack again.

::

    pieces, each at a multiple of 64 bytes      packed weights, scales
    JSON                                        {"format": 3, "model": ..., "pieces": {name: place}}, where
                                                place is [offset, bytes, CRC-32]
    24 bytes                                    where the JSON starts, its bytes (uint64 each), "BITGENPK"
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.families.base import TERNARY, Codes
from bitgen.formats.weights import DenseMatrix, TernaryMatrix, Weights
from bitgen.inference.memory import mapping_of
from bitgen.paths import cache_dir, ensure_dir
from bitgen.progress import Progress, Report
from bitgen.runtime import Groups, KernelTable, aligned_bytes
from bitgen.spec import Shape

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Doubles: TypeAlias = NDArray[np.float64]

FORMAT = 3  # of cache files; part of their names, so files of other formats are never read
_MAGIC = b"BITGENPK"
_TAIL = 24
_ALIGN = 64
_SUFFIX = ".packed"
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
    the int8, differ for any hidden state x (docs/reference/screened-head.md).
    """

    data: NDArray[np.int8]  # (vocab, hidden)
    scale: Floats  # (vocab,)
    bound: Floats  # (vocab,)
    error: float


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache."""

    path: Path
    model: str
    bytes: int


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

    pieces = _cached(
        _key(fingerprint, "groups", weights.config.group, list(matrices)),
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
    key = _key(fingerprint, "layers", layouts)

    def make() -> Iterator[tuple[str, Bytes]]:
        if from_disk:
            _check_disk(packed_bytes(weights, table, groups))
        return _pack(matrices, table, groups, progress, lambda: release_pages(weights.embedding.data))

    pieces = _cached(
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
    return PackedModel(tuple(layers), head, None if key is None else _path(key))


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
    pieces = _cached(
        _key(fingerprint, "head", [head.type, rows, cols]),
        model,
        lambda: _quantize(head, table, progress),
        lambda found: (
            [found[n].size for n in ("data", "scale", "bound", "error")]
            == [rows * cols, rows * 4, rows * 4, 8]
        ),
    )
    return QuantizedLmHead(
        pieces["data"].view(np.int8).reshape(rows, cols),
        pieces["scale"].view(np.float32),
        pieces["bound"].view(np.float32),
        float(pieces["error"].view(np.float64)[0]),
    )


def packed_bytes(weights: Weights, table: KernelTable, groups: GroupsOf) -> int:
    """Bytes of the packed weights and scales of a model; nothing is packed."""
    return sum(
        table.packed_bytes(m.shape, groups[name]) + (0 if groups[name] else m.shape.m * 4)
        for name, m in named_matrices(weights).items()
    )


def cache_entries() -> list[CacheEntry]:
    """The files of the cache, largest first."""
    entries = []
    for path in _folder().glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError, BitgenError):
            entries.append(CacheEntry(path, _map(path).model, path.stat().st_size))
    return sorted(entries, key=lambda entry: (-entry.bytes, entry.path.name))


def check_cache() -> list[CacheEntry]:
    """Read all files of the cache whole, and delete those that are not what was written; those are returned.

    A start does not do this: it maps a file and looks at its heads alone, and pages come when they are used.
    """
    damaged = []
    for path in sorted(_folder().glob(f"*{_SUFFIX}")):
        with contextlib.suppress(OSError):
            size, model = path.stat().st_size, ""
            try:
                file = _map(path)
                model = file.model
                whole = all(zlib.crc32(data.data) == file.sums[name] for name, data in file.pieces.items())
            except BitgenError:
                whole = False
            if not whole:
                path.unlink()
                damaged.append(CacheEntry(path, model, size))
    return damaged


def clear_cache() -> int:
    """Delete all files of the cache, unfinished ones too; the bytes they had. Who has one mapped keeps it."""
    freed = 0
    for path in _folder().glob("*"):
        if path.suffix in (_SUFFIX, ".part"):
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                freed += size
    return freed


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
    """int8 rows, their scales, bounds, the relative error: as activations are quantised, a row at a time."""
    ffi, lib, context = table.native
    rows, cols = head.shape
    data, scale, bound = (
        np.empty((rows, cols), np.int8),
        np.empty(rows, np.float32),
        np.empty(rows, np.float32),
    )
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
        changed += float(squares[0].sum())
        size += float(squares[1].sum())
        if progress:
            progress(Progress("quantizing the LM head, once", end * cols, rows * cols, "bytes"))
    yield "data", data.view(np.uint8).reshape(-1)
    yield "scale", scale.view(np.uint8)
    yield "bound", bound.view(np.uint8)
    yield "error", np.array([(changed / size) ** 0.5 if size else 0.0]).view(np.uint8)


def _screen_bound(squares: Sequence[Doubles], k: int) -> Floats:
    """What times |x| bounds how far logits differ, of the squared norms of w - near, w and near, a row each.

    |w - near| + c u (|w| + |near|), u = 2^-24: a logit is rounded k / 16 times in a lane, 4 times in the sum
    of lanes and once by the scale; c = k / 16 + 8 leaves room for the rounding of these norms. Rounded up.
    """
    off, w, near = map(np.sqrt, squares)
    rounding = (-(-k // 16) + 8) * 2.0**-24
    bound = off * (1 + 1e-9) + rounding * (w + near) * 1.01
    return np.nextafter(bound.astype(np.float32), np.float32(np.inf))


# ---- the cache ----


def _folder() -> Path:
    return cache_dir() / "packed"


def _path(key: str) -> Path:
    return _folder() / f"{key}{_SUFFIX}"


def _check_disk(size: int) -> None:
    """FileError unless the cache's disk has room for a file of ``size`` bytes."""
    folder = ensure_dir(_folder())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise FileError(
            f"too little room in {folder}: packed weights take {size >> 20:,} MiB, {free >> 20:,} MiB are "
            "free; BITGEN_HOME names another place"
        )


def _key(fingerprint: str | None, *what: Any) -> str | None:
    """The name of a cache file; None where there is no fingerprint."""
    if fingerprint is None:
        return None
    return hashlib.sha256(json.dumps([FORMAT, fingerprint, *what]).encode()).hexdigest()[:32]


def _cached(
    key: str | None,
    model: str,
    make: Callable[[], Iterator[tuple[str, Bytes]]],
    is_valid: Callable[[Mapping[str, Bytes]], bool],
    *,
    must_write: bool = False,
) -> Mapping[str, Bytes]:
    """The pieces under ``key``; made, and kept if possible, where there are none or they are not valid.

    ``must_write``: they are kept, or it is a FileError.
    """
    if key is not None:
        path = _path(key)
        found = _read(path, is_valid)
        if found is None:
            with contextlib.suppress(_CannotWriteError):
                _write(path, model, make())
                found = _read(path, is_valid)
        if found is not None:
            return found
    if must_write:
        raise FileError(f"cannot write packed weights to {_folder()}, which is what runs a model from disk")
    return dict(make())


def _read(path: Path, is_valid: Callable[[Mapping[str, Bytes]], bool]) -> Mapping[str, Bytes] | None:
    try:
        pieces = _map(path).pieces
        return pieces if is_valid(pieces) else None
    except (OSError, BitgenError, KeyError):
        return None


def _is_valid(
    pieces: Mapping[str, Bytes], name: str, matrix: TernaryMatrix, groups: Groups | None, table: KernelTable
) -> bool:
    sizes = (0,) if groups else (4, 4 * matrix.shape.m)
    return table.is_packed(pieces[name], matrix.shape) and pieces[f"{name}.scale"].size in sizes


@dataclass(frozen=True)
class _File:
    """A cache file, mapped: the model's name, the pieces, the CRC-32 of each when it was written."""

    model: str
    pieces: Mapping[str, Bytes]
    sums: Mapping[str, int]


def _map(path: Path) -> _File:
    """FileError for a file that is none of the cache's."""
    other = FileError(f"{path} is not a weight cache file")
    with path.open("rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            raise other from None
    data = np.frombuffer(mapped, np.uint8)
    tail = data[-_TAIL:].tobytes()
    start, size = (int.from_bytes(tail[i : i + 8], "little") for i in (0, 8))
    if tail[16:] != _MAGIC or start + size + _TAIL != data.size:
        raise other
    try:
        header = json.loads(data[start : start + size].tobytes())
        places = {str(name): tuple(map(int, place)) for name, place in header["pieces"].items()}
        fits = all(not at % _ALIGN and at >= 0 <= n and at + n <= start for at, n, _ in places.values())
        model, known = str(header["model"]), header["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise other from None
    if not known or not fits:
        raise other
    pieces = {name: data[at : at + n] for name, (at, n, _) in places.items()}
    return _File(model, pieces, {name: crc for name, (_, _, crc) in places.items()})


class _CannotWriteError(Exception):
    """The cache file cannot be written; what it would hold can still be made."""


def _write(path: Path, model: str, pieces: Iterator[tuple[str, Bytes]]) -> None:
    """A cache file, whole or not at all. What making the pieces raises is passed on."""
    import tempfile

    try:
        folder = ensure_dir(path.parent)
        handle, name = tempfile.mkstemp(suffix=".part", dir=folder)
    except (OSError, BitgenError) as error:
        raise _CannotWriteError from error
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            _write_pieces(file, model, pieces)
        with _or_cannot_write():
            part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _write_pieces(file: BinaryIO, model: str, pieces: Iterator[tuple[str, Bytes]]) -> None:
    places: dict[str, tuple[int, int, int]] = {}
    at = 0
    for name, data in pieces:
        places[name] = (at, data.size, zlib.crc32(data.data))
        padding = bytes(-data.size % _ALIGN)
        with _or_cannot_write():
            file.write(data.data)
            file.write(padding)
        at += data.size + len(padding)
    text = json.dumps({"format": FORMAT, "model": model, "pieces": places}).encode()
    tail = at.to_bytes(8, "little") + len(text).to_bytes(8, "little") + _MAGIC
    with _or_cannot_write():
        file.write(text + tail)
        file.flush()


@contextlib.contextmanager
def _or_cannot_write() -> Iterator[None]:
    """Only what writing raises: errors of the model file that is being read are passed on."""
    try:
        yield
    except OSError as error:
        raise _CannotWriteError from error
