"""C text to machine code, cached by content: the only package that runs a compiler.

Text becomes a `Unit` (with flags of its own), a `Toolchain` compiles units to cached objects, a `Builder`
makes functions of them that Python can call::

    unit = Unit("add", text, isa, (Prototype.parse("int add(int a, int b)"),))
    kernels = best_builder(Toolchain(find_compiler())).build([unit])
    kernels.lib.add(1, 2)

No other module starts a compiler or knows a flag of one.
"""

from __future__ import annotations

from bitgen.toolchain.builder import Builder, CcBuilder, CffiBuilder, Kernels, best_builder, python_headers
from bitgen.toolchain.compile import DEFAULT_LIBS, CompileError, Toolchain
from bitgen.toolchain.compiler import (
    Compiler,
    find_compiler,
    find_compilers,
    find_cross_compiler,
    find_cross_compilers,
)
from bitgen.toolchain.linker import EXPORTS_FILE, exports_text, shared_flags
from bitgen.toolchain.unit import Prototype, Unit

__all__ = [
    "DEFAULT_LIBS",
    "EXPORTS_FILE",
    "Builder",
    "CcBuilder",
    "CffiBuilder",
    "CompileError",
    "Compiler",
    "Kernels",
    "Prototype",
    "Toolchain",
    "Unit",
    "best_builder",
    "exports_text",
    "find_compiler",
    "find_compilers",
    "find_cross_compiler",
    "find_cross_compilers",
    "python_headers",
    "shared_flags",
]
