"""Build the library of a bundle again from its C text, to see that it is what the text compiles to.

A signature says who made a library, a second build says what it is. Nothing that comes with the bundle is
executed: compiler flags are those of this bitgen, which must be the version that made it, and of its Makefile
only the order of the objects and the name for programs are read.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bitgen import __version__
from bitgen.abi import ABI_VERSION
from bitgen.bundle.manifest import Bundle, Manifest, sha256_of
from bitgen.bundle.write import HOST, exported
from bitgen.cpu import Isa, load_isas
from bitgen.errors import FileError, ToolchainError, UnsupportedError
from bitgen.hostcode import host_unit
from bitgen.toolchain import Compiler, Toolchain, Unit, find_compilers, find_cross_compilers

_STEM = re.compile(r"[A-Za-z0-9_]+")


def rebuild(bundle: Bundle) -> str:
    """The sha256 of the bundle's library, once it was built again to the same bytes.

    UnsupportedError: another version of bitgen made it, or it has no C text. ToolchainError: its compiler is
    not here. CompileError. FileError: the bytes differ.
    """
    manifest, sources = bundle.manifest, bundle.path / "src"
    if not (sources / "Makefile").is_file():
        raise UnsupportedError(f"{bundle.path.name} has no C text to build again; the zip of its release has")
    if manifest.bitgen_version != __version__:
        message = f"{bundle.path.name} was made by bitgen {manifest.bitgen_version}, this is {__version__}"
        raise UnsupportedError(f"{message}: install that one to build it again")
    facts = dict(manifest.compiler)
    host = facts.pop(HOST, None)
    kernels = _find_compiler(manifest, next(iter(facts.values())))
    compiler = kernels if host is None else _find_compiler(manifest, host)
    makefile = (sources / "Makefile").read_text(encoding="utf-8")
    soname = f"{manifest.library}.{ABI_VERSION}"
    soname = soname if f"-soname,{soname} " in makefile or f"/{soname} " in makefile else manifest.library
    with tempfile.TemporaryDirectory(prefix="bitgen-rebuild-") as scratch:
        strip = bool(re.search(r"-Wl,-[sx] ", makefile))
        cache = Path(scratch) / "cache"
        toolchain = Toolchain(compiler, cache, strip=strip, kernels=kernels if host is not None else None)
        _require_same_flags(manifest, toolchain)
        objects = toolchain.objects(list(_units(sources, makefile)))
        exports = exported((bundle.path / "bitgen.h").read_text(encoding="utf-8"))
        made = Path(scratch) / manifest.library
        toolchain.link_shared(objects, made, soname=soname, exports=exports)
        found = sha256_of(made)
    if found != manifest.files[manifest.library]:
        raise FileError(
            f"{bundle.path.name}: built again from its C text with {compiler.version} the library has "
            f"the sha256 {found}, not {manifest.files[manifest.library]}"
        )
    return found


def _units(sources: Path, makefile: str) -> Iterator[Unit]:
    """The translation units in the order in which they are linked, each with the flags of its ISA level."""
    isas = {isa.name: isa for isa in load_isas()}
    headers = tuple((file.name, file.read_text(encoding="utf-8")) for file in sorted(sources.glob("*.h")))
    listed = re.search(r"^OBJECTS = (.*)$", makefile, flags=re.MULTILINE)
    for name in listed[1].split() if listed else ():
        stem = name.removesuffix(".o")
        if not _STEM.fullmatch(stem) or not (sources / f"{stem}.c").is_file():
            raise FileError(f"{sources / 'Makefile'} names {name}, and there is no C text of it")
        text = (sources / f"{stem}.c").read_text(encoding="utf-8")
        isa: Isa | None = isas.get(stem.rpartition("__")[2])
        yield Unit(stem, text, isa, headers=headers) if isa else host_unit(stem, text, headers)


def _find_compiler(manifest: Manifest, facts: Mapping[str, Any]) -> Compiler:
    """The compiler that a manifest names, by version and target. ToolchainError when it is not here."""
    wanted = (facts["compiler"], facts["version"], facts["target"])
    here = [*find_compilers(), *find_cross_compilers(manifest.arch, manifest.system)]
    if manifest.system == "Linux":
        here += find_cross_compilers(manifest.arch, manifest.system, libc="musl")
    for compiler in here:
        if compiler.kind == wanted[0] and (compiler.kind, compiler.version, compiler.target) == wanted:
            return compiler
    raise ToolchainError(f"it was made with {wanted[1]} for {wanted[2]}, and that compiler is not here")


def _require_same_flags(manifest: Manifest, toolchain: Toolchain) -> None:
    isas = {isa.name: isa for isa in load_isas()}
    for name, facts in manifest.compiler.items():
        isa = None if name == HOST else isas.get(name)
        if (isa is None and name != HOST) or facts["flags"] != list(toolchain.flags(isa)):
            raise UnsupportedError(f"its {name} code was compiled with other flags than this bitgen uses")
