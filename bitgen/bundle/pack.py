"""Make a distribution of bundles: an index, what is inside and where it came from; a signature; a zip.

Equal bundles give equal bytes: names are sorted, there is no time, and a signature of Ed25519 is the same
every time. (The bytes of a zip also depend on the version of zlib; its files do not.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bitgen import __version__
from bitgen.bundle.container import Folder, read_small, write_zip
from bitgen.bundle.index import (
    INDEX_LIMIT,
    INDEX_NAME,
    SIGNATURE_NAME,
    Index,
    IndexEntry,
    parse_index,
    require_name,
    require_path,
    version_key,
)
from bitgen.bundle.manifest import MANIFEST_NAME, Bundle, read_bundle, sha256_of
from bitgen.bundle.provenance import PROVENANCE_NAME, SBOM_NAME, provenance, sbom
from bitgen.errors import FileError, UsageError
from bitgen.records import dump
from bitgen.spec import Shape
from bitgen.trust import Signature, writing_to
from bitgen.trust.minisign import SIGNATURE_LIMIT


class Signer(Protocol):
    """What signs the index: `bitgen.trust.ed25519.Signer`."""

    def sign(self, data: bytes, trusted_comment: str) -> Signature:
        """The signature of ``data`` and of the comment."""


@dataclass(frozen=True)
class Packed:
    """A distribution that was written: where, its index, the sha256 of that, and whether it is signed."""

    path: Path
    index: Index
    sha256: str
    signed: bool


def pack(
    folders: Sequence[Path],
    out: Path,
    *,
    name: str | None = None,
    version: str | None = None,
    signer: Signer | None = None,
) -> Packed:
    """Write a distribution of the bundles in ``folders`` to ``out``: a zip (NAME.zip), else a new folder.

    One folder that is a distribution already is taken as it is: sign it with any tool, then pack it.
    ``name`` (default: the model of the bundles) and ``version`` (default: bitgen's) are in the index.
    UsageError for names, versions or folders that do not fit; FileError for a bundle whose files are not
    those of its manifest, or an ``out`` that is there (a zip is replaced).
    """
    is_zip = out.suffix == ".zip"
    if out.is_dir() or (out.exists() and not is_zip):
        raise FileError(f"{out} exists; give -o the name of a new folder, or of a zip file")
    parent = out.absolute().parent
    with (
        writing_to(out),
        tempfile.TemporaryDirectory(prefix=".bitgen-pack-", dir=_existing(parent)) as scratch,
    ):
        made = Path(scratch) / "dist"
        made.mkdir()
        if len(folders) == 1 and (folders[0] / INDEX_NAME).is_file():
            if name is not None or version is not None:
                raise UsageError(f"{folders[0]} is packed already; its index has its name and version")
            index = _copy_packed(folders[0], made)
        else:
            index = _assemble(folders, made, name, version)
        data = (made / INDEX_NAME).read_bytes()
        if signer is not None:
            signature = signer.sign(data, f"bitgen bundle {index.name} {index.version}\tfile:{INDEX_NAME}")
            (made / SIGNATURE_NAME).write_text(signature.file_text, encoding="utf-8")
        signed = (made / SIGNATURE_NAME).is_file()
        whole = made
        if is_zip:
            whole = Path(scratch) / "dist.zip"
            names = [*index.files, INDEX_NAME, *([SIGNATURE_NAME] if signed else [])]
            write_zip(made, names, whole)
        whole.rename(out)
    return Packed(out, index, hashlib.sha256(data).hexdigest(), signed)


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _assemble(folders: Sequence[Path], made: Path, name: str | None, version: str | None) -> Index:
    """Copy bundles, and write beside them what describes them; the index comes last."""
    bundles = [read_bundle(folder) for folder in folders]
    packed = {bundle.path.absolute().name: bundle for bundle in bundles}
    if len(packed) < len(bundles):
        raise UsageError("two of the folders have one name; rename one")
    for path, bundle in packed.items():
        _copy_bundle(bundle, made / path)
    name = _common_model(bundles) if name is None else name
    version = __version__ if version is None else version
    require_name(name)
    version_key(version)
    _write_json(made / SBOM_NAME, sbom(name, version, packed))
    _write_json(made / PROVENANCE_NAME, provenance(packed))
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    files = {file: sha256_of(made / file) for file in names}
    entries = tuple(
        IndexEntry.of(packed[path], path, files[f"{path}/{MANIFEST_NAME}"]) for path in sorted(packed)
    )
    index = Index(name, version, __version__, _models(bundles), entries, files)
    _write_json(made / INDEX_NAME, dump(index))
    return index


def _copy_bundle(bundle: Bundle, target: Path) -> None:
    """The manifest and the files that it names; links are not shipped."""
    folder = bundle.path
    source = Folder(folder)
    source.require_only(bundle.manifest.files)
    for name, sha256 in bundle.manifest.files.items():
        require_path(name)
        if digest_to(source, name, target / name) != sha256:
            raise FileError(f"{folder / name} is not the file its manifest names: build the bundle again")
    shutil.copyfile(folder / MANIFEST_NAME, target / MANIFEST_NAME)


def _copy_packed(folder: Path, made: Path) -> Index:
    """A distribution as it is, each file verified; a signature made elsewhere comes along unread."""
    source = Folder(folder)
    data = read_small(source, INDEX_NAME, INDEX_LIMIT)
    index = parse_index(data, str(folder / INDEX_NAME))
    source.require_only(index.files)
    for name, sha256 in index.files.items():
        if digest_to(source, name, made / name) != sha256:
            raise FileError(f"{folder / name} is not the file that the index names: pack the bundles again")
    (made / INDEX_NAME).write_bytes(data)
    if source.has(SIGNATURE_NAME):
        raw = read_small(source, SIGNATURE_NAME, SIGNATURE_LIMIT)
        Signature.parse(raw, str(folder / SIGNATURE_NAME))
        (made / SIGNATURE_NAME).write_bytes(raw)
    return index


def digest_to(source: Folder, name: str, target: Path) -> str:
    """Copy a file; the sha256 of what was copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with target.open("xb") as file:
        for chunk in source.chunks(name):
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def _common_model(bundles: Sequence[Bundle]) -> str:
    models = {bundle.manifest.model for bundle in bundles}
    name = models.pop() if len(models) == 1 else None
    if name is None:
        raise UsageError("these bundles are not all for one model; give the distribution a --name")
    return name


def _models(bundles: Sequence[Bundle]) -> dict[str, tuple[Shape, ...]]:
    """The shapes with kernels of their own, by model."""
    found: dict[str, set[Shape]] = {}
    for bundle in bundles:
        if bundle.manifest.model is not None:
            shapes = found.setdefault(bundle.manifest.model, set())
            shapes |= {kernel.shape for kernel in bundle.manifest.kernels if kernel.shape}
    return {
        model: tuple(sorted(shapes, key=lambda shape: (shape.m, shape.k)))
        for model, shapes in sorted(found.items())
    }


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
