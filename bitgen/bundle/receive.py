"""Copy the files of an index whose signature was checked to a new folder, each verified as it is copied."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from bitgen.bundle.container import UNPACKED_LIMIT, Container
from bitgen.bundle.index import Index, require_entry
from bitgen.bundle.manifest import Bundle, read_bundle
from bitgen.errors import FileError


def receive(
    container: Container, index: Index, texts: Mapping[str, bytes], folder: Path, *, linked: bool = False
) -> list[Bundle]:
    """Copy the files of ``index``, and ``texts`` beside them, to the new ``folder``; the bundles among them.

    ``linked``: a file whose digest another one has becomes a second name of that one, and is not read.
    Families share most of their C text: of 675 files of nine 206 are different, 17 of 24 MB. FileError for a
    file that is missing or another than the index names, for one that it does not name, for too many bytes.
    """
    container.require_only({*texts, *index.files})
    folder.mkdir(mode=0o700)
    above = {name[:at] for name in index.files for at, letter in enumerate(name) if letter == "/"}
    for part in sorted(above):  # a folder comes before those in it
        (folder / part).mkdir(mode=0o700)
    left, copies = UNPACKED_LIMIT, dict[str, str]()
    for name, sha256 in index.files.items():
        if linked and container.has(name) and _link(copies.get(sha256), f"{folder}/{name}"):
            continue
        left -= _copy(container, name, folder / name, sha256, left)
        copies[sha256] = f"{folder}/{name}"
    for name, data in texts.items():
        with _create(folder / name) as file:
            file.write(data)
    return _bundles(index, folder, container.where)


def _copy(container: Container, name: str, target: Path, sha256: str, limit: int) -> int:
    """Copy a file of this digest to ``target``: its size, at most ``limit``."""
    size, digest = 0, hashlib.sha256()
    with _create(target) as file:
        for chunk in container.chunks(name):
            size += len(chunk)
            if size > limit:
                raise FileError(f"{container.where} unpacks to more than {UNPACKED_LIMIT:,} bytes")
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != sha256:
        raise FileError(f"{name} in {container.where} is not the file that its index names (sha256 differs)")
    return size


def _link(copy: str | None, target: str) -> bool:
    """Give a copy a second name; False where there is none, or the file system has no such names."""
    if copy is None:
        return False
    try:
        os.link(copy, target)
    except OSError:  # a disk that is full says so again when the file is copied instead
        return False
    return True


@contextlib.contextmanager
def _create(path: Path) -> Iterator[IO[bytes]]:
    """A new file for its owner only; never one that is there, nor what a link leads to."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:  # noqa: PTH123 - a descriptor
        yield file


def _bundles(index: Index, folder: Path, where: Path) -> list[Bundle]:
    """The bundles in ``folder``, whose files are those of the index, each as the index says."""
    bundles = []
    for entry in index.bundles:
        bundle = read_bundle(folder / entry.path, hashed=False)
        library = bundle.manifest.library
        if index.files.get(f"{entry.path}/{library}") != bundle.manifest.files.get(library, ""):
            raise FileError(f"{where}: the library of {entry.path} is not the one its manifest describes")
        require_entry(entry, bundle, where)
        bundles.append(bundle)
    return bundles
