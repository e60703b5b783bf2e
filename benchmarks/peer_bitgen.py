"""The side of bitgen in benchmarks/peers.py: a preset's random weights or a file, asked as peer_side.py says.

    python peer_bitgen.py 3B|FILE.gguf --threads N --context N [--sequences N] [--library PATH]
        [--head q8|screened] [--best K] [--kv q8] [--silu]

The answers are the same too; bytes are those of packed weights, scales and head. With --best a step gives the
K best logits instead of all, as sampling with top-k needs; only then a screened head reads less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace

import numpy as np
from make_peer_model import peer_config

from bitgen.errors import BitgenError
from bitgen.formats.open import open_model
from bitgen.formats.weights import Weights
from bitgen.inference.engine import Engine
from bitgen.inference.opening import open_engine
from bitgen.inference.synthetic import random_weights
from bitgen.inference.wants import Best, Nothing
from bitgen.library import library_for
from bitgen.runtime import load


def reach(engine: Engine, depth: int) -> None:
    """Make the cache hold ``depth`` tokens, always the same ones, as `peer_side.Peer.reach` does."""
    if depth and engine.lengths[0] >= depth:  # requests of one depth come one after another
        engine.truncate(0, depth)
        return
    engine.truncate(0, 0)
    if depth:
        at = np.arange(depth, dtype=np.int32)
        tokens = (at.astype(np.int64) * 7919 % engine.config.vocab).astype(np.int32)
        engine.forward(tokens, at, np.zeros(depth, np.int32), np.zeros(depth, np.bool_))


def run(
    engine: Engine,
    best: int,
    do: str,
    tokens: list[int],
    out: str | None = None,
    depth: int = 0,
    sequences: int = 1,
) -> float:
    """Seconds that a request takes; ``best`` logits of a step, 0: all."""
    reach(engine, depth)
    for slot in range(1, sequences):
        engine.truncate(slot, 0)
    several = sequences > 1
    size = sequences if do == "steps" else len(tokens)
    parts = np.array(tokens, np.int32).reshape(-1, size)
    slots = np.arange(size, dtype=np.int32) if several else np.zeros(size, np.int32)
    outputs = np.full(size, several) | (np.arange(size) == size - 1)
    rows = []
    started = time.perf_counter()
    for index, part in enumerate(parts):
        positions = depth + np.arange(index * size, (index + 1) * size, dtype=np.int32)
        if several:
            positions = np.full(size, index, np.int32)
        if best and out is None:
            engine.forward(part, positions, slots, [Best(best) if out else Nothing() for out in outputs])
            continue
        logits = engine.forward(part, positions, slots, outputs)
        if out is not None:
            rows.append(logits)
    seconds = time.perf_counter() - started
    if out is not None:
        np.concatenate(rows).astype("<f4").tofile(out)
    return seconds


def model_weights(args: argparse.Namespace) -> Weights:
    if args.model.endswith(".gguf"):
        return open_model(args.model).weights
    return random_weights(replace(peer_config(args.model, args.silu), context=args.context))


def serve(args: argparse.Namespace) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    weights = model_weights(args)
    with load(args.library or library_for(weights.config), args.threads) as table:
        options = {"context": args.context, "head": args.head, "kv": args.kv}
        engine = open_engine(weights, table, batch=args.sequences, **options)
        # The int8 rows of q8 and screened count as packed; the few rows of f16 that screening reads do not.
        head = weights.output.data.nbytes if args.head == "full" else 0
        about = {"bytes": engine.memory.weights + head, "about": table.path.parent.name}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            print(
                json.dumps({"seconds": run(engine, args.best, **json.loads(line))}), file=answers, flush=True
            )
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--library")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--silu", action="store_true", help="the shape of a relu² model with a silu gate")
    parser.add_argument("--head", choices=("full", "screened", "q8"), default="full")
    parser.add_argument("--kv", choices=("f16", "q8"), default="f16")
    parser.add_argument("--best", type=int, default=0, metavar="K")
    try:
        serve(parser.parse_args())
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
