"""The C side of measuring: the library's own host code, the checks and the clock, in one shared library.

``csrc/harness.h`` says what it does; Python is never inside a timed region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitgen.cpu import Isa, find_isa, load_isas
from bitgen.errors import BitgenError
from bitgen.hostcode import csrc_text, host_headers, kernel_unit, row_grain, run_units
from bitgen.render import Source, matmul_struct
from bitgen.spec import KernelSpec, Layout, family_named, regime_named
from bitgen.toolchain import Prototype, Toolchain, Unit
from bitgen.toolchain.cache import key_of

_DLFCN = "void *dlopen(const char *, int); void *dlsym(void *, const char *); char *dlerror(void);\n"
_MPROTECT = "int mprotect(void *, size_t, int);\n"
_DECLARATIONS = ("bitgen.h", "step.h")
_N_ANY = 2**31 - 1  # the host's "no bound"


def harness_units(arch: str) -> tuple[Unit, ...]:
    """What a kernel is called and timed by, with its headers."""
    headers = (*host_headers(arch), ("harness.h", csrc_text("harness.h")))
    return (*run_units(arch), Unit("harness", csrc_text("harness.c"), headers=headers))


def timed_texts(arch: str) -> tuple[str, ...]:
    """The code that times a kernel and runs in its turn: of `harness_units`, without what is only declared.

    Declarations, of what applications call and of the step, grow with every ABI and change no timing.
    """
    headers = {name: text for unit in harness_units(arch) for name, text in unit.headers}
    return (
        *(unit.text for unit in harness_units(arch)),
        *(text for name, text in headers.items() if name not in _DECLARATIONS),
    )


def build_harness(toolchain: Toolchain, arch: str) -> Path:
    """The shared library of `harness.h` for this architecture, from the cache where it is there already."""
    objects = toolchain.objects(harness_units(arch))
    # An object's name is the hash of its content.
    key = key_of({**toolchain.fingerprint(), "objects": [path.name for path in objects]})
    return toolchain.cache.make(
        "harness", key, ".so", lambda folder: toolchain.link_shared(objects, folder / "harness.so")
    )


@dataclass(frozen=True)
class Functions:
    """Where the machine code of one kernel is: a library and the names in it.

    ``support`` is the library with the ISA's quantiser and the family's table builder. ``scaled``: its int32
    sums are scaled, so that the largest k takes them to their bound. ``tile_registers``: a process must ask
    the system for registers before it runs it.
    """

    library: str
    run: str
    scratch: str
    support: str
    quantize: str
    tables: str | None
    row_block: int
    family: str
    row_grain: int
    n_min: int
    n_max: int
    scaled: bool = False
    tile_registers: bool = False
    table_bytes: int = 0
    group: int = 0

    @property
    def layout(self) -> Layout:
        return Layout(self.family, self.row_block, self.group)


def functions_of(spec: KernelSpec, library: Path, support: Path) -> Functions:
    """The names that `bitgen.render` gives the functions of ``spec``."""
    regime = regime_named(spec.regime)
    return Functions(
        library=str(library),
        run=spec.name,
        scratch=f"{spec.name}_scratch",
        support=str(support),
        quantize=f"bitgen_quantize__{spec.isa}",
        tables=Prototype.parse(spec.tables_prototype).name if spec.tables_prototype else None,
        table_bytes=spec.table_bytes,
        row_block=spec.layout.row_block,
        group=spec.layout.group,
        family=spec.family,
        row_grain=row_grain(spec),
        n_min=regime.n_min,
        n_max=regime.n_max or _N_ANY,
        scaled=spec.schedule.get("accumulators", 1) > 1,
        tile_registers=bool(isas()[spec.isa].tile_registers),
    )


@lru_cache(maxsize=1)
def isas() -> Mapping[str, Isa]:
    """The ISA levels by name."""
    return {isa.name: isa for isa in load_isas()}


def unit_of(source: Source) -> Unit:
    """A rendered file as a translation unit, see `kernel_unit`."""
    return kernel_unit(source, isas().get(source.isa) or find_isa(source.isa, isas().values()))


class Harness:
    """The harness opened in this process: only the worker does, and only its tasks open kernels."""

    def __init__(self, path: Path | str) -> None:
        import cffi  # here, because records and replays need no compiler's helper

        self.ffi: Any = cffi.FFI()
        self.ffi.cdef(matmul_struct() + csrc_text("harness.h") + _DLFCN + _MPROTECT)
        self.lib: Any = self.ffi.dlopen(str(path))
        self.libc: Any = self.ffi.dlopen(None)

    def symbol(self, library: str, name: str) -> Any:
        """The address of a function in a shared library, which stays loaded.

        BitgenError when the library or the function is not there.
        """
        now = 2  # RTLD_NOW: an undefined function is found here, not in the middle of a call
        handle = self.libc.dlopen(library.encode(), now)
        address = self.libc.dlsym(handle, name.encode()) if handle else self.ffi.NULL
        if address == self.ffi.NULL:
            said = self.libc.dlerror()
            reason = self.ffi.string(said).decode(errors="replace") if said else "no reason given"
            raise BitgenError(f"cannot load {name}: {reason}")
        return address

    def ask_for_tiles(self) -> None:
        """BitgenError when the system refuses this process the tile registers of its CPU."""
        if self.lib.harness_ask_for_tiles() != 0:
            raise BitgenError("the system refuses this process the tile registers (AMX) of its CPU")

    def kernel(self, functions: Functions) -> Any:
        """``struct harness_kernel *`` of a kernel, its libraries opened."""
        family = family_named(functions.family)
        tables = self.symbol(functions.support, functions.tables) if functions.tables else self.ffi.NULL
        return self.ffi.new(
            "struct harness_kernel *",
            {
                "run": self.symbol(functions.library, functions.run),
                "scratch": self.symbol(functions.library, functions.scratch),
                "quantize": self.symbol(functions.support, functions.quantize),
                "tables": tables,
                "n_min": functions.n_min,
                "n_max": functions.n_max,
                "row_block": functions.row_block,
                "k_chunk": family.k_chunk,
                "chunk_bytes": family.chunk_bytes,
                "trailer_bytes": family.trailer_bytes,
                "table_bytes": functions.table_bytes,
                "row_grain": functions.row_grain,
                "group": functions.group,
            },
        )
