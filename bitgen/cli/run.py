"""Continue a text with a model; the text goes to standard output, timings to standard error."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitgen.cli.arguments import (
    add_draft,
    add_energy,
    add_model,
    add_sampling,
    load_cache,
    metered,
    open_llm,
    print_timings,
    sampling_options,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_draft(parser)
    source = parser.add_argument_group("the prompt").add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="the text to continue")
    source.add_argument("-f", "--file", type=Path, help="read it from a file; - is standard input")
    parser.add_argument("-e", "--escape", action="store_true", help=r"read \n, \t, \\ and the like in -p")
    parser.add_argument("--no-display-prompt", action="store_true", help="print only what is new")
    parser.add_argument(
        "-cnv",
        "--conversation",
        action="store_true",
        help="chat; -p or -f is the system message (see `bitgen chat`)",
    )
    add_sampling(parser, tokens=128)
    add_energy(parser)
    parser.add_argument(
        "--prompt-cache",
        type=Path,
        metavar="FILE",
        help="start from what FILE holds, and write it at the end: a long prompt is computed once",
    )


def run(args: argparse.Namespace) -> int:
    from bitgen.errors import InterruptError, UsageError

    if args.conversation:
        from bitgen.cli.chat import converse

        if args.energy or args.energy_command is not None:
            raise UsageError("--energy is of one text: leave out -cnv")
        if args.prompt_cache:
            raise UsageError("--prompt-cache is of one text: in a chat /save FILE and /load FILE keep it")
        given = args.prompt is not None or args.file is not None
        return converse(args, system=_prompt(args) if given else None)
    options = sampling_options(args)
    prompt = _prompt(args)
    with metered(args) as meter, open_llm(args) as llm:
        if args.prompt_cache:
            load_cache(llm, args.prompt_cache)
        if meter:
            meter.measure_idle()
        llm.scheduler.meter = meter
        generation = llm.generate(prompt, **options)
        if not args.no_display_prompt:
            print(prompt, end="", flush=True)
        code = 0
        try:
            for piece in generation:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            code = InterruptError.exit_code
        finally:  # an error's line starts on a line of its own
            print(flush=True)
        if args.prompt_cache:
            llm.save_cache(args.prompt_cache)
        if generation.finish == "context":
            print(
                f"bitgen: the context of {llm.context} positions is full{llm.context_hint}", file=sys.stderr
            )
        if not args.no_perf:
            print_timings(llm, generation.seed, meter)
    return code


def _prompt(args: argparse.Namespace) -> str:
    """-p, the file of -f, or standard input where neither is given and it is no terminal."""
    from bitgen.errors import FileError, UsageError

    if args.prompt is not None:
        return _unescape(args.prompt) if args.escape else str(args.prompt)
    if args.file is None and sys.stdin.isatty():
        raise UsageError("give a prompt: -p TEXT, -f FILE, or standard input")
    try:
        if args.file is None or str(args.file) == "-":
            text = sys.stdin.buffer.read().decode("utf-8")
        else:
            text = args.file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"the prompt is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return text[:-1] if text.endswith("\n") else text  # the newline that ends a file is not meant


def _unescape(text: str) -> str:
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
    parts = text.split("\\")
    out, at = [parts[0]], 1
    while at < len(parts):
        part = parts[at]
        if part == "" and at + 1 < len(parts):  # an escaped backslash
            out.append("\\" + parts[at + 1])
            at += 1
        else:
            out.append(known.get(part[:1], "\\" + part[:1]) + part[1:])
        at += 1
    return "".join(out)
