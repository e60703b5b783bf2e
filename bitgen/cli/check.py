"""Prove kernels exact: every schedule of the spaces against numpy, ragged shapes and overflow edges."""

from __future__ import annotations

import argparse

from bitgen.errors import BitgenError

SUMMARY = "prove every schedule exact against numpy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--isa", action="append", default=[], help="ISA level (default: all this CPU runs)")
    parser.add_argument(
        "--family", action="append", default=[], help="i2s, tl1, tl2, t5 or tl5 (default: all)"
    )
    parser.add_argument("--regime", action="append", default=[], help="n1, small or large (default: all)")
    parser.add_argument("--sample", type=int, help="only so many schedules of each space, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--inherited", action="store_true", help="also kernels with the text of their level's parent"
    )
    parser.add_argument("--cc", help="C compiler: gcc, clang, zig or a path")


def run(args: argparse.Namespace) -> int:
    from bitgen.api import check
    from bitgen.cli.progress import ProgressBar

    with ProgressBar() as line:
        counts = check(
            isas=args.isa,
            families=args.family,
            regimes=args.regime,
            sample=args.sample,
            seed=args.seed,
            inherit=not args.inherited,
            cc=args.cc,
            progress=lambda seen: line.show(str(seen)),
        )
    for proof in counts.failures:
        print(f"{proof.spec.name}: {proof.status.value}: {proof.detail}")
    print(counts)
    return 0 if counts.exact else BitgenError.exit_code
