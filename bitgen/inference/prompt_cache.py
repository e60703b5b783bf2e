"""Files with what the KV cache holds, so that a long prompt is computed once and not at each start.

::

    save(path, scheduler, model)           # all that the slots hold; written beside its name, then renamed
    restore(path, scheduler, model)        # how many tokens came back

A file is of one model, one type of keys and values and of activations, and one version: the bits of a cache
do not depend on the machine or on how its tokens were computed, so a text that goes on from a file is the one
it always was.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from bitgen.errors import FileError
from bitgen.inference.passes import Held
from bitgen.inference.scheduler import Scheduler
from bitgen.whole import whole

KV_VERSION = "kv 2"  # goes up when the same tokens fill the KV cache with other bits than before
_MAGIC = b"bitgen prompt cache 1\n"
_HEADER_MAX = 1 << 28


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A sequence: whose request computed it, its tokens, and the bytes behind the header that are its own."""

    owner: str
    tokens: list[int]
    bytes: int
    sha256: str


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """``model`` says what the bytes depend on, ``messages`` is the conversation that they are of."""

    model: str
    entries: list[_Entry]
    messages: list[dict[str, str]] = []


def save(path: Path, scheduler: Scheduler, model: str, messages: Sequence[dict[str, str]] = ()) -> int:
    """Write all that the slots hold; the number of tokens. FileError when it cannot be written.

    Whoever reads ``path`` sees the file of before or the whole new one, whenever this process ends.
    """
    held = [each for each in scheduler.held() if each.tokens]
    entries = [
        _Entry(each.owner, list(each.tokens), len(each.data), hashlib.sha256(each.data).hexdigest())
        for each in held
    ]
    header = msgspec.json.encode(_Header(model, entries, list(messages)))
    try:
        with whole(path) as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for each in held:
                file.write(each.data)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    return sum(len(entry.tokens) for entry in entries)


def restore(path: Path, scheduler: Scheduler, model: str) -> list[dict[str, str]]:
    """Fill the slots from a file; the messages that were saved with it.

    FileError when it is of another model, damaged, or cannot be read; the cache then holds what it held.
    """
    try:
        with path.open("rb") as file:
            header = _read_header(file, path)
            if header.model != model:
                raise FileError(f"{path} is of another model, version, --kv or --activations")
            held = [
                Held(each.owner, tuple(each.tokens), _read_entry(file, each, path)) for each in header.entries
            ]
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    scheduler.restore(held)
    return header.messages


def _read_header(file: BinaryIO, path: Path) -> _Header:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise FileError(f"{path} is no prompt cache of this version")
    size = int.from_bytes(file.read(8), "little")
    if size > _HEADER_MAX:
        raise _damaged(path)
    try:
        return msgspec.json.decode(file.read(size), type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise _damaged(path) from None


def _read_entry(file: BinaryIO, entry: _Entry, path: Path) -> bytes:
    left = os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= entry.bytes <= left:
        raise _damaged(path)
    data = file.read(entry.bytes)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _damaged(path)
    return data


def _damaged(path: Path) -> FileError:
    return FileError(f"{path} is damaged")
