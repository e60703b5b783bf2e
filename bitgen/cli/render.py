"""Print C source, readable and complete: of one kernel (its default schedule) or of the forward pass."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "family",
        help="i2s, tl1, tl2, t5 or tl5; or what is no matmul: quantize, step, tl1_tables, tl2_tables, "
        "tl5_wide_tables, tl5_split_tables",
    )
    parser.add_argument(
        "-m", "--model", help="of step: fix this model's sizes in the code (default: arguments)"
    )
    parser.add_argument("--shape", help="MxK: fix the shape in the code (default: m and k are arguments)")
    parser.add_argument("--isa", help="ISA level (default: the best this CPU runs)")
    parser.add_argument(
        "--regime", default="n1", help="n1, small (2..16 tokens) or large (17 and more); default n1"
    )
    parser.add_argument("--row-block", type=int, help="rows of a row block: 16 or 32, of TL5 64")
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        help="weights along k that share a scale: 32 .. 256, of T4 also 16 (default: scales lie outside)",
    )
    parser.add_argument("--algorithm", help="direct, panel, ... (default: that of the default schedule)")
    parser.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a knob of the schedule (--list shows them); may be given again",
    )
    parser.add_argument("--list", action="store_true", help="list the legal schedules instead")


def run(args: argparse.Namespace) -> None:
    from bitgen.api import legal_space, render_source

    if args.list:
        space = legal_space(args.family, isa=args.isa, shape=args.shape, regime=args.regime, group=args.group)
        for spec in space:
            print(f"{spec.layout.name} {spec.schedule.name}{'  (default)' if spec == space.default else ''}")
        return
    source = render_source(
        args.family,
        shape=args.shape,
        isa=args.isa,
        regime=args.regime,
        row_block=args.row_block,
        algorithm=args.algorithm,
        knobs=args.knob,
        model=args.model,
        group=args.group,
    )
    print(source.text, end="")
