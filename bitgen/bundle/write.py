"""A library is compiled, verified by running it, and written; it appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitgen import __version__
from bitgen.abi import ABI_VERSION
from bitgen.bundle.contents import Contents, Target, choose_contents
from bitgen.bundle.manifest import MANIFEST_NAME, KernelEntry, Label, Manifest, is_bundle, sha256_of
from bitgen.bundle.units import library_units_of
from bitgen.cpu import CAP_VARIABLE, accepted_isas, detect_cpu
from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.hostcode import SYSTEMS, host_headers
from bitgen.paths import HOME_VARIABLE, cache_dir, ensure_dir
from bitgen.records import dump
from bitgen.spec import StepSizes
from bitgen.toolchain import (
    Toolchain,
    Unit,
    default_libs,
    exports_file,
    exports_text,
)
from bitgen.toolchain.cache import writing

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHECK_TIMEOUT_S = 120.0
HOST = "host"  # in a manifest's compilers: of host code


def write_library(
    choices: Sequence[KernelEntry],
    toolchain: Toolchain,
    out_dir: Path | str,
    name: str,
    target: Target,
    *,
    model: str | None = None,
    sizes: StepSizes | None = None,
    fingerprint: str | None = None,
    threads: int = 0,
    check: bool = True,
    label: Label | None = None,
    origin: str = "",
    release: bool = False,
) -> Path:
    """Write the bundle ``out_dir/name`` and return its path; it appears whole or not at all.

    ``sizes``: those of ``model``, which gets a forward step of its own; others run on the one for all.
    ``threads``: the fastest number on the cores of ``target``, the default wherever as many are usable; 0: no
    such number is known. ``label`` and ``origin`` say how the choices were found (see `Manifest`). A
    ``release`` goes into zips and wheels, which hold no links: programs load the library by its own name.
    ``check`` executes the library in a child process before it is kept: features that a hypervisor only
    advertises show there. An older bundle of this name is replaced. BitgenError: a name that cannot be a
    file's, a folder of this name that is no bundle, a read-only or full disk, a kernel that does not compile
    (CompileError), a library that computes something wrong.
    """
    if not _NAME.fullmatch(name):
        message = f"{name!r} cannot name files; use letters, digits, dot, dash, underscore"
        raise UsageError(message)
    contents = replace(choose_contents(choices, target), threads=threads, sizes=sizes)
    parent = ensure_dir(out_dir).absolute()  # the self-test runs in another folder
    folder = parent / name
    if folder.exists() and not is_bundle(folder):
        raise FileError(f"{folder} exists and is not a bundle; choose another name or folder")
    advice = f"choose another folder with --out or {HOME_VARIABLE}"
    with (
        writing(folder, advice),
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent, ignore_cleanup_errors=True) as scratch,
    ):
        made = Path(scratch) / name
        about = _About(name, model, fingerprint, label, origin, release)
        _write(made, contents, toolchain, about)
        if check:
            _execute(made, contents.target)
        _move(made, folder, Path(scratch) / "replaced")
    return folder


@dataclass(frozen=True)
class _About:
    """What a manifest says besides the contents, as `write_library` is given it."""

    name: str
    model: str | None
    fingerprint: str | None
    label: Label | None
    origin: str
    release: bool


def _write(folder: Path, contents: Contents, toolchain: Toolchain, about: _About) -> None:
    """The files of the bundle, below the new folder ``folder``."""
    folder.mkdir()
    target, library = contents.target, library_name(about.name, contents.target.cpu.os)
    units = library_units_of(contents)
    in_windows = target.cpu.os == "Windows"  # where a DLL is found by its own name
    soname = library if about.release or in_windows else f"{library}.{ABI_VERSION}"
    public = dict(host_headers(target.cpu.arch))["bitgen.h"]
    exports = exported(public)
    toolchain.link_shared(toolchain.objects(units), folder / library, soname=soname, exports=exports)
    if soname != library:
        (folder / soname).symlink_to(library)
    (folder / "bitgen.h").write_text(public, encoding="utf-8")
    (folder / "bitgen.pc").write_text(pkg_config(about.name, target.cpu.os), encoding="utf-8")
    _write_sources(folder / "src", units, toolchain, soname, exports)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    manifest = Manifest(
        name=about.name,
        library=library,
        arch=target.cpu.arch,
        system=target.cpu.os,
        cpu_family=target.cpu.family,
        model=about.model,
        step=contents.sizes,
        dispatches=target.universal,
        label=about.label,
        origin=about.origin,
        isas={isa.name: tuple(sorted(isa.requires)) for isa in contents.isas},
        kernels=contents.entries,
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
        compiler=_compilers(contents, toolchain),
        fingerprint=about.fingerprint,
        threads=contents.threads,
        cores=contents.cores,
        bitgen_version=__version__,
    )
    text = json.dumps(dump(manifest), indent=1) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def _compilers(contents: Contents, toolchain: Toolchain) -> dict[str, Any]:
    """What compiled each ISA level, and host code where that was another compiler."""
    levels = {isa.name: toolchain.fingerprint(isa) for isa in contents.isas}
    return levels if toolchain.kernels is None else {**levels, HOST: toolchain.fingerprint(None)}


def exported(header: str) -> tuple[str, ...]:
    """The functions that a public header declares: what a library leaves visible."""
    return tuple(re.findall(r"^BITGEN_API [^(]*?\b(bitgen_\w+)\(", header, flags=re.MULTILINE))


def library_name(name: str, system: str) -> str:
    """The file name of a library: libbitgen-NAME.so, libbitgen-NAME.dylib or bitgen-NAME.dll."""
    if system not in SYSTEMS:
        raise BitgenError(f"bitgen builds libraries for {', '.join(SYSTEMS)}, not for {system}")
    if system == "Windows":
        return f"bitgen-{name}.dll"
    return f"libbitgen-{name}.{'dylib' if system == 'Darwin' else 'so'}"


def pkg_config(name: str, system: str = "Linux") -> str:
    """The text of bitgen.pc; its paths are relative to wherever the file lies."""
    found = private = ""  # Windows looks for a DLL beside the program
    if system != "Windows":
        found, private = " -Wl,-rpath,${libdir}", f" {' '.join(default_libs(system))}"
    return "\n".join(
        (
            "libdir=${pcfiledir}",
            "includedir=${pcfiledir}",
            "",
            "Name: bitgen",
            f"Description: exact matrix kernels for ternary weights ({name})",
            f"Version: {__version__}",
            f"Libs: -L${{libdir}} -lbitgen-{name}{found}",
            f"Libs.private:{private}",
            "Cflags: -I${includedir}",
            "",
        )
    )


def _write_sources(
    folder: Path, units: Sequence[Unit], toolchain: Toolchain, soname: str, exports: Sequence[str]
) -> None:
    """The C text, and a Makefile that makes the library of it without bitgen."""
    folder.mkdir()
    headers = dict(header for unit in units for header in unit.headers)
    texts: Mapping[str, str] = {**headers, **{f"{unit.stem}.c": unit.text for unit in units}}
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    machine = toolchain.compiler.target
    (folder / exports_file(machine)).write_text(exports_text(machine, exports), encoding="utf-8")
    library = soname.removesuffix(f".{ABI_VERSION}")
    shared = toolchain.shared_flags(soname, exports=True)
    lines = [
        "# Makes the library again from the C text beside this file.",
        *(["KERNEL_CC = gcc # compiled the units of ISA levels"] if toolchain.kernels is not None else []),
        f"OBJECTS = {' '.join(f'{unit.stem}.o' for unit in units)}",
        "",
        f"{library}: $(OBJECTS)",
        f"\t$(CC) {' '.join(shared)} -o $@ $(OBJECTS) {' '.join(default_libs(machine))}".rstrip(),
        "",
    ]
    for unit in units:
        flags = " ".join((*toolchain.flags(unit.isa), *unit.flags))
        compiler = "$(KERNEL_CC)" if toolchain.kernels is not None and unit.isa is not None else "$(CC)"
        lines += [f"{unit.stem}.o: {unit.stem}.c", f"\t{compiler} {flags} -c {unit.stem}.c -o $@", ""]
    lines += ["clean:", f"\trm -f $(OBJECTS) {library}", "", ".PHONY: clean", ""]
    (folder / "Makefile").write_text("\n".join(lines), encoding="utf-8")


def _execute(folder: Path, target: Target) -> None:
    """Run the library's self-test in a child process. BitgenError when it fails or dies.

    A universal library is tested at each of its levels that this CPU runs.
    """
    here = accepted_isas(detect_cpu(), target.isas)
    for cap in [isa.name for isa in here] if target.universal else [None]:
        _execute_at(folder, cap)


def _execute_at(folder: Path, cap: str | None) -> None:
    command = [sys.executable, "-m", "bitgen.self_test", str(folder)]
    package = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, CAP_VARIABLE: cap} if cap else None
    try:
        done = subprocess.run(
            command,
            cwd=package,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_CHECK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BitgenError(f"the new library hung in its self-test ({_CHECK_TIMEOUT_S:g} s)") from None
    if done.returncode < 0:
        raise BitgenError(
            f"the new library died in its self-test (signal {-done.returncode}): this CPU may advertise "
            "features it does not have; build for a lower level with --isa"
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BitgenError(f"the new library failed its self-test: {said}")


def _move(made: Path, folder: Path, replaced: Path) -> None:
    """Put the finished folder in its place; programs that have the old library open keep it."""
    from filelock import FileLock  # 35 ms that only a build pays

    # Processes take turns. The lock stays behind where filelock does not remove it: not in the user's folder.
    with FileLock(ensure_dir(cache_dir()) / "replace.lock"):
        if folder.exists():
            folder.rename(replaced)
        try:
            made.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
