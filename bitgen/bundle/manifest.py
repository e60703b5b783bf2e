"""What a bundle says about itself, and whether that is true.

A bundle is a folder: a library, its header, a manifest, a pkg-config file, and the C text it was made from.
The manifest is believed only as far as it can be checked: the library's bytes against its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitgen.abi import ABI_VERSION
from bitgen.errors import BitgenError, FileError
from bitgen.spec import KernelSpec, Shape, StepSizes

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

TUNED, DEFAULT, PORTABLE = "tuned", "default", "portable"


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of a library, chosen for a shape on a number of threads, or (None and 0) for every shape.

    ``role`` is tuned, default (serves every shape) or portable (scalar); empty: tuned for a shape, else
    default. ``digest`` is the sha256 of its C text, empty where that was not rendered yet. BitgenError when
    shape, threads and spec contradict each other.
    """

    spec: KernelSpec
    shape: Shape | None = None
    threads: int = 0
    role: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if (self.shape is None) != (self.threads == 0) or self.threads < 0:
            raise BitgenError(
                f"{self.spec.name}: a kernel for a shape needs threads >= 1, one for all needs 0"
            )
        if self.spec.shape not in (None, self.shape):
            raise BitgenError(f"{self.spec.name} was made for another shape than {self.shape}")
        if not self.role:
            object.__setattr__(self, "role", TUNED if self.shape else DEFAULT)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.spec.name,  # for people; the spec below is what counts
            "role": self.role,
            "shape": self.shape.name if self.shape else None,
            "regime": self.spec.regime,
            "threads": self.threads,
            "spec": self.spec.to_dict(),
            "sha256": self.digest,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KernelEntry:
        return cls(
            spec=KernelSpec.from_dict(data["spec"]),
            role=str(data["role"]),
            shape=Shape.parse(data["shape"]) if data["shape"] else None,
            threads=int(data["threads"]),
            digest=str(data["sha256"]),
        )


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself.

    ``isas`` maps each ISA level of the library to the CPU features it requires; ``files`` maps each file to
    its sha256; ``compiler`` is JSON-able and for people; ``fingerprint`` is the digest of the tuning records'
    fingerprint, None for an untuned library. ``threads`` are the fastest on a machine of ``cores`` usable
    cores, and the default there; 0: not compared. ``step`` are the sizes of the models that have a forward
    step of their own in it; None: all share one.
    """

    name: str
    library: str
    arch: str
    system: str
    cpu_family: str
    model: str | None
    isas: Mapping[str, tuple[str, ...]]
    kernels: tuple[KernelEntry, ...]
    files: Mapping[str, str]
    compiler: Mapping[str, Any]
    fingerprint: str | None
    bitgen_version: str
    threads: int = 0
    cores: int = 0
    step: StepSizes | None = None
    abi_version: int = ABI_VERSION
    format: int = MANIFEST_FORMAT

    @property
    def features(self) -> frozenset[str]:
        """Everything a CPU needs to run the library."""
        return frozenset(feature for features in self.isas.values() for feature in features)

    @property
    def is_tuned(self) -> bool:
        return any(kernel.role == TUNED for kernel in self.kernels)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "isas": {name: list(features) for name, features in self.isas.items()},
            "kernels": [kernel.to_dict() for kernel in self.kernels],
            "files": dict(self.files),
            "compiler": dict(self.compiler),
            "step": self.step.to_dict() if self.step else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        return cls(
            name=str(data["name"]),
            library=str(data["library"]),
            arch=str(data["arch"]),
            system=str(data["system"]),
            cpu_family=str(data["cpu_family"]),
            model=None if data["model"] is None else str(data["model"]),
            isas={str(name): tuple(map(str, features)) for name, features in data["isas"].items()},
            kernels=tuple(KernelEntry.from_dict(kernel) for kernel in data["kernels"]),
            files={str(name): str(digest) for name, digest in data["files"].items()},
            compiler=dict(data["compiler"]),
            fingerprint=None if data["fingerprint"] is None else str(data["fingerprint"]),
            bitgen_version=str(data["bitgen_version"]),
            threads=int(data.get("threads", 0)),
            cores=int(data.get("cores", 0)),
            step=StepSizes.from_dict(data["step"]) if data.get("step") else None,
            abi_version=int(data["abi_version"]),
            format=int(data["format"]),
        )


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: the library is there and its bytes are those the manifest names."""

    path: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.path / self.manifest.library


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_bundle(path: Path) -> bool:
    """Whether there is a manifest in the folder ``path``; whether it is right is for `read_bundle`."""
    return (path / MANIFEST_NAME).is_file()


def read_bundle(path: Path | str) -> Bundle:
    """The bundle in the folder ``path``, its library's bytes verified.

    FileError, always one line: no manifest, one of another format or ABI version, a missing
    library, a library that is not the one the manifest describes.
    """
    folder = Path(path)
    file = folder / MANIFEST_NAME
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{folder} is not a bundle: there is no {MANIFEST_NAME} in it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"cannot read {file}: {error}") from error
    manifest = _parse(data, file)
    library = folder / manifest.library
    # A manifest from elsewhere must not name a library outside its folder.
    if Path(manifest.library).name != manifest.library:
        raise FileError(f"{file}: library must be a file name, not {manifest.library!r}")
    try:
        digest = sha256_of(library)
    except OSError as error:
        why = error.strerror or str(error)
        raise FileError(f"the library of bundle {folder} cannot be read: {library}: {why}") from error
    if digest != manifest.files.get(manifest.library):
        raise FileError(f"{library} is not the file its manifest describes (sha256 differs): build it again")
    return Bundle(folder, manifest)


def _parse(data: Any, file: Path) -> Manifest:
    versions = (("format", MANIFEST_FORMAT), ("abi_version", ABI_VERSION))
    for key, wanted in versions:
        found = data.get(key) if isinstance(data, dict) else None
        if found != wanted:
            raise FileError(f"{file}: {key} is {found!r}, this bitgen reads {wanted}: build the bundle again")
    try:
        return Manifest.from_dict(data)
    except BitgenError as error:
        raise FileError(f"{file}: {error.message}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        detail = f"{type(error).__name__}: {error}"
        raise FileError(f"{file} is damaged ({detail}): build the bundle again") from error


def find_bundles(folder: Path) -> tuple[list[Bundle], list[BitgenError]]:
    """The bundles in the folders directly below ``folder``, and what is wrong with the damaged ones."""
    bundles: list[Bundle] = []
    errors: list[BitgenError] = []
    for file in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        try:
            bundles.append(read_bundle(file.parent))
        except BitgenError as error:
            errors.append(error)
    return bundles, errors
