"""Serve a model over HTTP, as OpenAI's API: answers with a seed do not depend on the load. Ctrl-C ends it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import add_draft, add_energy, add_model, energy_lines, load_cache, metered, open_llm
from bitgen.errors import BitgenError, FileError, UsageError

if TYPE_CHECKING:
    from bitgen.inference.kv_memory import Capacity
    from bitgen.llm import LLM
    from bitgen.serve.guard import Access
    from bitgen.serve.service import Settings

_PARALLEL_MAX, _PARKED_MAX = 64, 256
_KV_MIB_MAX = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_draft(parser)
    _add_server(parser.add_argument_group("the server"))
    _add_load(parser.add_argument_group("the load"))
    _add_access(parser.add_argument_group("who may ask"))


def _add_server(group: argparse._ArgumentGroup) -> None:
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


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--parallel", type=int, default=4, metavar="N", help="texts at once (4)")
    group.add_argument(
        "--parked",
        type=int,
        default=12,
        metavar="N",
        help="texts that ended and are kept for others that start alike (12)",
    )
    group.add_argument(
        "--kv-memory",
        type=float,
        metavar="MIB",
        help="of keys and values (default: that of --parallel whole texts, or what is free)",
    )
    group.add_argument(
        "--share-prefixes",
        action="store_true",
        help="reuse what other keys' texts start with, of which times may tell them",
    )
    group.add_argument(
        "--pin",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a system prompt to compute at the start and share between all keys; repeatable",
    )
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


def _add_access(group: argparse._ArgumentGroup) -> None:
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
        from bitgen.serve.log import say
        from bitgen.serve.ports import listen
        from bitgen.serve.server import serve
    except ModuleNotFoundError as error:
        raise BitgenError(f"{error.name} is not installed: pip install 'bitgen[serve]'") from None
    access, prompts = _access(args), [(path, _prompt(path)) for path in args.pin]
    with (
        listen(args.host, args.port) as sock,
        metered(args) as meter,
        open_llm(args, capacity=_capacity(args)) as llm,
    ):
        llm.limit_stall(args.max_stall / 1e3)
        settings = _settings(args, llm, access)
        port = sock.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(_memory_line(llm))
        for path, text in prompts:
            say(f"{llm.pin(text)} tokens of {path} are shared by all chats that start with them")
        if args.cache_file:
            load_cache(llm, args.cache_file)
        say(f"{settings.names[0]} ({settings.fingerprint}) on http://{host}:{port}")
        code = serve(llm, settings, sock, args.drain, meter)
        for line in energy_lines(meter, llm.timings):
            say(line)
        if args.cache_file:
            tokens = llm.save_cache(args.cache_file)
            say(f"{tokens} tokens of prompts and texts in {args.cache_file}")
        return code


def _check(args: argparse.Namespace) -> None:
    for name, least, most in (
        ("parallel", 1, _PARALLEL_MAX),
        ("parked", 0, _PARKED_MAX),
        ("max_queue", 0, 100_000),
        ("max_stall", 1, 60_000),
        ("max_body", 1024, 1 << 30),
        ("drain", 0, 86_400),
    ):
        value = getattr(args, name)
        if not least <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be {least} to {most}, not {value:g}")
    if args.kv_memory is not None and not 0 < args.kv_memory < _KV_MIB_MAX:
        raise UsageError(f"--kv-memory must be above 0 and below {_KV_MIB_MAX}, not {args.kv_memory:g}")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens must be 1 or more, not {args.max_tokens}")


def _capacity(args: argparse.Namespace) -> Capacity:
    from bitgen.inference.kv_memory import Capacity

    held = None if args.kv_memory is None else int(args.kv_memory * 2**20)
    return Capacity(args.parallel, args.parked, len(args.pin), held, args.share_prefixes)


def _memory_line(llm: LLM) -> str:
    """What keys and values may take: texts x positions x bytes, and the part of it that is used at once."""
    texts, (_, cache, _) = llm.scheduler.parallel, llm.memory
    whole = llm.engine.sequence_bytes(llm.context)
    line = f"memory for {texts} texts x {llm.context} positions x {whole / llm.context:.0f} bytes"
    line += f": {texts * whole / 2**20:.1f} MiB"
    if cache < texts * whole:
        return f"{line}, of which {cache / 2**20:.1f} MiB are used at once: what has no room waits"
    return f"{line}; with what is kept of texts that ended, {cache / 2**20:.1f} MiB at most"


def _prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise FileError(f"{path} is not UTF-8") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None


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
