"""The GGUF container, version 2 and 3: a bounded reader over the mapped file, and a writer.

The reader trusts nothing: every count, length and offset is compared with the size of the file before it is
used, names are unique, tensors lie inside the file and do not overlap. Opening reads the header only, and of
arrays only where they end; values are decoded when asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.formats.quants import DENSE, OTHER, BlockType
from bitgen.formats.source import Bytes, map_file
from bitgen.formats.ternary import I2_S_ID, TERNARY, i2_s_bytes
from bitgen.progress import Progress, Report
from bitgen.whole import whole

MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensor data, where the file does not say otherwise
_NAME_MAX = 1 << 12  # bytes of a key or of a tensor's name
_STRING_MAX = 1 << 26  # bytes of a string; the largest are tokenizer.json texts of about 10 MB
_STRINGS_MAX = 1 << 22  # strings of one array; the largest vocabularies have 2^18, with twice as many merges
_HEADER_MAX = 1 << 29  # bytes before the tensor data
_DIMS_MAX = 4

BY_ID: Mapping[int, BlockType] = {t.id: t for t in (*DENSE.values(), *TERNARY.values(), *OTHER.values())}
# Types of forks, of whose sizes nothing is said here: bitnet.cpp's tiled packings, ik_llama.cpp's rows with a
# scale in front.
FORKS = {37: "i8_s", 38: "tl1", 134: "iq1_bn", 135: "iq2_bn", 335: "iq2_bn_r4"}
# Three layouts go by the number 42, which llama.cpp gave to the first of them.
_LAYOUTS_OF_42 = tuple(TERNARY[name] for name in ("q2_0", "pq2_0", "stq1_0"))

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL = 7
_LENGTH = struct.Struct("<Q")


def damaged(path: Path, what: str) -> BitgenError:
    return FileError(f"{path} is damaged or no GGUF file: {what}")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file. ``shape`` in numpy's order: (rows, cols) of a matrix."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int  # of its bytes in the file
    size: int | None  # bytes, None for a type whose size is not known here

    @property
    def type(self) -> str:
        """The type's name in lower case, ``type 99`` for one that is not known."""
        if self.type_id in BY_ID:
            return BY_ID[self.type_id].name
        return "i2_s" if self.type_id == I2_S_ID else FORKS.get(self.type_id, f"type {self.type_id}")

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Value:
    """Where a metadata value lies: an array when ``count`` is not None."""

    kind: int
    offset: int
    count: int | None


class Metadata(Mapping[str, Any]):
    """Key -> bool, int, float, str, numpy array (of numbers) or tuple of str, decoded when asked for."""

    def __init__(self, data: Bytes, values: dict[str, _Value]) -> None:
        self._data = data
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if value.count is None:
            return next(self._strings(value.offset, 1)) if value.kind == _STRING else self._scalar(value)
        if value.kind == _STRING:
            return tuple(self._strings(value.offset, value.count))
        dtype = np.dtype(_SCALARS[value.kind])
        raw = self._data[value.offset : value.offset + value.count * dtype.itemsize]
        array = raw.tobytes()  # a copy: the bytes in the file may be unaligned
        return (
            np.frombuffer(array, dtype).astype(bool) if value.kind == _BOOL else np.frombuffer(array, dtype)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def array_length(self, key: str) -> int | None:
        """The number of elements of an array, None for a single value; nothing is decoded."""
        return self._values[key].count

    def _scalar(self, value: _Value) -> bool | int | float:
        dtype = np.dtype(_SCALARS[value.kind])
        raw = self._data[value.offset : value.offset + dtype.itemsize].tobytes()
        number = np.frombuffer(raw, dtype)[0].item()
        return bool(number) if value.kind == _BOOL else number

    def _strings(self, offset: int, count: int) -> Iterator[str]:
        data = self._data.data  # a memoryview: vocabularies have hundreds of thousands of strings
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            end = offset + 8 + unpack(data, offset)[0]
            # surrogateescape: a token may be a piece of a character, and every byte must survive.
            yield str(data[offset + 8 : end], "utf-8", "surrogateescape")
            offset = end


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file, mapped read-only."""

    path: Path
    version: int
    metadata: Metadata
    tensors: Mapping[str, TensorInfo]
    data: Bytes  # the whole file
    header_bytes: int  # everything before the tensor data

    def bytes_of(self, tensor: TensorInfo) -> Bytes:
        """The bytes of a tensor: a read-only view of the mapped file."""
        if tensor.size is None:
            raise FileError(f"{self.path}: bitgen cannot read {tensor.name} of type {tensor.type}")
        return self.data[tensor.offset : tensor.offset + tensor.size]


def read_gguf(path: Path | str) -> GgufFile:
    """Open a GGUF file. FileError when it cannot be read or breaks a rule of the format."""
    file = Path(path)
    data = map_file(file)
    if data[:4].tobytes() != MAGIC:
        folder = ": of a Hugging Face model give the folder" if file.suffix == ".safetensors" else ""
        raise FileError(f"{file} is no GGUF file: it does not start with the letters GGUF{folder}")
    cursor = _Cursor(file, data, 4)
    version = cursor.number(4)
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian GGUF" if swapped in (1, 2, 3) else f"GGUF version {version}"
        raise FileError(f"{file} is {what}; bitgen reads little-endian versions 2 and 3")
    tensor_count = cursor.count(cursor.number(8), 8 + 4 + 8 + 4 + 8, "tensors")
    value_count = cursor.count(cursor.number(8), 8 + 4 + 1, "metadata values")
    values: dict[str, _Value] = {}
    for _ in range(value_count):
        key = cursor.name("metadata key")
        if key in values:
            raise damaged(file, f"the metadata key {key!r} is duplicated")
        values[key] = cursor.value(key)
    metadata = Metadata(data, values)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise damaged(file, f"general.alignment is {alignment!r}")
    infos = [cursor.tensor() for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    tensors = _place(file, infos, start, len(data), alignment)
    tensors = _decide_42(file, tensors, len(data), alignment)
    return GgufFile(file, version, metadata, tensors, data, min(start, len(data)))


def _place(
    path: Path, infos: Sequence[TensorInfo], start: int, end: int, alignment: int
) -> dict[str, TensorInfo]:
    """The tensors with offsets in the file, checked: inside the file, apart, with names of their own."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise damaged(path, f"the tensor {info.name} is duplicated")
        if info.offset % alignment:
            raise damaged(path, f"the tensor {info.name} is not aligned to {alignment} bytes")
        offset = start + info.offset
        if offset + (info.size or 0) > end:
            raise damaged(path, f"the tensor {info.name} ends after the file; was the download cut short?")
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type_id, offset, info.size)
    previous = None
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if previous is not None and previous.offset + (previous.size or 0) > tensor.offset:
            raise damaged(path, f"the tensors {previous.name} and {tensor.name} overlap")
        previous = tensor
    return tensors


def _decide_42(path: Path, tensors: dict[str, TensorInfo], end: int, alignment: int) -> dict[str, TensorInfo]:
    """Tensors of type 42 with the type whose layout they have, by the bytes to the next tensor.

    FileError unless exactly one layout fits all of them.
    """
    places = sorted(tensors.values(), key=lambda t: t.offset)
    ends = [t.offset for t in places[1:]] + [end]
    spans = {
        tensor.name: (after - tensor.offset, tensor is places[-1])  # to the next tensor, or to the end
        for tensor, after in zip(places, ends, strict=False)
        if tensor.type_id == _LAYOUTS_OF_42[0].id
    }
    if not spans:
        return tensors

    def size(layout: BlockType, info: TensorInfo) -> int:
        return info.values // layout.block * layout.block_bytes

    def fits(layout: BlockType, name: str) -> bool:
        span, last = spans[name]
        used = size(layout, tensors[name])
        if tensors[name].shape[-1] % layout.block:
            return False
        # A file may end with its last tensor, without the padding.
        return -(-used // alignment) * alignment == span or (last and used == span)

    found = [layout for layout in _LAYOUTS_OF_42 if all(fits(layout, name) for name in spans)]
    if len(found) != 1:
        name, (span, _) = next(iter(spans.items()))
        known = ", ".join(f"{t.name.upper()} (blocks of {t.block})" for t in _LAYOUTS_OF_42)
        what = "none of them fits all" if not found else "more than one fits all"
        raise FileError(
            f"{path}: the layout of tensors of type 42 cannot be told: {known} go by that number, and {what} "
            f"of its {len(spans)} tensors ({name} has {tensors[name].values} weights in {span} bytes)"
        )
    (layout,) = found
    return {
        name: replace(info, type_id=layout.id, size=size(layout, info)) if name in spans else info
        for name, info in tensors.items()
    }


class _Cursor:
    """Reads the header forward, never past the end of the file."""

    def __init__(self, path: Path, data: Bytes, at: int) -> None:
        self._path = path
        self._data = data.data  # a memoryview: slices of it cost a fifth of an array's
        self._end = min(len(data), _HEADER_MAX)
        self._whole = len(data) <= _HEADER_MAX
        self.at = at

    def take(self, size: int) -> memoryview:
        if size > self._end - self.at:
            what = "the file ends inside its header" if self._whole else "its header has more than 512 MB"
            raise damaged(self._path, what)
        piece = self._data[self.at : self.at + size]
        self.at += size
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def count(self, count: int, least: int, noun: str) -> int:
        """``count`` things of at least ``least`` bytes each must fit into the rest of the file."""
        if count * least > self._end - self.at:
            raise damaged(self._path, f"{count} {noun} do not fit into it")
        return count

    def name(self, noun: str) -> str:
        length = self.number(8)
        if length > _NAME_MAX:
            raise damaged(self._path, f"a {noun} of {length} bytes")
        text = bytes(self.take(length)).decode("utf-8", "replace")
        if not text.isprintable() or "\ufffd" in text:
            raise damaged(self._path, f"a {noun} is no printable text")
        return text

    def value(self, key: str) -> _Value:
        kind = self.number(4)
        if kind != _ARRAY:
            offset = self.at
            self._skip(kind, key)
            return _Value(kind, offset, None)
        kind = self.number(4)
        count = self.number(8)
        if kind == _ARRAY:
            raise damaged(self._path, f"{key} is an array of arrays, which no model has")
        if kind == _STRING:
            if count > _STRINGS_MAX:
                raise damaged(self._path, f"{key} has {count} strings")
            self.count(count, 8, f"strings of {key}")
            offset = self.at
            self._skip_strings(count, key)
            return _Value(kind, offset, count)
        size = self._size_of(kind, key)
        self.count(count, size, f"elements of {key}")
        offset = self.at
        self.take(count * size)
        return _Value(kind, offset, count)

    def tensor(self) -> TensorInfo:
        """A tensor's info with its offset still counted from the start of the data."""
        name = self.name("tensor name")
        dims_count = self.number(4)
        if not 1 <= dims_count <= _DIMS_MAX:
            raise damaged(self._path, f"the tensor {name} has {dims_count} dimensions")
        dims = tuple(self.number(8) for _ in range(dims_count))
        type_id = self.number(4)
        offset = self.number(8)
        if any(d == 0 for d in dims) or math.prod(dims) >= 1 << 48:
            raise damaged(self._path, f"the tensor {name} has the sizes {dims}")
        return TensorInfo(name, dims[::-1], type_id, offset, self._tensor_bytes(name, dims, type_id))

    def _tensor_bytes(self, name: str, dims: tuple[int, ...], type_id: int) -> int | None:
        values = math.prod(dims)
        if type_id == I2_S_ID:
            return i2_s_bytes(values)
        kind = BY_ID.get(type_id)
        if kind is None or kind.name == "mxfp4" or kind is _LAYOUTS_OF_42[0]:
            return None  # 39 is TL2 in bitnet.cpp's files; of 42 see _decide_42
        if dims[0] % kind.block:
            raise damaged(self._path, f"rows of {dims[0]} in {name} are no whole blocks of {kind.name}")
        return values // kind.block * kind.block_bytes

    def _skip(self, kind: int, key: str) -> None:
        if kind == _STRING:
            self._skip_strings(1, key)
        else:
            self.take(self._size_of(kind, key))

    def _skip_strings(self, count: int, key: str) -> None:
        """Written for speed: vocabularies have hundreds of thousands of strings."""
        data, end, at = self._data, self._end, self.at
        unpack = _LENGTH.unpack_from
        for _ in range(count):
            if at + 8 > end:
                self.take(end)  # raises
            (length,) = unpack(data, at)
            if length > _STRING_MAX:
                raise damaged(self._path, f"{key} has a string of {length} bytes")
            at += 8 + length
        if at > end:
            self.take(end + 1)  # raises
        self.at = at

    def _size_of(self, kind: int, key: str) -> int:
        if kind not in _SCALARS:
            raise damaged(self._path, f"{key} has the unknown type {kind}")
        return np.dtype(_SCALARS[kind]).itemsize


# ---- Writing -------------------------------------------------------------------


@dataclass(frozen=True)
class U32:
    """An int that a file stores in 32 bits, as GGUF's readers expect of sizes and token ids."""

    value: int


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. ``chunks()`` yields its ``size`` bytes in order, a bounded piece at a time."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    size: int
    chunks: Callable[[], Iterable[Bytes]]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    progress: Report | None = None,
) -> None:
    """Write a GGUF file, version 3, beside ``path`` and move it into place when it is whole.

    ``metadata``: bool, int (signed 64 bits), U32, float (32 bits), str, numpy arrays of numbers or bool,
    lists of str. ``progress`` counts bytes of tensors. FileError when it cannot be written.
    """
    try:
        with whole(path, synced=False) as file:
            _write(file, path.name, metadata, tensors, progress)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def _write(
    file: BinaryIO,
    name: str,
    metadata: Mapping[str, Any],
    tensors: Sequence[NewTensor],
    progress: Report | None,
) -> None:
    header = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        header += [_string_bytes(key), _value_bytes(value)]
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        header += [
            _string_bytes(tensor.name),
            struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type_id, offset),
        ]
        offset += -(-tensor.size // ALIGNMENT) * ALIGNMENT
    start = b"".join(header)
    file.write(start + bytes(-len(start) % ALIGNMENT))
    total = sum(tensor.size for tensor in tensors)
    done = 0
    for tensor in tensors:
        written = 0
        for chunk in tensor.chunks():
            file.write(np.ascontiguousarray(chunk).data)
            written += chunk.nbytes
            if progress is not None:
                progress(Progress(f"writing {name}", done + written, total, "bytes"))
        if written != tensor.size:
            raise BitgenError(f"{tensor.name}: {written} bytes instead of {tensor.size}")
        file.write(bytes(-written % ALIGNMENT))
        done += written


def _string_bytes(text: str) -> bytes:
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON can spell it
        raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def _value_bytes(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, U32):
        return struct.pack("<II", 4, value.value)
    if isinstance(value, int):
        return struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string_bytes(value)
    if isinstance(value, np.ndarray):
        kinds = (k for k, name in _SCALARS.items() if np.dtype(name) == value.dtype and k != _BOOL)
        kind = _BOOL if value.dtype == bool else next(kinds)
        return struct.pack("<IIQ", _ARRAY, kind, value.size) + value.tobytes()
    strings = [_string_bytes(text) for text in value]
    return struct.pack("<IIQ", _ARRAY, _STRING, len(strings)) + b"".join(strings)
