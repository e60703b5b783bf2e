"""Write one HTML page about a tune: rooflines, the search, winners, formats, noise. No JavaScript."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitgen.cli.arguments import PRESET_HELP, add_logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "records",
        nargs="?",
        type=Path,
        help="a file of records, or a folder of them (default: this machine's)",
    )
    parser.add_argument(
        "-m", "--model", help=f"the newest tune of this model: {PRESET_HELP} (default: the newest tune)"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="RECORDS",
        help="compare with the newest tune of another file or folder",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (report.html)")
    add_logs(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.report import write_report

    path = write_report(args.records, model=args.model, against=args.against, logs=args.logs, out=args.out)
    print(f"{path} ({path.stat().st_size / 1e3:,.0f} kB)")
