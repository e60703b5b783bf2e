"""Models on this machine: pulled from the Hugging Face hub, in LM Studio's folder, in Ollama's.

The names are what -m takes. `runs` says why bitgen cannot run a model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bitgen.cli.tables import Column, Table, add_output, render_tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.formats.downloads import Download, downloads
    from bitgen.paths import models_dir

    shipped = [Download(file.stem, file) for file in sorted(models_dir().glob("*.gguf"))]
    rows = [(each.name, each.bytes / 2**20, _runs(each.path)) for each in (*shipped, *downloads())]
    columns = (Column("name", "name"), Column("mib", "MiB", ",.1f"), Column("runs", "runs"))
    print(render_tables([Table("models", columns, rows)], args.output))


def _runs(path: Path) -> str:
    from bitgen.errors import BitgenError
    from bitgen.formats.open import open_model

    try:
        open_model(path)
    except BitgenError as error:
        return error.message
    return "yes"
