"""Where the time of a forward step goes, stage by stage, on random weights of a preset's shape.

    python benchmarks/step.py --model 3B --threads 1,2 --context 128 --prompt 512

A decode step with `context` tokens in the cache, and a prompt at once; medians over the repeats of each
stage's time. "of DRAM": the bytes a decode step streams (packed weights and head) over its time, against
the more of what a probe read just before and just after; the median over the rounds. "with cache": the
keys and values it reads count too. "beyond matrices": everything but the ternary matrices and the head.
"of FMA": the multiply-adds of a prompt's attention a second, against what float32 multiply-adds in
registers reach.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from dataclasses import replace

import numpy as np

from bitgen.abi import STAGES
from bitgen.cli.tables import Column, Table, render_tables
from bitgen.environment import Environment
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelConfig, find_model
from bitgen.inference.engine import Engine
from bitgen.inference.opening import open_engine
from bitgen.inference.synthetic import random_weights
from bitgen.library import library_for
from bitgen.measure import LocalRunner
from bitgen.runtime import load

_CHUNK = 128  # positions that keys and values are kept for together
_ALONE = ("matmul", "head")  # the rest is what a step costs beyond its matrices


def stages_ns(engine: Engine, n: int, position: int) -> dict[str, int]:
    """The stages of one step of ``n`` tokens from ``position`` on, the last of them with logits."""
    engine.truncate(0, position)
    positions = np.arange(position, position + n, dtype=np.int32)
    engine.reset_times()
    tokens = np.arange(n, dtype=np.int32) % engine.config.vocab
    engine.forward(tokens, positions, np.zeros(n, np.int32), np.arange(n) == n - 1)
    return engine.times_ns


def measure(config: ModelConfig, args: argparse.Namespace, threads: int, environment: Environment) -> Table:
    positions = max(args.context + 1, args.prompt)
    weights = random_weights(replace(config, context=max(config.context, positions)))
    level = environment.isa(None).name
    with (
        load(args.library or library_for(weights.config), threads) as table,
        LocalRunner(environment.toolchain, environment.cpu) as runner,
    ):
        engine = open_engine(weights, table, context=positions, kv=args.kv)
        prompt = [stages_ns(engine, args.prompt, 0) for _ in range(args.rounds + 1)][1:]
        fma = statistics.median(runner.fma_gflops(threads, level) for _ in range(args.rounds))
        # Memory changes from second to second: a probe before and after a few steps, and the larger counts.
        stages_ns(engine, args.context, 0)
        decode: list[dict[str, int]] = []
        dram, step_ns = [runner.dram_gbs(threads, level)], []
        for _ in range(4 * args.rounds):
            steps = [stages_ns(engine, 1, args.context) for _ in range(4)]
            step_ns.append(statistics.median(sum(run.values()) for run in steps))
            dram.append(runner.dram_gbs(threads, level))
            decode += steps
        streamed = engine.memory.weights + engine.head_bytes
        cached = (args.context + 1) * engine.sequence_bytes(_CHUNK) / _CHUNK
        engine.close()
    limit_ns = [streamed / max(pair) for pair in itertools.pairwise(dram)]
    share = statistics.median(limit / step for limit, step in zip(limit_ns, step_ns, strict=True))
    attention_ns = statistics.median(run["attention"] for run in prompt)
    fma_share = attention_operations(config, args.prompt) / attention_ns / fma
    tests = [
        (f"tg, context {args.context}", decode, (share, share * (1 + cached / streamed), None)),
        (f"pp{args.prompt}", prompt, (None, None, fma_share)),
    ]
    return report(
        f"{args.model}, {threads} threads, DRAM read {min(dram):.1f} to {max(dram):.1f} GB/s", tests
    )


def attention_operations(config: ModelConfig, n: int) -> int:
    """Multiplies and adds of the attention of n tokens from position 0 on: scores, then values."""
    return 4 * config.head_dim * config.heads * config.layers * n * (n + 1) // 2


Shares = tuple[float | None, float | None, float | None]  # of DRAM, with cache, of FMA


def report(title: str, tests: list[tuple[str, list[dict[str, int]], Shares]]) -> Table:
    columns = [Column("step", "step"), *(Column(name, f"{name} ms", ".2f") for name in (*STAGES, "all"))]
    for name in ("matrices", "beyond matrices", "of DRAM", "with cache", "of FMA"):
        columns.append(Column(name, name, ".1%"))
    rows = []
    for name, runs, shares in tests:
        medians = {stage: statistics.median(run[stage] for run in runs) / 1e6 for stage in STAGES}
        total = statistics.median(sum(run.values()) for run in runs) / 1e6
        beyond = 1 - sum(medians[stage] for stage in _ALONE) / total
        rows.append((name, *medians.values(), total, medians["matmul"] / total, beyond, *shares))
    return Table(title, tuple(columns), tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="3B")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv", choices=("f16", "q8", "q4"), default="f16", help="keys and values (f16)")
    parser.add_argument("--library", help="a kernel library (the best here)")
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    args = parser.parse_args()
    try:
        config = find_model(args.model)
        environment = Environment()
        tables = [measure(config, args, int(t), environment) for t in args.threads.split(",")]
    except BitgenError as error:
        sys.exit(f"error: {error}")
    print(render_tables(tables, args.output))


if __name__ == "__main__":
    main()
