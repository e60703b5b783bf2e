"""What all readers of files share: mapped and bounded files, JSON, typed look-ups that name their key."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError

Bytes: TypeAlias = NDArray[np.uint8]

FILE_MAX = 1 << 26  # bytes of a file that is read whole; the largest are tokenizer.json of about 10 MB
_SHOWN = 40  # characters of a wrong value


def map_file(path: Path) -> Bytes:
    """The bytes of a file, mapped read-only. FileError when it cannot be."""
    try:
        if not path.is_file():
            found = (
                "is a folder" if path.is_dir() else "does not exist" if not path.exists() else "is no file"
            )
            raise FileError(f"{path} {found}")
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise FileError(f"{path} is empty")
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise FileError(f"cannot read {path}: {reason}") from error


def read_bounded(path: Path, why: str = "") -> bytes:
    """The content of a file of at most FILE_MAX bytes; ``why`` says what it is needed for."""
    try:
        if not path.is_file():
            raise FileError(f"{path} is missing{why}")
        if path.stat().st_size > FILE_MAX:
            raise FileError(f"{path} has more than {FILE_MAX >> 20} MB")
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object a JSON file holds. FileError when it is too large, damaged or no object."""
    return parse_json(read_bounded(path), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise FileError(f"{where} holds no valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise FileError(f"{where} holds no JSON object")
    return data


def short(value: object) -> str:
    """A wrong value as a message shows it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class Settings:
    """Typed look-ups of what a file says about its model; every error names file and key.

    ``prefix`` goes in front of every key: GGUF's keys start with the architecture.
    """

    def __init__(self, where: object, data: Mapping[str, Any], prefix: str = "") -> None:
        self.where = where
        self._data = data
        self._prefix = prefix

    def error(self, key: str, what: str) -> BitgenError:
        return FileError(f"{self.where}: {self._prefix}{key} {what}")

    def raw(self, key: str) -> Any:
        """The value as it is, arrays too; None where there is none."""
        return self._data.get(self._prefix + key)

    def get(self, key: str) -> Any:
        """The value. An array of equal numbers (GGUF has one for each layer) counts as one."""
        value = self.raw(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            return value[0].item()
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong(key, value, "one whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300:
            raise self._wrong(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.get(key)
        return value if isinstance(value, str) else default

    def flag(self, key: str) -> bool | None:
        value = self.get(key)
        return value if isinstance(value, bool) else None

    def section(self, key: str) -> Settings:
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, "is no object")
        return Settings(f"{self.where}: {key}", value)

    def _wrong(self, key: str, value: object, wanted: str) -> BitgenError:
        return self.error(key, "is missing" if value is None else f"is {short(value)}, not {wanted}")
