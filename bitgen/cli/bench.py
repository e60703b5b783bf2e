"""Time a model's kernels on this machine: the winners against the untuned defaults, and against the limit."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitgen.cli.tables import Column, Table, add_output, render_tables

SUMMARY = "time the kernels of a model against the defaults and the machine's limit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help="a preset (see `bitgen models`) or a YAML file")
    parser.add_argument("--kernels", action="store_true", help="matrix kernels (what there is to time)")
    parser.add_argument("-n", "--tokens", default="1,8,128,512", help="numbers of tokens (1,8,128,512)")
    parser.add_argument("-t", "--threads", type=int, help="threads (default: all usable)")
    parser.add_argument("-r", "--rounds", type=int, default=9, help="interleaved rounds (9)")
    parser.add_argument("--isa", help="ISA level (default: the best this CPU runs)")
    parser.add_argument("--cc", help="C compiler: gcc, clang, zig or a path")
    parser.add_argument("--logs", type=Path, help="folder of the records (tune_logs/)")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.api import bench_kernels
    from bitgen.cli.progress import ProgressLine
    from bitgen.errors import EXIT_USAGE, BitgenError

    if not args.kernels:
        raise BitgenError("say what to time: bitgen bench --kernels --model NAME", EXIT_USAGE)
    words = args.tokens.split(",")
    if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise BitgenError(f"--tokens {args.tokens}: give positive numbers, separated by commas", EXIT_USAGE)
    with ProgressLine() as line:
        timings = bench_kernels(
            args.model,
            tokens=[int(word) for word in words],
            threads=args.threads,
            rounds=args.rounds,
            isa=args.isa,
            cc=args.cc,
            logs=args.logs,
            progress=line.show,
        )
    columns = (
        Column("shape", "m x k"),
        Column("n", "n", "d"),
        Column("threads", "threads", "d"),
        Column("isa", "ISA"),
        Column("layout", "layout"),
        Column("schedule", "schedule"),
        Column("time_us", "us", ",.1f"),
        Column("weight_gbs", "GB/s", ".1f"),
        Column("gops", "GOP/s", ",.0f"),
        Column("limit_share", "% of limit", ".0%"),
        Column("over_default", "time/default", ".2f"),
        Column("state", "state"),
    )
    rows = [
        (
            t.shape.name,
            t.n,
            t.threads,
            t.spec.isa,
            t.spec.layout.name,
            t.spec.schedule.name,
            t.time_ns / 1e3,
            t.weight_gbs,
            t.gops,
            t.limit_share,
            t.time_ns / t.default_ns,
            "tuned" if t.tuned else "untuned",
        )
        for t in timings
    ]
    print(render_tables([Table("kernels", columns, rows)], args.output))
