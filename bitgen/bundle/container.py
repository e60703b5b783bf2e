"""What a distribution arrives in: a folder, a zip, or a zip behind https. Nothing in it is trusted yet.

A container reads files by name and never writes one. Sizes are limited before and after unpacking; links,
devices, encrypted files and names that stand twice are refused.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import stat
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol

from bitgen.errors import FileError, UsageError

# A bundle has 1 to 4 MB and as much C text, so 15 families need 100 MB at the most.
ZIP_LIMIT, UNPACKED_LIMIT, FILES_LIMIT = 256 << 20, 1 << 30, 20_000
_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip can name
_DAMAGED = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError)


class Container(Protocol):
    """Files of a distribution by name; every error is a FileError."""

    where: Path

    def require_only(self, names: Collection[str]) -> None:
        """FileError when there is a file besides ``names`` that would come along."""

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file."""


def read_small(container: Container, name: str, limit: int) -> bytes:
    """A file of at most ``limit`` bytes, whole."""
    data = b""
    for chunk in container.chunks(name):
        data += chunk
        if len(data) > limit:
            raise FileError(f"{name} in {container.where} is larger than {limit:,} bytes")
    return data


class Folder:
    """A distribution in a folder of somebody. What the index does not name stays there."""

    def __init__(self, where: Path) -> None:
        self.where = where

    def require_only(self, names: Collection[str]) -> None:
        if len(names) > FILES_LIMIT:
            raise FileError(f"{self.where} has an index of more than {FILES_LIMIT:,} files")
        total = 0
        for name in names:
            parts = Path(name).parts
            places = [self.where.joinpath(*parts[: i + 1]) for i in range(len(parts))]
            if any(place.is_symlink() for place in places):
                raise FileError(f"{name} in {self.where} is a link")
            total += places[-1].stat().st_size if places[-1].is_file() else 0
        if total > UNPACKED_LIMIT:
            raise FileError(f"{self.where} holds more than {UNPACKED_LIMIT:,} bytes")

    def has(self, name: str) -> bool:
        return os.path.lexists(self.where / name)

    def chunks(self, name: str) -> Iterator[bytes]:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with open(os.open(self.where / name, flags), "rb") as file:  # noqa: PTH123 - a descriptor
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise FileError(f"{name} in {self.where} is no file")
                while chunk := file.read(_CHUNK):
                    yield chunk
        except FileNotFoundError:
            raise FileError(f"there is no {name} in {self.where}") from None
        except OSError as error:
            raise FileError(f"cannot read {name} in {self.where}: {error.strerror or error}") from error


class Zip:
    """A distribution in an open zip file."""

    def __init__(self, where: Path, archive: zipfile.ZipFile) -> None:
        self.where = where
        self._archive = archive
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        if len(entries) > FILES_LIMIT or sum(entry.file_size for entry in entries) > UNPACKED_LIMIT:
            raise FileError(f"{where} unpacks to more than {FILES_LIMIT:,} files or {UNPACKED_LIMIT:,} bytes")
        self._entries = {entry.filename: entry for entry in entries}
        if len(self._entries) < len(entries):
            raise FileError(f"{where} holds two files of one name")
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                raise FileError(f"{where} holds {entry.filename!r}, which is a link or a device")

    def require_only(self, names: Collection[str]) -> None:
        for name in self._entries:
            if name not in names:
                raise FileError(f"{self.where} holds {name!r}, which its index does not name")

    def has(self, name: str) -> bool:
        return name in self._entries

    def chunks(self, name: str) -> Iterator[bytes]:
        if name not in self._entries:
            raise FileError(f"there is no {name} in {self.where}")
        entry, count = self._entries[name], 0
        with _damage(self.where), self._archive.open(entry) as file:
            while chunk := file.read(_CHUNK):
                count += len(chunk)
                if count > entry.file_size:
                    raise FileError(f"{name} in {self.where} is larger than it says")
                yield chunk


@contextlib.contextmanager
def _damage(where: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGED as error:
        raise FileError(f"{where} is not a zip file, or is damaged or cut off: {error}") from error


@contextlib.contextmanager
def open_container(path: Path) -> Iterator[Container]:
    """The folder or zip at ``path``. FileError when it is neither, or too large."""
    if path.is_dir():
        yield Folder(path)
        return
    if not path.is_file():
        raise FileError(f"there is no file or folder {path}")
    if path.stat().st_size > ZIP_LIMIT:
        raise FileError(f"{path} is larger than {ZIP_LIMIT:,} bytes")
    with contextlib.ExitStack() as stack:
        with _damage(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
        yield Zip(path, archive)


def write_zip(folder: Path, names: Collection[str], path: Path) -> None:
    """Put files of a folder into a zip; see `write_archive`."""
    write_archive({name: (folder / name).read_bytes() for name in names}, path)


def write_archive(files: Mapping[str, bytes], path: Path) -> None:
    """Write a zip of files: sorted, all of one time and mode, so equal files give equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system, entry.external_attr = 3, (stat.S_IFREG | 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)


# ---- https ---------------------------------------------------------------------


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows a redirection to https and to nothing else."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: object, newurl: str
    ) -> urllib.request.Request | None:
        require_https(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def is_url(source: str) -> bool:
    """Whether ``source`` names a place in a network, not a file."""
    return "://" in source or source.startswith("file:")


def require_https(url: str) -> None:
    """UsageError for every address but https."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.hostname:
        raise UsageError(f"{_shown(url)} is not an https address; others are not loaded from")


def download(url: str, path: Path) -> None:
    """Write what an https address serves to the new file ``path``. FileError: it fails or is too large."""
    require_https(url)
    context = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    opener = urllib.request.build_opener(context, _HttpsOnly)
    count = 0
    try:
        with opener.open(url, timeout=_TIMEOUT_S) as answer, path.open("xb") as file:
            while chunk := answer.read(_CHUNK):
                count += len(chunk)
                if count > ZIP_LIMIT:
                    raise FileError(f"{_shown(url)} is larger than {ZIP_LIMIT:,} bytes")
                file.write(chunk)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise FileError(f"cannot load {_shown(url)}: {getattr(error, 'reason', error)}") from error


def _shown(url: str) -> str:
    """An address without user, password and query, which may be secrets."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
