"""Tune the kernels of a model on this machine: winners as a table, records in tune_logs/. It resumes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import PRESET_HELP, add_compiler, add_logs, add_spaces
from bitgen.cli.tables import Column, Table, add_output, numbers, render_tables
from bitgen.errors import BitgenError, FileError, UsageError

if TYPE_CHECKING:
    from bitgen.search import TuneOptions, TuningResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help=PRESET_HELP)
    parser.add_argument(
        "--quick", action="store_true", help="within 90 seconds: few candidates, n = 1 and large n"
    )
    parser.add_argument("--objective", help="decode, prefill, balanced or serve (configs/search.yaml)")
    add_spaces(parser, "the best", regimes="all; of --quick n1 and large")
    parser.add_argument(
        "-t",
        "--threads",
        metavar="LIST",
        help="threads, or auto to try some: the fastest becomes the library's default (default: all)",
    )
    parser.add_argument("--trials", type=int, help="candidates of each family and regime")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="wall time of the whole tune")
    parser.add_argument("--seed", type=int, default=0, help="seed of the search (0)")
    parser.add_argument("--fresh", action="store_true", help="measure again what the records already know")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="smoke test: verify and time two kernels of each family once, record nothing",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write a page about the tune at its end (bitgen report)"
    )
    add_compiler(parser)
    add_logs(parser)
    add_output(parser)


def run(args: argparse.Namespace) -> int:
    from bitgen.api import tune_with
    from bitgen.cli.progress import ProgressBar

    _check_report(args)
    with ProgressBar() as line:
        result = tune_with(args.model, options_of(args), line.show)
    if args.dry_run:
        return _show_dry_run(result, args.output)
    print(render_tables([*winner_tables(result)], args.output))
    if args.output == "text":
        print(f"\n{summary(result)}")
    if args.report:
        from bitgen.report import write_report

        page = write_report(model=args.model, logs=args.logs, out=args.report)
        print(f"bitgen: the report is {page}", file=sys.stderr)
    return 0


def _check_report(args: argparse.Namespace) -> None:
    """UsageError or FileError before the tune, not after it."""
    if args.report and args.dry_run:
        raise UsageError("--report needs records, and --dry-run writes none")
    if args.report and (args.report.is_dir() or not args.report.parent.is_dir()):
        raise FileError(f"cannot write {args.report}: it is a folder, or its folder is not there")


def _show_dry_run(result: TuningResult, output: str) -> int:
    """What was verified, without times; the exit code tells whether every kernel was."""
    columns = (Column("group", "group"), Column("points", "points", "d"), Column("exact", "verified", "d"))
    rows = [
        (g.name, g.points, g.outcomes["ok"], g.outcomes.total() - g.outcomes["ok"]) for g in result.groups
    ]
    verified, failed = sum(row[2] for row in rows), sum(row[3] for row in rows)
    print(render_tables([Table("groups", (*columns, Column("failed", "failed", "d")), rows)], output))
    if output == "text":
        print(f"\nDry run, {result.seconds:.0f} s: {verified} kernels compiled, verified exact and run.")
        print("Nothing was recorded, and nothing was timed that could be compared.")
    for text in (text for group in result.groups for text in group.failures):
        print(f"bitgen: {text}", file=sys.stderr)
    return BitgenError.exit_code if failed else 0


def options_of(args: argparse.Namespace) -> TuneOptions:
    """The flags of `add_arguments` as a record."""
    from bitgen.search import TuneOptions

    counts = numbers("--threads", args.threads, 0) if args.threads not in (None, "", "auto") else []
    return TuneOptions(
        isas=tuple(args.isa),
        families=tuple(args.family),
        regimes=tuple(args.regime),
        threads="auto" if args.threads == "auto" else tuple(counts),
        objective=args.objective,
        seed=args.seed,
        trials=args.trials,
        timeout_s=args.timeout,
        quick=args.quick,
        fresh=args.fresh,
        smoke=args.dry_run,
        cc=args.cc,
        logs=args.logs,
    )


def winner_tables(result: TuningResult) -> list[Table]:
    """What was chosen, what each family reached on each shape, what each format would cost, machine peaks."""
    columns = (
        Column("shape", "m x k"),
        Column("roles", "used by"),
        Column("n", "n", "d"),
        Column("threads", "threads", "d"),
        Column("family", "family"),
        Column("isa", "ISA"),
        Column("layout", "layout"),
        Column("schedule", "schedule"),
        Column("time_us", "us", ",.1f"),
        Column("weight_gbs", "GB/s", ".1f"),
        Column("gops", "GOP/s", ",.0f"),
        Column("limit_share", "% of limit", ".0%", "of roofline"),
        Column("over_default", "winner/default", ".2f", "speedup", is_speedup=True),
        Column("over_median", "winner/median", ".2f", "over median", is_speedup=True),
        Column("candidates", "timed", "d"),
        Column("chosen", "chosen"),
    )
    rows = [
        (
            row.shape.name,
            "/".join(row.roles),
            row.n,
            row.threads,
            row.family,
            row.spec.isa,
            row.spec.layout.name,
            row.spec.schedule.name,
            row.time_ns / 1e3,
            row.weight_gbs,
            row.gops,
            row.roofline_share,
            row.over_default,
            row.over_median,
            row.candidates,
            "yes" if row.chosen else "",
        )
        for row in sorted(result.rows, key=lambda r: (r.n, r.threads, r.shape, r.time_ns))
    ]
    threads = [_thread_table(result)] if len(result.thread_costs) > 1 else []
    return [Table("winners", columns, rows), _format_table(result), *threads, _peak_table(result)]


def _format_table(result: TuningResult) -> Table:
    slots = list(dict.fromkeys(slot for cost in result.formats for slot in cost.token_ns))
    columns = [Column("format", "format"), Column("packed_mb", "MB", ",.0f")]
    columns += [Column(f"token_ms_{r}_t{t}", f"ms/token {r} t={t}", ".3f") for r, t in slots]
    columns.append(Column("relative", f"{result.objective} cost", ".3f"))
    best = min(cost.session_ns for cost in result.formats)
    rows = [
        (
            cost.family or "chosen",
            cost.packed_bytes / 1e6,
            *(cost.token_ns[slot] / 1e6 for slot in slots),
            cost.session_ns / best,
        )
        for cost in result.formats
    ]
    return Table("formats", columns, rows)


def _thread_table(result: TuningResult) -> Table:
    columns = (
        Column("threads", "threads", "d"),
        Column("matrices", "matrices", ".3f"),
        Column("rest", "non-matmul", ".3f", "all but matrices"),
        Column("relative", f"{result.objective} cost", ".3f"),
        Column("chosen", "chosen"),
    )
    best = min(cost.session_ns for cost in result.thread_costs)
    rows = [
        (
            cost.threads,
            cost.matrices_ns / best,
            cost.non_matmul_ns / best,
            cost.session_ns / best,
            "yes" if cost.threads == result.threads else "",
        )
        for cost in result.thread_costs
    ]
    return Table("threads", columns, rows)


def _peak_table(result: TuningResult) -> Table:
    rows: list[tuple[str, int, float, str]] = []
    for threads, peak in result.peaks.items():
        rows.append(("DRAM read, best of the run", threads, result.dram_gbs[threads], "GB/s"))
        rows += [(f"DRAM read, {name}", threads, gbs, "GB/s") for name, gbs in peak.dram_gbs.items()]
        rows += [
            (f"int8 in registers, {isa}", threads, gops, "GOP/s") for isa, gops in peak.peak_gops.items()
        ]
    columns = (
        Column("what", "limit", text="probe"),
        Column("threads", "threads", "d"),
        Column("value", "value", ",.1f"),
    )
    return Table("limits", (*columns, Column("unit", "unit")), rows, "machine peaks")


def summary(result: TuningResult) -> str:
    """How the tune went, in a few lines."""
    outcomes = ", ".join(
        f"{count:,} {'verified' if name == 'ok' else name}" for name, count in sorted(result.outcomes.items())
    )
    lines = [
        f"{result.seconds:.0f} s, seed {result.seed}: {outcomes}; {result.recorded:,} timed, "
        f"{result.recalled:,} from cache."
    ]
    lines += [f"tried first: {text}" for text in result.started_from]
    lines += [f"left out: {text}" for text in result.rejected]
    lines += [f"failed: {text}" for group in result.groups for text in group.failures[:3]]
    if left := result.left_races:
        lines.append(f"{len(left)} verified kernels failed in a race, the first: {left[0]}")
    if not result.complete:
        cut = sum(not group.complete for group in result.groups)
        total = len(result.groups)
        lines.append(
            f"The time is used up, with {cut} of {total} searches cut short; the same command continues."
        )
    lines.append(f"Next: bitgen build --model {result.model}")
    return "\n".join(lines)
