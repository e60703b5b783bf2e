"""The public C header as Python reads it, through cffi: types, functions and numbers; none is repeated here.

::

    struct = ffi.new("struct bitgen_model *")
    constants.BITGEN_ERROR_BUSY

What lies between "ABI begins" and "ABI ends" in csrc/bitgen.h is C that cffi parses without `BITGEN_API`.
Parsing it takes 60 ms, so what came of it is kept in bitgen/abi_types.py, with the digest of what was parsed:
any other header is parsed again. ``python -m bitgen.abi`` writes that file.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from bitgen import abi_types
from bitgen.errors import FileError
from bitgen.paths import csrc_dir


def _declarations() -> str:
    header = (csrc_dir() / "bitgen.h").read_text(encoding="utf-8")
    _, begins, rest = header.partition("/* ABI begins")
    inside, ends, _ = rest.partition("/* ABI ends")
    if not begins or not ends:
        raise FileError("bitgen's installation is damaged: no declarations in bitgen.h")
    return (begins + inside).replace("BITGEN_API ", "")


def _parsed(declarations: str) -> Any:
    import cffi

    parsed = cffi.FFI()
    parsed.cdef(declarations)
    return parsed


def _digest(declarations: str) -> str:
    return hashlib.sha256(declarations.encode()).hexdigest()


def types_module(declarations: str) -> str:
    """The text of bitgen/abi_types.py: a module with ``PARSED``, a digest, and ``ffi``."""
    import io

    from cffi.recompiler import make_py_source

    parsed, out = _parsed(declarations), io.StringIO()
    parsed.set_source("bitgen.abi_types", None)
    make_py_source(parsed, "bitgen.abi_types", out)
    what = '"""What cffi reads in csrc/bitgen.h. Do not edit: `python -m bitgen.abi` writes it."""'
    return f'{what}\n\nPARSED = "{_digest(declarations)}"\n\n{out.getvalue()}'


def _types() -> Any:
    declarations = _declarations()
    return abi_types.ffi if _digest(declarations) == abi_types.PARSED else _parsed(declarations)


ffi: Any = _types()
constants: Any = ffi.dlopen(None)  # enumerators and #defines are its attributes; it has no functions

ABI_VERSION = int(constants.BITGEN_ABI_VERSION)


def has_function(lib: Any, name: str) -> bool:
    """Whether a library that cffi opened has a function of the header; older ones lack the newest."""
    try:
        getattr(lib, name)
    except (AttributeError, ffi.error):  # as the header was parsed here, or before
        return False
    return True


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
KV_TYPES = {name.replace("i", "q"): n for name, n in enumerators("bitgen_kv_type", "BITGEN_KV_").items()}

if __name__ == "__main__":
    Path(__file__).with_name("abi_types.py").write_text(types_module(_declarations()), encoding="utf-8")
