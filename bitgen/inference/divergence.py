"""How far a model's predictions are from another's over one text: KL divergence, same top tokens.

The other's logits come from the model itself, or from a file that was saved once::

    16 bytes    "BITGENLG", and the bytes of the JSON and the spaces, uint64
    JSON        {"format": 1, "vocab", "context", "windows", "rows": of each window, "ids": SHA-256}
    spaces      up to a multiple of 64 bytes
    float32     (windows, rows, vocab), the logits as they are
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.formats.source import map_file, parse_json
from bitgen.records import load

Floats: TypeAlias = NDArray[np.float32]

_MAGIC = b"BITGENLG"
_ALIGN = 64
_FORMAT = 1
_HEADER_MAX = 1 << 16


@dataclass(frozen=True)
class Windows:
    """What logits are of: ``rows`` rows of each of ``windows`` windows of ``context`` tokens of one text."""

    format: int
    vocab: int
    context: int
    windows: int
    rows: int
    ids: str  # hexadecimal SHA-256 of the token ids of all windows

    @classmethod
    def of(cls, vocab: int, context: int, windows: Sequence[Sequence[int]], rows: int) -> Windows:
        digest = hashlib.sha256(np.array(windows, "<i4").tobytes()).hexdigest()
        return cls(_FORMAT, vocab, context, len(windows), rows, digest)

    @property
    def window_bytes(self) -> int:
        return 4 * self.rows * self.vocab


class Reference(Protocol):
    """Whose predictions others are compared with."""

    def logits(self, text: str, windows: Windows) -> Iterator[Iterator[Floats]]:
        """Of each window its rows, float32 (vocab). BitgenError when they are not of the same windows."""


@dataclass(frozen=True)
class Divergence:
    """Over the positions compared so far."""

    mean: float  # of KL(reference || model), in nats
    error: float  # its standard error
    same_top: float  # share of positions where both find the same token likeliest


class Comparison:
    """Adds up how two models differ, row by row."""

    def __init__(self) -> None:
        self._sum = self._squares = 0.0
        self._same = self._count = 0

    def add(self, reference: Floats, row: Floats) -> None:
        """Logits float32 (vocab) of one position."""
        expected, found = _log_softmax(reference), _log_softmax(row)
        value = float((np.exp(expected) * (expected - found)).sum())
        self._sum += value
        self._squares += value * value
        self._same += int(reference.argmax() == row.argmax())
        self._count += 1

    @property
    def result(self) -> Divergence:
        mean = self._sum / self._count
        variance = max(0.0, self._squares / self._count - mean * mean)
        error = math.sqrt(variance / (self._count - 1)) if self._count > 1 else 0.0
        return Divergence(mean, error, self._same / self._count)


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max()
    x -= math.log(float(np.exp(x).sum()))
    return x


# ---- Files of logits ----


class LogitsWriter:
    """Writes a file of logits beside ``path``, and moves it into place when it is whole.

    A context manager; FileError when it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._left = -1  # bytes that are missing

    def __enter__(self) -> LogitsWriter:
        with self._failing():
            self._file = self._partial.open("wb")
        return self

    def begin(self, windows: Windows) -> None:
        text = json.dumps(asdict(windows)).encode()
        text += b" " * (-(len(text) + 16) % _ALIGN)
        with self._failing():
            self._file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
        self._left = windows.windows * windows.window_bytes

    def add(self, row: Floats) -> None:
        with self._failing():
            self._file.write(np.ascontiguousarray(row, "<f4").data)
        self._left -= 4 * row.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._failing():
            self._file.close()
            if self._left == 0 and kind is None:
                self._partial.replace(self._path)
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"cannot write {self._path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class SavedLogits:
    """A file of logits, mapped."""

    path: Path
    windows: Windows
    data: Floats  # (windows, rows, vocab)

    def logits(self, text: str, windows: Windows) -> Iterator[Iterator[Floats]]:  # noqa: ARG002 - Reference's
        for name in ("vocab", "context", "rows"):
            theirs, ours = getattr(self.windows, name), getattr(windows, name)
            if theirs != ours:
                raise FileError(f"{self.path} holds logits of another {name}: {theirs}, not {ours}")
        if self.windows.windows != windows.windows or self.windows.ids != windows.ids:
            raise FileError(
                f"{self.path} holds logits of another text, another number of windows "
                f"({self.windows.windows}, not {windows.windows}) or another tokenizer"
            )
        return (iter(window) for window in self.data)


def read_logits(path: Path) -> SavedLogits:
    """FileError when the file is not one that `LogitsWriter` wrote."""
    data = map_file(path)
    length = int.from_bytes(data[8:16].tobytes(), "little")
    if data[:8].tobytes() != _MAGIC or length > min(_HEADER_MAX, data.size - 16) or (16 + length) % _ALIGN:
        raise FileError(f"{path} is no file of logits")
    header: Any = parse_json(data[16 : 16 + length].tobytes(), f"the header of {path}")
    windows = load(Windows, header, str(path))
    body = data[16 + length :]
    sizes = (windows.windows, windows.rows, windows.vocab)
    if windows.format != _FORMAT or min(sizes) < 1 or math.prod(sizes) * 4 != body.size:
        raise FileError(f"{path} is damaged, or a file of logits of another version")
    return SavedLogits(path, windows, body.view("<f4").reshape(sizes))


def is_logits(path: Path) -> bool:
    """Whether it begins as a file of logits does."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def check_same(found: Windows, wanted: Windows, name: str) -> None:
    """BitgenError unless another model makes the same windows of a text."""
    if found.vocab != wanted.vocab:
        raise BitgenError(f"{name} has a vocabulary of {found.vocab}, not {wanted.vocab}")
    if found.ids != wanted.ids:
        raise BitgenError(f"{name} has another tokenizer: it makes other tokens of this text")
