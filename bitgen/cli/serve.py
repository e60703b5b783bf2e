"""Serve a model over HTTP, as OpenAI's API: answers with a seed do not depend on the load. Ctrl-C ends it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import add_draft, add_energy, add_model, energy_lines, load_cache, metered, open_llm
from bitgen.errors import BitgenError, UsageError

if TYPE_CHECKING:
    from bitgen.llm import LLM
    from bitgen.serve.guard import Access
    from bitgen.serve.service import Settings

_PARALLEL_MAX = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_draft(parser)
    group = parser.add_argument_group("the server")
    group.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    group.add_argument("--port", type=int, default=8080, help="0: any that is free (8080)")
    group.add_argument(
        "--alias", metavar="A,B", help="names of the model for clients (default: the file's name)"
    )
    group.add_argument(
        "--strict-model", action="store_true", help="refuse a model name that is none of these"
    )
    group.add_argument(
        "--log-format", choices=("text", "json", "none"), default="text", help="a line a request (text)"
    )
    group.add_argument(
        "--drain", type=float, default=30, metavar="S", help="seconds for running texts at the end (30)"
    )
    group = parser.add_argument_group("the load")
    group.add_argument("--parallel", type=int, default=4, metavar="N", help="texts at once (4)")
    group.add_argument("--max-queue", type=int, default=64, metavar="N", help="texts that may wait (64)")
    group.add_argument(
        "--max-stall",
        type=float,
        default=250,
        metavar="MS",
        help="how long a part of a prompt may hold up running texts (250)",
    )
    group.add_argument(
        "--cache-file",
        type=Path,
        metavar="FILE",
        help="start from what FILE holds of prompts, and write it at the end",
    )
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens of an answer at most (default: the context)"
    )
    group.add_argument(
        "--max-body", type=int, default=2 << 20, metavar="BYTES", help="of a request at most (2097152)"
    )
    add_energy(group)
    group = parser.add_argument_group("who may ask")
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line, mode 600")
    group.add_argument("--insecure", action="store_true", help="serve other machines without a key")
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="a Host to answer to; repeatable"
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="an origin whose pages may ask (default: those of localhost); *: any; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    _check(args)
    try:
        from bitgen.serve.ports import listen
        from bitgen.serve.server import serve
    except ModuleNotFoundError as error:
        raise BitgenError(f"{error.name} is not installed: pip install 'bitgen[serve]'") from None
    access = _access(args)
    with (
        listen(args.host, args.port) as sock,
        metered(args) as meter,
        open_llm(args, batch=args.parallel) as llm,
    ):
        llm.limit_stall(args.max_stall / 1e3)
        settings = _settings(args, llm, access)
        _, cache, _ = llm.memory
        port = sock.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        for line in (
            f"memory for {args.parallel} texts x {llm.context} positions: {cache / 2**20:.0f} MiB at most",
            f"{settings.names[0]} ({settings.fingerprint}) on http://{host}:{port}",
        ):
            print(f"bitgen: {line}", file=sys.stderr, flush=True)
        if args.cache_file:
            load_cache(llm, args.cache_file)
        code = serve(llm, settings, sock, args.drain, meter)
        for line in energy_lines(meter, llm.timings):
            print(f"bitgen: {line}", file=sys.stderr)
        if args.cache_file:
            tokens = llm.save_cache(args.cache_file)
            print(f"bitgen: {tokens} tokens of prompts and texts in {args.cache_file}", file=sys.stderr)
        return code


def _check(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("parallel", 1, _PARALLEL_MAX),
        ("max_queue", 0, 100_000),
        ("max_stall", 1, 60_000),
        ("max_body", 1024, 1 << 30),
        ("drain", 0, 86_400),
    ):
        value = getattr(args, name)
        if not least <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be {least} to {most}, not {value:g}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens must be 1 or more, not {args.max_tokens}")


def _access(args: argparse.Namespace) -> Access:
    """UsageError where anybody could ask who should not."""
    from bitgen.serve.guard import Access
    from bitgen.serve.ports import is_loopback
    from bitgen.serve.server import read_keys

    keys = read_keys(args.api_key_file) if args.api_key_file else ()
    local = is_loopback(args.host)
    if not local and not keys and not args.insecure:
        raise UsageError(
            f"{args.host} can be reached from other machines: give --api-key-file, or --insecure for none"
        )
    hosts = None if keys and not local else (args.host.lower(), *map(str.lower, args.allowed_host))
    return Access(keys, hosts, tuple(origin.rstrip("/") for origin in args.cors_origin))


def _settings(args: argparse.Namespace, llm: LLM, access: Access) -> Settings:
    from bitgen.formats.downloads import is_download
    from bitgen.formats.open import open_model
    from bitgen.serve.server import fingerprint_of
    from bitgen.serve.service import Settings

    path = open_model(args.model).path
    own = args.model.partition(":")[2] if is_download(args.model) else path.stem
    names = [name.strip() for name in (args.alias or "").split(",") if name.strip()]
    return Settings(
        names=tuple(names or [own]),
        fingerprint=fingerprint_of(
            path, *llm.precision, "head q8" if args.head == "q8" else "head exact", llm.template_text
        ),
        access=access,
        max_queue=args.max_queue,
        max_body=args.max_body,
        max_tokens=args.max_tokens,
        strict_model=args.strict_model,
        log=None if args.log_format == "none" else args.log_format,
    )
