"""From translation units to a file with functions that Python could call; nothing is loaded here.

Machine code that was loaded stays until the process ends, and its constructors run at once: who loads an
untried kernel does it in a process that may die.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from bitgen.errors import BitgenError
from bitgen.toolchain.cache import key_of
from bitgen.toolchain.compile import Toolchain
from bitgen.toolchain.unit import Unit

# The glue is cffi's text, not ours: its warnings say nothing about a kernel.
_GLUE_FLAGS = ("-w",)
_GLUE_HEADER = "#include <stdint.h>\n#include <stddef.h>\n"


def build_module(toolchain: Toolchain, units: Sequence[Unit]) -> Path:
    """Compile and link ``units``: the file of an extension module made by cffi (its out-of-line API mode).

    Where Python came without its headers it is a `build_library`; C takes the functions from either with
    dlsym. CompileError of the first unit that does not compile, or when they do not link: sort those out with
    `Toolchain.compile_objects` before, the rest then comes from the cache.
    """
    include = python_headers()
    if not include:
        return build_library(toolchain, units)
    import cffi

    objects, cdef = toolchain.objects(units), declarations_of(units)
    flags = toolchain.link_flags(undefined=True)
    abi = sysconfig.get_config_var("SOABI")
    key = key_of(
        {**_ingredients(toolchain, objects, flags), "cdef": cdef, "cffi": cffi.__version__, "abi": abi}
    )
    name = f"_bitgen_{key}"

    def produce(folder: Path) -> Path:
        # A module may have open symbols, Python's own. That the units have none is found out here, not by
        # whoever loads it.
        toolchain.link_into(folder, "units", objects, toolchain.link_flags(undefined=False))
        made = toolchain.compile_object(_glue_unit(name, cdef, folder, include))
        return toolchain.link_into(folder, name, (made, *objects), flags)

    return toolchain.cache.make("modules", key, ".so", produce)


def build_library(toolchain: Toolchain, units: Sequence[Unit]) -> Path:
    """Compile and link ``units``: the file of a plain shared library, of the same cached objects."""
    objects = toolchain.objects(units)
    flags = toolchain.link_flags(undefined=False)
    key = key_of(_ingredients(toolchain, objects, flags))
    return toolchain.cache.make(
        "libraries", key, ".so", lambda folder: toolchain.link_into(folder, f"bitgen_{key}", objects, flags)
    )


def declarations_of(units: Sequence[Unit]) -> str:
    """The types and functions of all units, for cffi. BitgenError for no function, or two of one name."""
    functions: dict[str, str] = {}
    for function in (function for unit in units for function in unit.functions):
        if function.name in functions:
            raise BitgenError(f"two units define the function {function.name}")
        functions[function.name] = function.declaration
    if not functions:
        raise BitgenError("these units define no function that could be called")
    types = dict.fromkeys(unit.declarations.strip() for unit in units if unit.declarations.strip())
    return "\n".join((*types, *functions.values())) + "\n"


def python_headers() -> tuple[Path, ...]:
    """The folders of Python.h and pyconfig.h (two on Debian); empty when this Python came without them."""
    folders = [Path(sysconfig.get_path(name)) for name in ("include", "platinclude")]
    files = ("Python.h", "pyconfig.h")
    complete = all(any((folder / file).is_file() for folder in folders) for file in files)
    return tuple(dict.fromkeys(folders)) if complete else ()


def _ingredients(toolchain: Toolchain, objects: Sequence[Path], flags: Sequence[str]) -> dict[str, object]:
    # An object's name is the hash of its content.
    return {**toolchain.fingerprint(), "objects": [path.name for path in objects], "link": flags}


def _glue_unit(name: str, cdef: str, folder: Path, include: Sequence[Path]) -> Unit:
    """The C text of the extension module ``name``, as cffi writes it; ``cdef`` declares its functions."""
    import cffi

    ffi = cffi.FFI()
    try:
        ffi.cdef(cdef)
    except (cffi.CDefError, cffi.FFIError) as error:
        raise BitgenError(f"cffi cannot read these C declarations: {error}") from error
    ffi.set_source(name, _GLUE_HEADER + cdef, compiler_verbose=0)  # else it reports on stdout
    path = folder / f"{name}.c"
    ffi.emit_c_code(str(path))
    flags = (*_GLUE_FLAGS, *(f"-I{folder}" for folder in include))
    return Unit(name, path.read_text(encoding="utf-8"), flags=flags)
