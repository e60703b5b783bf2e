"""The safetensors container, one file or many: a bounded reader over the mapped files.

A file is 8 bytes (the header's length), a JSON header {name: {dtype, shape, data_offsets}}, the data. A
folder of many has model.safetensors.index.json, whose weight_map maps each tensor to a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from bitgen.errors import BitgenError, FileError
from bitgen.formats.source import Bytes, map_file, parse_json, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER_MAX = 1 << 25  # bytes; a model of 100,000 tensors has a tenth of it
_FILES_MAX = 1 << 10
_DIMS_MAX = 8

_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


# Of the format too, and in no model that bitgen runs.
_OTHERS = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its type as the file names it, in lower case, and a read-only view of its bytes."""

    name: str
    type: str  # f32, f16, bf16, u8, ...
    shape: tuple[int, ...]
    data: Bytes


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. FileError when it breaks a rule of the format."""
    data = map_file(path)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > len(data) - 8:
        raise _damaged(path, "it ends inside its header; was the download cut short?")
    if length > _HEADER_MAX:
        raise _damaged(path, f"its header has {length} bytes")
    header = parse_json(data[8 : 8 + length].tobytes(), f"the header of {path}")
    body = data[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _tensor(path, name, entry, body)
    _check_apart(path, tensors, body)
    return tensors


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of model.safetensors, or of the files that the index names."""
    if (folder / SINGLE).is_file():
        return read_safetensors(folder / SINGLE)
    if not (folder / INDEX).is_file():
        raise FileError(f"the folder {folder} holds no weights: neither {SINGLE} nor {INDEX}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(f, str) for f in weight_map.values()):
        raise FileError(f"{folder / INDEX} has no weight_map from tensors to files")
    files: dict[str, dict[str, StoredTensor]] = {}
    tensors = {}
    for name, file in weight_map.items():
        if file not in files:
            # A name, never a path: an index must not reach outside its folder.
            if Path(file).name != file or not file.endswith(".safetensors") or len(files) >= _FILES_MAX:
                raise FileError(f"{folder / INDEX} names the file {file[:60]!r}")
            files[file] = read_safetensors(folder / file)
        if name not in files[file]:
            raise FileError(f"{folder / file} lacks the tensor {name[:100]!r} of the index")
        tensors[name] = files[file][name]
    return tensors


def _damaged(path: Path, what: str) -> BitgenError:
    return FileError(f"{path} is damaged or no safetensors file: {what}")


def _tensor(path: Path, name: str, entry: object, body: Bytes) -> StoredTensor:
    short = name[:100]
    if not isinstance(entry, dict):
        raise _damaged(path, f"{short!r} is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype in _OTHERS:
        raise FileError(f"{path}: {short!r} is stored as {dtype}, which bitgen does not read")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise _damaged(path, f"{short!r} has the type {str(dtype)[:20]!r}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(shape) > _DIMS_MAX or len(offsets) != 2:
        raise _damaged(path, f"{short!r} has the shape {shape!r:.60} at {offsets!r:.60}")
    begin, end = offsets
    if not begin <= end <= len(body):
        raise _damaged(path, f"{short!r} ends after the file; was the download cut short?")
    if math.prod(shape) * _BYTES[dtype] != end - begin:
        raise _damaged(path, f"{short!r} of shape {shape} has {end - begin} bytes")
    return StoredTensor(name, dtype.lower(), tuple(shape), body[begin:end])


def _is_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value
    )


def _check_apart(path: Path, tensors: Mapping[str, StoredTensor], body: Bytes) -> None:
    """No two tensors share bytes: the format forbids it, and damage shows there."""
    start = body.__array_interface__["data"][0]
    spans = sorted(
        (t.data.__array_interface__["data"][0] - start, t.data.size, t.name) for t in tensors.values()
    )
    for (begin, size, name), (after, _, other) in itertools.pairwise(spans):
        if begin + size > after:
            raise _damaged(path, f"{name[:100]!r} and {other[:100]!r} overlap")
