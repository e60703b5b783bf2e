"""Time a model: prompts and steps as llama-bench does, or with --kernels its matrix kernels one by one.

With --url a server is timed, bitgen's or another one with OpenAI's API, as -b clients at once. Otherwise the
model is a file, or a preset (see `bitgen models`), which gets random weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import (
    add_activations,
    add_compiler,
    add_energy,
    add_from_disk,
    add_head,
    add_kv,
    add_library,
    add_logs,
    metered,
)
from bitgen.cli.tables import Column, Table, add_output, numbers, render_tables

if TYPE_CHECKING:
    from bitgen.energy import Meter
    from bitgen.formats.model_file import ModelFile
    from bitgen.formats.weights import Weights
    from bitgen.inference.bench import Run
    from bitgen.inference.engine import Engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", help="a model file, a preset or a YAML file; with --url a name")
    parser.add_argument(
        "--url", help="a server, as http://127.0.0.1:8080; BITGEN_API_KEY is its key, if it wants one"
    )
    parser.add_argument(
        "-p", "--n-prompt", default="512", metavar="LIST", help="tokens of prompts; 0: none (512)"
    )
    parser.add_argument(
        "-n",
        "--n-gen",
        "--tokens",
        metavar="LIST",
        help="steps of one token; 0: none (128). With --kernels: tokens at once (1,8,128,512)",
    )
    parser.add_argument(
        "-d", "--n-depth", default="0", metavar="LIST", help="tokens that the KV cache holds before (0)"
    )
    parser.add_argument("-b", "--batch", default="1", metavar="LIST", help="sequences that step at once (1)")
    parser.add_argument(
        "-t", "--threads", metavar="LIST", help="threads (default: one a core, or what a first race found)"
    )
    parser.add_argument("-r", "--repetitions", "--rounds", type=int, help="repetitions (5; with --kernels 9)")
    add_kv(parser)
    add_activations(parser)
    add_head(parser, "full", "the output matrix; screened times steps that choose the best token")
    add_library(parser)
    add_from_disk(parser)
    add_energy(parser)
    parser.add_argument("--kernels", action="store_true", help="time the matrix kernels of a preset")
    parser.add_argument("--isa", help="with --kernels: the ISA level (default: the best this CPU runs)")
    add_compiler(parser, "with --kernels: ")
    add_logs(parser, "with --kernels: ")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    from bitgen.errors import UsageError

    if (args.energy or args.energy_command is not None) and (args.url or args.kernels):
        raise UsageError("--energy is of a model that runs here: leave out --url and --kernels")
    if args.url:
        _run_url(args)
        return
    if args.model is None:
        raise UsageError("give a model (-m), or a server (--url)")
    (_run_kernels if args.kernels else _run_model)(args)


# ---- Servers ----


def _run_url(args: argparse.Namespace) -> None:
    from bitgen.errors import UsageError
    from bitgen.serve.load import Load, percentile, run_load

    prompts, steps = numbers("-p", args.n_prompt, 1), numbers("-n", args.n_gen or "128", 1)
    repeats = 3 if args.repetitions is None else args.repetitions
    if repeats < 1:
        raise UsageError("nothing to time: -r must be at least 1")
    rows = []
    for prompt in prompts:
        for tokens in steps:
            for clients in numbers("-b", args.batch, 1):
                key = os.environ.get("BITGEN_API_KEY")
                timed = run_load(
                    Load(args.url.rstrip("/"), clients, repeats, prompt, tokens, args.model, key)
                )
                times = [(timed.firsts, 0.5), (timed.firsts, 0.95)]
                times += [(timed.gaps, share) for share in (0.5, 0.95, 0.99)]
                shown = [None if (p := percentile(*each)) is None else 1e3 * p for each in times]
                rows.append((clients, prompt, tokens, *shown, timed.tokens / timed.seconds))
    columns = (
        Column("clients", "clients", "d"),
        Column("prompt", "prompt", "d"),
        Column("tokens", "tokens", "d"),
        Column("first_ms_p50", "first token ms p50", ",.1f"),
        Column("first_ms_p95", "p95", ",.1f"),
        Column("inter_ms_p50", "inter-token ms p50", ",.2f"),
        Column("inter_ms_p95", "p95", ",.2f"),
        Column("inter_ms_p99", "p99", ",.2f"),
        Column("tokens_s", "tokens/s", ",.1f"),
    )
    print(render_tables([Table("server", columns, rows)], args.output))


# ---- Models ----


def _run_model(args: argparse.Namespace) -> None:
    from bitgen.cli.progress import ProgressBar
    from bitgen.errors import UsageError
    from bitgen.inference.bench import bench_engine
    from bitgen.inference.opening import config_of_kernels, open_engine
    from bitgen.inference.thread_race import open_table
    from bitgen.library import library_for
    from bitgen.progress import Progress

    prompts = [n for n in numbers("-p", args.n_prompt, 0) if n]
    steps = [n for n in numbers("-n", args.n_gen or "128", 0) if n]
    batches, depths = numbers("-b", args.batch, 1), numbers("-d", args.n_depth, 0)
    threads = numbers("-t", args.threads, 1) if args.threads else [None]
    repeats = 5 if args.repetitions is None else args.repetitions
    if not (prompts or steps) or repeats < 1:
        raise UsageError("nothing to time: -p or -n, and -r, must be at least 1")
    context = max((*prompts, *steps)) + max(depths)
    rows = []
    with metered(args) as meter, ProgressBar() as line:
        if meter:
            line.show(Progress("measuring what the machine takes when idle"))
            meter.measure_idle()
        model = _open(args.model, context)
        library = args.library or library_for(config_of_kernels(model), line.show)
        random = f"random {replace(model.config, context=1)!r}"  # names packed weights of a preset
        for count in threads:
            with open_table(library, model.config, count, line.show, from_disk=args.from_disk) as table:
                engine = open_engine(
                    model,
                    table,
                    context=context,
                    kv=args.kv,
                    head=args.head,
                    activations=args.activations,
                    batch=max(batches),
                    from_disk=args.from_disk,
                    fingerprint=random if args.from_disk else None,
                    progress=line.show,
                )
                for run in bench_engine(
                    engine,
                    table.threads,
                    prompts=prompts,
                    steps=steps,
                    batches=batches,
                    depths=depths,
                    choose=engine.screens,
                    repeats=repeats,
                    meter=meter,
                    progress=line.show,
                ):
                    rows.append(_row(engine, run, args, meter))
                engine.close()
    if meter and meter.error:
        print(f"bitgen: energy: not available ({meter.error})", file=sys.stderr)
    energy = {"scope": meter.scope, "idle_watts": meter.idle_watts} if meter and not meter.error else None
    print(render_tables([Table("bench", _COLUMNS, rows)], args.output, {"energy": energy}))


def _open(name: str, context: int) -> ModelFile | Weights:
    """A model file, or the random weights of a preset."""
    from bitgen.formats.config import find_model
    from bitgen.formats.open import open_model, shipped_model

    path = Path(name)
    on_disk = path.exists() or path.suffix in (".gguf", ".safetensors")
    if (on_disk and path.suffix not in (".yaml", ".yml")) or shipped_model(name):
        return open_model(name)
    from bitgen.inference.synthetic import random_weights

    return random_weights(replace(find_model(name), context=context))


_COLUMNS = (
    Column("model", "model"),
    Column("streamed_mib", "MiB a token", ",.0f"),
    Column("parameters_m", "params (M)", ",.1f"),
    Column("library", "library"),
    Column("threads", "threads", "d"),
    Column("batch", "batch", "d"),
    Column("test", "test"),
    Column("avg_ts", "t/s", ",.2f"),
    Column("stddev_ts", "±", ",.2f"),
    Column("joules_token", "J/token", ",.4g", optional=True),
    Column("net_joules_token", "J/token without idle", ",.4g", optional=True),
)


def _row(engine: Engine, run: Run, args: argparse.Namespace, meter: Meter | None) -> tuple[object, ...]:
    from bitgen.energy import median_a_token

    head = 0 if engine.screens else engine.head_bytes  # its int8 rows count as packed
    return (
        engine.config.name or Path(args.model).stem,
        (engine.memory.weights + head) / 2**20,
        engine.config.parameters / 1e6,
        engine.table.path.parent.name,
        run.threads,
        run.batch,
        run.test,
        run.mean,
        run.deviation,
        median_a_token(run.spans, run.span_tokens, 0.0),
        median_a_token(run.spans, run.span_tokens, meter.idle_watts if meter else None),
    )


# ---- Kernels ----


def _run_kernels(args: argparse.Namespace) -> None:
    from bitgen.api import bench_kernels
    from bitgen.cli.progress import ProgressBar

    with ProgressBar() as line:
        timings = [
            timing
            for threads in (numbers("-t", args.threads, 1) if args.threads else [None])
            for timing in bench_kernels(
                args.model,
                tokens=numbers("-n", args.n_gen or "1,8,128,512", 1),
                threads=threads,
                rounds=9 if args.repetitions is None else args.repetitions,
                isa=args.isa,
                cc=args.cc,
                logs=args.logs,
                progress=line.show,
            )
        ]
    rows = [
        (
            t.shape.name,
            t.n,
            t.threads,
            t.spec.isa,
            t.spec.layout.name,
            t.spec.schedule.name,
            t.time_ns / 1e3,
            t.weight_gbs,
            t.gops,
            t.roofline_share,
            t.time_ns / t.baseline.median_ns,
            "tuned" if t.tuned else "untuned",
        )
        for t in timings
    ]
    print(render_tables([Table("kernels", _KERNEL_COLUMNS, rows)], args.output))


_KERNEL_COLUMNS = (
    Column("shape", "m x k"),
    Column("n", "n", "d"),
    Column("threads", "threads", "d"),
    Column("isa", "ISA"),
    Column("layout", "layout"),
    Column("schedule", "schedule"),
    Column("time_us", "us", ",.1f"),
    Column("weight_gbs", "GB/s", ".1f"),
    Column("gops", "GOP/s", ",.0f"),
    Column("limit_share", "% of limit", ".0%", "of roofline", of_limit=True),
    Column("over_default", "time/default", ".2f", "speedup", is_speedup=True),
    Column("state", "state"),
)
