"""Options that more than one parser has."""

from __future__ import annotations

import argparse


def add_isa_cap(parser: argparse.ArgumentParser) -> None:
    """--isa-cap, which may stand before the command or after it."""
    parser.add_argument(
        "--isa-cap",
        metavar="LEVEL",
        default=argparse.SUPPRESS,
        help="let this CPU act as one of at most this ISA level (the environment variable BITGEN_ISA_CAP)",
    )
