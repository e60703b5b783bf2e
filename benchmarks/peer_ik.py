"""The side of ik_llama.cpp in benchmarks/peers.py: run by a Python that has ik-llama-cpp-python installed.

    python peer_ik.py MODEL.gguf --threads N --context N

It answers requests, one JSON object a line, through the package's bindings of the C API, without sampling:

    {"do": "prompt", "tokens": [...]}               all tokens in one llama_decode, logits of the last one
    {"do": "steps", "tokens": [...]}                one llama_decode a token, each with its logits
    {"do": "logits", "tokens": [...], "out": PATH}  as prompt; the logits are written there as float32

The answer is {"seconds": ...}. The first line it prints tells what runs: {"bytes": ..., "about": ...}; bytes
is the size of the file, which a step reads once where embedding and head are one tensor.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time

from ik_llama_cpp import _ctypes_api as ik


class Peer:
    """A model with a context of its own."""

    def __init__(self, path: str, threads: int, context: int, flash: bool, mmap: bool) -> None:
        self.size = os.stat(path).st_size  # noqa: PTH116 - the rest here wants text
        ik.llama_backend_init()
        params = ik.llama_model_default_params()
        params.use_mmap = mmap
        self.model = ik.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            sys.exit(f"error: ik_llama.cpp cannot load {path}")
        options = ik.llama_context_default_params()
        options.n_ctx = options.n_batch = context
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn = flash
        self.context = ik.llama_init_from_model(self.model, options)
        if not self.context:
            sys.exit("error: ik_llama.cpp cannot make a context")
        self.vocab = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self.model))
        self.batch = ik.llama_batch_init(context, 0, 1)

    def decode(self, tokens: list[int], start: int) -> ctypes.Array[ctypes.c_float]:
        """Append tokens at position ``start``; the logits of the last one."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = i == len(tokens) - 1
        code = ik.llama_decode(self.context, batch)
        if code:
            sys.exit(f"error: llama_decode fails with {code}")
        return ik.llama_get_logits_ith(self.context, len(tokens) - 1)  # waits until they are there

    def run(self, do: str, tokens: list[int], out: str | None = None) -> float:
        """Seconds that a request takes."""
        ik.llama_kv_cache_clear(self.context)
        parts = [[token] for token in tokens] if do == "steps" else [tokens]
        started = time.perf_counter()
        for position, part in enumerate(parts):
            logits = self.decode(part, position)
        seconds = time.perf_counter() - started
        if out is not None:
            with open(out, "wb") as file:  # noqa: PTH123
                file.write(ctypes.string_at(logits, 4 * self.vocab))
        return seconds


def system_info() -> str:
    """The instruction sets the library was compiled for, as it prints them."""
    describe = ik._lib.llama_print_system_info
    describe.restype = ctypes.c_char_p
    flags = [flag.split("=") for flag in describe().decode().split("|") if "=" in flag]
    return " ".join(name.strip() for name, value in flags if value.strip() == "1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--no-flash", action="store_true")
    parser.add_argument("--no-mmap", action="store_true")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # what the library prints goes to standard error
    os.dup2(2, 1)
    peer = Peer(args.model, args.threads, args.context, not args.no_flash, not args.no_mmap)
    print(json.dumps({"bytes": peer.size, "about": system_info()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": peer.run(**json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
