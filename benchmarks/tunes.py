"""Libraries of real tunes, quiet and beside other work, and of winners from elsewhere, judged side by side.

    python benchmarks/tunes.py tune:480 tune:150 loaded:150 loaded:150 loaded:150 transferred --model 3B

Each argument is a library; all are compared with the first:

tune:SECONDS     of a tune of so long, from an empty store
loaded:SECONDS   the same beside a load: bursts of a process that computes or reads memory, in turn, drawn by
                 the seed; --busy is their share of the time, --burst their mean length
transferred      built without a tune, from the winners of the nearest family
committed        built without a tune, from the winners of this CPU's family
library:PATH     any other library

All but ``committed`` see a copy of the checkout without the winners of this CPU's family (--hide names
others). The race: some layers of the model with random weights, in one process; each round runs every
library once in an order of its own, a step of 1, of 8 and of 128 tokens. What counts is the median over the
rounds of time / time of the first library in the same round, with its 95 % interval (order statistics).
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.cpu import detect_cpu
from bitgen.errors import BitgenError, UsageError
from bitgen.formats.config import find_model
from bitgen.inference.engine import Engine
from bitgen.inference.opening import open_engine
from bitgen.inference.synthetic import random_weights
from bitgen.measure.stats import median_interval
from bitgen.runtime import load

ROOT = Path(__file__).resolve().parent.parent
_CHECKOUT = ("bitgen", "templates", "csrc", "configs", "models", "tune_logs", "pyproject.toml")
_BATCHES = (1, 8, 128)


@dataclass(frozen=True)
class Library:
    """A library of the race: its kind, the seconds of its tune or its path, and the seed."""

    kind: str
    value: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.value}".strip() + (f", seed {self.seed}" if self.tuned else "")

    @property
    def tuned(self) -> bool:
        return self.kind in ("tune", "loaded")


def parse(arguments: Sequence[str]) -> list[Library]:
    """The libraries of the command line; repeats of a kind get the next seed. UsageError: no such kind."""
    kinds = {"tune": True, "loaded": True, "library": True, "transferred": False, "committed": False}
    found: list[Library] = []
    for text in arguments:
        kind, _, value = text.partition(":")
        if kinds.get(kind) != bool(value) or (kind in ("tune", "loaded") and not value.isdigit()):
            raise UsageError(
                f"{text}: give tune:SECONDS, loaded:SECONDS, transferred, committed or library:PATH"
            )
        found.append(Library(kind, value, sum(library.kind == kind for library in found)))
    return found


# ---- the load ----

_BURST = """
import sys, time, numpy as np
kind, end = sys.argv[1], time.monotonic() + float(sys.argv[2])
a = np.ones(1 << 24 if kind == "memory" else 1 << 10, np.float32)
while time.monotonic() < end:
    a += 1
"""


@contextmanager
def load_beside(seed: int, busy: float, burst_s: float) -> Iterator[None]:
    """Bursts of work in a process of its own while the body runs: exponential lengths and gaps of a seed."""
    here = str(Path(__file__).resolve())
    code = f"import runpy; runpy.run_path({here!r})['bursts']({seed}, {busy}, {burst_s})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def bursts(seed: int, busy: float, burst_s: float) -> None:
    """Work for a share ``busy`` of the time, for ever: in a process that computes, then in one that reads."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    kinds = ("compute", "memory")
    for i in range(1 << 30):
        subprocess.run(
            [sys.executable, "-c", _BURST, kinds[i % 2], str(rng.expovariate(1 / burst_s))], check=True
        )
        time.sleep(rng.expovariate(busy / (burst_s * (1 - busy))))


# ---- the libraries ----


def checkout_without(families: Sequence[str], folder: Path) -> Path:
    """A copy of what a tune reads, in ``folder``, without the committed winners of some families."""
    for name in _CHECKOUT:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for family in families:
        (folder / "tune_logs" / "winners" / f"{family}.json").unlink(missing_ok=True)
    return folder


def bitgen(checkout: Path, home: Path, *words: str) -> str:
    """The standard output of a command in a checkout. BitgenError with its last line when it fails."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "BITGEN_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-m", "bitgen", *words], env=environment, cwd=home, text=True, capture_output=True
    )
    if done.returncode:
        raise BitgenError(f"bitgen {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def make(library: Library, args: argparse.Namespace, hidden: Path, folder: Path) -> tuple[Path, float]:
    """The path of a library, and the seconds its tune took."""
    if library.kind == "library":
        return Path(library.value), math.nan
    home = folder / library.name.replace(" ", "-").replace(",", "")
    home.mkdir()
    checkout = ROOT if library.kind == "committed" else hidden
    begin = time.monotonic()
    if library.tuned:
        words = ("tune", "-m", args.model, "--timeout", library.value, "--seed", str(library.seed))
        if library.kind == "loaded":
            with load_beside(library.seed, args.busy, args.burst):
                bitgen(checkout, home, *words)
        else:
            bitgen(checkout, home, *words)
    seconds = time.monotonic() - begin if library.tuned else math.nan
    bitgen(checkout, home, "build", "-m", args.model)
    (manifest,) = (home / "generated").glob("*/manifest.json")
    print(f"{library.name}: {'-' if math.isnan(seconds) else round(seconds)} s", file=sys.stderr)
    return manifest.parent, seconds


# ---- the race ----


def step(engine: Engine, n: int) -> float:
    """Seconds of one step of n tokens of a sequence, the last of them with logits."""
    engine.truncate(0, 0)
    tokens, rows = np.arange(n, dtype=np.int32), np.zeros(n, np.int32)
    begin = time.perf_counter()
    engine.forward(tokens, np.arange(n, dtype=np.int32), rows, np.arange(n) == n - 1)
    return time.perf_counter() - begin


def race(engines: Sequence[Engine], rounds: int) -> dict[int, list[list[float]]]:
    """For each batch the seconds of each library in each round."""
    times: dict[int, list[list[float]]] = {n: [] for n in _BATCHES}
    rng = random.Random(0)  # noqa: S311 - an order, no secret
    for _ in range(rounds):
        for n in _BATCHES:
            order = rng.sample(range(len(engines)), len(engines))
            row = {i: step(engines[i], n) for i in order}
            times[n].append([row[i] for i in range(len(engines))])
    return times


def table(
    libraries: Sequence[Library], seconds: Sequence[float], times: dict[int, list[list[float]]], title: str
) -> Table:
    columns = [Column("library", "library"), Column("tune_s", "tune s", ".0f")]
    for n in _BATCHES:
        columns += [Column(f"ms_{n}", f"{n}: ms", ".2f"), Column(f"ratio_{n}", f"{n}: ratio (95 %)")]
    rows = []
    for i, (library, tune_s) in enumerate(zip(libraries, seconds, strict=True)):
        cells: list[object] = [library.name, None if math.isnan(tune_s) else tune_s]
        for n in _BATCHES:
            ratios = [row[i] / row[0] for row in times[n]]
            low, high = median_interval(ratios) or (math.nan, math.nan)
            cells += [
                statistics.median(row[i] for row in times[n]) * 1e3,
                f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})",
            ]
        rows.append(tuple(cells))
    return Table(title, tuple(columns), tuple(rows))


def run(args: argparse.Namespace) -> Table:
    libraries = parse(args.libraries)
    config = find_model(args.model)
    config = replace(config, layers=min(args.layers, config.layers), vocab=min(1024, config.vocab))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        hidden = folder / "checkout"
        if not hidden.exists():
            checkout_without(args.hide or [detect_cpu().family], hidden)
        made = [make(library, args, hidden, folder) for library in libraries]
        weights = random_weights(config)
        tables = [load(path, args.threads) for path, _ in made]
        engines = [open_engine(weights, each, context=max(_BATCHES)) for each in tables]
        times = race(engines, args.rounds)
    title = f"{args.model}, {config.layers} layers, {args.threads} threads, {args.rounds} rounds"
    return table(libraries, [seconds for _, seconds in made], times, title)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("libraries", nargs="+", metavar="LIBRARY")
    parser.add_argument("--model", default="3B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4, help="layers of the race (4)")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--busy", type=float, default=0.3, help="share of the time that the load works (0.3)")
    parser.add_argument("--burst", type=float, default=0.5, help="mean seconds of a burst (0.5)")
    parser.add_argument("--hide", action="append", metavar="FAMILY", help="winners not to see (this CPU's)")
    parser.add_argument("--keep", help="folder for records and libraries (a temporary one)")
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    args = parser.parse_args()
    try:
        print(render_tables([run(args)], args.output))
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
