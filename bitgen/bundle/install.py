"""Take a distribution from elsewhere: verified, copied to where only its owner can write, kept whole or not.

The order is what makes it safe: the signature over the raw bytes of index.json, then its JSON, then each file
against its sha256 while it is copied, then the receipt. Until the receipt is written the older one is what is
installed; what a killed process left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from bitgen.bundle.container import Container, download, is_url, open_container, read_small
from bitgen.bundle.index import (
    INDEX_LIMIT,
    INDEX_NAME,
    SIGNATURE_NAME,
    Index,
    parse_index,
    version_key,
)
from bitgen.bundle.installed import FOLDER, Receipt, find_receipt, receipts
from bitgen.bundle.manifest import Bundle, is_bundle
from bitgen.bundle.receive import receive
from bitgen.bundle.select import judge
from bitgen.cpu import detect_cpu
from bitgen.errors import FileError, UnsupportedError, UsageError
from bitgen.paths import installed_dir
from bitgen.records import dump
from bitgen.trust import Signature, TrustStore, private_dir, write_private, writing_to
from bitgen.trust.minisign import SIGNATURE_LIMIT

_UNFINISHED = re.compile(r"\..+\.json\.\d+")  # a receipt that a killed process was writing


@dataclass(frozen=True)
class Verified:
    """An index whose signature was checked; ``signature``: None where none is needed and none is there."""

    index: Index
    data: bytes
    signature: Signature | None

    @property
    def sha256(self) -> str:
        """The digest of the index, which stands for the whole distribution."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def key_id(self) -> str | None:
        return self.signature.key_id if self.signature else None

    @property
    def texts(self) -> dict[str, bytes]:
        """The files that the index does not name: itself, and its signature."""
        own = {INDEX_NAME: self.data}
        return own if self.signature is None else {**own, SIGNATURE_NAME: self.signature.file_text.encode()}


def verify_index(container: Container, *, allow_unsigned: bool = False) -> Verified:
    """The index of a distribution, its signature checked before its JSON is read.

    FileError: no index, no signature, a wrong one, one of a key that is not trusted or was revoked.
    """
    where = container.where
    if is_bundle(where) and not (where / INDEX_NAME).exists():
        raise FileError(f"{where} is a bundle without an index; `bitgen bundle pack` makes one for it")
    data = read_small(container, INDEX_NAME, INDEX_LIMIT)
    store, name = TrustStore(), f"{INDEX_NAME} of {where}"
    if reason := store.revoked().reason(None, hashlib.sha256(data).hexdigest()):
        raise FileError(f"{name} must not be used: {reason}")
    signature = None
    if container.has(SIGNATURE_NAME):
        raw = read_small(container, SIGNATURE_NAME, SIGNATURE_LIMIT)
        signature = Signature.parse(raw, f"{SIGNATURE_NAME} of {where}")
        store.verify(data, signature, name)
    elif not allow_unsigned:
        raise FileError(f"{where} is not signed; --allow-unsigned takes it, if you know who made it")
    return Verified(parse_index(data, name), data, signature)


def verify(
    path: Path, *, allow_unsigned: bool = False, examine: Callable[[Bundle], object] | None = None
) -> Verified:
    """Check everything that `install` checks but what this CPU can run, and keep nothing.

    ``examine`` is called with each bundle once all of them are as their index says.
    """
    with open_container(path) as container, tempfile.TemporaryDirectory(prefix="bitgen-verify-") as scratch:
        verified = verify_index(container, allow_unsigned=allow_unsigned)
        for bundle in receive(container, verified.index, verified.texts, Path(scratch) / "files"):
            if examine is not None:
                examine(bundle)
    return verified


def install(
    source: str,
    *,
    allow_unsigned: bool = False,
    downgrade: bool = False,
    report: Callable[[str], None] | None = None,
) -> Receipt:
    """Install the distribution in a folder, a zip or at an https address; it replaces one of its name.

    FileError when it is not what its index says, is not signed by a trusted key, or is older than what is
    installed (``downgrade``: that is wanted). UnsupportedError when nothing in it runs on this CPU.
    """
    root = installed_dir()
    with (
        _alone(root, report),
        writing_to(root),
        tempfile.TemporaryDirectory(prefix=".incoming-", dir=root) as scratch,
    ):
        path = Path(source)
        if is_url(source):
            path = Path(scratch) / "download.zip"
            download(source, path)
        with open_container(path.absolute()) as container:
            verified = verify_index(container, allow_unsigned=allow_unsigned)
            _require_newer(verified.index, downgrade)
            made = Path(scratch) / "files"
            bundles = receive(container, verified.index, verified.texts, made, linked=True)
            _require_runnable(verified.index, bundles)
        return _commit(verified, made, root)


def remove(name: str, report: Callable[[str], None] | None = None) -> Receipt:
    """Remove what is installed under ``name``. UsageError when nothing is."""
    root = installed_dir()
    known = [receipt.name for receipt in receipts()[0]]
    if name not in known:
        raise UsageError(f"no bundle {name!r} is installed; there is {', '.join(known) or 'none'}")
    with _alone(root, report), writing_to(root):
        receipt = find_receipt(name)
        if receipt is None:
            raise UsageError(f"no bundle {name!r} is installed any more")
        (root / f"{name}.json").unlink()  # from here on it is not installed, whatever happens
        shutil.rmtree(root / receipt.folder, ignore_errors=True)
    return receipt


def _require_newer(index: Index, downgrade: bool) -> None:
    before = find_receipt(index.name)
    if before is not None and not downgrade and version_key(index.version) < version_key(before.version):
        raise FileError(
            f"{index.name} {index.version} is older than what is installed, {before.version}; "
            "--downgrade installs it nevertheless"
        )


def _require_runnable(index: Index, bundles: list[Bundle]) -> None:
    cpu = detect_cpu()
    decisions = [judge(bundle, cpu) for bundle in bundles]
    if not any(decision.accepted for decision in decisions):
        reasons = "; ".join(f"{d.bundle.path.name}: {d.reason}" for d in decisions)
        raise UnsupportedError(f"no bundle of {index.name} {index.version} runs here: {reasons}")


def _commit(verified: Verified, made: Path, root: Path) -> Receipt:
    """Move the verified files into place and write the receipt, which installs them."""
    index = verified.index
    before = find_receipt(index.name)
    folder = f"{index.name}-{verified.sha256[:16]}-{secrets.token_hex(4)}"
    receipt = Receipt(index.name, index.version, folder, verified.sha256, verified.key_id)
    made.rename(root / folder)
    try:
        text = json.dumps(dump(receipt), indent=1) + "\n"
        write_private(root / f"{index.name}.json", text.encode())
    except BaseException:
        shutil.rmtree(root / folder, ignore_errors=True)
        raise
    if before is not None:
        shutil.rmtree(root / before.folder, ignore_errors=True)
    return receipt


@contextlib.contextmanager
def _alone(root: Path, report: Callable[[str], None] | None) -> Iterator[None]:
    """The only process that changes what is installed; what a killed one left is removed first."""
    private_dir(root)
    lock = FileLock(root / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if report:
            report("another bitgen is installing; waiting until it is done")
        lock.acquire()
    try:
        _sweep(root)
        yield
    finally:
        lock.release()


def _sweep(root: Path) -> None:
    found, errors = receipts()
    named = {receipt.folder for receipt in found}
    for path in root.iterdir():
        if path.name.startswith(".incoming-") or _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        elif FOLDER.fullmatch(path.name) and path.name not in named and not errors:
            shutil.rmtree(path, ignore_errors=True)
