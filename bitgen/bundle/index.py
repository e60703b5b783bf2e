"""index.json: what a distribution of bundles holds, with the sha256 of each file. It alone is signed.

A distribution is a folder, and a zip is a container of it::

    index.json  index.json.minisig      the list, and who vouches for it
    sbom.cdx.json  provenance.json      what is inside and what it was made from (`bitgen.bundle.provenance`)
    3B-zen4/manifest.json ...           bundles, as `bitgen build` wrote them
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgen.abi import ABI_VERSION
from bitgen.bundle.manifest import MANIFEST_NAME, Bundle, Label
from bitgen.cpu import Cpu
from bitgen.errors import FileError, UsageError
from bitgen.records import load
from bitgen.spec import Shape

INDEX_NAME = "index.json"
SIGNATURE_NAME = "index.json.minisig"
INDEX_FORMAT = 1
INDEX_LIMIT = 4 << 20  # bytes; an index of 15 bundles has 200 KiB

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,5}")
# No part begins with a dot: neither "..", nor an absolute path, nor a file that `ls` hides.
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class IndexEntry:
    """One bundle: its folder, what it needs, how its kernels were found, and the sha256 of its manifest.

    ``label``: tuned on this CPU family, transferred from another one, or default schedules.
    """

    path: str
    os: str
    arch: str
    family: str
    features: tuple[str, ...]
    label: Label
    manifest: str

    @classmethod
    def of(cls, bundle: Bundle, path: str, sha256: str) -> IndexEntry:
        """The entry of a bundle in the folder ``path``."""
        manifest = bundle.manifest
        features = tuple(sorted(manifest.features))
        system, arch, family = manifest.system, manifest.arch, manifest.cpu_family
        return cls(path, system, arch, family, features, bundle.label, sha256)

    def runs_on(self, cpu: Cpu) -> bool:
        """Whether ``cpu`` can run the bundle, as far as an index says; `judge` decides."""
        return (self.os, self.arch) == (cpu.os, cpu.arch) and cpu.features.issuperset(self.features)


@dataclass(frozen=True)
class Index:
    """The content of index.json. ``models`` maps a model to the shapes with kernels of their own.

    ``files`` maps every file but the index and its signature to its sha256. UsageError when a name, version,
    path or digest is none.
    """

    name: str
    version: str
    bitgen_version: str
    models: Mapping[str, tuple[Shape, ...]]
    bundles: tuple[IndexEntry, ...]
    files: Mapping[str, str]
    abi_version: int = ABI_VERSION
    format: int = INDEX_FORMAT

    def __post_init__(self) -> None:
        require_name(self.name)
        version_key(self.version)
        folded: set[str] = {INDEX_NAME, SIGNATURE_NAME}
        for path, digest in self.files.items():
            require_path(path)
            if path.casefold() in folded:
                raise UsageError(f"files: {path!r} is duplicated")
            if not _SHA256.fullmatch(digest):
                raise UsageError(f"files: {path} has {digest!r}, which is no sha256")
            folded.add(path.casefold())
        for entry in self.bundles:
            if self.files.get(f"{entry.path}/{MANIFEST_NAME}") != entry.manifest:
                raise UsageError(f"bundles: the manifest of {entry.path} is not among the files")
        if not self.bundles or len({entry.path for entry in self.bundles}) < len(self.bundles):
            raise UsageError("bundles: there is none, or one is duplicated")


def require_name(name: str) -> None:
    """UsageError unless ``name`` can name a distribution, and files."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name files; use at most 64 letters, digits, dot, dash, underscore")


def require_path(path: str) -> None:
    """UsageError unless ``path`` leads from a folder to a file below it, whatever there is."""
    if not _PATH.fullmatch(path):
        raise UsageError(f"{path!r} is not a path below its folder")


def version_key(version: str) -> tuple[int, ...]:
    """What orders versions: 1.10 is above 1.9 and equals 1.10.0. UsageError: not numbers and dots."""
    if not _VERSION.fullmatch(version):
        raise UsageError(f"{version!r} is no version; use numbers and dots (1.2.0)")
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def parse_index(data: bytes, where: str) -> Index:
    """The index of bytes whose signature was checked. FileError names ``where`` and what is wrong."""
    try:
        plain: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{where} is not valid JSON: {error}") from error
    plain = plain if isinstance(plain, dict) else {}
    for key, mine in (("format", INDEX_FORMAT), ("abi_version", ABI_VERSION)):
        found = plain.get(key)
        if found != mine:
            newer = isinstance(found, int) and found > mine
            what = "install a newer bitgen" if newer else "get a newer version of it"
            raise FileError(f"{where}: {key} is {found!r}, this bitgen reads {mine}: {what}")
    return load(Index, plain, where)


def require_entry(entry: IndexEntry, bundle: Bundle, where: Path | str) -> None:
    """FileError unless the index says what a bundle's own manifest says; the label is the index's word."""
    own = IndexEntry.of(bundle, entry.path, entry.manifest)
    names = ("os", "arch", "family", "features")
    told = [name for name in names if getattr(own, name) != getattr(entry, name)]
    if told:
        raise FileError(f"{where}: the index and the manifest of {entry.path} differ in {', '.join(told)}")
