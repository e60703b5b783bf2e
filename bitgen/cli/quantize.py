"""Write a model with weights of 3 or 4 bits: BitMoD, learned codebooks, GGUF's Q4_0 and IQ4_NL."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitgen.cli.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a Hugging Face folder, or a GGUF file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the GGUF file to write")
    parser.add_argument(
        "--type",
        required=True,
        help="bitmod4, bitmod3, codebook4, codebook3, fp4, fp3, int4, nl4, int3, q4_0 or iq4_nl",
    )
    parser.add_argument(
        "--group",
        type=int,
        default=0,
        help="weights along k that share a scale: 32, 64, 128 or 256 (128; of q4_0 and iq4_nl 32)",
    )
    parser.add_argument(
        "--head",
        default="keep",
        help="the LM head, tied or not: keep (as it is), f16, q8_0 or q4_0",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text, UTF-8, that the model reads first: errors then count by what weights are multiplied with",
    )


def run(args: argparse.Namespace) -> None:
    from bitgen.errors import FileError
    from bitgen.formats.source import read_bounded
    from bitgen.quantize import Recipe, quantize

    text = ""
    if args.calibration is not None:
        try:
            text = read_bounded(args.calibration).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FileError(
                f"{args.calibration} is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from None
        if not text:
            raise FileError(f"{args.calibration} is empty")
    recipe = Recipe(args.type, args.group, args.head, text)
    with ProgressBar() as bar:
        made = quantize(args.source, args.out, recipe, bar.show)
    for note in made.notes:
        print(f"bitgen: note: {note}", file=sys.stderr)
    print(
        f"{made.path}: {made.size:,} bytes; {made.weights:,} weights of matrices, {made.bits:.3f} bits each, "
        f"changed by {made.off:.2%} (root mean square)"
    )
