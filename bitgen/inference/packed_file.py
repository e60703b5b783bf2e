"""The cache of packed weights: files of named arrays, each whole or not there, mapped when a model starts.

A file holds what follows from a model file and a library's layouts, nothing else: its name is a digest of the
model file's fingerprint and of the layout of every matrix. It is only a cache: deleting it costs the time to
pack again.

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
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.paths import cache_dir, ensure_dir
from bitgen.whole import whole

Bytes: TypeAlias = NDArray[np.uint8]
Pieces: TypeAlias = Mapping[str, Bytes]

FORMAT = 3  # of cache files; part of their names, so files of other formats are never read
_MAGIC = b"BITGENPK"
_TAIL = 24
_ALIGN = 64
_SUFFIX = ".packed"


@dataclass(frozen=True)
class CacheEntry:
    """A file of the cache."""

    path: Path
    model: str
    bytes: int


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
                sound = all(zlib.crc32(data.data) == file.sums[name] for name, data in file.pieces.items())
            except BitgenError:
                sound = False
            if not sound:
                path.unlink()
                damaged.append(CacheEntry(path, model, size))
    return damaged


def clear_cache() -> int:
    """Delete all files of the cache, unfinished ones too; the bytes they had. Who has one mapped keeps it."""
    freed = 0
    for path in _folder().glob("*"):
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def _folder() -> Path:
    return cache_dir() / "packed"


def path_of(key: str) -> Path:
    return _folder() / f"{key}{_SUFFIX}"


def check_disk(size: int) -> None:
    """FileError unless the cache's disk has room for a file of ``size`` bytes."""
    folder = ensure_dir(_folder())
    free = shutil.disk_usage(folder).free
    if free < size:
        raise FileError(
            f"too little room in {folder}: packed weights take {size >> 20:,} MiB, {free >> 20:,} MiB are "
            "free; BITGEN_HOME names another place"
        )


def key_of(fingerprint: str | None, *what: Any) -> str | None:
    """The name of a cache file; None where there is no fingerprint."""
    if fingerprint is None:
        return None
    return hashlib.sha256(json.dumps([FORMAT, fingerprint, *what]).encode()).hexdigest()[:32]


def cached(
    key: str | None,
    model: str,
    make: Callable[[], Iterator[tuple[str, Bytes]]],
    is_valid: Callable[[Pieces], bool],
    *,
    must_write: bool = False,
) -> Pieces:
    """The pieces under ``key``; made, and kept if possible, where there are none or they are not valid.

    ``must_write``: they are kept, or it is a FileError.
    """
    if key is not None:
        path = path_of(key)
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


def _read(path: Path, is_valid: Callable[[Pieces], bool]) -> Pieces | None:
    try:
        pieces = _map(path).pieces
        return pieces if is_valid(pieces) else None
    except (OSError, BitgenError, KeyError):
        return None


@dataclass(frozen=True)
class _File:
    """A cache file, mapped: the model's name, the pieces, the CRC-32 of each when it was written."""

    model: str
    pieces: Pieces
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
    """A cache file, whole or not at all. What making the pieces raises is passed on: no OSErrors."""
    try:
        ensure_dir(path.parent)
    except BitgenError as error:
        raise _CannotWriteError from error
    try:
        with whole(path, synced=False, private=True) as file:
            _write_pieces(file, model, pieces)
    except OSError as error:
        raise _CannotWriteError from error


def _write_pieces(file: BinaryIO, model: str, pieces: Iterator[tuple[str, Bytes]]) -> None:
    places: dict[str, tuple[int, int, int]] = {}
    at = 0
    for name, data in pieces:
        places[name] = (at, data.size, zlib.crc32(data.data))
        at += file.write(data.data) + file.write(bytes(-data.size % _ALIGN))
    text = json.dumps({"format": FORMAT, "model": model, "pieces": places}).encode()
    file.write(text + at.to_bytes(8, "little") + len(text).to_bytes(8, "little") + _MAGIC)
