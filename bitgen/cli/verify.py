"""Verify kernels exact: every schedule of the spaces against numpy, ragged shapes and overflow edges."""

from __future__ import annotations

import argparse

from bitgen.cli.arguments import add_compiler, add_spaces
from bitgen.errors import BitgenError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_spaces(parser, "all this CPU runs")
    parser.add_argument("--sample", type=int, help="only so many schedules of each space, sampled by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--inherited", action="store_true", help="also kernels with the text of their level's parent"
    )
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        help="kernels of weights with a scale for each 32, 64, 128 or 256 (of T4 also 16)",
    )
    add_compiler(parser)


def run(args: argparse.Namespace) -> int:
    from bitgen.api import verify
    from bitgen.cli.progress import ProgressBar

    with ProgressBar() as line:
        counts = verify(
            isas=args.isa,
            families=args.family,
            regimes=args.regime,
            sample=args.sample,
            seed=args.seed,
            inherit=not args.inherited,
            cc=args.cc,
            progress=line.show,
            group=args.group,
        )
    for failed in counts.failures:
        print(f"{failed.spec.name}: {failed.status.value}: {failed.detail}")
    print(counts)
    return 0 if counts.exact else BitgenError.exit_code
