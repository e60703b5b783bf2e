"""A distribution of bundles as a wheel, which pip installs and bitgen finds through an entry point.

::

    bitgen_kernels_3b/index.json ...               the distribution, without C text
    bitgen_kernels_3b-1.2.0.dist-info/             entry_points.txt: group bitgen.bundles, the package
                                     sboms/        the bill of materials (PEP 770)

It is read where pip put it. Equal distributions give equal bytes, on one version of zlib.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

from bitgen.bundle.container import write_archive
from bitgen.bundle.elf import common_tag, read_requirements
from bitgen.bundle.installed import GROUP
from bitgen.bundle.manifest import MANIFEST_NAME, read_bundle
from bitgen.bundle.pack import Packed
from bitgen.bundle.provenance import SBOM_NAME
from bitgen.records import dump


def slim(bundle: Path, out: Path) -> Path:
    """Copy a bundle to the new folder ``out`` without its C text; the library keeps its bytes."""
    known = read_bundle(bundle)
    files = {name: sha for name, sha in known.manifest.files.items() if not name.startswith("src/")}
    out.mkdir(parents=True)
    for name in files:
        shutil.copyfile(bundle / name, out / name)
    text = json.dumps(dump(replace(known.manifest, files=files)), indent=1) + "\n"
    (out / MANIFEST_NAME).write_text(text, encoding="utf-8")
    return out


def package_name(name: str) -> str:
    """The package, and in its normal form the project, of a distribution's wheel."""
    return "bitgen_kernels_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write_wheel(packed: Packed, out: Path) -> Path:
    """Write the wheel of a distribution in a folder to the folder ``out``; returns its file.

    Its tag is what all of its libraries ask for together. FileError for a library that is none of Linux.
    """
    index, folder = packed.index, packed.path
    package = package_name(index.name)
    libraries = [read_bundle(folder / entry.path).library for entry in index.bundles]
    tag = common_tag([read_requirements(library) for library in libraries])
    info = f"{package}-{index.version}.dist-info"
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    files = {f"{package}/{name}": (folder / name).read_bytes() for name in names}
    files |= {
        f"{package}/__init__.py": b'"""Kernel libraries; bitgen reads them where they lie."""\n',
        f"{info}/METADATA": _metadata(package, index.name, index.version).encode(),
        f"{info}/WHEEL": _wheel(tag).encode(),
        f"{info}/entry_points.txt": f"[{GROUP}]\n{index.name} = {package}\n".encode(),
        f"{info}/sboms/{SBOM_NAME}": (folder / SBOM_NAME).read_bytes(),
    }
    record = [f"{name},{_digest(data)},{len(data)}" for name, data in sorted(files.items())]
    files[f"{info}/RECORD"] = "".join(f"{line}\n" for line in (*record, f"{info}/RECORD,,")).encode()
    made = out / f"{package}-{index.version}-{tag}.whl"
    write_archive(files, made)
    return made


def _digest(data: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def _metadata(package: str, name: str, version: str) -> str:
    lines = (
        "Metadata-Version: 2.1",
        f"Name: {package}",
        f"Version: {version}",
        f"Summary: Kernel libraries of bitgen for {name}",
        "License: Apache-2.0",
    )
    return "".join(f"{line}\n" for line in lines)


def _wheel(tag: str) -> str:
    python, abi, platforms = tag.split("-")
    lines = ["Wheel-Version: 1.0", "Generator: bitgen", "Root-Is-Purelib: false"]
    lines += [f"Tag: {python}-{abi}-{platform}" for platform in platforms.split(".")]
    return "".join(f"{line}\n" for line in lines)
