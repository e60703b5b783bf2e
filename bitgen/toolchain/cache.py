"""Files addressed by what they were made from, safe against crashes, bit rot and a second process.

``root/kind/KEY/DIGEST.suffix``: KEY is the hash of everything that can change the content, DIGEST the hash of
the content itself. A file is written elsewhere in its folder and renamed when complete, so what is found
under its name is whole; a file whose content no longer fits its name is made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgen.errors import FileError
from bitgen.paths import HOME_VARIABLE

_log = logging.getLogger(__name__)
_SCRATCH_PREFIX = "making-"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def key_of(parts: Mapping[str, Any]) -> str:
    """The key of whatever is made from ``parts`` (JSON-able): 128 bits of SHA-256, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def digest_of(path: Path) -> str:
    """The digest of a file's content: 128 bits of SHA-256, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@contextlib.contextmanager
def writing(place: Path, advice: str) -> Iterator[None]:
    """Turn an OSError of the block into a BitgenError of one line: what, where, why, ``advice``."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in _DISK_FULL else error.strerror or str(error)
        raise FileError(f"cannot write to {place}: {what}; {advice}") from error


@dataclass(frozen=True)
class ContentCache:
    """A folder of such files. Reading needs no permission to write, so a filled cache may be read-only.

    ``lock_timeout_s``: how long to wait for another process that makes the same file. When it is over we make
    the file too: twice the work, but never wrong, because a rename is atomic.
    """

    root: Path
    lock_timeout_s: float

    def find(self, kind: str, key: str, suffix: str) -> Path | None:
        """The file made earlier for ``key``, its content checked; None when it has to be made."""
        for path in sorted(self._entry(kind, key).glob(f"*{suffix}")):
            try:
                if digest_of(path) == path.name.removesuffix(suffix):
                    return path
            except OSError:  # gone or unreadable by now: the same as never made
                continue
            _log.warning("a corrupted file in bitgen's cache is made again: %s", path)
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def make(self, kind: str, key: str, suffix: str, produce: Callable[[Path], Path]) -> Path:
        """The file for ``key``, made by ``produce(folder) -> path in folder`` unless it is there already.

        Whatever ``produce`` raises is passed on and leaves nothing behind; BitgenError when the cache cannot
        be written.
        """
        found = self.find(kind, key, suffix)
        if found is not None:
            return found
        entry = self._entry(kind, key)
        advice = f"free some space there or name another folder with {HOME_VARIABLE}"
        with writing(self.root, advice):
            entry.mkdir(parents=True, exist_ok=True)
            with self._locked(entry) as alone:
                found = self.find(kind, key, suffix)
                if found is not None:
                    return found
                if alone:
                    _remove_scratch(entry)
                return _produce(entry, suffix, produce)

    def _entry(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / key

    @contextlib.contextmanager
    def _locked(self, entry: Path) -> Iterator[bool]:
        from filelock import FileLock, Timeout  # 35 ms that a cache hit does not pay

        lock = FileLock(entry / "lock")
        try:
            lock.acquire(timeout=self.lock_timeout_s)
        except Timeout:
            _log.warning("%s is locked for %g s: working without the lock", entry, self.lock_timeout_s)
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _produce(entry: Path, suffix: str, produce: Callable[[Path], Path]) -> Path:
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir=entry))
    try:
        made = produce(scratch)
        return made.replace(entry / f"{digest_of(made)}{suffix}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remove_scratch(entry: Path) -> None:
    # What a killed process left. Only the holder of the lock may call this.
    for scratch in entry.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(scratch, ignore_errors=True)
