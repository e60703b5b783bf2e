"""Write this machine's winners as schedules of its CPU family, no timings: tune starts from them."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write this machine's winners as defaults of its CPU family"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="folder (default: winners/ in that of the records)")
    parser.add_argument("--logs", type=Path, help="folder of the records (tune_logs/)")
    parser.add_argument("--cc", help="C compiler whose records are meant")


def run(args: argparse.Namespace) -> None:
    from bitgen.api import export

    print(export(cc=args.cc, logs=args.logs, out=args.out))
