"""What a bundle says about itself, and whether that is true.

A bundle is a folder: a library, its header, a manifest, a pkg-config file, and the C text it was made from.
The manifest is believed only as far as it can be checked: the library's bytes against its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, overload

import msgspec

from bitgen.abi import ABI_VERSION
from bitgen.errors import BitgenError, FileError
from bitgen.families.base import COMMON_GROUP, TERNARY
from bitgen.records import load
from bitgen.spec import EVERY_FAMILY, KernelSpec, Shape, StepSizes, WeightKind

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1

PACKAGE = "a package of pip"  # whoever installs one lets it run
WHEEL = "in bitgen's wheel"  # whoever trusts bitgen trusts it
TUNED, DEFAULT, PORTABLE = "tuned", "default", "portable"
Label: TypeAlias = Literal["tuned", "transferred", "default"]  # how a bundle's kernels were found


def in_every_library(kind: WeightKind) -> bool:
    """Whether all libraries have kernels of their ISA level for such weights, whatever they were built for.

    Ternary ones with a scale a row or for each `COMMON_GROUP` weights along k. Others run on a
    portable kernel, tens of times slower, in a library that was not built for them.
    """
    return kind.weights == TERNARY and kind.group in (0, COMMON_GROUP)


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of a library, chosen for a shape on a number of threads, or (None and 0) for every shape.

    ``role`` is tuned, default (serves every shape) or portable (scalar); empty: tuned for a shape, else
    default. ``sha256`` is that of its C text, empty where that was not rendered yet. ``cpu_family``: where
    kernels of one ISA level were tuned on several families, that on which this one comes first; it never
    decides what runs. BitgenError when shape, threads and spec contradict each other.
    """

    name: str = field(init=False, repr=False, compare=False)  # for people, and so is the regime
    regime: str = field(init=False, repr=False, compare=False)
    spec: KernelSpec
    shape: Shape | None = None
    threads: int = 0
    role: str = ""
    sha256: str = ""
    cpu_family: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.spec.name)
        object.__setattr__(self, "regime", self.spec.regime)
        if (self.shape is None) != (self.threads == 0) or self.threads < 0:
            raise BitgenError(
                f"{self.spec.name}: a kernel for a shape needs threads >= 1, one for all needs 0"
            )
        if self.spec.shape not in (None, self.shape):
            raise BitgenError(f"{self.spec.name} was made for another shape than {self.shape}")
        if not self.role:
            object.__setattr__(self, "role", TUNED if self.shape else DEFAULT)


class Offer(NamedTuple):
    """What tells whether a kernel is for a model's matrices; ``shape`` None: it serves every one."""

    family: str
    group: int
    role: str
    shape: Shape | None

    @property
    def kind(self) -> WeightKind:
        """Of the weights that it multiplies."""
        return WeightKind(EVERY_FAMILY[self.family].weights, self.group)


class Kernels(Sequence[KernelEntry]):
    """The kernels of a manifest that was verified. Each becomes a record when one of them is asked for.

    That takes 50 us a kernel, and who chooses among bundles needs but their `Offer`. FileError when one is
    damaged.
    """

    def __init__(self, plain: Sequence[Any], where: str) -> None:
        self._plain, self._where = plain, where

    @cached_property
    def _entries(self) -> tuple[KernelEntry, ...]:
        return load(tuple[KernelEntry, ...], self._plain, self._where)

    def __len__(self) -> int:
        return len(self._plain)

    @overload
    def __getitem__(self, at: int) -> KernelEntry: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[KernelEntry, ...]: ...
    def __getitem__(self, at: int | slice) -> KernelEntry | tuple[KernelEntry, ...]:
        return self._entries[at]

    def __iter__(self) -> Iterator[KernelEntry]:
        return iter(self._entries)

    def to_plain(self) -> Sequence[Any]:
        return self._plain

    def offers(self) -> Iterator[Offer]:
        """What each is for, read without the rest of it."""
        try:
            for entry in self._plain:
                layout, shape = entry["spec"]["layout"], entry.get("shape")
                place = Shape.from_plain(shape) if shape is not None else None
                role = entry.get("role") or (TUNED if place else DEFAULT)
                yield Offer(layout["family"], layout.get("group", 0), role, place)
        except (KeyError, TypeError, AttributeError):
            list(self)  # says what is wrong
            raise


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself.

    ``isas`` maps each ISA level of the library to the CPU features it requires; ``files`` maps each file to
    its sha256; ``compiler`` is JSON-able and for people; ``fingerprint`` is the digest of the tuning records'
    fingerprint, None for an untuned library. ``threads`` are the fastest on a machine of ``cores`` usable
    cores, and the default there; 0: not compared. ``step`` are the sizes of the models that have a forward
    step of their own in it; None: all share one. ``dispatches``: the library is for every CPU and takes the
    best of its levels that the one it is loaded on runs. ``label``: how the kernels of shapes were found;
    None: tuned where there are any. ``origin`` says it for people.
    """

    name: str
    library: str
    arch: str
    system: str
    cpu_family: str
    model: str | None
    isas: Mapping[str, tuple[str, ...]]
    kernels: Sequence[KernelEntry]
    files: Mapping[str, str]
    compiler: Mapping[str, Any]
    fingerprint: str | None
    bitgen_version: str
    threads: int = 0
    cores: int = 0
    step: StepSizes | None = None
    dispatches: bool = False
    label: Label | None = None
    origin: str = ""
    abi_version: int = ABI_VERSION
    format: int = MANIFEST_FORMAT

    @property
    def features(self) -> frozenset[str]:
        """Everything a CPU needs to run the library."""
        levels = [frozenset(features) for features in self.isas.values()]
        return frozenset.intersection(*levels) if self.dispatches else frozenset().union(*levels)

    @property
    def is_tuned(self) -> bool:
        return any(offer.role == TUNED for offer in self.offers())

    def offers(self) -> Iterator[Offer]:
        """What each kernel is for."""
        if isinstance(self.kernels, Kernels):
            return self.kernels.offers()
        return (Offer(k.spec.family, k.spec.layout.group, k.role, k.shape) for k in self.kernels)


@dataclass(frozen=True)
class Origin:
    """What a bundle from elsewhere is part of: ``key_id`` is that of the key that signed it, None: nobody's.

    ``trust``: why it may be used without a signature, for people.
    """

    name: str
    version: str
    key_id: str | None
    label: Label
    trust: str = "unsigned"

    @property
    def signed(self) -> str:
        """Who vouches for it."""
        return self.key_id or self.trust


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read; see `read_bundle` for what is known of its library.

    ``origin`` is None for one that was built here.
    """

    path: Path
    manifest: Manifest
    origin: Origin | None = None

    @property
    def label(self) -> Label:
        """How its kernels were found: the index's word for an installed one, else its manifest's."""
        if self.origin is not None:
            return self.origin.label
        return self.manifest.label or ("tuned" if self.manifest.is_tuned else "default")

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


def read_bundle(path: Path | str, *, hashed: bool = True, sha256: str | None = None) -> Bundle:
    """The bundle in the folder ``path``, its library's bytes verified.

    Without ``hashed`` they are not read: for whoever only chooses among bundles. `bitgen.runtime.load`
    verifies the one it opens, on the descriptor that it loads. ``sha256``: what the manifest must have; its
    kernels are then read when they are asked for.

    FileError, always one line: no manifest, one of another format or ABI version, a missing
    library, a library that is not the one the manifest describes.
    """
    folder = Path(path)
    file = folder / MANIFEST_NAME
    try:
        raw = file.read_bytes()
        if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
            raise FileError(f"the manifest of {folder.name} is not the one its index names: install it again")
        data = msgspec.json.decode(raw)
    except FileNotFoundError:
        raise FileError(f"{folder} is not a bundle: there is no {MANIFEST_NAME} in it") from None
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise FileError(f"cannot read {file}: {error}") from error
    manifest = _parse(data, file, trusted=sha256 is not None and not hashed)
    # A manifest from elsewhere must not name a library outside its folder.
    if Path(manifest.library).name != manifest.library:
        raise FileError(f"{file}: library must be a file name, not {manifest.library!r}")
    if hashed:
        _require_library(folder, manifest)
    return Bundle(folder, manifest)


def _require_library(folder: Path, manifest: Manifest) -> None:
    library = folder / manifest.library
    try:
        digest = sha256_of(library)
    except OSError as error:
        why = error.strerror or str(error)
        raise FileError(f"the library of bundle {folder} cannot be read: {library}: {why}") from error
    if digest != manifest.files.get(manifest.library):
        raise FileError(f"{library} is not the file its manifest describes (sha256 differs): build it again")


def _parse(data: Any, file: Path, trusted: bool = False) -> Manifest:
    versions = (("format", MANIFEST_FORMAT), ("abi_version", ABI_VERSION))
    for key, wanted in versions:
        found = data.get(key) if isinstance(data, dict) else None
        if found != wanted:
            raise FileError(f"{file}: {key} is {found!r}, this bitgen reads {wanted}: build the bundle again")
    kernels = data.get("kernels")
    try:
        if not trusted or not isinstance(kernels, list):
            return load(Manifest, data, str(file))
        return replace(
            load(Manifest, {**data, "kernels": []}, str(file)), kernels=Kernels(kernels, str(file))
        )
    except FileError as error:
        raise FileError(f"{error.message}; the manifest is damaged: build the bundle again") from error


def find_bundles(folder: Path, *, hashed: bool = True) -> tuple[list[Bundle], list[BitgenError]]:
    """The bundles in the folders directly below ``folder``, and what is wrong with the damaged ones.

    ``hashed``: see `read_bundle`.
    """
    bundles: list[Bundle] = []
    errors: list[BitgenError] = []
    for file in sorted(folder.glob(f"*/{MANIFEST_NAME}")):
        try:
            bundles.append(read_bundle(file.parent, hashed=hashed))
        except BitgenError as error:
            errors.append(error)
    return bundles, errors
