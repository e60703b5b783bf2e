"""What data types of 3 and 4 bits cost a model: one table, from weights that every type is made of.

    python benchmarks/quantize.py -m SmolLM2-135M-Instruct.Q4_1.gguf --work files

Of each type: bits a weight (scales, selectors and tables counted), what weights changed by, perplexity and KL
divergence from the model as it is. The first half of the text calibrates, the second half is measured, in
windows of 512 tokens of which the second halves are predicted. Activations are floats here, so that the
numbers speak of weights alone; ``--run`` also runs each file with kernels, and ``--speed THREADS`` times
steps of one token, all files in turn, medians. ``a row``: each row and group has a table of its own, which no
kernel runs; else 16 rows share one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.errors import BitgenError
from bitgen.formats.config import Floats
from bitgen.formats.model_file import ModelFile
from bitgen.formats.open import open_model
from bitgen.formats.stored_matrix import CodedMatrix, TernaryMatrix
from bitgen.formats.table_types import STACKS
from bitgen.formats.weights import Weights
from bitgen.inference.bench import bench_engine
from bitgen.inference.divergence import Comparison
from bitgen.inference.sampling import log_softmax_at
from bitgen.llm import LLM
from bitgen.quantize import TYPES, Recipe, quantize, squares_of
from bitgen.quantize.fit import Fit, choose
from bitgen.quantize.forward import Squares, logits, multiply, run_layer
from bitgen.tokenizer.tokenizer import Tokenizer

WINDOW = 512
TEXT = Path(__file__).parents[1] / "tests" / "data" / "tiny-heldout.txt"
COLUMNS = (
    Column("type", "type"),
    Column("group", "group", "d"),
    Column("scales", "scales"),
    Column("tables", "tables by"),
    Column("bits", "bits a weight", ".3f"),
    Column("off", "changed by, %", ".2f"),
    Column("perplexity", "perplexity", ".3f"),
    Column("kl_divergence", "KL divergence", ".4f"),
    Column("kl_error", "+/-", ".4f"),
    Column("same_top", "same top, %", ".1f"),
)
STEPS = 32  # of one token, timed at once
SPEED = (Column("speed", "tokens/s", ",.1f"),)
RUN = (Column("run", "run: perplexity", ".3f"), Column("run_kl", "run: KL", ".4f"))


@dataclass(frozen=True)
class Row:
    """A type as it is made: ``recipe``, and whether each row has tables of its own."""

    recipe: Recipe
    own_tables: bool = False


def rows_of(names: Sequence[str], group: int, text: str) -> Iterator[Row]:
    """Every type; with scales the other way; then several tables by rows, and calibrated."""
    kinds = [(name, 0 if TYPES[name].gguf else group, TYPES[name]) for name in names]
    many = [(name, size) for name, size, kind in kinds if kind.learned or len(kind.tables) > 1]
    yield from (Row(Recipe(name, size)) for name, size, _ in kinds)
    for name, size, kind in kinds:
        if not kind.learned and not kind.gguf:
            yield Row(Recipe(name, size, fitted=not kind.fitted), own_tables=(name, size) in many)
    yield from (Row(Recipe(name, size), own_tables=True) for name, size in many)
    yield from (Row(Recipe(name, size, calibration=text)) for name, size in many)


class Measure:
    """The text's windows, and the logits of the model as it is."""

    def __init__(self, model: ModelFile, text: str, most: int, work: Path) -> None:
        tokenizer = Tokenizer(model.tokenizer_data)
        ids = tokenizer.encode(text, parse=False)
        count = min(most, len(ids) // WINDOW)
        self.windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(count)]
        self.inputs = [list(window) for window in self.windows]
        if tokenizer.add_bos and tokenizer.bos is not None:
            for window in self.inputs:
                window[0] = tokenizer.bos
        shape = (count * (WINDOW - 1 - WINDOW // 2), model.config.vocab)
        self.squares: list[Squares] = []
        self.reference = np.lib.format.open_memmap(work / "reference.npy", "w+", np.float32, shape)
        self.perplexity, _ = self.of(model.weights, keep=True)

    def of(self, weights: Weights, keep: bool = False) -> tuple[float, Comparison]:
        """Perplexity, and how far from the reference, of weights with float activations."""
        x = weights.embedding.gather(np.array(self.inputs, np.int32).reshape(-1))
        for index in range(weights.config.layers):
            x = run_layer(weights, index, x, len(self.windows), lambda _, w, x: multiply(w, x))
        nll, compared, at = 0.0, Comparison(), 0
        first = WINDOW // 2
        for window, states in zip(self.windows, x.reshape(len(self.windows), WINDOW, -1), strict=True):
            rows = logits(weights, states[first:-1])
            for row, target in zip(rows, window[first + 1 :], strict=True):
                nll -= log_softmax_at(row, target)
                if keep:
                    self.reference[at] = row
                compared.add(self.reference[at], row)
                at += 1
        return math.exp(nll / at), compared


def with_own_tables(weights: Weights, made: Weights, row: Row) -> tuple[Weights, float]:
    """The tables of ``made``, selected for each row: weights of floats, and what they changed by."""
    kind, group = row.recipe.checked()
    fit = Fit(group, "plus" if kind.sign == "free" else kind.sign, row.recipe.fits_scales, rows=1)
    layers, error, size = [], 0.0, 0.0
    for layer, other in zip(weights.layers, made.layers, strict=True):
        found: dict[str, Any] = {}
        for role, matrix, coded in zip(STACKS, layer.matrices, other.matrices, strict=True):
            tables = coded.coded(0, 16).tables if isinstance(coded, CodedMatrix) else None
            if tables is None:
                raise BitgenError(f"{coded.name} has no tables")
            narrow = tables[:, : 1 << kind.bits]
            if kind.sign == "free":  # as tables of their own
                narrow = np.concatenate([narrow, -narrow])
            chosen = choose(matrix.values(0, matrix.shape.m), narrow, fit)
            found[role] = of_floats(matrix, chosen.values(narrow, matrix.shape.k))
            error, size = error + chosen.error, size + chosen.size
        layers.append(replace(layer, **found))
    return replace(weights, layers=tuple(layers)), math.sqrt(error / size)


def of_floats(matrix: TernaryMatrix, values: Floats) -> TernaryMatrix:
    def floats(begin: int, end: int) -> Floats:
        return values[begin:end]

    return TernaryMatrix(matrix.name, matrix.shape, matrix.decode, matrix.find_scale, floats=floats)


def scales_of(recipe: Recipe) -> str:
    return "calibrated" if recipe.calibration else "fitted" if recipe.fits_scales else "largest"


def file_of(row: Row, work: Path) -> Path:
    """Where the file of a row is: what it is made of names it."""
    kind, group = row.recipe.checked()
    return work / f"{kind.name}-g{group}-{scales_of(row.recipe)}.gguf"


def speeds(files: Sequence[Path], threads: int, rounds: int) -> dict[Path, float]:
    """Steps of one token a second of each file, medians of rounds in which all take turns, shuffled."""
    found: dict[Path, list[float]] = {path: [] for path in files}
    order = random.Random(0)  # noqa: S311 - no secret
    with contextlib.ExitStack() as stack:
        opened = {
            path: stack.enter_context(LLM(path, context=WINDOW, threads=threads))
            for path in dict.fromkeys(files)
        }
        for _ in range(rounds):
            turns = list(opened)
            order.shuffle(turns)
            for path in turns:
                (timed,) = bench_engine(opened[path].engine, threads, prompts=(), steps=(STEPS,), repeats=1)
                found[path] += timed.speeds
    return {path: statistics.median(each) for path, each in found.items()}


def one(model: ModelFile, measure: Measure, row: Row, args: argparse.Namespace) -> list[Any]:
    """The cells of a row: the file is made, read, measured, and run where that is asked for."""
    recipe = row.recipe
    kind, group = recipe.checked()
    how = scales_of(recipe)
    path = file_of(row, args.work)
    if recipe.calibration and not measure.squares:
        measure.squares = list(squares_of(model, recipe.calibration))
    if not path.exists() or not path.with_suffix(".json").exists():
        made = quantize(args.model, path, recipe, squares=measure.squares if recipe.calibration else None)
        path.with_suffix(".json").write_text(json.dumps([made.bits, made.off]))
    bits, off = json.loads(path.with_suffix(".json").read_text())
    weights = open_model(path).weights
    many = kind.learned > 1 or len(kind.tables) > 1
    if row.own_tables:
        weights, off = with_own_tables(model.weights, weights, row)
        bits += (2 - 8 / 16) / group  # two bits a row and group in place of a byte for 16 rows
    value, compared = measure.of(weights)
    far = compared.result
    tables = ("a row" if row.own_tables else "16 rows") if many else "-"
    cells = [kind.title, group, how, tables, bits, 100 * off, value, far.mean, far.error, 100 * far.same_top]
    if not args.run:
        return cells
    return [*cells, *([None, None] if row.own_tables else run(path, measure))]


def run(path: Path, measure: Measure) -> list[float]:
    """Perplexity and KL divergence of a file as kernels run it."""
    nll, compared, at = 0.0, Comparison(), 0
    with LLM(path, context=WINDOW) as llm:
        for inputs, window in zip(measure.inputs, measure.windows, strict=True):
            for row, target in zip(llm.logits(inputs, WINDOW // 2), window[WINDOW // 2 + 1 :], strict=False):
                nll -= log_softmax_at(row, target)
                compared.add(measure.reference[at], row)
                at += 1
    return [math.exp(nll / at), compared.result.mean]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for files; those that are there stay"
    )
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--windows", type=int, default=8, help="at most")
    parser.add_argument("--run", action="store_true", help="run the files with kernels too")
    parser.add_argument("--speed", type=int, metavar="THREADS", help="time steps of all files")
    parser.add_argument("--rounds", type=int, default=7, help="of --speed")
    parser.add_argument("-o", "--output", default="md", choices=("text", "md", "csv", "json"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    text = args.text.read_text(encoding="utf-8")
    half = len(text) // 2
    model = open_model(args.model)
    measure = Measure(model, text[half:], args.windows, args.work)
    title = f"perplexity {measure.perplexity:.3f} over {len(measure.windows)} windows"
    print(f"{args.model}: {title}", file=sys.stderr, flush=True)
    rows, found = list(rows_of(args.types.split(","), args.group, text[:half])), []
    for row in rows:
        started = time.perf_counter()
        found.append(one(model, measure, row, args))
        print(*found[-1], f"{time.perf_counter() - started:.0f} s", sep="  ", file=sys.stderr, flush=True)
    columns = COLUMNS + (RUN if args.run else ())
    if args.speed:
        files = [None if row.own_tables else file_of(row, args.work) for row in rows]
        timed = speeds([model.path, *(each for each in files if each)], args.speed, args.rounds)
        found = [[*cells, each and timed[each]] for cells, each in zip(found, files, strict=True)]
        columns += SPEED
        print(f"the model as it is: {timed[model.path]:.1f} tokens/s", file=sys.stderr)
    print(render_tables([Table("types", columns, found)], args.output))


if __name__ == "__main__":
    try:
        main()
    except BitgenError as error:
        sys.exit(f"error: {error}")
