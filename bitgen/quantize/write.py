"""Write a model with weights of 3 or 4 bits: one matrix at a time, beside the file's name, then renamed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from bitgen.errors import FileError, UsageError, unknown
from bitgen.families.base import GROUPS
from bitgen.formats.architectures import EMBEDDING, GGUF_LAYER, LM_HEAD, Architecture, architecture_of
from bitgen.formats.coded import BLOCK, encode_codes
from bitgen.formats.config import Floats
from bitgen.formats.convert import (
    copied_tokenizer,
    dense_tensor,
    file_matrices,
    final_tensors,
    gguf_metadata,
    open_for,
    vector_tensor,
)
from bitgen.formats.gguf import NewTensor, write_gguf
from bitgen.formats.model_file import ModelFile
from bitgen.formats.pooling import pooling_metadata
from bitgen.formats.quants import DENSE, OTHER, Bytes, quantize_rows
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.table_types import ROWS, STACKS, TableLayout
from bitgen.formats.weights import DenseMatrix, LayerWeights
from bitgen.progress import Report
from bitgen.quantize.codebooks import learn_tables
from bitgen.quantize.fit import Chosen, Fit, Tables, choose
from bitgen.quantize.forward import Squares, input_squares
from bitgen.quantize.types import TYPES, DataType
from bitgen.tokenizer.tokenizer import Tokenizer

HEADS = ("keep", "f16", "q8_0", "q4_0")
_FILE_TYPES = {"q4_0": 2, "iq4_nl": 25}  # general.file_type of llama.cpp
_SLAB = 1 << 20  # weights that one thread fits at once
_LEARNED = 1 << 21  # weights of a matrix that tables are learned from
_WINDOW, _WINDOWS = 512, 16  # tokens, and texts of so many, that calibration uses


@dataclass(frozen=True)
class Recipe:
    """What to make: a type of TYPES, groups of weights along k that share a scale, the head as one of HEADS.

    ``calibration``: text that the model reads first; errors then count by what weights are multiplied with.
    ``fitted`` False: scales are the largest weight over the largest value, as BitMoD's paper has them; None:
    as is nearer (`DataType.fitted`).
    """

    type: str
    group: int = 0  # 0: 128, or 32 of GGUF's types
    head: str = "keep"
    calibration: str = ""
    fitted: bool | None = None

    @property
    def fits_scales(self) -> bool:
        """Whether scales are fitted by least squares. With calibration always: errors are then of outputs."""
        if self.fitted is not None:
            return self.fitted
        return bool(self.calibration) or TYPES[self.type].fitted

    def checked(self) -> tuple[DataType, int]:
        """The type and the size of groups. UsageError."""
        if self.type not in TYPES:
            raise unknown("type", self.type, TYPES)
        if self.head not in HEADS:
            raise unknown("type of head", self.head, HEADS)
        kind = TYPES[self.type]
        sizes = (BLOCK,) if kind.gguf else GROUPS
        group = self.group or (BLOCK if kind.gguf else 128)
        if group not in sizes:
            raise UsageError(f"{kind.name} has groups of {', '.join(map(str, sizes))} weights, not {group}")
        return kind, group


@dataclass
class Quantized:
    """What `quantize` wrote. ``off``: the root mean square of what weights changed by, relative to theirs."""

    path: Path
    size: int = 0  # bytes
    weights: int = 0  # of the matrices
    bytes: int = 0  # that these take, scales and tables included
    off: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def bits(self) -> float:
        """A weight of the matrices."""
        return 8 * self.bytes / self.weights


def quantize(
    source: Path | str,
    out: Path | str,
    recipe: Recipe,
    progress: Report | None = None,
    squares: Iterable[Squares] | None = None,
) -> Quantized:
    """Write the model at ``source`` (a folder or a GGUF file, whatever its weights) to the GGUF file ``out``.

    ``squares``: what `squares_of` gave, in place of ``recipe.calibration``. BitgenError when the source is no
    model that bitgen runs, or ``out`` cannot be written; then nothing is.
    """
    kind, group = recipe.checked()
    model, target = open_for(source, out)
    if model.config.input_norms:
        raise FileError(
            f"{source}: {model.config.architecture} was trained ternary; there is nothing to quantize"
        )
    if squares is None and recipe.calibration:
        squares = squares_of(model, recipe.calibration)
    work = _Work(
        model, recipe, kind, group, architecture_of(model.config), None if squares is None else iter(squares)
    )
    tokenizer, notes = copied_tokenizer(model)
    metadata = {
        **gguf_metadata(model.config, work.architecture.gguf_name, _FILE_TYPES.get(kind.name)),
        **pooling_metadata(model, work.architecture.gguf_name),
        **tokenizer,
    }
    if not kind.gguf:
        metadata |= work.layout.metadata
    with ThreadPoolExecutor(os.cpu_count()) as work.pool:
        write_gguf(target, metadata, list(work.tensors()), progress)
    made = Quantized(target, target.stat().st_size, work.weights, work.bytes, notes=notes)
    made.off = math.sqrt(work.error / work.size) if work.size else 0.0
    return made


@dataclass
class _Work:
    """One run: the tensors to write, each made when it is its turn."""

    model: ModelFile
    recipe: Recipe
    kind: DataType
    group: int
    architecture: Architecture
    squares: Iterator[Squares] | None
    pool: ThreadPoolExecutor = field(init=False)
    weights: int = 0
    bytes: int = 0
    error: float = 0.0
    size: float = 0.0

    def __post_init__(self) -> None:
        self.layout = TableLayout(self.kind.name, self.kind.bits, self.group)
        self.fit = Fit(self.group, self.kind.sign, self.recipe.fits_scales)
        self._layer = -1
        self._current: Squares = {}

    def tensors(self) -> Iterator[NewTensor]:
        weights = self.model.weights
        tied = weights.lm_head is None
        yield from self._dense(EMBEDDING.gguf, weights.embedding, is_head=tied)
        if weights.lm_head is not None:
            yield from self._dense(LM_HEAD.gguf, weights.lm_head, is_head=True)
        yield from final_tensors(weights)
        for index, layer in enumerate(weights.layers):
            prefix = GGUF_LAYER.format(index)
            for name, tensor in self.architecture.norms.items():
                yield vector_tensor(f"{prefix}{tensor.gguf}.weight", getattr(layer, name))
            yield from self._blocks(index, layer) if self.kind.gguf else self._stacks(index, layer)

    def _dense(self, name: str, matrix: DenseMatrix, is_head: bool) -> Iterator[NewTensor]:
        head = self.recipe.head
        if head == "keep" or not is_head or matrix.type == head:
            yield from dense_tensor(name, matrix, matrix.type)
            return
        rows, cols = matrix.shape
        stored = DENSE[head]
        size = rows * stored.row_bytes(cols)  # FileError: no whole blocks
        step = max(1, _SLAB // cols)

        def chunks() -> Iterator[Bytes]:
            for begin in range(0, rows, step):
                yield _head_rows(head, matrix.rows(begin, min(begin + step, rows)), name)

        yield NewTensor(f"{name}.weight", matrix.shape, stored.id, size, chunks)

    # ---- the matrices of a layer ----

    def _stacks(self, index: int, layer: LayerWeights) -> Iterator[NewTensor]:
        """Those of bitgen's own types: tables, then blocks of 16 rows."""
        for matrix, role in zip(layer.matrices, STACKS, strict=True):
            name, shape = GGUF_LAYER.format(index) + STACKS[role], matrix.shape
            tables = self._tables_of(index, role, matrix)
            count = self.kind.learned or len(self.kind.tables)
            size = count * self.layout.levels

            def table_bytes(tables: Callable[[], Tables] = tables) -> Iterator[Bytes]:
                yield tables().view(np.uint8)

            def blocks(
                matrix: TernaryMatrix = matrix, role: str = role, tables: Callable[[], Tables] = tables
            ) -> Iterator[Bytes]:
                for chosen in self._chosen(index, role, matrix, tables()):
                    yield self.layout.encode(chosen.rows(tables(), matrix.shape.k))

            i8 = OTHER["i8"].id
            stored = self.layout.shape(shape.m, shape.k)
            yield NewTensor(f"{name}.tables", (count, self.layout.levels), i8, size, table_bytes)
            yield NewTensor(f"{name}.weight", stored, i8, math.prod(stored), blocks)
            self._count(shape.m * shape.k, size + math.prod(stored))

    def _blocks(self, index: int, layer: LayerWeights) -> Iterator[NewTensor]:
        """Those of GGUF's types, as other programs read them."""
        config = self.model.config
        roles = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
        stored = DENSE.get(self.kind.name) or OTHER[self.kind.name]
        for role, matrix in file_matrices(config, layer, self.architecture).items():
            m, k = matrix.shape.m, matrix.shape.k
            name = GGUF_LAYER.format(index) + self.architecture.matrices[role].gguf
            size = m * stored.row_bytes(k)  # FileError: no whole blocks

            def chunks(matrix: TernaryMatrix = matrix, role: str = role) -> Iterator[Bytes]:
                for chosen in self._chosen(index, roles.get(role, role), matrix, self.kind.arrays()):
                    rows = chosen.rows(self.kind.arrays(), matrix.shape.k)
                    yield encode_codes(self.kind.name, rows)

            yield NewTensor(f"{name}.weight", (m, k), stored.id, size, chunks)
            self._count(m * k, size)

    def _count(self, weights: int, size: int) -> None:
        self.weights += weights
        self.bytes += size

    def _tables_of(self, index: int, role: str, matrix: TernaryMatrix) -> Callable[[], Tables]:
        @cache
        def tables() -> Tables:
            if not self.kind.learned:
                return self.kind.arrays()
            return learn_tables(
                [matrix.values(begin, end) for begin, end in _sample(matrix)],
                self.layout.levels,
                self.kind.learned,
                self.fit,
                self._importance(index, role),
                matrix.name,
            )

        return tables

    def _chosen(self, index: int, role: str, matrix: TernaryMatrix, tables: Tables) -> Iterator[Chosen]:
        """All rows in order, slabs of them fitted on all cores."""
        importance = self._importance(index, role)

        def one(span: tuple[int, int]) -> Chosen:
            return choose(matrix.values(*span), tables, self.fit, importance, matrix.name)

        for chosen in self.pool.map(one, _spans(matrix)):
            self.error += chosen.error
            self.size += chosen.size
            yield chosen

    def _importance(self, index: int, role: str) -> Floats | None:
        """Tensors are written in the order of layers, and so are the model's layers run."""
        if self.squares is None:
            return None
        while self._layer < index:
            self._current = next(self.squares)
            self._layer += 1
        squares = self._current[role]
        if not np.isfinite(squares).all():
            raise FileError("the model gives NaN or infinity for the text of calibration")
        return squares / max(float(squares.mean()), 1e-30)


def squares_of(model: ModelFile, text: str) -> Iterator[Squares]:
    """Of each layer and matrix the mean square of its inputs over a text, up to 16 windows of 512 tokens."""
    ids = Tokenizer(model.tokenizer_data).encode(text, parse=False)
    window = min(_WINDOW, model.config.context)
    count = min(_WINDOWS, len(ids) // window)
    if not count:
        raise UsageError(f"the text for calibration has {len(ids)} tokens; {window} are the least")
    return input_squares(model.weights, np.reshape(ids[: count * window], (count, window)).tolist())


def _head_rows(kind: str, values: Floats, name: str) -> Bytes:
    """Rows of a head in ``kind``: uint8 (rows, bytes)."""
    if kind != "q4_0":
        return quantize_rows(kind, values, name)
    tables = TYPES[kind].arrays()
    rows = choose(values, tables, Fit(BLOCK, sign="largest"), name=name).rows(tables, values.shape[1])
    return encode_codes(kind, rows)


def _spans(matrix: TernaryMatrix) -> list[tuple[int, int]]:
    m, k = matrix.shape.m, matrix.shape.k
    step = max(1, _SLAB // (k * ROWS)) * ROWS
    return [(begin, min(begin + step, m)) for begin in range(0, m, step)]


def _sample(matrix: TernaryMatrix) -> list[tuple[int, int]]:
    """Blocks of 16 rows, evenly spread, of as many weights as tables are learned from."""
    m, k = matrix.shape.m, matrix.shape.k
    blocks = -(-m // ROWS)
    wanted = min(blocks, max(1, _LEARNED // (k * ROWS)))
    starts = np.unique(np.linspace(0, blocks - 1, wanted).astype(int)) * ROWS
    return [(int(begin), min(int(begin) + ROWS, m)) for begin in starts]
