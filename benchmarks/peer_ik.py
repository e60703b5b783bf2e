"""The side of ik_llama.cpp in benchmarks/peers.py: run by a Python that has ik-llama-cpp-python installed.

python peer_ik.py MODEL.gguf --threads N --context N

What it is asked and answers: peer_side.py.
"""

from __future__ import annotations

import argparse
import ctypes
import sys

from peer_side import Peer, enabled, serve, set_cache


def load(args: argparse.Namespace) -> tuple[Peer, str]:
    try:
        from ik_llama_cpp import _ctypes_api as ik
    except ImportError:
        sys.exit("error: this Python has no ik-llama-cpp-python: benchmarks/README.md says how to install it")
    ik.llama_backend_init()
    params = ik.llama_model_default_params()
    params.use_mmap = not args.no_mmap
    model = ik.llama_model_load_from_file(args.model.encode(), params)
    if not model:
        sys.exit(f"error: ik_llama.cpp cannot load {args.model}")
    options = ik.llama_context_default_params()
    options.n_ctx, options.n_seq_max = args.context * args.sequences, args.sequences
    options.n_batch = size = max(args.context, args.sequences)
    options.n_threads = options.n_threads_batch = args.threads
    options.flash_attn = not args.no_flash
    set_cache(options, args.kv)
    context = ik.llama_init_from_model(model, options)
    if not context:
        sys.exit("error: ik_llama.cpp cannot make a context")
    describe = ik._lib.llama_print_system_info
    describe.restype = ctypes.c_char_p
    forget = ik._lib.llama_kv_cache_seq_rm  # the bindings leave it out
    forget.argtypes, forget.restype = (ctypes.c_void_p, *[ctypes.c_int32] * 3), ctypes.c_bool

    def trim(of: object, depth: int) -> None:
        forget(of, 0, depth, -1)

    return Peer(ik, model, context, size, ik.llama_kv_cache_clear, trim), enabled(describe())


if __name__ == "__main__":
    serve(__doc__, load)
