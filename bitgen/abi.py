"""The public C header as Python reads it, through cffi: types, functions and numbers; none is repeated here.

::

    struct = ffi.new("struct bitgen_model *")
    constants.BITGEN_ERROR_BUSY

What lies between "ABI begins" and "ABI ends" in csrc/bitgen.h is C that cffi parses without `BITGEN_API`.
"""

from __future__ import annotations

from typing import Any

import cffi

from bitgen.errors import FileError
from bitgen.paths import csrc_dir


def _declarations() -> str:
    header = (csrc_dir() / "bitgen.h").read_text(encoding="utf-8")
    _, begins, rest = header.partition("/* ABI begins")
    inside, ends, _ = rest.partition("/* ABI ends")
    if not begins or not ends:
        raise FileError("bitgen's installation is damaged: no declarations in bitgen.h")
    return (begins + inside).replace("BITGEN_API ", "")


ffi: Any = cffi.FFI()
ffi.cdef(_declarations())
constants: Any = ffi.dlopen(None)  # enumerators and #defines are its attributes; it has no functions

ABI_VERSION = int(constants.BITGEN_ABI_VERSION)


def enumerators(enum: str, prefix: str) -> dict[str, int]:
    """The members of a C enum that start with ``prefix``: rest of the name, lower case -> value."""
    members = ffi.typeof(f"enum {enum}").relements
    named = {name.removeprefix(prefix).lower(): n for name, n in members.items() if name.startswith(prefix)}
    return dict(sorted(named.items(), key=lambda item: item[1]))


# Formats of embeddings and heads that a forward step reads. i8: int8 with a float scale a row, made at load.
DENSE_TYPES = enumerators("bitgen_dense_type", "BITGEN_DENSE_")
del DENSE_TYPES["types"]  # their number
STAGES = tuple(enumerators("bitgen_stage", "BITGEN_STAGE_"))
ACTIVATIONS = enumerators("bitgen_activation", "BITGEN_")
X_TYPES = enumerators("bitgen_x_type", "BITGEN_X_")  # what activations are quantised to
KV_TYPES = {
    "q8" if name == "i8" else name: n for name, n in enumerators("bitgen_kv_type", "BITGEN_KV_").items()
}
