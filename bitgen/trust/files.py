"""Files that nobody else can change: made so, checked to be so, and loaded from what was checked.

A native library is code, so who can write to it, or to a folder above it, can run code as this user. Trusted
owners are this user, root, and whoever owns bitgen itself, whose code runs anyway. A folder that everybody
may write to is right where only owners may rename what is in it (/tmp), and a group's where it is the user's.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import hashlib
import itertools
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitgen.errors import FileError
from bitgen.whole import whole

_LINUX_DESCRIPTORS = Path("/proc/self/fd")
_opened = itertools.count(1)


@dataclass(frozen=True)
class OpenedFile:
    """A file that was opened once: its bytes can be read and loaded, whatever becomes of its name."""

    path: Path
    descriptor: int

    def sha256(self) -> str:
        """The sha256 of its bytes, in hexadecimal."""
        digest = hashlib.sha256()
        position = 0
        while block := os.pread(self.descriptor, 1 << 20, position):
            digest.update(block)
            position += len(block)
        return digest.hexdigest()

    @property
    def loadable(self) -> str:
        """What to give to dlopen: on Linux the descriptor, elsewhere the path.

        glibc takes equal names for one library, and a closed descriptor's number comes again: so each time
        the path is spelt anew, by a dot or none for each bit of a counter.
        """
        if not _LINUX_DESCRIPTORS.is_dir():
            return str(self.path)
        spelling = "".join("/." if bit == "1" else "/" for bit in f"{next(_opened):b}")
        return f"{_LINUX_DESCRIPTORS}{spelling}/{self.descriptor}"


@contextlib.contextmanager
def open_private(path: Path) -> Iterator[OpenedFile]:
    """Open a file that nobody else can change. FileError when it is missing, no file, or others can."""
    where = path.absolute()
    try:
        descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise FileError(f"cannot open {path}: {error.strerror or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"cannot open {path}: it is no file")
        _require_status(where, status)
        _require_folders(where)
        yield OpenedFile(where, descriptor)
    finally:
        os.close(descriptor)


def require_private(path: Path) -> None:
    """FileError when somebody else can change ``path`` or a folder above it."""
    where = path.absolute()
    _require_status(where, where.stat())
    _require_folders(where)


def private_dir(path: Path) -> Path:
    """Create the folder ``path`` for its owner only, and return it. FileError when others can change it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot write to the folder {path}: {error.strerror or error}") from error
    require_private(path)
    return path


def write_private(path: Path, data: bytes) -> None:
    """Write a file for its owner only; it is the old or the new one whole, whatever happens."""
    with whole(path, private=True) as file:
        file.write(data)


@contextlib.contextmanager
def writing_to(place: Path) -> Iterator[None]:
    """Turn an OSError of the block into a FileError of one line that says what could not be written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else error.strerror or str(error)
        raise FileError(f"cannot write to {place}: {what}; nothing was changed") from error


def _require_folders(path: Path) -> None:
    """The folders above ``path`` as it is named, and above what that name leads to."""
    for folder in dict.fromkeys([*path.parents, *path.resolve().parents]):
        try:
            _require_status(folder, folder.stat())
        except OSError as error:
            raise FileError(f"cannot read {folder}: {error.strerror or error}") from error


def _require_status(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in _trusted_owners():
        raise FileError(f"cannot trust {path}: it belongs to another user ({_user(status.st_uid)})")
    mode = status.st_mode
    kept_apart = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    if mode & stat.S_IWOTH and not kept_apart:
        raise FileError(f"cannot trust {path}: every user can write to it; chmod o-w")
    if mode & stat.S_IWGRP and not kept_apart and not _is_own_group(status.st_gid):
        raise FileError(f"cannot trust {path}: its group can write to it; chmod g-w")


@cache
def _trusted_owners() -> frozenset[int]:
    return frozenset({0, os.geteuid(), Path(__file__).stat().st_uid})


@cache
def _is_own_group(gid: int) -> bool:
    """Whether a group is one that systems make for each user, of the same name and with nobody else in it."""
    if gid == 0:
        return True
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
