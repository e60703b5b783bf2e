"""Distributions of bundles whose library is no library: all that installing, listing and choosing read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitgen.bundle import MANIFEST_NAME, TUNED, KernelEntry, Manifest, sha256_of
from bitgen.bundle.pack import Packed, pack
from bitgen.cpu import detect_cpu
from bitgen.records import dump
from bitgen.spec import KernelSpec, Layout, Schedule, Shape

SPEC = KernelSpec("tl2", "avx2", "n1", Layout("tl2", 32), Schedule("direct", (("streams", 2), ("nr", 1))))


def manifest(**changes: Any) -> Manifest:
    """Of a tuned bundle that this CPU runs, whatever it is."""
    cpu = detect_cpu()
    base = Manifest(
        name="test",
        library="libbitgen-test.so",
        arch=cpu.arch,
        system=cpu.os,
        cpu_family=cpu.family,
        model="3B",
        isas={"scalar": ()},
        kernels=(KernelEntry(SPEC, Shape(100, 500), 2, TUNED, "a" * 64), KernelEntry(SPEC, sha256="b" * 64)),
        files={},
        compiler={"scalar": {"compiler": "gcc"}},
        fingerprint="f" * 16,
        bitgen_version="0.1.0",
    )
    return replace(base, **changes)


def fake_bundle(folder: Path, library: bytes = b"machine code" * 1000, **changes: Any) -> Path:
    """A bundle in the new ``folder``: a library of these bytes, a header, a C file."""
    (folder / "src").mkdir(parents=True)
    files = {"libbitgen-test.so": library, "bitgen.h": b"/* header */\n", "src/run.c": b"int x;\n"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    made = manifest(**{"files": {name: sha256_of(folder / name) for name in files}, **changes})
    (folder / MANIFEST_NAME).write_text(json.dumps(dump(made)), encoding="utf-8")
    return folder


def distribution(
    out: Path, signer: Any = None, version: str = "1.0.0", library: bytes = b"machine code", **changes: Any
) -> Packed:
    """A distribution of one bundle: a zip or a folder, as ``out`` is named."""
    bundle = fake_bundle(out.with_name(f"{out.name}.made") / "native", library * 1000, **changes)
    return pack([bundle], out, version=version, signer=signer)


def rewritten(archive: Path, out: Path, change: Callable[[dict[str, bytes]], object]) -> Path:
    """The zip with its files (name -> bytes) changed."""
    with zipfile.ZipFile(archive) as before:
        files = {name: before.read(name) for name in before.namelist()}
    change(files)
    with zipfile.ZipFile(out, "w") as after:
        for name, data in files.items():
            after.writestr(name, data)
    return out


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder: path -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
