"""What kernels cost on ARM cores that are not here: by counting, not by a clock.

    python benchmarks/arm_loops.py                            # the default kernel of every family, every core
    python benchmarks/arm_loops.py --space --family i2s --core cortex-a72      # every schedule
    python benchmarks/arm_loops.py --tokens 32 --core neoverse-v2 --algorithm panel       # for 32 tokens
    python benchmarks/arm_loops.py --group 32 --family q4 --family t4         # weights in groups, half floats

Each kernel multiplies 64 x 2880 weights (64 x 3072, where they are in groups) by one token, or as many as
--tokens says, in qemu, which logs every instruction that is executed: branches, prefetches, widening and the
ends of rows count, each as often as it happens. The log goes to llvm-mca as one straight piece of code, which
tells how many cycles a core's scheduling model takes for it; it assumes that every load hits the L1 cache and
every branch is predicted. Both figures are for 256 weights and one token. Lookup tables are built before,
once a token.

Needs gcc-aarch64-linux-gnu, qemu-user, and LLVM 19 (llvm-mca-19, llvm-objdump-19; older: fewer cores).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.cpu import Isa, find_isa, load_isas, target_cpu
from bitgen.errors import BitgenError
from bitgen.hostcode import kernel_unit
from bitgen.render import render_kernel
from bitgen.space import Space, space_for
from bitgen.spec import EVERY_FAMILY, FAMILIES, KernelSpec, Shape, regime_of, x_stride
from bitgen.toolchain import Toolchain, Unit, declarations_of, find_cross_compiler

SHAPE, IN_GROUPS = Shape(64, 2880), Shape(64, 3072)
UNIT = 256  # weights that both figures are for


@dataclass(frozen=True)
class Core:
    """A row of configs/targets.yaml, the ISA level of its kernels, and the model llvm-mca has for it."""

    target: str
    isa: str
    model: str


# LLVM 19 schedules the A76 with the model of the A57; Neoverse N1 is the same core with other caches. Apple's
# cores all get one model, Cyclone, which is narrower than an M1.
CORES = (
    Core("cortex-a72", "neon", "cortex-a57"),
    Core("cortex-a76", "neon_dotprod", "neoverse-n1"),
    Core("neoverse-n1", "neon_dotprod", "neoverse-n1"),
    Core("neoverse-v1", "neon_i8mm", "neoverse-v1"),
    Core("neoverse-v1", "sve256", "neoverse-v1"),
    Core("neoverse-v1", "sve256_i8mm", "neoverse-v1"),
    Core("neoverse-v2", "neon_i8mm", "neoverse-v2"),
    Core("neoverse-v2", "sve128", "neoverse-v2"),
    Core("a64fx", "sve512", "a64fx"),
    Core("apple-m1", "neon_dotprod", "cyclone"),
)

DRIVER = """\
#include <stdint.h>
{declarations}
_Alignas(64) static uint8_t w[{w}], tables[{n} * {tables}], scratch[1 << 20];
_Alignas(64) static int8_t x[{n} * {x}];
static float y[{n} * {m}], scale[{n} * {groups}];
static int32_t x_sum[{n} * {groups}];

int main(void)
{{
    const struct bitgen_matmul a = {{
        .w = w, .x = x, .x_sum = x_sum, .tables = tables, .x_scale = scale, .w_scale = scale, .y = y,
        .scratch = scratch, .x_stride = {x}, .table_stride = {tables}, .out_stride = {m},
        .w_scale_stride = {scale_bytes},
        .m = {m}, .k = {k}, .n = {n}, .row_end = {m}}};
    {name}(&a);
    return 0;
}}
"""


@dataclass(frozen=True)
class Cost:
    """Instructions and estimated cycles for 256 weights and one token."""

    instructions: float
    cycles: float


def build(spec: KernelSpec, tokens: int, toolchain: Toolchain, folder: Path) -> Path:
    """A static program that calls the kernel of ``spec`` once, with so many tokens."""
    source, shape = render_kernel(spec), shape_of(spec.layout.group)
    unit = kernel_unit(source, find_isa(source.isa, load_isas()))
    text = DRIVER.format(
        declarations=declarations_of([unit]),
        name=source.name,
        w=spec.layout.packed_bytes(shape),
        tables=max(1, spec.layout.chunks(shape.k) * spec.table_bytes),
        x=x_stride(shape.k),
        m=shape.m,
        k=shape.k,
        n=tokens,
        groups=max(1, spec.layout.groups(shape.k)),
        scale_bytes=2 if spec.layout.group else 0,
    )
    objects = toolchain.objects([unit, Unit("driver", text)])
    program = folder / source.name
    command = [*toolchain.compiler.command, "-static", "-o", str(program), *map(str, objects)]
    subprocess.run(command, check=True)
    return program


def executed(program: Path, function: str, isa: Isa, llvm: str) -> list[str]:
    """The instructions from the first to the last of ``function`` that one run of ``program`` executes."""
    cpu = f"max,sve-default-vector-length={isa.vector_bytes}" if isa.exact_vector else "max"
    texts, begin, end = disassembly(program, function, llvm)
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        words = [one_step_flag(), "-d", "exec,nochain", "-D", log.name, "-cpu", cpu]
        subprocess.run([qemu(), *words, str(program)], check=True)
        trace = [int(found[1], 16) for found in re.finditer(r"^Trace .*?/0*([0-9a-f]+)/", log.read(), re.M)]
    inside = [at for at, address in enumerate(trace) if begin <= address < end]
    if not inside:
        raise BitgenError(f"qemu logged no instruction of {function}")
    return [texts[address] for address in trace[inside[0] : inside[-1] + 1]]


def disassembly(program: Path, function: str, llvm: str) -> tuple[Mapping[int, str], int, int]:
    """Address -> instruction of a program, and where ``function`` begins and ends."""
    command = [f"llvm-objdump-{llvm}", "-d", "--no-show-raw-insn", "--no-leading-headers", str(program)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    texts: dict[int, str] = {}
    starts: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"([0-9a-f]+) <(.+)>:$", line):
            starts.append((int(label[1], 16), label[2]))
        elif found := re.match(r"\s*([0-9a-f]+):\s+(.+?)\s*(//.*)?$", line):
            texts[int(found[1], 16)] = found[2]
    at = next(i for i, (_, name) in enumerate(starts) if name == function)
    return texts, starts[at][0], starts[at + 1][0]


def estimated_cycles(instructions: Sequence[str], model: str, llvm: str) -> int:
    """Cycles that the scheduling model of a core takes for the instructions, in this order."""
    # Where a branch or a page address leads does not matter, and the assembler wants no labels of objdump's.
    plain = [re.sub(r"0x[0-9a-f]+ <.*>$", "#0", text) for text in instructions]
    command = [f"llvm-mca-{llvm}", "-mtriple=aarch64", f"-mcpu={model}", "-mattr=+i8mm,+dotprod,+sve"]
    command += ["-iterations=1", "-instruction-info=0", "-resource-pressure=0"]
    done = subprocess.run(command, input="\n".join(plain), capture_output=True, text=True, check=False)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if done.returncode or found is None:
        raise BitgenError(f"llvm-mca failed: {done.stderr.strip().splitlines()[:1]}")
    return int(found[1])


def require_tools(llvm: str) -> None:
    """BitgenError when this machine lacks LLVM's tools of that version."""
    missing = [tool for tool in (f"llvm-mca-{llvm}", f"llvm-objdump-{llvm}") if not shutil.which(tool)]
    if missing:
        raise BitgenError(
            f"there is no {' and no '.join(missing)}: install LLVM's tools, or name others with --llvm"
        )


@cache
def qemu() -> str:
    found = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if found is None:
        raise BitgenError("no emulator: apt-get install qemu-user")
    return found


@cache
def one_step_flag() -> str:
    """What this qemu calls the mode that logs each instruction."""
    said = subprocess.run([qemu(), "-help"], capture_output=True, text=True, check=False).stdout
    return "-one-insn-per-tb" if "one-insn-per-tb" in said else "-singlestep"


def cost(spec: KernelSpec, core: Core, tokens: int, llvm: str) -> Cost:
    """What the kernel costs on a core."""
    trace = trace_of(spec, tokens, llvm)
    shape = shape_of(spec.layout.group)
    units = shape.m * shape.k / UNIT * tokens
    return Cost(len(trace) / units, estimated_cycles(trace, core.model, llvm) / units)


@cache
def trace_of(spec: KernelSpec, tokens: int, llvm: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        program = build(spec, tokens, Toolchain(find_cross_compiler("aarch64", "Linux", "gcc")), Path(folder))
        return executed(program, render_kernel(spec).name, find_isa(spec.isa, load_isas()), llvm)


def space_of(family: str, core: Core, tokens: int, group: int) -> Space:
    isa, cpu = find_isa(core.isa, load_isas()), target_cpu(core.target)
    return space_for(family, isa, regime_of(tokens), shape_of(group), cpu, group)


def shape_of(group: int) -> Shape:
    return IN_GROUPS if group else SHAPE


def points(space: Space, algorithm: str | None, every: bool) -> list[KernelSpec]:
    """The default of a space, or of an algorithm; ``every``: all schedules, with that one's prefetches."""
    known = [spec for spec in space.known_good if algorithm in (None, spec.schedule.algorithm)]
    if not every:
        return known[:1]
    asks = (
        {name: value for name, value in known[0].schedule if name in ("prefetch", "prefetch_hint")}
        if known
        else {}
    )
    return [
        spec
        for spec in space.points
        if algorithm in (None, spec.schedule.algorithm)
        if all(dict(spec.schedule).get(name, value) == value for name, value in asks.items())
    ]


def table(specs: Iterable[tuple[Core, KernelSpec]], tokens: int, llvm: str) -> Table:
    columns = (
        Column("core", "core"),
        Column("model", "model of llvm-mca"),
        Column("isa", "ISA level"),
        Column("family", "family"),
        Column("schedule", "schedule"),
        Column("instructions", "instructions", ".1f"),
        Column("cycles", "cycles", ".1f"),
    )
    rows = []
    for core, spec in specs:
        found = cost(spec, core, tokens, llvm)
        name = f"{spec.layout.name} {spec.schedule.name}"
        rows.append((core.target, core.model, core.isa, spec.family, name, found.instructions, found.cycles))
        print(f"{len(rows)} done", end="\r", file=sys.stderr, flush=True)
    return Table("loops", columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Count instructions and estimate cycles of ARM kernels.")
    parser.add_argument(
        "--core", action="append", choices=list(dict.fromkeys(core.target for core in CORES)), default=[]
    )
    parser.add_argument("--family", action="append", choices=list(EVERY_FAMILY), default=[])
    parser.add_argument("--group", type=int, default=0, help="weights that share a scale (0: those of a row)")
    parser.add_argument("--space", action="store_true", help="every schedule, not only the default")
    parser.add_argument("--tokens", type=int, default=1, help="n of the product (1)")
    parser.add_argument("--algorithm", help="the default of this algorithm: direct, panel, mmla, ...")
    parser.add_argument("--llvm", default="19", help="version of llvm-mca and llvm-objdump (19)")
    parser.add_argument("-o", "--output", choices=("text", "csv", "json"), default="text")
    args = parser.parse_args()
    chosen = [
        (core, spec)
        for core in CORES
        if core.target in args.core or not args.core
        for family in args.family or FAMILIES
        for spec in points(space_of(family, core, args.tokens, args.group), args.algorithm, args.space)
    ]
    try:
        require_tools(args.llvm)
        print(render_tables([table(chosen, args.tokens, args.llvm)], args.output))
    except BitgenError as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
