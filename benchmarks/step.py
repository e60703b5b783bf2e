"""Where the time of a forward step goes, stage by stage, on random weights of a preset's shape.

    python benchmarks/step.py --model 3B --threads 1,2 --context 128 --prompt 512

A decode step with `context` tokens in the cache, and a prompt at once; medians over the repeats of each
stage's time. "of DRAM": the bytes a decode step streams (packed weights and head) over its time, against the
best that a probe read just before; the median over the rounds. "beyond matrices": everything but the ternary
matrices and the head.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import numpy as np

from bitgen.api import Workshop
from bitgen.cli.tables import Column, Table, render_tables
from bitgen.config import find_model
from bitgen.errors import BitgenError
from bitgen.llm import library_for
from bitgen.measure import measure_limits
from bitgen.model.config import ModelConfig
from bitgen.model.engine import STAGES, Engine
from bitgen.model.llm import open_engine
from bitgen.model.synthetic import config_of, random_weights
from bitgen.runtime import load

_ALONE = ("matmul", "head")  # the rest is what a step costs beyond its matrices


def stages_ns(engine: Engine, n: int, position: int) -> dict[str, int]:
    """The stages of one step of ``n`` tokens from ``position`` on, the last of them with logits."""
    engine.truncate(0, position)
    positions = np.arange(position, position + n, dtype=np.int32)
    engine.reset_times()
    engine.forward(np.arange(n, dtype=np.int32), positions, np.zeros(n, np.int32), np.arange(n) == n - 1)
    return engine.times_ns


def measure(config: ModelConfig, args: argparse.Namespace, threads: int, workshop: Workshop) -> Table:
    weights = random_weights(config)
    decode: list[dict[str, int]] = []
    prompt: list[dict[str, int]] = []
    dram: list[float] = []
    shares: list[float] = []
    with load(args.library or library_for(weights.config), threads) as table:
        engine = open_engine(weights, table, context=max(args.context + 1, args.prompt))
        stages_ns(engine, args.prompt, 0)
        for _ in range(args.rounds):
            limits = measure_limits(workshop.toolchain, workshop.cpu, threads, [workshop.isa(None).name])
            dram.append(limits.best_dram_gbs)
            stages_ns(engine, args.context, 0)
            steps = [stages_ns(engine, 1, args.context) for _ in range(8)]
            step_ns = statistics.median(sum(run.values()) for run in steps)
            shares.append((engine.memory.weights + engine.head_bytes) / step_ns / limits.best_dram_gbs)
            decode += steps
            prompt.append(stages_ns(engine, args.prompt, 0))
        engine.close()
    tests = [
        (f"tg, context {args.context}", decode, statistics.median(shares)),
        (f"pp{args.prompt}", prompt, None),
    ]
    return report(
        f"{args.model}, {threads} threads, DRAM read {min(dram):.1f} to {max(dram):.1f} GB/s", tests
    )


def report(title: str, tests: list[tuple[str, list[dict[str, int]], float | None]]) -> Table:
    columns = [Column("step", "step"), *(Column(name, f"{name} ms", ".2f") for name in (*STAGES, "all"))]
    for name in ("matrices", "beyond matrices", "of DRAM"):
        columns.append(Column(name, name, ".1%"))
    rows = []
    for name, runs, share in tests:
        medians = {stage: statistics.median(run[stage] for run in runs) / 1e6 for stage in STAGES}
        total = statistics.median(sum(run.values()) for run in runs) / 1e6
        beyond = 1 - sum(medians[stage] for stage in _ALONE) / total
        rows.append((name, *medians.values(), total, medians["matmul"] / total, beyond, share))
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
    parser.add_argument("--library", help="a kernel library (the best here)")
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    args = parser.parse_args()
    try:
        config = config_of(find_model(args.model))
        workshop = Workshop()
        tables = [measure(config, args, int(t), workshop) for t in args.threads.split(",")]
    except BitgenError as error:
        sys.exit(f"error: {error}")
    print(render_tables(tables, args.output))


if __name__ == "__main__":
    main()
