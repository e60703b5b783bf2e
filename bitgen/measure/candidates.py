"""Specs to machine code: rendered, compiled in parallel, linked several a module; nothing is loaded here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bitgen.errors import BitgenError, ToolchainError
from bitgen.measure.harness import Functions, functions_of, unit_of
from bitgen.render import Source, render_kernel, render_quantize, render_tables
from bitgen.spec import FAMILIES, KernelSpec
from bitgen.toolchain import CompileError, Toolchain, Unit, build_module

Render = Callable[[KernelSpec], Source]

# Candidates a module: the glue of cffi costs about 0.2 s a module, and a module is the unit of a failed link.
_BATCH = 16


class Candidates:
    """The kernels compiled so far in this run; the worker loads them.

    ``render`` gives the C text of a spec; the tests put their own there.
    """

    def __init__(self, toolchain: Toolchain, render: Render = render_kernel) -> None:
        self._toolchain = toolchain
        self._render = render
        self._compiled: dict[KernelSpec, Functions | str] = {}
        self._support: dict[str, Path] = {}

    def compile(self, specs: Sequence[KernelSpec]) -> None:
        """Compile those of ``specs`` that are new, on all cores the toolchain may use.

        What is wrong with a candidate is its answer in `functions`. BitgenError for errors of the
        environment, such as a full disk.
        """
        units: dict[KernelSpec, Unit] = {}
        for spec in dict.fromkeys(specs):
            if spec in self._compiled:
                continue
            try:
                units[spec] = unit_of(self._render(spec))
            except BitgenError as error:
                self._compiled[spec] = error.message
        # All objects first, so that the modules below are linked from the cache.
        objects = self._toolchain.compile_objects([*units.values(), *self._support_units(units)])
        for spec, made in zip(tuple(units), objects, strict=False):
            if isinstance(made, CompileError):
                self._compiled[spec] = str(made)
                del units[spec]
        for isa in dict.fromkeys(spec.isa for spec in units):
            own = [spec for spec in units if spec.isa == isa]
            for start in range(0, len(own), _BATCH):
                self._link({spec: units[spec] for spec in own[start : start + _BATCH]})

    def functions(self, spec: KernelSpec) -> Functions | str:
        """Where the code of a compiled spec is, or why there is none, in the compiler's message."""
        return self._compiled[spec]

    def isolate(self, spec: KernelSpec) -> bool:
        """Give each kernel of the module of ``spec`` one of its own; False when it was alone there.

        For a module that ends the process which loads it: one of its kernels does, the others must not pay.
        """
        found = self._compiled[spec]
        if isinstance(found, str):
            return False
        every = {s: f.library for s, f in self._compiled.items() if isinstance(f, Functions)}
        together = [other for other, library in every.items() if library == found.library]
        if len(together) == 1:
            return False
        for other in together:
            self._link({other: unit_of(self._render(other))})
        return True

    def support(self, isa: str) -> Path:
        """The module with the quantiser and all table builders of an ISA level."""
        if isa not in self._support:
            self._support[isa] = build_module(self._toolchain, support_units(isa))
        return self._support[isa]

    def _support_units(self, specs: dict[KernelSpec, Unit]) -> list[Unit]:
        new = {spec.isa for spec in specs} - set(self._support)
        return [unit for isa in sorted(new) for unit in support_units(isa)]

    def _link(self, units: dict[KernelSpec, Unit]) -> None:
        """One module of kernels of one ISA level."""
        try:
            library = build_module(self._toolchain, list(units.values()))
        except ToolchainError as error:  # a full disk is no kernel's fault, and another error
            if len(units) > 1:  # one of them has, say, an undefined function: the others must not pay for it
                for spec, unit in units.items():
                    self._link({spec: unit})
            else:
                self._compiled.update(dict.fromkeys(units, str(error)))
            return
        for spec in units:
            self._compiled[spec] = functions_of(spec, library, self.support(spec.isa))


def support_units(isa: str) -> list[Unit]:
    """What the kernels of an ISA level need beside themselves."""
    tables = [render_tables(f.name, isa, algorithm) for f in FAMILIES.values() for algorithm, _ in f.tables]
    return [unit_of(source) for source in (render_quantize(isa), *tables)]
