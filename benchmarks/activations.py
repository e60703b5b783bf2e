"""Time a model with int8 and with int16 activations: the same weights, in turns, on this machine.

    python benchmarks/activations.py -m Bonsai-1.7B -t 2 --tokens 1,8,128 --rounds 9

``-m`` is a preset (random weights) or a model file. A row for each number of tokens at once: milliseconds of
each mode (the least and the median of the rounds) and int8 / int16, of the least times and of the pairs of
times that were taken one after the other (median).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from bitgen.errors import BitgenError
from bitgen.formats.config import find_model
from bitgen.formats.open import open_model
from bitgen.inference.engine import Engine
from bitgen.inference.opening import open_engine
from bitgen.inference.synthetic import random_weights
from bitgen.library import library_for
from bitgen.runtime import Activations, load

MODES: tuple[Activations, ...] = ("int8", "int16")


def seconds(engine: Engine, n: int, repeats: int) -> float:
    """Of one forward pass of ``n`` tokens, the last of which wants logits."""
    tokens, positions = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    outputs = np.arange(n) == n - 1
    started = time.perf_counter()
    for _ in range(repeats):
        engine.truncate(0, 0)
        engine.forward(tokens, positions, np.zeros(n, np.int32), outputs)
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("-m", "--model", required=True)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--tokens", default="1,8,128")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--library", type=Path)
    args = parser.parse_args()
    tokens = [int(n) for n in args.tokens.split(",")]
    preset = args.model.endswith((".yaml", ".yml"))
    is_file = not preset and (Path(args.model).exists() or args.model.isidentifier())
    context = max(512, *tokens)
    model = (
        open_model(args.model)
        if is_file
        else random_weights(replace(find_model(args.model), context=context))
    )
    with load(args.library or library_for(model.config), args.threads) as table:
        engines = {mode: open_engine(model, table, context=context, activations=mode) for mode in MODES}
        print(f"{args.model}, {table.threads} threads, {table.path.parent.name}, {args.rounds} rounds")
        print("    n   int8 ms: least  median   int16 ms: least  median   int8/int16: least  pairs")
        for n in tokens:
            repeats = max(1, 8 // n)
            times: dict[Activations, list[float]] = {mode: [] for mode in MODES}
            for number in range(args.rounds + 1):
                for mode in MODES if number % 2 else MODES[::-1]:
                    spent = 1e3 * seconds(engines[mode], n, repeats)
                    if number:  # the first round warms up
                        times[mode].append(spent)
            least, middle = ({m: f(t) for m, t in times.items()} for f in (min, statistics.median))
            pairs = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
            print(
                f"{n:5}{least['int8']:17.2f}{middle['int8']:8.2f}{least['int16']:18.2f}{middle['int16']:8.2f}"
                f"{least['int8'] / least['int16']:20.2f}{pairs:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except BitgenError as error:
        sys.exit(f"error: {error}")
