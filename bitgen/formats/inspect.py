"""What a model file holds and what running it costs: `bitgen inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitgen.formats.config import ModelConfig, printable
from bitgen.formats.model_file import ModelFile
from bitgen.formats.table_types import TableLayout
from bitgen.spec import EVERY_FAMILY, Layout

_TEXT_SHOWN = 60  # characters of a metadata value
_ITEMS_SHOWN = 3  # elements of an array


@dataclass(frozen=True)
class TypeUse:
    """The tensors of one type: their number, values and bytes."""

    type: str
    tensors: int
    values: int
    size: int | None


@dataclass(frozen=True)
class TokenBytes:
    """What one decoded token reads from memory, in bytes, apart from the KV cache.

    ``packed`` are the ternary matrices of layers in each family's layout; the head is read in the type of its
    file, or as they are where it is ternary.
    """

    packed: dict[str, int]  # family -> bytes
    head: dict[str, int]  # likewise
    kv_a_position: int  # bytes of an f16 KV cache for each position of the context

    def total(self, family: str) -> int:
        return self.packed[family] + self.head[family]


def type_uses(model: ModelFile) -> list[TypeUse]:
    """The types of the file, the one with most bytes first."""
    uses: dict[str, TypeUse] = {}
    for t in model.tensors:
        values = int(np.prod(t.shape, dtype=np.int64))
        old = uses.get(t.type, TypeUse(t.type, 0, 0, 0))
        size = None if t.size is None or old.size is None else old.size + t.size
        uses[t.type] = TypeUse(t.type, old.tensors + 1, old.values + values, size)
    return sorted(uses.values(), key=lambda use: -(use.size or 0))


def token_bytes(model: ModelFile) -> TokenBytes:
    config, group = model.config, model.config.group
    layouts = {
        name: Layout(name, family.rows, group)
        for name, family in EVERY_FAMILY.items()
        if family.weights == config.weights and (not group or group in family.groups)
    }
    packed, head = {}, {}
    for name, layout in layouts.items():
        packed[name] = sum(m.count * layout.packed_bytes(m.shape) for m in config.layer_matmuls)
        matrix = model.weights.ternary_head
        alike = matrix is not None and matrix.weights == config.weights
        head[name] = layout.packed_bytes(matrix.shape) if matrix and alike else model.weights.output.data.size
    return TokenBytes(packed, head, 2 * 2 * config.layers * config.kv_rows)


def facts(model: ModelFile) -> dict[str, Any]:
    """The model in a few lines: name -> value."""
    c = model.config
    scaled = ", frequencies scaled" if c.rope_divisors is not None else ""
    own = TableLayout.of(model.path, model.metadata) if model.container == "gguf" else None
    stored = {} if own is None else {"stored as": f"{own.type}, {_bits(model, own):.3f} bits a weight"}
    return {
        "file": str(model.path),
        "container": model.container,
        "bytes": model.fingerprint.size,
        "architecture": c.architecture,
        "name": c.name,
        "layers": c.layers,
        "hidden": c.hidden,
        "ffn": c.ffn,
        "heads": f"{c.heads} of {c.head_dim}, {c.kv_heads} for keys and values",
        "vocabulary": c.vocab,
        "context": c.context,
        **({"windows": _windows(c)} if c.windows else {}),
        "activation": c.activation,
        "sub-norms": "yes" if c.sub_norms else "no",
        "norms of q and k": "yes" if c.qk_norm else "no",
        **({"norms of inputs": "one a matrix"} if c.input_norms else {}),
        **({"groups": f"{c.group} weights along k share a scale, or fewer"} if c.group else {}),
        **stored,
        "head": f"{model.weights.output.type}, {'tied to the embedding' if c.tied_head else 'its own'}",
        "rope": f"theta {c.rope_theta:g}{scaled}",
        "norm_eps": c.norm_eps,
    }


def _windows(config: ModelConfig) -> str:
    """How far attention sees, by the number of layers."""
    lengths = sorted(set(config.windows), reverse=True)
    layers = {length: f"{config.windows.count(length)} of {config.layers}" for length in lengths}
    each = (f"{length or 'all'} positions in {count} layers" for length, count in layers.items())
    return ", ".join(each)


def _bits(model: ModelFile, own: TableLayout) -> float:
    """Of a weight of the matrices, scales, selectors and tables counted."""
    size = sum(t.size or 0 for t in model.tensors if t.type == own.type or t.name.endswith(".tables"))
    return 8 * size / model.config.ternary_weights


def metadata_lines(model: ModelFile) -> Iterator[tuple[str, str]]:
    """(key, value) of everything the file says, values shortened and safe to print."""
    for key, value in model.metadata.items():
        yield printable(key), short(value)


def short(value: Any) -> str:
    """A value on one short line, without control characters."""
    if isinstance(value, (tuple, list, np.ndarray)):
        items = ", ".join(short(v) for v in value[:_ITEMS_SHOWN])
        more = ", ..." if len(value) > _ITEMS_SHOWN else ""
        return f"[{items}{more}] ({len(value)})"
    text = value if isinstance(value, str) else str(value)
    cut = printable(text[:_TEXT_SHOWN])
    return f"{cut}... ({len(text)} characters)" if len(text) > _TEXT_SHOWN else cut
