"""The words of the linkers we meet: ELF's (Linux), Mach-O's (macOS), PE's (Windows), each for a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath


def is_mach_o(target: str) -> bool:
    """Whether the target triple is one of Apple's."""
    return "-apple-" in target


def is_pe(target: str) -> bool:
    """Whether the target triple is one of Windows."""
    return "-windows-" in target


def default_libs(target: str) -> tuple[str, ...]:
    """What a library is linked with; on Windows that needs no name."""
    return () if is_pe(target) else ("-lm", "-lpthread", "-ldl")


def library_suffix(target: str) -> str:
    """Of files that the linker makes and nobody else sees; what a DLL is called stands in it."""
    return ".dll" if is_pe(target) else ".so"


def exports_file(target: str) -> str:
    """The name of the list of the visible functions, in the linker's folder."""
    return "exports.def" if is_pe(target) else "exports.txt"


def import_library(library: str) -> str:
    """The name of the file that programs link with for a DLL."""
    return PurePath(library).with_suffix(".lib").name


def shared_flags(
    target: str,
    *,
    undefined: bool = False,
    soname: str | None = None,
    exports: bool = False,
    strip: bool = False,
) -> tuple[str, ...]:
    """The flags that make a shared library.

    ``undefined``: symbols may stay open until it is loaded (Python's own, in an extension module).
    ``soname``: the name that programs linked with it will look for; of a DLL it gives that of the import
    library, which is made besides. ``exports``: only what `exports_text` names is visible; that text lies in
    `exports_file` in the linker's folder. ``strip``: without the names of all other functions.
    """
    listed = exports_file(target)
    if is_pe(target):
        optional: tuple[tuple[bool, str], ...] = (
            (soname is not None, f"-Wl,--out-implib,{import_library(soname or '')}"),
            (exports, listed),
            (strip, "-Wl,-s"),
        )
        return ("-shared", *(flag for wanted, flag in optional if wanted))
    if is_mach_o(target):
        optional = (
            (undefined, "-Wl,-undefined,dynamic_lookup"),
            (soname is not None, f"-Wl,-install_name,@rpath/{soname}"),
            (exports, f"-Wl,-exported_symbols_list,{listed}"),
            (strip, "-Wl,-x"),
        )
        return ("-shared", *(flag for wanted, flag in optional if wanted))
    optional = (
        (not undefined, "-Wl,-z,defs"),
        (soname is not None, f"-Wl,-soname,{soname}"),
        (exports, f"-Wl,--version-script={listed}"),
        (strip, "-Wl,-s"),
    )
    return ("-shared", "-Wl,-z,noexecstack", *(flag for wanted, flag in optional if wanted))


def exports_text(target: str, names: Sequence[str]) -> str:
    """The list of the visible functions ``names``, as the linker of ``target`` reads it."""
    if is_pe(target):
        return "EXPORTS\n" + "".join(f"    {name}\n" for name in names)
    if is_mach_o(target):
        return "".join(f"_{name}\n" for name in names)
    return f"{{ global: {' '.join(f'{name};' for name in names)} local: *; }};\n"
