"""Work for a fleet: take jobs of this machine's kind of CPU from the fleet's database and answer them."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime

from bitgen.cli.arguments import add_compiler, add_logs
from bitgen.errors import BitgenError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dsn(parser)
    parser.add_argument("--name", help="of this machine in the fleet (its host name)")
    parser.add_argument("-t", "--threads", type=int, help="the most that a job may use (all physical cores)")
    parser.add_argument(
        "--max-load",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="take no jobs while others use more of the CPUs; 1 never asks (0.25)",
    )
    parser.add_argument("--idle", type=float, metavar="SECONDS", help="end when no job has come for so long")
    add_compiler(parser)
    add_logs(parser)


def add_dsn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dsn",
        help="the fleet's database, without a password (BITGEN_FLEET_DSN, else the service bitgen_fleet)",
    )


def run(args: argparse.Namespace) -> None:
    fleet_of("bitgen worker")
    from bitgen.fleet.database import find_database
    from bitgen.fleet.local import local_worker
    from bitgen.fleet.worker import Settings

    database = find_database(args.dsn)
    settings = Settings(max_load=args.max_load, idle_s=args.idle)
    worker = local_worker(database, args.name, args.threads, args.cc, args.logs, settings, say)
    worker.run()


def say(text: str) -> None:
    """A line with the time, for whoever reads a log."""
    clean = BitgenError(text).message
    print(f"{datetime.now().astimezone():%H:%M:%S} {clean}", file=sys.stderr, flush=True)


def fleet_of(what: str) -> None:
    """BitgenError where the extra is not installed."""
    try:
        import procrastinate  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError as error:
        raise BitgenError(f"{what} needs {error.name}: pip install 'bitgen[fleet]'") from None
