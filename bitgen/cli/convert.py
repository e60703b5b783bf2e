"""Write a Hugging Face folder (or another GGUF file) as one GGUF file; every weight keeps its value."""

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
        default="i2_s",
        help="storage of the ternary matrices (i2_s): i2_s, tq1_0, tq2_0, q1_0, q2_0, stq1_0, pq2_0, ptq1_0, "
        "f16; f16 where a scale a row does not fit, refused where scales of groups do not. Of matrices of 4 "
        "bits: q4_0, q4_1, iq4_nl, mxfp4, nvfp4, table4",
    )


def run(args: argparse.Namespace) -> None:
    from bitgen.formats.convert import convert

    with ProgressBar() as bar:
        written = convert(args.source, args.out, args.type, bar.show)
    for note in written.notes:
        print(f"bitgen: note: {note}", file=sys.stderr)
    counts = ", ".join(f"{count} {kind}" for kind, count in written.counts.items())
    print(f"{written.path}: {written.size:,} bytes, tensors: {counts}")
