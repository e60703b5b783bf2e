"""Show what a model file holds: metadata, tensors, types, and the bytes a token streams."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.tables import Column, Table, add_output, render_tables

if TYPE_CHECKING:
    from bitgen.formats.model_file import ModelFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("-m", "--model", type=Path, help="the same")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument("--metadata", action="store_true", help="list the whole metadata")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.errors import UsageError
    from bitgen.formats.inspect import facts
    from bitgen.formats.open import open_model

    path = args.path or args.model
    if path is None:
        raise UsageError("name a model file: bitgen inspect model.gguf")
    model = open_model(path)
    known = facts(model)
    tables = [Table("model", (Column("key", "what"), Column("value", "value")), list(known.items()))]
    tables += [_types(model), _matmuls(model), _stream(model)]
    if args.metadata:
        tables.append(_metadata(model))
    if args.tensors:
        tables.append(_tensors(model))
    print(render_tables(tables, args.output, known))


def _types(model: ModelFile) -> Table:
    from bitgen.formats.inspect import type_uses

    columns = (
        Column("type", "type"),
        Column("tensors", "tensors", "d"),
        Column("values", "values", ",d"),
        Column("bytes", "bytes", ",d"),
        Column("bits_a_value", "bits a value", ".3f"),
    )
    rows = [
        (u.type, u.tensors, u.values, u.size, None if u.size is None else 8 * u.size / u.values)
        for u in type_uses(model)
    ]
    return Table("types", columns, rows)


def _matmuls(model: ModelFile) -> Table:
    roles = {"qkv": "q/k/v", "gate_up": "gate/up"}
    rows = [(roles.get(m.role, m.role), m.shape.name, m.count) for m in model.config.matmuls]
    return Table(
        "matmuls", (Column("role", "role"), Column("shape", "m x k"), Column("count", "count", "d")), rows
    )


def _stream(model: ModelFile) -> Table:
    from bitgen.formats.inspect import token_bytes
    from bitgen.spec import EVERY_FAMILY

    read = token_bytes(model)
    columns = (
        Column("family", "packed as"),
        Column("ternary", "ternary bytes", ",d"),
        Column("head", "head bytes", ",d"),
        Column("total", "a token streams", ",d"),
        Column("kv_a_position", "and for each position (f16 KV)", ",d"),
    )
    rows = [
        (EVERY_FAMILY[name].title, size, read.head[name], read.total(name), read.kv_a_position)
        for name, size in read.packed.items()
    ]
    return Table("bytes a token", columns, rows)


def _metadata(model: ModelFile) -> Table:
    from bitgen.formats.inspect import metadata_lines

    return Table("metadata", (Column("key", "key"), Column("value", "value")), list(metadata_lines(model)))


def _tensors(model: ModelFile) -> Table:
    columns = (
        Column("name", "tensor"),
        Column("type", "type"),
        Column("shape", "shape"),
        Column("bytes", "bytes", ",d"),
    )
    rows = [(t.name, t.type, "x".join(map(str, t.shape)), t.size) for t in model.tensors]
    return Table("tensors", columns, rows)
