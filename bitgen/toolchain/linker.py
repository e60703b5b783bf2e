"""The words of the two linkers we meet, ELF's (Linux) and Mach-O's (macOS); the target is an argument."""

from __future__ import annotations

from collections.abc import Sequence

EXPORTS_FILE = "exports.txt"


def is_mach_o(target: str) -> bool:
    """Whether the target triple is one of Apple's."""
    return "-apple-" in target


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
    ``soname``: the name that programs linked with it will look for. ``exports``: only what `exports_text`
    names is visible; that text lies in ``EXPORTS_FILE`` in the linker's folder. ``strip``: without the
    names of all other functions.
    """
    if is_mach_o(target):
        optional = (
            (undefined, "-Wl,-undefined,dynamic_lookup"),
            (soname is not None, f"-Wl,-install_name,@rpath/{soname}"),
            (exports, f"-Wl,-exported_symbols_list,{EXPORTS_FILE}"),
            (strip, "-Wl,-x"),
        )
        return ("-shared", *(flag for wanted, flag in optional if wanted))
    optional = (
        (not undefined, "-Wl,-z,defs"),
        (soname is not None, f"-Wl,-soname,{soname}"),
        (exports, f"-Wl,--version-script={EXPORTS_FILE}"),
        (strip, "-Wl,-s"),
    )
    return ("-shared", "-Wl,-z,noexecstack", *(flag for wanted, flag in optional if wanted))


def exports_text(target: str, names: Sequence[str]) -> str:
    """The list of the visible functions ``names``, as the linker of ``target`` reads it."""
    if is_mach_o(target):
        return "".join(f"_{name}\n" for name in names)
    return f"{{ global: {' '.join(f'{name};' for name in names)} local: *; }};\n"
