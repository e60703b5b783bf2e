"""Count the instructions of the inner loops: every family's own default kernel on every ISA level.

    python benchmarks/instructions.py                    # n = 1, all families and levels
    python benchmarks/instructions.py --tokens 8 --family tl5 --isa avx2
    python benchmarks/instructions.py --group 128 --family t4 --family t3

Kernels are compiled as `bitgen tune` compiles them and read back with `objdump -d`. The inner loop has the
most vector instructions and holds no other one. Its instructions, with loads and the loop's own, are divided
by the products of a turn. Building a token's lookup tables is not in it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.cpu import load_isas
from bitgen.environment import Environment
from bitgen.measure.harness import unit_of
from bitgen.render import render_kernel
from bitgen.space import Space
from bitgen.spec import EVERY_FAMILY, FAMILIES, KernelSpec, Shape, regime_of

SHAPE = Shape(3200, 8640)
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.+)>:$")
_LINE = re.compile(r"^\s*([0-9a-f]+):\t(\S+)\s*(.*)$")
_TARGET = re.compile(r"^([0-9a-f]+) <")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly; ``target`` is where a jump goes, else None."""

    address: int
    name: str
    target: int | None


def functions(listing: str) -> Iterator[list[Instruction]]:
    """The instructions of each function of `objdump -d --no-show-raw-insn`."""
    current: list[Instruction] = []
    for line in listing.splitlines():
        if _FUNCTION.match(line):
            yield current
            current = []
        elif found := _LINE.match(line):
            address, name, operands = found.groups()
            jump = _TARGET.match(operands) if name.startswith("j") else None
            current.append(Instruction(int(address, 16), name, int(jump[1], 16) if jump else None))
    yield current


def vectors(turn: list[Instruction]) -> int:
    return sum(i.name.startswith("v") for i in turn)


def inner_loop(listing: str) -> list[Instruction]:
    """The loop with the most vector instructions that has no loop in it; empty when there is none.

    A `jmp` back is no loop: compilers move rare code behind a function and return from it so.
    """
    best: list[Instruction] = []
    for body in functions(listing):
        jumps = [(i.target, i.address) for i in body if i.target is not None and i.name != "jmp"]
        loops = [(to, at) for to, at in jumps if to <= at]
        for start, end in loops:
            inside = [loop for loop in loops if loop != (start, end) and start <= loop[0] and loop[1] <= end]
            turn = [i for i in body if start <= i.address <= end]
            if not inside and vectors(turn) > vectors(best):
                best = turn
    return best


def counted(space: Space) -> KernelSpec:
    """The first good point that multiplies straight from packed weights, else from a panel.

    An instruction of the tile kernels is no vector instruction: theirs are not comparable.
    """
    points: tuple[KernelSpec, ...] = (*space.known_good, space.default, *space)
    straight = (p for p in points if not p.schedule.unpacks)
    panel = (p for p in points if p.schedule.algorithm == "panel")
    return next(straight, None) or next(panel)


def products(spec: KernelSpec) -> int:
    """Products of a weight and an activation in one turn of the inner loop."""
    s = dict(spec.schedule)
    rows = s["mr"] if spec.schedule.algorithm == "panel" else s["streams"] * spec.layout.row_block
    columns = 4 if spec.schedule.algorithm == "panel" else EVERY_FAMILY[spec.family].k_chunk
    return rows * columns * s["nr"] * s.get("unroll", 1)


def disassembly(file: Path) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1, help="n: which regime's kernels")
    parser.add_argument("--isa", action="append", default=[])
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--group", type=int, default=0, help="weights that share a scale (0: those of a row)")
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    args = parser.parse_args()
    environment = Environment()
    regime = regime_of(args.tokens).name
    names = args.isa or [isa.name for isa in load_isas() if isa.arch == environment.cpu.arch]
    spaces = [
        environment.space(family, isa, regime, SHAPE, args.group)
        for isa in load_isas()
        if isa.name in names
        for family in args.family or FAMILIES
    ]
    specs = [counted(space) for space in spaces]
    rows = []
    objects = environment.toolchain.compile_objects([unit_of(render_kernel(spec)) for spec in specs])
    for spec, made in zip(specs, objects, strict=True):
        if not isinstance(made, Path):
            raise made
        loop = inner_loop(disassembly(made))
        each = 256 / products(spec)
        counts = (len(loop), len(loop) * each, vectors(loop) * each)
        rows.append((spec.family, spec.isa, *counts, spec.schedule.name))
    columns = (
        *(Column("family", "family"), Column("isa", "ISA"), Column("turn", "instructions a turn", "d")),
        *(Column("each", "per 256 products", ".1f"), Column("vector", "vector ones", ".1f")),
        Column("schedule", "schedule"),
    )
    print(render_tables([Table(f"inner loops, {regime}", columns, rows)], args.output))


if __name__ == "__main__":
    main()
