"""The side of llama.cpp in benchmarks/peers.py: run by a Python that has llama-cpp-python installed.

python peer_llama.py MODEL.gguf --threads N --context N

What it is asked and answers: peer_side.py.
"""

from __future__ import annotations

import argparse
import sys

from peer_side import Peer, enabled, serve, set_cache

_FLASH, _NO_FLASH = 1, 0


def load(args: argparse.Namespace) -> tuple[Peer, str]:
    try:
        from llama_cpp import llama_cpp as api
    except ImportError:
        sys.exit("error: this Python has no llama-cpp-python: benchmarks/README.md says how to install it")
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.use_mmap = not args.no_mmap
    model = api.llama_model_load_from_file(args.model.encode(), params)
    if not model:
        sys.exit(f"error: llama.cpp cannot load {args.model}")
    options = api.llama_context_default_params()
    options.n_ctx, options.n_seq_max = args.context * args.sequences, args.sequences
    options.n_batch = size = max(args.context, args.sequences)
    options.n_threads = options.n_threads_batch = args.threads
    options.flash_attn_type = _NO_FLASH if args.no_flash else _FLASH
    set_cache(options, args.kv)
    context = api.llama_init_from_model(model, options)
    if not context:
        sys.exit("error: llama.cpp cannot make a context")

    def clear(of: object) -> None:
        api.llama_memory_clear(api.llama_get_memory(of), False)

    def trim(of: object, depth: int) -> None:
        api.llama_memory_seq_rm(api.llama_get_memory(of), 0, depth, -1)

    return Peer(api, model, context, size, clear, trim), enabled(api.llama_print_system_info())


if __name__ == "__main__":
    serve(__doc__, load)
