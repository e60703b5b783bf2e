"""How well a model predicts a text: perplexity, as llama.cpp counts it, and the distance to another model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import add_model, open_llm
from bitgen.cli.tables import Column, Table, add_output, render_tables

if TYPE_CHECKING:
    from bitgen.inference.divergence import Reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, context=512, head="full")
    parser.add_argument("-f", "--file", type=Path, required=True, help="the text, UTF-8; - is standard input")
    parser.add_argument("--chunks", type=int, help="windows at most (default: all of the text)")
    parser.add_argument(
        "--against",
        metavar="MODEL",
        help="compare with the predictions of another model, or with a file of --save-logits: their "
        "Kullback-Leibler divergence, and how often both find the same token likeliest",
    )
    parser.add_argument(
        "--save-logits", type=Path, metavar="FILE", help="keep the logits (4 bytes a token of the vocabulary)"
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.cli.progress import ProgressBar
    from bitgen.errors import FileError
    from bitgen.inference.divergence import LogitsWriter
    from bitgen.inference.perplexity import perplexity
    from bitgen.progress import Progress

    try:
        data = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{args.file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    with contextlib.ExitStack() as stack:
        llm = stack.enter_context(open_llm(args))
        against = _reference(args, stack) if args.against else None
        save = stack.enter_context(LogitsWriter(args.save_logits)) if args.save_logits else None
        bar = stack.enter_context(ProgressBar())
        for result in perplexity(llm, text, llm.context, args.chunks, against=against, save=save):
            title = f"perplexity {result.value:.4f} so far"
            bar.show(Progress(title, result.windows, result.total, "windows"))
    columns = [
        Column("perplexity", "perplexity", ".4f"),
        Column("error", "+/-", ".5f"),
        Column("windows", "windows", "d"),
        Column("context", "of tokens", "d"),
        Column("tokens", "tokens predicted", "d"),
    ]
    row = [result.value, result.error, result.windows, llm.context, result.tokens]
    if divergence := result.divergence:
        columns += [
            Column("kl_divergence", "KL divergence", ".3e"),
            Column("kl_error", "+/-", ".1e"),
            Column("same_top", "same top, %", ".3f"),
        ]
        row += [divergence.mean, divergence.error, 100 * divergence.same_top]
    print(render_tables([Table("perplexity", tuple(columns), [tuple(row)])], args.output))


def _reference(args: argparse.Namespace, stack: contextlib.ExitStack) -> Reference:
    from bitgen.inference.divergence import is_logits, read_logits
    from bitgen.inference.perplexity import ModelReference

    if is_logits(Path(args.against)):
        return read_logits(Path(args.against))
    other = argparse.Namespace(**{**vars(args), "model": args.against})
    return ModelReference(stack.enter_context(open_llm(other)), args.against)
