"""What the peers of benchmarks/peers.py share: one model of the llama.cpp family behind a line protocol.

A child answers requests, one JSON object a line, through the C API of its library, without sampling:

    {"do": "prompt", "tokens": [...]}               all tokens in one llama_decode, logits of the last one
    {"do": "steps", "tokens": [...]}                one llama_decode a token, each with its logits
    {"do": "steps", "tokens": [...], "sequences": 8}    the same for eight tokens, one of each sequence

With "depth": N the cache holds N tokens before, which are computed, untimed, where the request before left
others. With "out": PATH the logits are written there as float32. The answer is {"seconds": ...}. The first
line it prints tells what runs: {"bytes": ..., "about": ...}; bytes is what a step reads: the size of the
file, less the embedding where that is not the head.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_Q8_0 = 8  # of enum ggml_type: keys and values of 8 bits
_PART = 512  # tokens of one llama_decode of those that a request finds in the cache


def set_cache(options: Any, kv: str) -> None:
    """Types of keys and values in the parameters of a context: f16, as they are, or q8."""
    if kv == "q8":
        options.type_k = options.type_v = _Q8_0


class Peer:
    """A model with a context of its own. ``api``: the bindings of a library.

    ``size`` is the number of tokens of the largest batch; ``clear`` empties the cache, ``trim`` forgets what
    is in it from a position on.
    """

    def __init__(
        self,
        api: Any,
        model: Any,
        context: Any,
        size: int,
        clear: Callable[[Any], None],
        trim: Callable[[Any, int], None],
    ) -> None:
        self.api, self.context, self.clear, self.trim = api, context, clear, trim
        self.depth = 0  # tokens in the cache that the next request may find there
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(size, 0, 1)

    def decode(self, tokens: list[int], start: int, sequences: int = 1) -> Any:
        """Append tokens at position ``start``; float32 (vocab), the logits of the last one.

        With several sequences one token to each, all with their logits.
        """
        batch, several = self.batch, sequences > 1
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + (0 if several else i)
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i if several else 0
            batch.logits[i] = several or i == len(tokens) - 1
        code = self.api.llama_decode(self.context, batch)
        if code:
            sys.exit(f"error: llama_decode fails with {code}")
        return self.api.llama_get_logits_ith(self.context, len(tokens) - 1)  # waits until they are there

    def reach(self, depth: int) -> None:
        """Make the cache hold ``depth`` tokens, always the same ones."""
        if depth and depth == self.depth:
            self.trim(self.context, depth)
            return
        self.clear(self.context)
        tokens = [i * 7919 % self.vocab for i in range(depth)]
        for start in range(0, depth, _PART):
            self.decode(tokens[start : start + _PART], start)
        self.depth = depth

    def run(
        self, do: str, tokens: list[int], out: str | None = None, depth: int = 0, sequences: int = 1
    ) -> float:
        """Seconds that a request takes."""
        self.reach(depth)
        size = sequences if do == "steps" else len(tokens)
        parts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        rows = []
        started = time.perf_counter()
        for position, part in enumerate(parts):
            logits = self.decode(part, depth + position, sequences)
            if out is not None:
                rows.append(ctypes.string_at(logits, 4 * self.vocab))
        seconds = time.perf_counter() - started
        if out is not None:
            with open(out, "wb") as file:  # noqa: PTH123
                file.write(b"".join(rows))
        return seconds


def serve(doc: str, load: Callable[[argparse.Namespace], tuple[Peer, str]]) -> None:
    """Parse the command line, load the model and answer until the input ends."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=1, help="that step at once")
    parser.add_argument("--bytes", type=int, help="bytes a step reads (the size of the file)")
    parser.add_argument("--kv", choices=("f16", "q8"), default="f16")
    parser.add_argument("--no-flash", action="store_true")
    parser.add_argument("--no-mmap", action="store_true")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # what the library prints goes to standard error
    os.dup2(2, 1)
    peer, about = load(args)
    size = args.bytes or os.stat(args.model).st_size  # noqa: PTH116 - the rest here wants text
    print(json.dumps({"bytes": size, "about": about}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": peer.run(**json.loads(line))}), file=answers, flush=True)


def enabled(system_info: bytes) -> str:
    """The instruction sets a library was compiled for, from what it prints: "AVX2 = 1 | AVX512 = 0 | ..."."""
    flags = [flag.split("=") for flag in system_info.decode().replace(":", "|").split("|") if "=" in flag]
    return " ".join(name.strip() for name, value in flags if value.strip() == "1")
