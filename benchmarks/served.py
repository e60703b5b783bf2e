"""The models of benchmarks/serve.py, its server, and the process of its clients.

    python served.py '[[[0.0, {"url": "http://127.0.0.1:8080", "clients": 1, ...}]]]'

asks a server in phases, each a list of loads (`bitgen.serve.load.Load`) and when they start, and prints what
they saw as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeAlias

from oracle import plain_tokens

from bitgen.errors import BitgenError
from bitgen.formats.config import ModelConfig, find_model
from bitgen.formats.open import open_model, shipped_model
from bitgen.inference.engine import Engine
from bitgen.inference.opening import open_engine
from bitgen.inference.synthetic import random_weights
from bitgen.library import library_for
from bitgen.llm import LLM
from bitgen.runtime import load
from bitgen.serve.load import Load, Timed, run_load
from bitgen.serve.ports import listen
from bitgen.serve.server import serve
from bitgen.serve.service import Settings

STALL_S = 0.25  # --max-stall of a server
# The shape and the 4-bit weights of SmolLM2-135M, a draft model as people have them.
SMOLLM2 = ModelConfig(
    "SmolLM2-135M",
    hidden=576,
    ffn=1536,
    layers=30,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocab=49152,
    rope_theta=100000.0,
    activation="silu",
    sub_norms=False,
    tied_head=True,
    norm_eps=1e-5,
    architecture="llama",
    group=32,
    weights="q4m",
    context=8192,
)


@contextlib.contextmanager
def opened(args: argparse.Namespace, context: int, batch: int) -> Iterator[LLM]:
    """The model with room for ``batch`` texts of ``context`` positions; prompts in parts, as served."""
    name = args.model
    if Path(name).suffix in (".gguf", ".safetensors") or shipped_model(name):
        positions = min(context, open_model(name).config.context)
        llm = LLM(name, library=args.library, threads=args.threads, context=positions, batch=batch)
    else:
        config = replace(find_model(name), context=context)
        table = load(args.library or library_for(config), args.threads)
        engine = open_engine(random_weights(config), table, context=context, head="auto", batch=batch)
        llm = LLM.over(engine, config, plain_tokens(config.vocab))
        llm.table = table
    llm.limit_stall(STALL_S)
    with llm:
        yield llm


@contextlib.contextmanager
def small_engine(args: argparse.Namespace, context: int) -> Iterator[Engine]:
    """The draft model: a file, a preset, or the shape of SmolLM2-135M."""
    if args.draft and (Path(args.draft).suffix == ".gguf" or shipped_model(args.draft)):
        model: Any = open_model(args.draft)
    else:
        config = find_model(args.draft) if args.draft else SMOLLM2
        model = random_weights(replace(config, context=context))
    with load(library_for(model.config), args.threads) as table:
        engine = open_engine(model, table, context=min(context, model.config.context), head="auto")
        yield engine
        engine.close()


Phase: TypeAlias = Sequence[tuple[float, Load]]  # what is asked at the same time, each after so many seconds


def served(llm: LLM, phases: Sequence[Phase]) -> list[list[Timed]]:
    """What clients in a process of their own see of a server in this one, phase after phase."""
    with listen("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        asked = [[(after, asdict(replace(each, url=url))) for after, each in phase] for phase in phases]
        command = [sys.executable, __file__, json.dumps(asked)]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said: list[str] = []

        def wait() -> None:
            said.append(client.communicate()[0])
            os.kill(os.getpid(), signal.SIGTERM)  # as a server is ended

        watcher = threading.Thread(target=wait)
        watcher.start()
        with contextlib.redirect_stderr(io.StringIO()) as lines:
            serve(llm, Settings(("bench",), "fp_bench", log=None), sock, drain_s=1.0)
        watcher.join()
    if client.returncode:
        raise BitgenError(f"the client failed; the server said {lines.getvalue().strip()!r}")
    return [[Timed(**timed) for timed in phase] for phase in json.loads(said[0])]


def main() -> None:
    def ask(after: float, asked: dict[str, Any]) -> dict[str, Any]:
        time.sleep(after)
        return asdict(run_load(Load(**asked)))

    if len(sys.argv) != 2:
        sys.exit("error: say what to ask, as JSON")
    found = []
    try:
        for phase in json.loads(sys.argv[1]):
            with ThreadPoolExecutor(len(phase)) as pool:
                found.append(list(pool.map(ask, *zip(*phase, strict=True))))
    except BitgenError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
