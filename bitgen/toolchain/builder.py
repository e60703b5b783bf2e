"""From translation units to functions that Python can call: two ways, the same kernels.

`CffiBuilder` links the objects with cffi's glue into an extension module (a call costs 0.1 us), `CcBuilder`
opens a plain shared library (0.25 us, no Python headers). Both link the same cached objects. That prototypes
and definitions agree is checked when the objects are compiled, see `Unit.checked_text`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bitgen.errors import BitgenError, ToolchainError
from bitgen.toolchain.cache import key_of
from bitgen.toolchain.compile import CompileError, Toolchain
from bitgen.toolchain.unit import Unit

if TYPE_CHECKING:
    import cffi

# The glue is cffi's text, not ours: its warnings say nothing about a kernel.
_GLUE_FLAGS = ("-w",)
_GLUE_HEADER = "#include <stdint.h>\n#include <stddef.h>\n"


@dataclass(frozen=True)
class Kernels:
    """Loaded functions. ``ffi`` makes their arguments, ``lib.NAME(...)`` is the cheapest way to call one.

    Once loaded, machine code stays until the process ends: run candidates in children.
    """

    ffi: Any
    lib: Any
    path: Path

    def function(self, name: str) -> Any:
        """The function as a cdata pointer. BitgenError when there is none of this name."""
        try:
            return self.ffi.addressof(self.lib, name)
        except AttributeError as error:
            raise BitgenError(f"{self.path.name} has no function {name}") from error

    def address(self, name: str) -> int:
        """Its address, to hand it to C as a number."""
        return int(self.ffi.cast("uintptr_t", self.function(name)))


class Builder(Protocol):
    """A way to get callable functions."""

    def build(self, units: Sequence[Unit]) -> Kernels:
        """Compile, link and load ``units``; every one of their ``functions`` can be called.

        CompileError of the first unit that does not compile: sort those out with
        `Toolchain.compile_objects` before, the rest then comes from the cache.
        """


@dataclass(frozen=True)
class CffiBuilder:
    """One extension module in cffi's out-of-line API mode. Needs Python.h, not setuptools."""

    toolchain: Toolchain

    def build(self, units: Sequence[Unit]) -> Kernels:
        """See `Builder`."""
        import cffi

        objects = _objects(self.toolchain, units)
        cdef = _cdef(units)
        ingredients = {"cdef": cdef, "cffi": cffi.__version__, "abi": sysconfig.get_config_var("SOABI")}
        flags = self.toolchain.link_flags(undefined=True)
        key = _module_key(self.toolchain, objects, flags, ingredients)
        name = f"_bitgen_{key}"

        def produce(folder: Path) -> Path:
            glue = self.toolchain.compile_object(_glue_unit(name, cdef, folder))
            return self.toolchain.link_into(folder, name, (glue, *objects), flags)

        path = self.toolchain.cache.make("modules", key, ".so", produce)
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        if spec is None:
            raise ToolchainError(f"cannot import {path}")
        try:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except ImportError as error:
            raise ToolchainError(f"cannot load compiled kernels: {error}") from error
        return Kernels(module.ffi, module.lib, path)


@dataclass(frozen=True)
class CcBuilder:
    """One plain shared library, opened by cffi: for machines without Python.h, and what is shipped."""

    toolchain: Toolchain

    def build(self, units: Sequence[Unit]) -> Kernels:
        """See `Builder`."""
        objects = _objects(self.toolchain, units)
        ffi = _parsed(_cdef(units))
        flags = self.toolchain.link_flags(undefined=False)
        key = _module_key(self.toolchain, objects, flags, {})
        name = f"bitgen_{key}"

        def produce(folder: Path) -> Path:
            return self.toolchain.link_into(folder, name, objects, flags)

        path = self.toolchain.cache.make("libraries", key, ".so", produce)
        try:
            # Now, not lazily: an undefined function is better found here than in the middle of a call.
            lib = ffi.dlopen(str(path), os.RTLD_NOW)
        except OSError as error:
            raise ToolchainError(f"cannot load compiled kernels: {error}") from error
        kernels = Kernels(ffi, lib, path)
        for function in _functions(units):
            kernels.function(function)
        return kernels


def best_builder(toolchain: Toolchain) -> CffiBuilder | CcBuilder:
    """API mode where Python's headers are, else the plain library."""
    return CffiBuilder(toolchain) if python_headers() else CcBuilder(toolchain)


def python_headers() -> tuple[Path, ...]:
    """The folders of Python.h and pyconfig.h (two on Debian); empty when this Python came without them."""
    folders = [Path(sysconfig.get_path(name)) for name in ("include", "platinclude")]
    files = ("Python.h", "pyconfig.h")
    complete = all(any((folder / file).is_file() for folder in folders) for file in files)
    return tuple(dict.fromkeys(folders)) if complete else ()


def _objects(toolchain: Toolchain, units: Sequence[Unit]) -> list[Path]:
    objects = []
    for result in toolchain.compile_objects(units):
        if isinstance(result, CompileError):
            raise result
        objects.append(result)
    return objects


def _functions(units: Sequence[Unit]) -> dict[str, str]:
    """Name to declaration of all functions. BitgenError when there are none or two of one name."""
    functions: dict[str, str] = {}
    for function in (function for unit in units for function in unit.functions):
        if function.name in functions:
            raise BitgenError(f"two units define the function {function.name}")
        functions[function.name] = function.declaration
    if not functions:
        raise BitgenError("these units define no function that could be called")
    return functions


def _cdef(units: Sequence[Unit]) -> str:
    types = dict.fromkeys(unit.declarations.strip() for unit in units if unit.declarations.strip())
    return "\n".join((*types, *_functions(units).values())) + "\n"


def _parsed(cdef: str) -> cffi.FFI:
    import cffi

    ffi = cffi.FFI()
    try:
        ffi.cdef(cdef)
    except (cffi.CDefError, cffi.FFIError) as error:
        raise BitgenError(f"cffi cannot read these C declarations: {error}") from error
    return ffi


def _module_key(
    toolchain: Toolchain, objects: Sequence[Path], flags: Sequence[str], ingredients: dict[str, Any]
) -> str:
    # An object's name is the hash of its content.
    parts = {**toolchain.fingerprint(), "objects": [path.name for path in objects], "link": flags}
    return key_of({**parts, **ingredients})


def _glue_unit(name: str, cdef: str, folder: Path) -> Unit:
    """The C text of the extension module ``name``, as cffi writes it; ``cdef`` declares its functions."""
    ffi = _parsed(cdef)
    ffi.set_source(name, _GLUE_HEADER + cdef, compiler_verbose=0)  # else it reports on stdout
    path = folder / f"{name}.c"
    ffi.emit_c_code(str(path))
    includes = tuple(f"-I{include}" for include in python_headers())
    return Unit(name, path.read_text(encoding="utf-8"), flags=(*_GLUE_FLAGS, *includes))
