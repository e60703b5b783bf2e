"""The packed weights that are kept on disk so that a model starts at once.

list shows them, check reads them whole and deletes what is damaged (then exit code 5), clear deletes all.
"""

from __future__ import annotations

import argparse

from bitgen.cli.tables import Column, Table, add_output, render_tables
from bitgen.errors import FileError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=("list", "check", "clear"), nargs="?", default="list", help="(list)"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.inference.packed_file import cache_entries, check_cache, clear_cache

    if args.action == "clear":
        print(f"{clear_cache() / 2**20:,.1f} MiB freed")
        return
    damaged = check_cache() if args.action == "check" else []
    entries = cache_entries()
    columns = (Column("model", "model"), Column("mib", "MiB", ",.1f"), Column("path", "file"))
    rows = [(entry.model, entry.bytes / 2**20, entry.path) for entry in entries]
    print(render_tables([Table("cache", columns, rows)], args.output))
    if damaged:
        names = ", ".join(f"{entry.path.name} ({entry.model or 'unreadable'})" for entry in damaged)
        raise FileError(f"damaged or of another version, and deleted: {names}; the next start packs again")
