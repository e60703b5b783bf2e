"""Tokens a second of bitgen, ik_llama.cpp and llama.cpp: the same model, the same machine, taking turns.

    python benchmarks/peers.py --model 3B --work FOLDER --ik PYTHON --llama PYTHON --threads 1,2 --rounds 7

The PYTHONs have ik-llama-cpp-python==0.1.5 and llama-cpp-python==0.3.36 installed, each in an environment of
its own and compiled for this machine: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary :all: PACKAGE
(ik's wheel is compiled for AVX2, which is not what bitgen should be compared with on a CPU with AVX-512), or
name such a libllama.so of ik's with --ik-library. Either may be left out. FOLDER holds the peers' files, made
by make_peer_model.py when they are missing: 1 to 2 GB a type for 3B, and 7 GB for a moment.

--model FILE.gguf runs that file on every side, whatever its types: there is nothing to make, and --type takes
options alone (llama, ik+no-flash). Otherwise all sides have the same random weights, an f16 head and an f16
cache. They sample nothing; each runs in a process of its own (peer_bitgen.py, peer_ik.py, peer_llama.py).
First all compute the logits of one prompt: the run ends unless they are finite and alike (not equal: the
peers quantise activations with several scales a token). Then each round runs every test on every side in
shuffled order. Figures are medians. pp: a prompt at once; tg: tokens one by one from an empty context, or
with tg32@d4096 behind 4096 tokens that the cache holds, which each side computes once, untimed; then its
rounds follow one another, and the bytes of keys and values (--kv q8: of 8 bits on all sides) count too.
tg32x8 steps 8 sequences at once. MB a step: packed weights, scales and head; for the peers the file. Before
and after a side's steps a probe reads the memory; "of DRAM": the median over the rounds of what the side
read, against the more of the two.

llama.cpp knows 2B-4T's architecture only with a silu gate: with --llama every side runs a relu² model's shape
that way, and the title says so. TQ1_0 and TQ2_0 hold matrices of multiples of 256 columns, Q4_0 all.
--bitgen head=screened,best=40 adds a side of bitgen with options of peer_bitgen.py, --bitgen library=PATH one
with another library; no peer is needed then.
A --type may carry options of peer_side.py, as in IQ2_BN_R4+no-flash: ik_llama.cpp has its own flash attention
kernels for some head sizes, but not for the 100 of 3B, so both ways are timed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
from make_peer_model import LLAMA_TYPES, make_models, peer_config, read_bytes_a_token

from bitgen.cli.progress import ProgressBar
from bitgen.cli.tables import Column, Table, render_tables
from bitgen.environment import Environment
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelConfig
from bitgen.formats.open import open_model
from bitgen.measure import LocalRunner
from bitgen.progress import Progress

HERE = Path(__file__).resolve().parent
_ALIKE = 0.95  # correlation of logits; 0.99 and more is what other roundings of activations leave
_PROMPT = 16  # tokens whose logits are compared
_IK_TYPES = ("IQ2_BN", "IQ2_BN_R4", "IQ2_BN_R4+no-flash", "IQ1_BN")


class Side:
    """A child process that runs one model; see peer_side.py for what it is asked."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: dict[str, str]) -> None:
        self.name = name
        # Not a pipe: one that nobody reads fills up and stops the child.
        self._errors = TemporaryFile("w+")  # noqa: SIM115 - closed with the child
        self._child = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **environment},
        )
        hello = self._read()
        self.bytes = int(hello["bytes"])  # a token
        self.about = str(hello["about"])

    def ask(self, do: str, tokens: list[int], **options: str | int) -> float:
        """Seconds that it took. BitgenError when the child ended."""
        assert self._child.stdin is not None  # noqa: S101 - for mypy
        with contextlib.suppress(BrokenPipeError):  # it ended: reading its answer says why
            print(json.dumps({"do": do, "tokens": tokens, **options}), file=self._child.stdin, flush=True)
        return float(self._read()["seconds"])

    def close(self) -> None:
        self._child.communicate(timeout=60)
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None  # noqa: S101 - for mypy
        line = self._child.stdout.readline()
        if not line:
            code = self._child.wait(timeout=60)
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or [""]
            raise BitgenError(f"{self.name} ended with exit code {code}: {last[0]}")
        return dict(json.loads(line))


@dataclass(frozen=True)
class Test:
    """``pp512``: a prompt of 512 tokens; ``tg32``: 32 steps of one token; ``tg32@d4096``: behind 4096.

    ``tg32x8``: 32 steps of 8 sequences at once.
    """

    name: str
    do: str
    n: int
    depth: int = 0
    sequences: int = 1

    @classmethod
    def parse(cls, text: str) -> Test:
        kinds = {"pp": "prompt", "tg": "steps"}
        found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?:@d(\d+))?", text)
        if found:
            return cls(text, kinds[found[1]], int(found[2]), int(found[3] or 0))
        found = re.fullmatch(r"tg([1-9]\d*)x([1-9]\d*)", text)
        if not found:
            raise BitgenError(f"{text} is no test: write pp512, tg32, tg32@d4096 or tg32x8")
        return cls(text, "steps", int(found[1]), sequences=int(found[2]))

    @property
    def tokens(self) -> int:
        return self.n * self.sequences


@contextlib.contextmanager
def opened(
    args: argparse.Namespace, config: ModelConfig, files: dict[str, Path], threads: int, room: tuple[int, int]
) -> Iterator[list[Side]]:
    """Load bitgen and every file of the peers, with room for so many positions of so many sequences."""
    common = ["--threads", str(threads), "--context", str(room[0]), "--sequences", str(room[1])]
    common += ["--kv", args.kv]
    options = ["--library", args.library] if args.library else []
    options += ["--silu"] if args.silu else []
    ik_env = {"IK_LLAMA_CPP_LIB_PATH": str(args.ik_library)} if args.ik_library else {}
    sides: list[Side] = []
    try:
        sides.append(
            Side("bitgen", [sys.executable, HERE / "peer_bitgen.py", args.model, *common, *options], {})
        )
        for text in args.bitgen:
            also = [f"--{option}" for option in text.split(",")]
            command = [sys.executable, HERE / "peer_bitgen.py", args.model, *common, *options, *also]
            sides.append(Side(f"bitgen {text}", command, {}))
        for peer in args.type:
            kind, *flags = peer.split("+")
            options = ["--bytes", str(read_bytes_a_token(files[kind], config)), *(f"--{f}" for f in flags)]
            if kind in (*LLAMA_TYPES, "llama"):
                command = [args.llama, HERE / "peer_llama.py", files[kind], *common, *options]
                sides.append(Side(f"llama.cpp {peer.removeprefix('llama')}".rstrip(), command, {}))
            else:
                command = [args.ik, HERE / "peer_ik.py", files[kind], *common, *options]
                sides.append(Side(f"ik {peer.removeprefix('ik')}".rstrip(), command, ik_env))
        yield sides
    finally:
        for side in sides:
            side.close()


def compare_logits(sides: Sequence[Side], vocab: int) -> list[tuple[object, ...]]:
    """A row a side: how its logits of one prompt compare with bitgen's. BitgenError unless they are alike."""
    tokens = np.random.default_rng(1).integers(0, vocab, _PROMPT).tolist()
    rows: list[tuple[object, ...]] = []
    with TemporaryDirectory() as folder:
        found = []
        for side in sides:
            out = Path(folder) / "logits"
            side.ask("prompt", tokens, out=str(out))
            found.append(np.fromfile(out, "<f4").astype(np.float64))
    for side, logits in zip(sides, found, strict=True):
        if logits.size != vocab or not np.isfinite(logits).all():
            raise BitgenError(f"{side.name}: the logits are not {vocab} finite numbers")
        alike = float(np.corrcoef(found[0], logits)[0, 1])
        rms = float(np.sqrt(np.mean((logits - found[0]) ** 2)) / found[0].std())
        rows.append((side.name, side.about, alike, rms, int(logits.argmax())))
        if alike < _ALIKE:
            raise BitgenError(f"{side.name} and bitgen do not run the same model: correlation {alike:.3f}")
    return rows


Rounds = dict[tuple[str, str], list[float]]  # by side and test


def time_sides(
    sides: Sequence[Side], tests: Sequence[Test], rounds: int, vocab: int, probe: Callable[[], float]
) -> tuple[Rounds, Rounds]:
    """Seconds of every round, and for steps the GB/s of ``probe``: the more of before and after them.

    Each side runs once untimed before.
    """
    order, draw = random.Random(0), np.random.default_rng(0)  # noqa: S311 - an order, no secret
    seconds: Rounds = {(s.name, t.name): [] for s in sides for t in tests}
    dram: Rounds = {key: [] for key in seconds}
    with ProgressBar() as line:
        # All rounds of a depth before those of the next: a side computes what its cache holds once.
        for depth in dict.fromkeys(test.depth for test in tests):
            for number, test in product(range(rounds + 1), [test for test in tests if test.depth == depth]):
                tokens = draw.integers(0, vocab, test.tokens).tolist()
                for side in order.sample(list(sides), len(sides)):
                    line.show(Progress(f"{test.name}, {side.name}", number, rounds + 1, "rounds"))
                    # Memory that is shared changes from second to second.
                    before = probe() if number and test.do == "steps" else 0.0
                    time = side.ask(test.do, tokens, depth=depth, sequences=test.sequences)
                    if not number:
                        continue
                    seconds[side.name, test.name].append(time)
                    if before:
                        dram[side.name, test.name].append(max(before, probe()))
    return seconds, dram


def result_rows(
    sides: Sequence[Side],
    tests: Sequence[Test],
    seconds: Rounds,
    threads: int,
    dram: Rounds,
    cached: Callable[[Test, Side], float],
) -> list[tuple[object, ...]]:
    """A row a test and side; the ratio is bitgen's median speed to that side's.

    ``cached``: bytes of the keys and values that a step of a test reads on a side.
    """
    rows: list[tuple[object, ...]] = []
    for test in tests:
        speeds = {side.name: [test.tokens / s for s in seconds[side.name, test.name]] for side in sides}
        ours = statistics.median(speeds[sides[0].name])
        for side in sides:
            speed = statistics.median(speeds[side.name])
            gbs = share = None
            read = side.bytes + cached(test, side)
            if test.do == "steps":
                each = read / test.sequences / 1e9  # GB a token
                gbs = each * speed
                rounds = zip(speeds[side.name], dram[side.name, test.name], strict=True)
                share = statistics.median(each * s / limit for s, limit in rounds)
            spread = min(speeds[side.name]), max(speeds[side.name])
            rows.append((threads, test.name, side.name, speed, *spread, ours / speed, read / 1e6, gbs, share))
    return rows


def cache_bytes(config: ModelConfig, kv: str, test: Test, side: Side) -> float:
    """Bytes of the keys and values that the middle one of a test's steps behind a depth reads; else 0.

    q8: a byte each, and a float for each head and position (bitgen), or two bytes for each 32 values.
    """
    if not test.depth:
        return 0.0
    element = 2.0 if kv == "f16" else 1 + (4 / config.head_dim if side.name.startswith("bitgen") else 2 / 32)
    return (test.depth + test.n / 2) * config.layers * config.kv_rows * 2 * element


_LOGITS = (
    Column("side", "side"),
    Column("about", "library, or compiled for"),
    Column("alike", "correlation", ".4f"),
    Column("rms", "rms difference", ".3f"),
    Column("top", "most likely", "d"),
)
_RESULTS = (
    *(Column("threads", "threads", "d"), Column("test", "test"), Column("side", "side")),
    *(Column("avg_ts", "t/s", ",.2f"), Column("min_ts", "min", ",.2f"), Column("max_ts", "max", ",.2f")),
    *(Column("speedup", "bitgen is", ".2f"), Column("mb", "MB a step", ",.0f")),
    *(Column("gbs", "GB/s", ".1f"), Column("share", "of DRAM", ".0%")),
)


def is_file(model: str) -> bool:
    """Whether the sides run a file, and no preset."""
    return model.endswith(".gguf")


def chosen_types(args: argparse.Namespace, config: ModelConfig) -> list[str]:
    """The types to time: the ones asked for, or all that the peers given can run. BitgenError for neither."""
    wanted = list(args.type or ())
    if not wanted and is_file(args.model):
        wanted = ["ik"] * bool(args.ik) + ["llama"] * bool(args.llama)
    elif not wanted:
        columns = (config.hidden, config.q_rows, config.ffn)
        of_256 = all(k % 256 == 0 for k in columns)
        wanted += _IK_TYPES if args.ik else ()
        wanted += [kind for kind in LLAMA_TYPES if kind == "Q4_0" or of_256] if args.llama else []
    for peer in wanted:
        option = "llama" if peer.partition("+")[0] in (*LLAMA_TYPES, "llama") else "ik"
        if getattr(args, option) is None:
            raise BitgenError(f"{peer} needs a peer's Python: name it with --{option}")
    if not wanted and not args.bitgen:
        raise BitgenError("name a peer's Python with --ik, --llama or both")
    return wanted


def run(args: argparse.Namespace) -> None:
    environment = Environment()
    whole = is_file(args.model)
    args.silu = not whole and args.llama is not None and peer_config(args.model).activation != "silu"
    config = open_model(args.model).config if whole else peer_config(args.model, args.silu)
    tests = [Test.parse(text) for text in args.tests.split(",")]
    context = max(_PROMPT, *(test.n + test.depth for test in tests))
    room = context, max(test.sequences for test in tests)
    args.type = chosen_types(args, config)
    kinds = list(dict.fromkeys(peer.partition("+")[0] for peer in args.type))
    if whole:
        files = dict.fromkeys(kinds, Path(args.model))
    elif args.work is None:
        raise BitgenError("name a folder for the peers' files with --work")
    else:
        files = make_models(args.work, config, kinds, args.ik)
    isa = environment.isa(None).name
    rows: list[tuple[object, ...]] = []
    logits: list[tuple[object, ...]] = []
    facts = [f"load before: {os.getloadavg()[0]:.2f}"]
    for threads in map(int, args.threads.split(",")):
        with (
            opened(args, config, files, threads, room) as sides,
            LocalRunner(environment.toolchain, environment.cpu) as runner,
        ):
            logits = logits or compare_logits(sides, config.vocab)
            probe = partial(runner.dram_gbs, threads, isa)
            probe()  # finds out which way of reading is the fastest
            seconds, dram = time_sides(sides, tests, args.rounds, config.vocab, probe)
        rows += result_rows(sides, tests, seconds, threads, dram, partial(cache_bytes, config, args.kv))
        read = [gbs for each in dram.values() for gbs in each]
        if read:
            middle = statistics.median(read)
            facts.append(
                f"DRAM read, {threads} threads: {middle:.1f} GB/s ({min(read):.1f} to {max(read):.1f})"
            )
    shape = f"{Path(args.model).name}{' with a silu gate' if args.silu else ''}"
    facts += [f"{args.kv} keys and values"] if any(test.depth for test in tests) else []
    title = f"{shape}, medians of {args.rounds} interleaved rounds; {'; '.join(facts)}"
    tables = [
        Table(f"{shape}: logits of the last of {_PROMPT} tokens, against bitgen's", _LOGITS, logits),
        Table(title, _RESULTS, rows),
    ]
    print(render_tables(tables, args.output))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="3B", help="a preset, or a GGUF file that all sides run (3B)")
    parser.add_argument("--work", type=Path, help="folder of the peers' files, for a preset")
    parser.add_argument("--ik", type=Path, help="a Python with ik-llama-cpp-python")
    parser.add_argument("--ik-library", type=Path, help="its libllama.so, compiled for this machine")
    parser.add_argument("--llama", type=Path, help="a Python with llama-cpp-python")
    parser.add_argument("--type", action="append", help="of a peer, + options (all that the peers can run)")
    parser.add_argument(
        "--bitgen", action="append", default=[], help="another side of bitgen, by its options"
    )
    parser.add_argument("--library", type=Path, help="bitgen's kernel library (the best here)")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tests", default="pp128,pp512,tg32")
    parser.add_argument("--kv", choices=("f16", "q8"), default="f16", help="keys and values (f16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="md")
    try:
        run(parser.parse_args())
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
