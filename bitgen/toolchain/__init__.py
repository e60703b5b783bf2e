"""C text to machine code, cached by content: the only package that runs a compiler.

Text becomes a `Unit` (with flags of its own), a `Toolchain` compiles units to cached objects, and a module
(of cffi) or a shared library is linked of them, which is loaded by whoever may die of it::

    unit = Unit("add", text, isa, (Prototype.parse("int add(int a, int b)"),))
    path = build_module(Toolchain(find_compiler()), [unit])

No other module starts a compiler or knows a flag of one.
"""

from __future__ import annotations

from bitgen.toolchain.compile import CompileError, Toolchain
from bitgen.toolchain.compiler import (
    Compiler,
    find_compiler,
    find_compilers,
    find_cross_compiler,
    find_cross_compilers,
    release_compiler,
)
from bitgen.toolchain.linker import default_libs, exports_file, exports_text, shared_flags
from bitgen.toolchain.module import build_library, build_module, declarations_of, python_headers
from bitgen.toolchain.unit import Prototype, Unit

__all__ = [
    "CompileError",
    "Compiler",
    "Prototype",
    "Toolchain",
    "Unit",
    "build_library",
    "build_module",
    "declarations_of",
    "default_libs",
    "exports_file",
    "exports_text",
    "find_compiler",
    "find_compilers",
    "find_cross_compiler",
    "find_cross_compilers",
    "python_headers",
    "release_compiler",
    "shared_flags",
]
