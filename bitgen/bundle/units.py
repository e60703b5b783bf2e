"""The translation units of a library: kernels each with the flags of their ISA level, and host code."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from bitgen import __version__
from bitgen.bundle.contents import Contents
from bitgen.cpu import cap_rows
from bitgen.hostcode import CpuChecks, kernel_unit, library_units, row_grain, step_headers
from bitgen.spec import EVERY_FAMILY, REGIMES, KernelSpec, Layout, regime_named
from bitgen.toolchain import Prototype, Unit


def library_units_of(contents: Contents) -> tuple[Unit, ...]:
    """All translation units of the library: kernels each with the flags of their ISA level, and host code."""
    isas = {isa.name: isa for isa in contents.isas}
    kernels = tuple(kernel_unit(source, isas[source.isa]) for source in contents.sources)
    headers = step_headers()
    sized = (contents.sized_step,) if contents.sized_step else ()
    steps = tuple(
        Unit(source.name, source.text, isas[source.isa], headers=headers)
        for source in (*contents.steps, *sized)
    )
    cpu = contents.target.cpu
    checked = CpuChecks(contents.features, contents.cpu_families)
    return (*kernels, *steps, *library_units(cpu.arch, cpu.os, checked, table_values(contents)))


def table_values(contents: Contents) -> dict[str, Any]:
    """The values of templates/table.c.j2."""
    specs, layouts = contents.specs, contents.layouts
    isa_names = [isa.name for isa in contents.isas]
    families = ("", *contents.cpu_families)
    bit = {feature: 1 << i for i, feature in enumerate(contents.features)}
    return {
        "version": __version__,
        "tuned": {"threads": contents.threads, "cores": contents.cores},
        "prototypes": [prototype for source in contents.sources for prototype in source.prototypes],
        "layouts": [_layout_values(layout) for layout in layouts],
        "required": sum(bit[f] for f in contents.required),
        "isas": [
            {
                "name": isa.name,
                "requires": sorted(isa.requires),
                "mask": sum(bit[f] for f in isa.requires),
                "tiles": sum(bit[f] for f in isa.tile_registers),
                "sve_bytes": isa.vector_bytes if isa.exact_vector else 0,
            }
            for isa in contents.isas
        ],
        "isa_caps": [
            {
                "isa": row.isa.name,
                "mask": sum(bit[f] for f in row.features & bit.keys()),
                "sve_bytes": row.sve_bytes,
            }
            for row in cap_rows(contents.target.cpu.arch, contents.target.isas)
        ],
        "kernels": [_kernel_values(spec, isa_names, contents.any_n) for spec in specs],
        "steps": [
            {
                "isa": step.isa,
                "isa_id": isa_names.index(step.isa),
                "sizes": contents.sizes if step.isa == contents.target.isa.name else None,
            }
            for step in contents.steps
        ],
        "entries": [
            {
                "kernel": specs.index(entry.spec),
                "layout": layouts.index(entry.spec.layout),
                "m": entry.shape.m if entry.shape else 0,
                "k": entry.shape.k if entry.shape else 0,
                "threads": entry.threads,
                "cpu_family": families.index(entry.cpu_family),
            }
            for entry in contents.entries
        ],
    }


def _layout_values(layout: Layout) -> dict[str, Any]:
    family = EVERY_FAMILY[layout.family]
    group_bytes = family.group_bytes(layout.group) if layout.group else 0
    return {
        "family": family,
        "row_block": layout.row_block,
        "group": layout.group,
        "group_bytes": group_bytes,
        "kind": f"BITGEN_WEIGHTS_{family.weights.upper()}",
    }


def _kernel_values(spec: KernelSpec, isa_names: Sequence[str], any_n: Set[KernelSpec]) -> dict[str, Any]:
    tables = spec.tables_prototype
    regime = regime_named(spec.regime)
    return {
        "spec": spec,
        "family": EVERY_FAMILY[spec.family],
        "isa_id": isa_names.index(spec.isa),
        "regime": regime,
        "n_min": 1 if spec in any_n else regime.n_min,
        "regime_id": REGIMES.index(regime),
        "table_bytes": spec.table_bytes,
        "row_grain": row_grain(spec),
        "tables": Prototype.parse(tables).name if tables else "0",
    }
