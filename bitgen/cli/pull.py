"""Download a model from the Hugging Face hub into its cache: hf:owner/repo[:file][@revision].

What was interrupted goes on where it stopped. The name then stands for this download, until it is pulled
again.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="hf:owner/repo, with :file where it has several, with @revision")


def run(args: argparse.Namespace) -> None:
    from bitgen.formats.downloads import HubName, pull

    path, commit = pull(HubName.parse(args.name))
    print(f"bitgen: commit {commit}", file=sys.stderr)
    print(path)
