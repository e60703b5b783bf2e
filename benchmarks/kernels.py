"""Time a model's matrices with the tuned kernels of every family, side by side, against the limits.

    python benchmarks/kernels.py decode  --model 3B --threads 1,2        # n = 1, weights cold
    python benchmarks/kernels.py batch   --model 3B --threads 2          # n = 1, 2, 4, 8, 16, weights cold
    python benchmarks/kernels.py prefill --model 3B --threads 1 -n 512   # weights warm

Kernels are the winners in tune_logs/ (run `bitgen tune` first, for each ISA level that is asked for with
--isa), the defaults where nothing is recorded. For each shape all kernels, and for cold runs the best
memory-reading probe, take turns in interleaved, shuffled rounds; figures are medians. The limit is the most
that any probe or kernel of this run reached. A token's time is the sum over the model's matrices, each as
often as a token uses it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.cpu import Isa
from bitgen.environment import Environment
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelPreset, find_model
from bitgen.measure import LocalRunner, Race, RaceJob
from bitgen.spec import EVERY_FAMILY, FAMILIES, LARGE, KernelSpec, Shape, regime_of


@dataclass(frozen=True)
class Cell:
    """One kernel on one shape: the median of a call in ns, and the bytes it reads."""

    shape: Shape
    count: int
    spec: KernelSpec
    n: int
    threads: int
    time_ns: float
    limit_gbs: float | None

    @property
    def packed_bytes(self) -> int:
        return self.spec.layout.packed_bytes(self.shape)


def recorded(
    environment: Environment, shape: Shape, family: str, isa: Isa, regime: str, threads: int, group: int = 0
) -> KernelSpec:
    """The fastest recorded winner of a family, else its default; ``group``: weights that share a scale."""
    found = [
        winner
        for record in environment.store.tunings
        if record.shape == shape
        for winner in record.current(environment.fingerprints)
        if (winner.spec.family, winner.spec.isa, winner.regime) == (family, isa.name, regime)
        and winner.spec.layout.group == group
        and winner.threads <= threads
    ]
    if not found:
        return environment.space(family, isa, regime, shape, group).default
    most = max(winner.threads for winner in found)
    return min((w for w in found if w.threads == most), key=lambda w: w.time_ns).spec


def time_shape(
    runner: LocalRunner,
    specs: Iterable[KernelSpec],
    shape: Shape,
    n: int,
    threads: int,
    rounds: int,
) -> Race:
    cold = regime_of(n) is not LARGE
    race = runner.race(RaceJob(tuple(specs), shape, n, threads, rounds, cold))
    for spec, reason in race.dropped.items():
        print(f"dropped {spec.name}: {reason}", file=sys.stderr)
    return race


def cells_of(race: Race, shape: Shape, count: int, n: int, threads: int) -> list[Cell]:
    return [
        Cell(shape, count, spec, n, threads, statistics.median(times), race.read_gbs)
        for spec, times in race.items()
    ]


def shapes_of(model: ModelPreset) -> dict[Shape, int]:
    counts: dict[Shape, int] = {}
    for matmul in model.matmuls:
        shape = Shape(matmul.m, matmul.k)
        counts[shape] = counts.get(shape, 0) + matmul.count
    return counts


def measure(args: argparse.Namespace, environment: Environment, ns: list[int], threads: int) -> list[Cell]:
    isas = [environment.isa(name) for name in args.isa] or [environment.isa(None)]
    cells: list[Cell] = []
    config = find_model(args.model)
    group = config.group if args.group is None else args.group
    with LocalRunner(environment.toolchain, environment.cpu) as runner:
        for n in ns:
            for shape, count in shapes_of(config).items():
                specs = dict.fromkeys(
                    recorded(environment, shape, family, isa, regime_of(n).name, threads, group)
                    for isa in isas
                    for family in args.family or FAMILIES
                    if not group or group in EVERY_FAMILY[family].groups
                )
                race = time_shape(runner, specs, shape, n, threads, args.rounds)
                cells += cells_of(race, shape, count, n, threads)
        peak = {isa.name: runner.machine_peak(threads, [isa.name]).peak_gops[isa.name] for isa in isas}
        dram = runner.machine_peak(threads, [isas[0].name]).best_dram_gbs
    report(args, cells, ns, threads, dram, peak)
    return cells


def report(
    args: argparse.Namespace,
    cells: list[Cell],
    ns: list[int],
    threads: int,
    dram: float,
    peak: dict[str, float],
) -> None:
    """Tables: every shape, and the whole model for each family and ISA level."""
    roof = dram
    for cell in cells:
        if regime_of(cell.n) is not LARGE:
            roof = max(roof, cell.limit_gbs or 0.0, cell.packed_bytes / cell.time_ns if cell.n == 1 else 0.0)
    title = f"{args.model}, {threads} thread{'s' if threads > 1 else ''}, best DRAM read {roof:.1f} GB/s"
    tables = [
        Table(f"{title}: shapes", SHAPE_COLUMNS, [shape_row(cell, roof, peak) for cell in cells]),
        Table(
            f"{title}: model", MODEL_COLUMNS, [row for n in ns for row in model_rows(cells, n, roof, peak)]
        ),
    ]
    print(render_tables(tables, args.output))


SHAPE_COLUMNS = (
    *(Column("shape", "m x k"), Column("n", "n", "d"), Column("family", "family"), Column("isa", "ISA")),
    *(Column("time_us", "us", ",.1f"), Column("gbs", "GB/s", ".1f"), Column("share", "of DRAM", ".0%")),
    *(Column("gops", "GOP/s", ",.0f"), Column("peak", "of int8 peak", ".0%"), Column("kernel", "kernel")),
)


def shape_row(cell: Cell, roof: float, peak: dict[str, float]) -> tuple[object, ...]:
    gops = 2 * cell.shape.m * cell.shape.k * cell.n / cell.time_ns
    gbs = cell.packed_bytes / cell.time_ns
    return (
        *(cell.shape.name, cell.n, cell.spec.family, cell.spec.isa, cell.time_ns / 1e3, gbs, gbs / roof),
        *(gops, gops / peak[cell.spec.isa], f"{cell.spec.layout.name} {cell.spec.schedule.name}"),
    )


MODEL_COLUMNS = (
    *(Column("n", "n", "d"), Column("family", "family"), Column("isa", "ISA"), Column("mb", "MB", ",.0f")),
    *(Column("time_ms", "ms a step", ".2f"), Column("gbs", "GB/s", ".1f"), Column("share", "of DRAM", ".0%")),
    *(Column("gops", "GOP/s", ",.0f"), Column("peak", "of int8 peak", ".0%")),
    Column("speedup", "against the first", ".2f"),
)


def model_rows(cells: list[Cell], n: int, roof: float, peak: dict[str, float]) -> list[tuple[object, ...]]:
    """All matrices of a step of ``n`` tokens, a row for each ISA level and family."""
    rows: list[tuple[object, ...]] = []
    base = None
    for isa, family in sorted({(cell.spec.isa, cell.spec.family) for cell in cells}):
        mine = [c for c in cells if (c.n, c.spec.isa, c.spec.family) == (n, isa, family)]
        time_ns = sum(c.count * c.time_ns for c in mine)
        bytes_ = sum(c.count * c.packed_bytes for c in mine)
        ops = sum(2 * c.count * c.shape.m * c.shape.k * n for c in mine)
        base = base or time_ns
        rows.append(
            (
                *(n, family, isa, bytes_ / 1e6, time_ns / 1e6, bytes_ / time_ns, bytes_ / time_ns / roof),
                *(ops / time_ns, ops / time_ns / peak[isa], base / time_ns),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("decode", "batch", "prefill"))
    parser.add_argument("--model", default="3B")
    parser.add_argument("--isa", action="append", default=[])
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--group", type=int, help="weights that share a scale (the model's; 0: one a row)")
    parser.add_argument("--threads", default="1")
    parser.add_argument("-n", type=int, default=512, help="tokens of prefill")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    args = parser.parse_args()
    ns = {"decode": [1], "batch": [1, 2, 4, 8, 16], "prefill": [args.n]}[args.what]
    try:
        environment = Environment()
        for threads in args.threads.split(","):
            measure(args, environment, ns, int(threads))
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
