"""The command line: arguments in, tables and exit codes out; the work is done by the package.

Results go to standard output, progress and errors to standard error. A command module is light to import:
it declares its arguments and imports what it needs when it runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import NoReturn

from bitgen import __version__
from bitgen.cli import (
    bench,
    build,
    bundle,
    cache,
    chat,
    check,
    convert,
    detect,
    export,
    inspect,
    models,
    perplexity,
    render,
    run,
    show,
    trust,
    tune,
)
from bitgen.cli.options import add_isa_cap
from bitgen.errors import BitgenError, FileError, InterruptError, UsageError

COMMANDS: tuple[ModuleType, ...] = (
    *(detect, models, render, tune, build, bench, show, check, export),
    *(bundle, trust),
    *(run, chat, perplexity, convert, inspect, cache),
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"bitgen: {message}; `{self.prog} --help` lists what there is\n")


@contextmanager
def _isa_cap(name: str | None) -> Iterator[None]:
    """Set the environment's cap for this command and what it starts; BitgenError for an unknown level."""
    from bitgen.cpu import CAP_VARIABLE, isa_cap

    before = os.environ.get(CAP_VARIABLE)
    if name is not None:
        os.environ[CAP_VARIABLE] = name
    try:
        isa_cap()
        yield
    finally:
        if before is not None:
            os.environ[CAP_VARIABLE] = before
        elif name is not None:
            del os.environ[CAP_VARIABLE]


def parser() -> argparse.ArgumentParser:
    """The whole command line; every command module adds its own part."""
    top = _Parser(
        prog="bitgen",
        description="Generate, prove, tune and ship CPU kernels for ternary language models.",
        epilog="Start with `bitgen detect`, then `bitgen tune --model 3B` and `bitgen build --model 3B`.",
    )
    top.add_argument("--version", action="version", version=f"bitgen {__version__}")
    add_isa_cap(top)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        sub = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(sub)
        add_isa_cap(sub)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code tells what happened (bitgen.errors)."""
    args = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a model may print what a Latin-1 terminal cannot show
    try:
        from bitgen.cpu import require_supported_os

        require_supported_os(platform.system())
        with _isa_cap(getattr(args, "isa_cap", None)):
            code = int(args.run(args) or 0)
        sys.stdout.flush()
        return code
    except BitgenError as error:
        print(f"bitgen: {error.message}", file=sys.stderr)
        detail = getattr(error, "stderr", "")  # a compiler's own words
        if detail:
            print(str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        kept = "; what was recorded is kept" if args.command == "tune" else ""
        print(f"bitgen: interrupted{kept}", file=sys.stderr)
        return InterruptError.exit_code
    except BrokenPipeError:
        # The reader of a pipe (head, less) left: not an error; keep Python from complaining again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = f" {error.filename}" if error.filename else ""
        print(f"bitgen: {error.strerror or error}{name}", file=sys.stderr)
        return FileError.exit_code
