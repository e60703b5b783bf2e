"""A model on disk as all readers give it: its config, weights, tokenizer and what identifies it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bitgen.errors import FileError
from bitgen.formats.config import ModelConfig
from bitgen.formats.weights import Weights
from bitgen.tokenizer.data import TokenizerData

_BLOCKS, _BLOCK = 64, 1 << 16  # of a file, for a digest of its content


@dataclass(frozen=True)
class Fingerprint:
    """What a cache made from a file is kept under: another or a changed file has another fingerprint."""

    size: int  # bytes, of all files
    mtime_ns: int  # the latest
    header: str  # hexadecimal SHA-256 of all headers

    @property
    def key(self) -> str:
        """32 hexadecimal digits, for file names."""
        return hashlib.sha256(f"{self.size} {self.mtime_ns} {self.header}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class TensorSummary:
    """One tensor as the file stores it, for `bitgen inspect`."""

    name: str
    type: str
    shape: tuple[int, ...]
    size: int | None  # bytes


@dataclass(frozen=True)
class ModelFile:
    """A model on disk. Opening checks its structure; values are read when they are asked for."""

    path: Path
    container: str  # "gguf" or "safetensors"
    config: ModelConfig
    weights: Weights
    metadata: Mapping[str, Any]  # of the GGUF file, or config.json
    tensors: tuple[TensorSummary, ...]
    fingerprint: Fingerprint
    read_tokenizer: Any = field(repr=False)  # () -> TokenizerData

    @cached_property
    def tokenizer_data(self) -> TokenizerData:
        """FileError when the tokenizer's data is missing or damaged."""
        data: TokenizerData = self.read_tokenizer()
        return data


def fingerprint_of(paths: list[Path], headers: list[Any]) -> Fingerprint:
    """``headers``: the bytes that describe the content of each file, bytes-like."""
    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise FileError(f"cannot read {error.filename}: {error.strerror or error}") from error
    digest = hashlib.sha256()
    for header in headers:
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
    return Fingerprint(sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats), digest.hexdigest())


def content_digest(path: Path, *details: str) -> str:
    """SHA-256 of ``details`` and of the bytes of a model (samples): not of its name, place or time.

    ``path`` is a file, or a folder whose files count.
    """
    digest = hashlib.sha256(" ".join(details).encode())
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    try:
        for file in files:
            size = file.stat().st_size
            digest.update(size.to_bytes(8, "little"))
            with file.open("rb") as data:
                for i in range(_BLOCKS):
                    data.seek(i * size // _BLOCKS)
                    digest.update(data.read(_BLOCK))
    except OSError as error:
        raise FileError(f"cannot read {error.filename}: {error.strerror or error}") from error
    return digest.hexdigest()
