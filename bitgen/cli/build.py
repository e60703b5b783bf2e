"""Build the kernel library of a model: shared library, header, manifest, pkg-config file and the C text."""

from __future__ import annotations

import argparse
from pathlib import Path

from bitgen.cli.arguments import PRESET_HELP, add_compiler, add_logs
from bitgen.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", required=True, help=PRESET_HELP)
    parser.add_argument("--isa", help="ISA level of the kernels (default: the best this CPU runs)")
    parser.add_argument(
        "--target", help="CPU to build for: neoverse-n1, cortex-a72, zen4, ... (default: this one)"
    )
    parser.add_argument(
        "--os", choices=("linux", "macos", "windows"), help="system of that CPU (default: this one's)"
    )
    parser.add_argument("--out", type=Path, help="folder that gets the library's folder (generated/)")
    parser.add_argument("--name", help="name of the library (default: <model>-<cpu family>)")
    add_compiler(parser)
    add_logs(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.api import build
    from bitgen.cli.progress import ProgressBar
    from bitgen.cli.show import library_table
    from bitgen.cli.tables import render_tables

    if args.os and not args.target:
        raise UsageError("--os needs --target: the CPU that the system runs on")
    with ProgressBar() as line:
        path = build(
            args.model,
            isa=args.isa,
            cc=args.cc,
            out=args.out,
            logs=args.logs,
            name=args.name,
            target=args.target,
            system={"linux": "Linux", "macos": "Darwin", "windows": "Windows", None: None}[args.os],
            progress=line.show,
        )
    print(render_tables([library_table(path)], "text"))
    print(f"\n{path}")
