"""Options that more than one parser has."""

from __future__ import annotations

import argparse

TYPE_CHECKING = False
if TYPE_CHECKING:  # for the time of --help, as in bitgen/cli/__init__.py
    from collections.abc import Callable


def add_isa_cap(parser: argparse.ArgumentParser) -> None:
    """--isa-cap, which may stand before the command or after it."""
    parser.add_argument(
        "--isa-cap",
        metavar="LEVEL",
        default=argparse.SUPPRESS,
        help="let this CPU act as one of at most this ISA level (the environment variable BITGEN_ISA_CAP)",
    )


def add_actions(parser: argparse.ArgumentParser) -> Callable[[str, str], argparse.ArgumentParser]:
    """Actions below a command, in ``args.action``: the result adds one by its name and what it does."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add_isa_cap(sub)
        return sub

    return action
