"""List the model presets with the distinct matrices that the runtime multiplies with."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from bitgen.cli.tables import Column, Table, add_output, render_tables

if TYPE_CHECKING:
    from bitgen.formats.config import ModelPreset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="a preset, a YAML file or a model file (default: all presets)")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.formats.config import load_models

    models = [_shapes_of(args.model)] if args.model else load_models()
    rows = []
    for model in models:
        shapes: dict[str, list[str]] = {}
        for matmul in model.matmuls:
            shapes.setdefault(f"{matmul.m}x{matmul.k}", []).append(matmul.role)
        listed = ", ".join(f"{shape} ({'/'.join(roles)})" for shape, roles in shapes.items())
        rows.append((model.alias, model.name, model.layers, model.ternary_weights / 1e9, listed))
    columns = (
        Column("alias", "model"),
        Column("name", "name"),
        Column("layers", "layers", "d"),
        Column("ternary_gweights", "ternary 10^9", ".2f"),
        Column("shapes", "m x k of each layer, stacked as they run"),
    )
    print(render_tables([Table("models", columns, rows)], args.output))


def _shapes_of(model: str) -> ModelPreset:
    from bitgen.formats.open import preset_of  # the list of all presets does not need it

    return preset_of(model)
