"""How well a model predicts a text: perplexity over the windows that llama.cpp uses."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitgen.cli.arguments import add_model, open_llm
from bitgen.cli.tables import Column, Table, add_output, render_tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, context=512)
    parser.add_argument("-f", "--file", type=Path, required=True, help="the text, UTF-8; - is standard input")
    parser.add_argument("--chunks", type=int, help="windows at most (default: all of the text)")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.cli.progress import ProgressBar
    from bitgen.errors import FileError
    from bitgen.inference.perplexity import perplexity
    from bitgen.progress import Progress

    try:
        data = sys.stdin.buffer.read() if str(args.file) == "-" else args.file.read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{args.file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    with open_llm(args) as llm, ProgressBar() as bar:
        for result in perplexity(llm, text, llm.context, args.chunks):
            title = f"perplexity {result.value:.4f} so far"
            bar.show(Progress(title, result.windows, result.total, "windows"))
    columns = (
        Column("perplexity", "perplexity", ".4f"),
        Column("error", "+/-", ".5f"),
        Column("windows", "windows", "d"),
        Column("context", "of tokens", "d"),
        Column("tokens", "tokens predicted", "d"),
    )
    row = (result.value, result.error, result.windows, llm.context, result.tokens)
    print(render_tables([Table("perplexity", columns, [row])], args.output))
