"""Specs to machine code: rendered, compiled in parallel, linked several a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from bitgen.errors import BitgenError, ToolchainError
from bitgen.measure.harness import Functions, functions_of, unit_of
from bitgen.render import Source, render_kernel, render_quantize, render_tables
from bitgen.spec import FAMILIES, KernelSpec
from bitgen.toolchain import Builder, CompileError, Toolchain, Unit, best_builder

Render = Callable[[KernelSpec], Source]

# Candidates a module: the glue of cffi costs about 0.2 s a module, and a module is the unit of a failed link.
_BATCH = 16


class Candidates:
    """The kernels compiled so far in this run; none of them is executed here.

    ``render`` gives the C text of a spec; the tests put their own there.
    """

    def __init__(
        self, toolchain: Toolchain, builder: Builder | None = None, render: Render = render_kernel
    ) -> None:
        self._toolchain = toolchain
        self._builder = builder or best_builder(toolchain)
        self._render = render
        self._compiled: dict[KernelSpec, Functions | str] = {}
        self._support: dict[str, Path] = {}

    def compile(self, specs: Sequence[KernelSpec]) -> None:
        """Compile those of ``specs`` that are new, on all cores the toolchain may use.

        What is wrong with a candidate is its answer in `functions`. BitgenError for what is nobody's fault,
        such as a full disk.
        """
        new = [spec for spec in dict.fromkeys(specs) if spec not in self._compiled]
        units: dict[KernelSpec, Unit] = {}
        for spec in new:
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
                self._link(own[start : start + _BATCH], units)

    def functions(self, spec: KernelSpec) -> Functions | str:
        """Where the code of a compiled spec is, or why there is none, in the compiler's words."""
        return self._compiled[spec]

    def support(self, isa: str) -> Path:
        """The library with the quantiser and all table builders of an ISA level."""
        if isa not in self._support:
            self._support[isa] = self._builder.build(support_units(isa)).path
        return self._support[isa]

    def _support_units(self, specs: dict[KernelSpec, Unit]) -> list[Unit]:
        new = {spec.isa for spec in specs} - set(self._support)
        return [unit for isa in sorted(new) for unit in support_units(isa)]

    def _link(self, specs: Sequence[KernelSpec], units: dict[KernelSpec, Unit]) -> None:
        try:
            library = self._builder.build([units[spec] for spec in specs]).path
        except ToolchainError as error:  # a full disk is no kernel's fault, and another error
            if len(specs) > 1:  # one of them has, say, an undefined function: the others must not pay for it
                for spec in specs:
                    self._link([spec], units)
            else:
                self._compiled[specs[0]] = str(error)
            return
        for spec in specs:
            self._compiled[spec] = functions_of(spec, library, self.support(spec.isa))


def support_units(isa: str) -> list[Unit]:
    """What the kernels of an ISA level need beside themselves."""
    tables = [render_tables(f.name, isa, algorithm) for f in FAMILIES.values() for algorithm, _ in f.tables]
    return [unit_of(source) for source in (render_quantize(isa), *tables)]
