"""Every schedule of every space of the ARM levels against numpy, in an emulator: half an hour, so by hand.

    python tests/support/arm_sweep.py [LEVEL ...]

from the root of a checkout, with bitgen installed. For each level it prints what `bitgen verify` prints on
x86. Kernels that have the text of their level's parent are counted, not compiled again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import foreign_kernels

from bitgen.cpu import load_isas, target_cpu
from bitgen.measure.verify import all_points, own_points
from bitgen.spec import FAMILIES, KernelSpec
from bitgen.toolchain import Toolchain, find_cross_compiler

BATCH = 24  # kernels of one program
LEVELS = tuple(isa.name for isa in load_isas() if isa.arch == "aarch64")


def batches(specs: Sequence[KernelSpec]) -> Iterator[Sequence[KernelSpec]]:
    for i in range(0, len(specs), BATCH):
        yield specs[i : i + BATCH]


def sweep(toolchain: Toolchain, specs: Sequence[KernelSpec], folder: Path) -> tuple[int, list[str]]:
    """The products that the kernels were given, and what is wrong with them."""
    cases = 0
    wrong: list[str] = []
    for batch in batches(specs):
        program = foreign_kernels.build(toolchain, batch, folder / "kernels", "-static")
        count, faults = foreign_kernels.faults(program, batch)
        cases += count
        wrong += faults
    return cases, wrong


def main(levels: Sequence[str]) -> int:
    unknown = set(levels) - set(LEVELS)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(LEVELS)}", file=sys.stderr)
        return 2
    everything = all_points(target_cpu("neoverse-n1"), LEVELS, tuple(FAMILIES))
    own, failed = own_points(everything), False
    sizes = Counter(spec.isa for spec in everything)
    for level in levels:
        specs, started = [spec for spec in own if spec.isa == level], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            toolchain = Toolchain(find_cross_compiler("aarch64", "Linux"), Path(folder) / "cache")
            cases, wrong = sweep(toolchain, specs, Path(folder))
        print(*wrong, sep="\n", end="\n" if wrong else "")
        print(
            f"{level}: {len(specs)} schedules, {cases} (schedule, shape, n) cases: "
            f"{f'{len(wrong)} NOT exact' if wrong else 'all exact'} "
            f"({sizes[level] - len(specs)} more have the text of their parent level); "
            f"{toolchain.compiler.version}, {time.monotonic() - started:.0f} s",
            flush=True,
        )
        failed = failed or bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or LEVELS))
