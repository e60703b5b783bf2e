"""Show this CPU, its caches, the ISA levels it can run (and why not the others), and the compilers found."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from bitgen.cli.tables import Column, Table, add_output, render_tables
from bitgen.errors import ToolchainError

if TYPE_CHECKING:
    from bitgen.cpu import Topology
    from bitgen.toolchain import Compiler


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.cpu import (
        CAP_VARIABLE,
        Accepted,
        detect_cpu,
        detect_topology,
        isa_cap,
        load_isas,
        resolve_isas,
    )
    from bitgen.cpu.raced import raced_here
    from bitgen.records import dump

    cpu, cap = detect_cpu(), isa_cap()
    facts = [
        ("model", cpu.model_name),
        ("family", f"{cpu.family} ({cpu.vendor}, {cpu.arch}, {cpu.os})"),
        (
            "cores",
            f"{cpu.physical_cores} physical, {cpu.logical_cpus} logical, {cpu.usable_threads} usable threads",
        ),
        ("caches", ", ".join(f"L{c.level} {c.type} {c.size_bytes >> 10} KiB" for c in cpu.caches)),
    ]
    facts += _topology(detect_topology())
    facts += [("raced", f"{raced.model}: {raced}") for raced in raced_here()]
    if cap:
        facts.append(
            ("ISA cap", f"{cap.name} ({CAP_VARIABLE}): what levels beyond it need is not shown or used")
        )
    decisions = [
        (d.isa.name, "accepted", "") if isinstance(d, Accepted) else (d.isa.name, "rejected", d.reason)
        for d in resolve_isas(cpu, load_isas())
    ]
    tables = [
        Table("cpu", (Column("what", "cpu"), Column("value", "")), facts),
        Table(
            "isas",
            (Column("isa", "ISA level, best first"), Column("state", ""), Column("reason", "reason")),
            decisions,
        ),
        Table(
            "compilers",
            (Column("kind", "compiler"), Column("version", "version"), Column("command", "command")),
            _compilers() or [("none", "install gcc or clang, or pip install ziglang", "")],
        ),
    ]
    print(render_tables(tables, args.output, {"cpu_record": dump(cpu), "isa_cap": cap.name if cap else None}))


def _compilers() -> list[tuple[str, str, str]]:
    """The one that CC names, which is what is used, and those found. One that does not work says why."""
    from bitgen.toolchain import find_compiler, find_compilers

    rows = []
    if words := os.environ.get("CC", "").strip():
        try:
            named = find_compiler()
            rows.append((f"{named.kind} (CC)", *_version(named)))
        except ToolchainError as error:
            rows.append(("CC", error.message, words))
    return rows + [(c.name, *_version(c)) for c in find_compilers()]


def _version(compiler: Compiler) -> tuple[str, str]:
    """The version of a compiler, or what is wrong with it, and its command."""
    try:
        said = compiler.version.splitlines()[0]
    except ToolchainError as error:
        said = error.message
    return said, " ".join(compiler.command)


def _topology(found: Topology) -> list[tuple[str, str]]:
    """What decides the default number of threads, and what else differs between cores."""
    facts = [("threads", str(found))]
    if found.kinds:
        kinds = ", ".join(f"{count} {name}" for name, count in found.kinds)
        facts.append(("kinds of cores", f"{kinds}: all take part, and slower ones take fewer rows"))
    if found.caches:
        sizes = ", ".join(f"{found.caches.count(n)} of {n}" for n in dict.fromkeys(found.caches))
        facts.append(("cores a cache", f"{sizes} cores"))
    if found.nodes > 1:
        facts.append(
            (
                "NUMA",
                f"{found.nodes} nodes: threads stay on theirs, and weights are copied to where they are read",
            )
        )
    return facts
