"""Vectors of texts, of length 1: a JSON array a line on standard output, or a .npy file."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import add_model, open_llm

if TYPE_CHECKING:
    from bitgen.inference.wants import Floats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, head="full")
    source = parser.add_argument_group("the texts").add_mutually_exclusive_group(required=True)
    source.add_argument("-p", "--prompt", help="one text")
    source.add_argument("-f", "--file", type=Path, help="a text a line, UTF-8; - is standard input")
    parser.add_argument(
        "--pooling", help="last (token) or mean (of all tokens); default: what the file says, else last"
    )
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="float32 (texts, hidden) as .npy")


def run(args: argparse.Namespace) -> None:
    from bitgen.cli.progress import ProgressBar
    from bitgen.errors import FileError
    from bitgen.inference import FEW
    from bitgen.inference.embedding import checked_pooling
    from bitgen.inference.kv_memory import Capacity
    from bitgen.progress import Progress

    pooling = None if args.pooling is None else checked_pooling(args.pooling)
    texts = [args.prompt] if args.prompt is not None else _lines(args.file)
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise FileError(f"{args.out} cannot be written: there is no folder {args.out.parent}")
    with open_llm(args, capacity=Capacity(min(len(texts), FEW))) as llm, ProgressBar() as bar:
        vectors = []
        for done, vector in enumerate(llm.embed(texts, pooling), start=1):
            vectors.append(vector)
            if args.out is None:
                print(json.dumps([float(str(value)) for value in vector]))
            else:
                bar.show(Progress("embedding", done, len(texts), "texts"))
    if args.out is not None:
        _write(args.out, vectors)


def _write(path: Path, vectors: list[Floats]) -> None:
    """A .npy file, whole or not at all."""
    import numpy as np

    from bitgen.errors import FileError
    from bitgen.whole import whole

    try:
        with whole(path) as file:
            np.save(file, np.stack(vectors))
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def _lines(path: Path) -> list[str]:
    from bitgen.errors import FileError, UsageError

    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        # Not splitlines(), which ends lines at form feeds and U+2028 too: a vector for each line is wanted.
        lines = io.TextIOWrapper(io.BytesIO(data), "utf-8").read().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not data:
        raise UsageError(f"{path} has no lines: a text a line is wanted")
    return lines
