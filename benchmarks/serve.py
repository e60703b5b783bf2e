"""What a server adds to its engine, and what its scheduling gains; a Markdown table, medians of rounds.

    python benchmarks/serve.py --model 3B --threads 2                     # all of these, on a quiet machine
    python benchmarks/serve.py streams step --model 2B-4T --threads 2

    streams   8 clients stream over HTTP, against the engine's own batch of 8 on the same prompts and sampler
    step      a step of 8 sequences against max(bytes / DRAM, operations / int8 peak), both measured beside it
    stall     the first token of a short prompt while a long one is computed, against its time alone
    prefix    the first token of a prompt whose start was computed before, against the first time
    cpu       CPU time outside the engine's thread a streamed token, with an engine that answers at once
    lookup    a text that repeats itself: with drafts by prompt lookup, and without
    drafts    a draft model that is right with p = 0.6, 0.8, 0.9, at the cost of --draft: speedup against the
              formula (1 - p^(n + 1)) / (1 - p) / (n c + v), c a token of the draft model and v the check of
              n + 1 tokens, both in steps of the model; and with the length that the scheduler finds by itself
    mixed     7 texts run while a prompt comes: its parts in passes of their own, and in those of the steps

A preset has random weights, a file its own. Whatever is compared takes turns, round by round. The clients are
a process of their own on the same machine (served.py). In lookup and drafts the engine computes everything
and is then told which token comes next (oracle.py).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

from oracle import Instant, Script, plain_tokens, scripted
from served import SMOLLM2, STALL_S, opened, served, small_engine

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.environment import Environment
from bitgen.errors import BitgenError
from bitgen.inference.draft_model import DraftModel
from bitgen.inference.engine import Engine
from bitgen.inference.passes import Row
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.wants import Best
from bitgen.llm import LLM
from bitgen.measure import LocalRunner
from bitgen.serve.load import Load

LENGTHS = (1, 2, 4, 8)  # of drafts
CORRECT = (0.6, 0.8, 0.9)

Result: TypeAlias = "tuple[str, str, float, str, str]"  # what, unit, measured, bar, aim


def engine_of(llm: LLM) -> Engine:
    assert isinstance(llm.engine, Engine)  # noqa: S101 - for mypy
    return llm.engine


def streams(args: argparse.Namespace) -> list[Result]:
    asked = Load("", clients=8, requests=1, prompt=16, tokens=args.tokens, sampling={"seed": 1})
    over_http, own = [], []
    with opened(args, 16 + args.tokens, 8) as llm:
        prompts = [prompt for client in range(8) for prompt in asked.prompts(client)]
        for number in range(args.rounds + 1):
            llm.scheduler.clear()
            ((timed,),) = served(llm, [[(0.0, asked)]])
            llm.scheduler.clear()
            requests = [llm.request(p, max_tokens=args.tokens, ignore_end=True, seed=1) for p in prompts]
            started = time.perf_counter()
            llm.scheduler.texts(requests)
            seconds = time.perf_counter() - started
            if number:
                over_http.append(timed.tokens / timed.seconds)
                own.append(8 * args.tokens / seconds)
    share = statistics.median(a / b for a, b in zip(over_http, own, strict=True))
    return [
        ("8 streams over HTTP", "tokens/s", statistics.median(over_http), "", ""),
        ("the engine's own batch of 8", "tokens/s", statistics.median(own), "", ""),
        ("8 streams over HTTP against it", "%", 100 * share, "92", "97"),
    ]


def step(args: argparse.Namespace) -> list[Result]:
    environment, before = Environment(), 128
    level = environment.isa(None).name
    with (
        opened(args, before + 64, 8) as llm,
        LocalRunner(environment.toolchain, environment.cpu) as runner,
    ):
        engine, scheduler = engine_of(llm), llm.scheduler
        threads = engine.table.threads
        peak = runner.machine_peak(threads, [level]).peak_gops[level]
        tokens = list(range(before))
        for slot in range(8):
            scheduler.forward([Row(slot, tokens, [False] * before)])
        taken, limits, dram, stages = [], [], [runner.dram_gbs(threads, level)], []
        for _ in range(args.rounds + 1):
            seconds = []
            engine.reset_times()
            for _ in range(8):
                started = time.perf_counter()
                scheduler.answers([Row(slot, [slot]) for slot in range(8)], [Best(41)] * 8)
                seconds.append(time.perf_counter() - started)
            stages.append(engine.times_ns)
            scheduler.clear(keep=before)
            dram.append(runner.dram_gbs(threads, level))
            taken.append(statistics.median(seconds))
            limits.append(roofline_s(engine, 8, before, max(dram[-2:]), peak))
    ratio = statistics.median(t / limit for t, (limit, _) in zip(taken[1:], limits[1:], strict=True))
    bound = statistics.mode(name for _, name in limits[1:])
    return [
        ("a step of 8", "ms", 1e3 * statistics.median(taken[1:]), "", ""),
        *(
            (f"its {stage}", "ms", statistics.median(one[stage] for one in stages[1:]) / 8 / 1e6, "", "")
            for stage in stages[0]
        ),
        (f"its limit: {bound}", "ms", 1e3 * statistics.median(limit for limit, _ in limits[1:]), "", ""),
        (f"DRAM, {threads} threads", "GB/s", statistics.median(dram), "", ""),
        (f"int8 peak, {threads} threads, {level}", "GOP/s", peak, "", ""),
        ("a step of 8 against its limit", "x", ratio, "1.25", "1.1"),
    ]


def roofline_s(
    engine: Engine, n: int, positions: int, dram_gbs: float, peak_gops: float
) -> tuple[float, str]:
    """Seconds that a step of n tokens takes at least, and what for."""
    config = engine.config
    streamed = engine.memory.weights + (0 if engine.screens else engine.head_bytes)
    streamed += n * positions * config.layers * config.kv_rows * 2 * 2  # f16 keys and values
    multiplied = sum(matmul.m * matmul.k * matmul.count for matmul in config.matmuls)
    if not config.ternary_head:
        multiplied += config.vocab * config.hidden
    memory, work = streamed / dram_gbs / 1e9, 2 * n * multiplied / peak_gops / 1e9
    return max((memory, "bytes / DRAM"), (work, "operations / int8 peak"))


def stall(args: argparse.Namespace) -> list[Result]:
    alone, beside, steps = [], [], []
    with opened(args, args.long + 32, 2) as llm:
        long = min(args.long, llm.context - 32)
        for number in range(args.rounds + 1):
            short = Load("", 1, 1, prompt=20, tokens=8, seed=3 * number)
            again, other = replace(short, seed=3 * number + 1), replace(short, seed=3 * number + 2)
            slow = replace(other, prompt=long, tokens=1)
            (one,), (two, _) = served(llm, [[(0.0, short)], [(1.5 * STALL_S, again), (0.0, slow)]])
            if number:
                alone += one.firsts
                beside += two.firsts
                steps.append(statistics.fmean(one.gaps))
    bound = statistics.median(alone) + STALL_S + statistics.median(steps)
    return [
        ("first token of a prompt of 20, alone", "ms", 1e3 * statistics.median(alone), "", ""),
        ("a step", "ms", 1e3 * statistics.median(steps), "", ""),
        (
            f"first token while {long} tokens are computed, median",
            "ms",
            1e3 * statistics.median(beside),
            f"{1e3 * bound:.0f} (alone + {1e3 * STALL_S:.0f} + a step)",
            "",
        ),
        ("the longest of these", "ms", 1e3 * max(beside), "", ""),
    ]


def prefix(args: argparse.Namespace) -> list[Result]:
    first, again = [], []
    with opened(args, args.prefix + 16, 2) as llm:
        shared = min(args.prefix, llm.context - 16)
        for number in range(args.rounds + 1):
            llm.scheduler.clear()
            asked = Load("", 1, 2, prompt=shared + 1, tokens=2, shared=shared, seed=number)
            ((timed,),) = served(llm, [[(0.0, asked)]])
            if number:
                first.append(timed.firsts[0])
                again.append(timed.firsts[1])
    gains = [a / b for a, b in zip(first, again, strict=True)]
    return [
        (f"first token of {shared} + 1 tokens, the first time", "ms", 1e3 * statistics.median(first), "", ""),
        ("with another last token", "ms", 1e3 * statistics.median(again), "", ""),
        ("a repeated start", "x", statistics.median(gains), "50", "100"),
    ]


def cpu(args: argparse.Namespace) -> list[Result]:
    """The process and its threads, less the engine's own thread."""
    rows: list[Result] = []
    tokens, vocab = args.stream, 1024
    config = replace(SMOLLM2, vocab=vocab, context=tokens + 16)
    for clients in (1, 8):
        asked = Load("", clients, 1, prompt=8, tokens=tokens // clients)
        taken = []
        for _ in range(args.rounds):
            engine = Instant(config, tokens + 16, 8)
            llm = LLM.over(engine, config, plain_tokens(vocab))
            llm.limit_stall(STALL_S)
            before = time.process_time()
            ((timed,),) = served(llm, [[(0.0, asked)]])
            taken.append((time.process_time() - before - engine.thread_s) / timed.tokens)
        what = f"CPU outside the engine's thread a token, {tokens} to {clients} client{'s' * (clients > 1)}"
        rows.append((what, "ms", 1e3 * statistics.median(taken), "0.3", "0.1"))
    return rows


def decode_s(scheduler: Scheduler, llm: LLM, script: Script, tokens: int, *, lookup: bool = False) -> float:
    """Seconds a token of a text that follows the script, its prompt left out."""
    scheduler.clear()
    prompt = [script.at(position) for position in range(64)]
    options: dict[str, Any] = {"max_tokens": tokens, "ignore_end": True, "temperature": 0, "lookup": lookup}
    sequence = scheduler.submit(llm.request(prompt, **options))
    events = scheduler.drive([sequence])
    while not sequence.tokens:
        next(events)
    started = time.perf_counter()
    for _ in events:
        pass
    taken = time.perf_counter() - started
    if list(sequence.whole) != [script.at(position) for position in range(64 + tokens)]:
        raise BitgenError("the text is another one with drafts")
    return taken / (tokens - 1)


def lookup(args: argparse.Namespace) -> list[Result]:
    with opened(args, 64 + args.tokens, 1) as llm:
        script = Script(llm.config.vocab, 24)
        scheduler = Scheduler(scripted(llm.engine, script.at), llm.tokenizer)
        run = partial(decode_s, scheduler, llm, script, args.tokens)
        without, using = alternate(args.rounds, [run, partial(run, lookup=True)])
    gain = statistics.median(a / b for a, b in zip(without, using, strict=True))
    return [
        ("a text that repeats 24 tokens, without lookup", "tokens/s", 1 / statistics.median(without), "", ""),
        ("with lookup", "tokens/s", 1 / statistics.median(using), "", ""),
        ("lookup on text that repeats", "x", gain, "2", "3"),
    ]


def alternate(rounds: int, tests: Sequence[Callable[[], float]]) -> list[list[float]]:
    """What each test gives in each round; a round before is not counted."""
    found = [[test() for test in tests] for _ in range(rounds + 1)]
    return [list(column) for column in zip(*found[1:], strict=True)]


class _Fixed(DraftModel):
    """Drafts of one length."""

    def __init__(self, scheduler: Scheduler, tokens: int) -> None:
        super().__init__(scheduler)
        self._tokens = tokens

    def length(self, running: int, room: int) -> int:
        del running
        return min(self._tokens, room)


def drafts(args: argparse.Namespace) -> list[Result]:
    rows: list[Result] = []
    context = 64 + max(args.tokens, 1 + max(LENGTHS))
    with opened(args, context, 1) as llm, small_engine(args, context) as small:
        script, right = Script(min(llm.config.vocab, small.config.vocab), 997), [0.0]
        scheduler = Scheduler(scripted(llm.engine, script.at), llm.tokenizer)
        step_s, small_s = costs(scheduler.engine, args.rounds), costs(small, args.rounds)
        c = small_s[1] / step_s[1]
        rows.append((f"a token of {small.config.name or args.draft}", "steps", c, "", ""))
        reader = Scheduler(scripted(small, lambda position: script.guess(position, right[0])))
        for p in CORRECT:
            right[0] = p
            # The one that finds its length goes on measuring from round to round.
            kinds = [None, *(_Fixed(reader, n) for n in LENGTHS), DraftModel(reader)]

            def run(kind: DraftModel | None) -> float:
                scheduler.drafts = kind
                return decode_s(scheduler, llm, script, args.tokens)

            without, *found = alternate(args.rounds, [partial(run, kind) for kind in kinds])
            gains = [statistics.median(a / b for a, b in zip(without, taken, strict=True)) for taken in found]
            for n, gain in zip(LENGTHS, gains, strict=False):
                formula = (1 - p ** (n + 1)) / (1 - p) / (n * c + step_s[n + 1] / step_s[1])
                rows.append((f"p = {p}, drafts of {n}", "x", gain, f"{formula:.2f} (formula)", ""))
            rows.append((f"p = {p}, drafts of the length that it finds", "x", gains[-1], "1", ""))
    return rows


def costs(engine: EngineProtocol, rounds: int) -> dict[int, float]:
    """Seconds of a pass of n tokens of one sequence behind 64 others, each with its best token."""
    scheduler, taken = Scheduler(engine), dict[int, list[float]]()
    scheduler.forward([Row(0, [1] * 64, [False] * 64)])
    for _ in range(4 * rounds):
        for n in (1, *(length + 1 for length in LENGTHS)):
            started = time.perf_counter()
            scheduler.answers([Row(0, [1] * n)], [Best(2)] * n)
            taken.setdefault(n, []).append(time.perf_counter() - started)
            scheduler.clear(keep=64)
    return {n: statistics.median(each) for n, each in taken.items()}


def mixed(args: argparse.Namespace) -> list[Result]:
    with opened(args, args.mix + args.tokens, 8) as llm:
        size, scheduler = min(args.mix, llm.context - args.tokens), llm.scheduler
        asked = Load("", 8, 1, prompt=16, tokens=1)
        prompts = [prompt for client in range(7) for prompt in asked.prompts(client)]
        (long,) = replace(asked, prompt=size).prompts(7)

        def run(both: bool) -> tuple[float, float]:
            """Seconds of all, and of the longest step while the prompt is computed."""
            scheduler.clear()
            scheduler.mixed = both
            options: dict[str, Any] = {"ignore_end": True, "seed": 1}
            few = [scheduler.submit(llm.request(p, max_tokens=args.tokens, **options)) for p in prompts]
            while not all(sequence.tokens for sequence in few):
                scheduler.step()
            started = last = time.perf_counter()
            longest, late = 0.0, scheduler.submit(llm.request(long, max_tokens=8, **options))
            while not scheduler.idle:
                waits = not late.tokens
                scheduler.step()
                now = time.perf_counter()
                longest = max(longest, now - last) if waits else longest
                last = now
            return last - started, longest

        rounds = [(run(False), run(True)) for _ in range(args.rounds + 1)][1:]
    rows: list[Result] = []
    for index, name in enumerate(("passes of its own", "passes with the steps")):
        seconds = [pair[index][0] for pair in rounds]
        longest = [pair[index][1] for pair in rounds]
        what = f"7 texts of {args.tokens} tokens and a prompt of {size} in {name}"
        rows.append((what, "ms", 1e3 * statistics.median(seconds), "", ""))
        rows.append(("the longest wait of a text meanwhile", "ms", 1e3 * statistics.median(longest), "", ""))
    gain = statistics.median(own[0] / both[0] for own, both in rounds)
    return [*rows, ("one pass for both", "x", gain, "above 1: worth it", "")]


TESTS: dict[str, Callable[[argparse.Namespace], list[Result]]] = {
    "streams": streams,
    "step": step,
    "stall": stall,
    "prefix": prefix,
    "cpu": cpu,
    "lookup": lookup,
    "drafts": drafts,
    "mixed": mixed,
}
COLUMNS = (
    *(Column("test", "test"), Column("what", "what"), Column("value", "measured", ",.3f")),
    *(Column("unit", "unit"), Column("bar", "bar"), Column("aim", "aim")),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", metavar="TEST", help=f"{', '.join(TESTS)} (all)")
    parser.add_argument("-m", "--model", default="3B", help="a preset or a model file (3B)")
    parser.add_argument("-t", "--threads", type=int, help="of the engine (one a physical core)")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--library", help="a kernel library (the best here)")
    parser.add_argument("--draft", help="the draft model: a file or a preset (SmolLM2-135M's shape)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (128)")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long prompt of stall (2000)")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens that prompts share (1000)")
    parser.add_argument("--mix", type=int, default=512, help="tokens of the prompt of mixed (512)")
    parser.add_argument("--stream", type=int, default=10_000, help="tokens of cpu (10000)")
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    args = parser.parse_args()
    try:
        unknown = set(args.tests) - set(TESTS)
        if unknown:
            raise BitgenError(f"no such test: {', '.join(sorted(unknown))}; there are {', '.join(TESTS)}")
        rows = []
        for name in args.tests or TESTS:
            rows += [(name, what, value, unit, bar, aim) for what, unit, value, bar, aim in TESTS[name](args)]
            print(f"{name} done, load {os.getloadavg()[0]:.2f}", file=sys.stderr, flush=True)
    except BitgenError as error:
        sys.exit(f"error: {error}")
    title = f"{args.model}, {args.threads or 'all'} threads, medians of {args.rounds} rounds"
    print(render_tables([Table(title, COLUMNS, rows)], args.output))


if __name__ == "__main__":
    main()
