"""The command line: arguments in, tables and exit codes out; the work is done by the package.

Results go to standard output, progress and errors to standard error. The module of a command has
`add_arguments` and `run`, and is imported when it is that command's turn, so `bitgen --help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import contextmanager
from importlib import import_module

from bitgen import __version__
from bitgen.cli.options import add_isa_cap

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a tenth of the time of --help
    from collections.abc import Iterator, Sequence
    from typing import Any, NoReturn

COMMANDS = {
    "detect": "this CPU: caches, ISA levels accepted or rejected with the reason, compilers",
    "models": "the presets of configs/models/ with their distinct shapes",
    "render": "readable C of one kernel, or of the forward pass, on standard output",
    "tune": "find this machine's fastest kernels for a model",
    "fleet": "tune on many machines through a database, and direct them",
    "worker": "measure on this machine for a fleet",
    "report": "write a page with plots and tables of what a tune measured",
    "build": "write the kernel library of a model",
    "bench": "time a model in tokens a second, or its kernels against defaults and roofline",
    "show": "what is tuned, and what a library contains",
    "verify": "verify every schedule exact against numpy",
    "export": "write this machine's winners as defaults of its microarchitecture",
    "bundle": "install, list, remove, verify, pick and pack bundles of kernels",
    "trust": "make, add, list and revoke the keys that sign bundles",
    "run": "continue a text with a model",
    "chat": "talk with a model",
    "serve": "serve a model over HTTP",
    "pull": "download a model from the Hugging Face hub",
    "list": "the models on this machine: the hub's cache, LM Studio, Ollama",
    "embed": "vectors of texts",
    "perplexity": "how well a model predicts a text",
    "convert": "Hugging Face folder -> GGUF",
    "quantize": "write a model with weights of 3 or 4 bits",
    "inspect": "what a model file holds",
    "cache": "list, check or clear the packed weights that are kept on disk",
}
_ALIASES = {"verify": ("check",)}  # names they had before


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the whole usage before it.

    Options are not abbreviated: --isa of a command that has none would be --isa-cap.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        from bitgen.errors import UsageError

        self.exit(UsageError.exit_code, f"bitgen: {message}; `{self.prog} --help` lists what there is\n")


class _Command(_Parser):
    """A command, by its name; what it takes is known when it is chosen."""

    name = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.name:
            module = import_module(f"bitgen.cli.{self.name}")
            self.description, self.name = module.__doc__, ""
            module.add_arguments(self)
            add_isa_cap(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(args, namespace)


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
    """The whole command line."""
    top = _Parser(
        prog="bitgen",
        description="Generate, verify, tune and ship CPU kernels for ternary language models.",
        epilog="Start with `bitgen detect`, then `bitgen tune --model 3B` and `bitgen build --model 3B`.",
    )
    top.add_argument("--version", action="version", version=f"bitgen {__version__}")
    add_isa_cap(top)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Command)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, aliases=_ALIASES.get(name, ())).name = name
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code tells what happened (bitgen.errors)."""
    args = parser().parse_args(argv)
    import platform

    from bitgen.cpu import require_supported_os
    from bitgen.errors import BitgenError, FileError, InterruptError

    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a model may print what a Latin-1 terminal cannot show
    try:
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
        kept = "; what was recorded is kept" if args.command in ("tune", "fleet") else ""
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
