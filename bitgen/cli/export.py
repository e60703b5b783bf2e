"""Write this machine's winners as schedules of its CPU family, no timings: tune starts from them.

The file names no machine, no user and no folder. A maintainer folds it into those that bitgen ships.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitgen.cli.arguments import add_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder (default: winners/ in that of the records)")
    parser.add_argument(
        "--merge", metavar="FILE", type=Path, help="fold an exported file into the winners that bitgen ships"
    )
    add_logs(parser)
    parser.add_argument("--cc", help="C compiler whose records are meant")


def run(args: argparse.Namespace) -> None:
    from bitgen.api import export, merge

    if args.merge:
        print(merge(args.merge, out=args.out))
        return
    print(export(cc=args.cc, logs=args.logs, out=args.out))
