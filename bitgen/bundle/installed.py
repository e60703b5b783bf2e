"""What is installed: one receipt for each distribution, and the folder that it names.

::

    INSTALLED/3B.json                   the receipt: version, folder, who signed it
    INSTALLED/3B-1f0c..-k3j2/           the distribution; a folder that no receipt names is a leftover

Writing the receipt is what installs (`bitgen.bundle.install`): a distribution is there whole or not at all.
Reading needs no cryptography: the signature was checked when it came in, and only its owner can write here.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen import __version__
from bitgen.bundle.index import INDEX_NAME, SIGNATURE_NAME, Index, parse_index, require_entry
from bitgen.bundle.manifest import (
    PACKAGE,
    WHEEL,
    Bundle,
    Origin,
    find_bundles,
    read_bundle,
)
from bitgen.cpu import Cpu
from bitgen.errors import BitgenError, FileError
from bitgen.paths import generated_dir, installed_dir, shipped_bundles_dir
from bitgen.records import load, load_json
from bitgen.trust import Revocations, Signature, TrustStore, require_private

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "bitgen.bundles"  # of entry points: packages of bundles
FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{16}-[0-9a-f]{8}")  # name, index, a random number


@dataclass(frozen=True)
class Receipt:
    """An installed distribution: its ``folder`` beside the receipt, the ``key_id`` of who signed it."""

    name: str
    version: str
    folder: str
    index_sha256: str
    key_id: str | None

    def __post_init__(self) -> None:
        if not FOLDER.fullmatch(self.folder):
            raise FileError(f"{self.folder!r} is no folder beside it")

    @property
    def signed(self) -> str:
        """Who signed it, for people."""
        return f"signed by {self.key_id}" if self.key_id else "unsigned"


def receipts() -> tuple[list[Receipt], list[BitgenError]]:
    """What is installed, by name, and what is wrong with damaged receipts."""
    found: list[Receipt] = []
    errors: list[BitgenError] = []
    for file in sorted(installed_dir().glob("*.json")):
        try:
            found.append(load(Receipt, load_json(file), str(file)))
        except BitgenError as error:
            errors.append(error)
    return found, errors


def find_receipt(name: str) -> Receipt | None:
    """The receipt of what is installed under ``name``."""
    return next((receipt for receipt in receipts()[0] if receipt.name == name), None)


def index_of(receipt: Receipt) -> Index:
    """The index of an installed distribution. FileError when it is not the one that was verified."""
    file = installed_dir() / receipt.folder / INDEX_NAME
    try:
        data = file.read_bytes()
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != receipt.index_sha256:
        raise FileError(f"{file} is not the index that was installed: install it again")
    return parse_index(data, str(file))


def find_installed(*, hashed: bool = True, cpu: Cpu | None = None) -> tuple[list[Bundle], list[BitgenError]]:
    """The installed bundles, and why others must not be used: damaged, of another ABI, revoked.

    ``hashed``: see `bitgen.bundle.manifest.read_bundle`; ``cpu``: see `all_bundles`.
    """
    found, errors = receipts()
    bundles: list[Bundle] = []
    if not found and not errors:
        return [], []
    try:
        require_private(installed_dir())
        revoked = TrustStore().revoked()
    except BitgenError as error:
        return [], [error]
    for receipt in found:
        try:
            bundles += _bundles_of(receipt, revoked, hashed, cpu)
        except BitgenError as error:
            errors.append(FileError(f"{receipt.name} {receipt.version}: {error.message}"))
    if errors and receipts()[0] != found:  # another process installed meanwhile
        return find_installed(hashed=hashed, cpu=cpu)
    return bundles, errors


def _bundles_of(receipt: Receipt, revoked: Revocations, hashed: bool, cpu: Cpu | None) -> list[Bundle]:
    if reason := revoked.reason(receipt.key_id, receipt.index_sha256):
        raise FileError(f"{reason}; bitgen bundle remove {receipt.name}")
    origin = Origin(receipt.name, receipt.version, receipt.key_id, "default")
    return _indexed(index_of(receipt), installed_dir() / receipt.folder, origin, hashed, cpu)


def _indexed(index: Index, folder: Path, origin: Origin, hashed: bool, cpu: Cpu | None) -> list[Bundle]:
    """The bundles of an index in ``folder``, each as its manifest and the index say alike."""
    made = []
    for entry in index.bundles:
        if cpu is not None and not entry.runs_on(cpu):
            continue
        bundle = read_bundle(folder / entry.path, hashed=hashed, sha256=entry.manifest)
        require_entry(entry, bundle, folder)
        made.append(replace(bundle, origin=replace(origin, label=entry.label)))
    return made


def find_shipped(*, hashed: bool = True) -> tuple[list[Bundle], list[BitgenError]]:
    """The bundles that came in the wheel of bitgen. They are trusted as the wheel is."""
    folder = shipped_bundles_dir()
    if folder is None:
        return [], []
    bundles, errors = find_bundles(folder, hashed=hashed)
    return [replace(b, origin=Origin("bitgen", __version__, None, b.label, WHEEL)) for b in bundles], errors


def find_packages(*, hashed: bool = True, cpu: Cpu | None = None) -> tuple[list[Bundle], list[BitgenError]]:
    """The bundles in packages that name themselves in the entry point group bitgen.bundles.

    They are trusted as a package is: who installs one lets it run. Nothing of it is imported here, and what
    is revoked is refused.
    """
    bundles: list[Bundle] = []
    errors: list[BitgenError] = []
    for entry in _packages():
        try:
            bundles += _packaged(entry, hashed, cpu)
        except BitgenError as error:
            errors.append(FileError(f"the package {entry.value}: {error.message}"))
    return bundles, errors


def _packages() -> Iterable[EntryPoint]:
    """The entry points of packages of bundles.

    Importing importlib.metadata and asking it takes 25 ms, so it is only where some package mentions them.
    """
    if not any(map(_may_mention_bundles, sys.path)):
        return ()
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


def _may_mention_bundles(place: str) -> bool:
    """Whether a package in a folder of sys.path has such an entry point; of what is no folder: it may."""
    try:
        with os.scandir(place or ".") as found:
            names = [entry.path for entry in found if entry.name.endswith((".dist-info", ".egg-info"))]
    except OSError:
        return Path(place).is_file()
    for name in names:
        try:
            if GROUP.encode() in Path(name, "entry_points.txt").read_bytes():
                return True
        except OSError:  # it has none
            continue
    return False


def _packaged(entry: EntryPoint, hashed: bool, cpu: Cpu | None) -> list[Bundle]:
    spec = find_spec(entry.value) if entry.value.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileError("there is no such package")
    folder = Path(spec.submodule_search_locations[0])
    try:
        data = (folder / INDEX_NAME).read_bytes()
    except OSError as error:
        raise FileError(f"cannot read its {INDEX_NAME}: {error.strerror or error}") from error
    key_id = None
    if (folder / SIGNATURE_NAME).is_file():
        signature = (folder / SIGNATURE_NAME).read_bytes()
        key_id = Signature.parse(signature, SIGNATURE_NAME).key_id
    if reason := TrustStore().revoked().reason(key_id, hashlib.sha256(data).hexdigest()):
        raise FileError(reason)
    index = parse_index(data, str(folder / INDEX_NAME))
    origin = Origin(entry.value, index.version, None, "default", PACKAGE)
    return _indexed(index, folder, origin, hashed, cpu)


def all_bundles(*, hashed: bool = True, cpu: Cpu | None = None) -> tuple[list[Bundle], list[BitgenError]]:
    """The bundles built here, installed, in packages, in bitgen's wheel; what is wrong with damaged ones.

    ``hashed``: see `bitgen.bundle.manifest.read_bundle`. With a ``cpu`` those are not read of which an index
    says that it cannot run them.
    """
    places = (
        find_bundles(generated_dir(), hashed=hashed),
        find_installed(hashed=hashed, cpu=cpu),
        find_packages(hashed=hashed, cpu=cpu),
        find_shipped(hashed=hashed),
    )
    bundles = [bundle for found, _ in places for bundle in found]
    return bundles, [error for _, wrong in places for error in wrong]
