"""transformers as it is, the same model on bitgen's kernels, and bitgen's engine, on random weights.

    python benchmarks/hf.py --model 0.7B --prompt 128 --steps 16 --dtype bfloat16

All three run a model of a preset's sizes: transformers packed BitLinears (`linear_class: bitlinear`), as
microsoft's checkpoints have them, the engine the same shapes. A row is tokens a second of a prompt and of
decoding with a KV cache, medians over the repeats, and the largest of their deviations from it. PyTorch has
as many threads as bitgen (``--torch-threads`` for another number): both pools are there at once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from bitgen.cli.tables import Column, Table, render_tables
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelConfig, find_model
from bitgen.inference.opening import open_engine
from bitgen.inference.scheduler import Row, Scheduler
from bitgen.inference.synthetic import random_weights
from bitgen.llm import library_for
from bitgen.runtime import load


def random_bitnet(config: ModelConfig, dtype: Any, linear_class: str) -> Any:
    """BitNetForCausalLM of a preset's sizes; a third of its weights is zero."""
    import torch
    import transformers
    from transformers.integrations import bitnet

    settings = transformers.BitNetConfig(
        hidden_size=config.hidden,
        intermediate_size=config.ffn,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab,
        max_position_embeddings=config.context,
        hidden_act=config.activation,
        tie_word_embeddings=config.tied_head,
    )
    with torch.device("meta"):
        model = transformers.BitNetForCausalLM(settings).to(dtype)
    quantization = transformers.BitNetQuantConfig(linear_class=linear_class, quantization_mode="offline")
    model = bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantization).to_empty(device="cpu")
    model.tie_weights()
    for module in model.modules():
        if isinstance(module, (bitnet.BitLinear, bitnet.AutoBitLinear)):
            _fill(module)
        elif isinstance(module, torch.nn.Embedding):
            module.weight.data.normal_()
        elif module.__class__.__name__.endswith("RMSNorm"):
            module.weight.data.fill_(1)
    if not config.tied_head:
        model.lm_head.weight.data.normal_(0, 0.02)
    # What is computed from the configuration was on meta too.
    model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model.eval()


def _fill(layer: Any) -> None:
    import torch
    from transformers.integrations import bitnet

    k = layer.in_features
    scale = (1.5 / k) ** 0.5
    if isinstance(layer, bitnet.BitLinear):
        codes = torch.randint(0, 3, (4, *layer.weight.shape), dtype=torch.uint8)
        layer.weight.copy_(codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6)
        layer.weight_scale.fill_(1 / scale)
    else:
        layer.weight.data.copy_(torch.randint(-1, 2, layer.weight.shape))
        layer.weight_scale.fill_(scale)


def timed(run: Callable[[], int], args: argparse.Namespace) -> list[float]:
    """Tokens a second of each repeat, after one that is not counted."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    speeds = []
    for repeat in range(args.repeats + 1):
        started = clock()
        tokens = run()
        if repeat:
            speeds.append(tokens / (clock() - started))
    return speeds


def time_torch(model: Any, args: argparse.Namespace) -> list[list[float]]:
    """Of prompts, then of decoding behind one."""
    import torch

    vocab, prompts, steps = model.config.vocab_size, int(args.prompt), int(args.steps)
    prompt = torch.randint(0, vocab, (1, args.prompt))

    cache: Any = None

    def read() -> int:
        model(prompt, use_cache=True, logits_to_keep=1)
        return prompts

    def step() -> int:
        nonlocal cache
        for _ in range(args.steps):
            cache = model(torch.randint(0, vocab, (1, 1)), past_key_values=cache).past_key_values
        return steps

    with torch.inference_mode():
        read_speeds = timed(read, args)
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        return [read_speeds, timed(step, args)]


def time_engine(config: ModelConfig, args: argparse.Namespace) -> Iterator[list[float]]:
    """The same of bitgen's own engine."""
    context = args.prompt + args.steps * (args.repeats + 2)
    weights = random_weights(replace(config, context=max(config.context, context)))
    with load(args.library or library_for(weights.config), args.threads) as table:
        engine = open_engine(weights, table, context=context)
        scheduler, rng = Scheduler(engine), np.random.default_rng(0)

        def read() -> int:
            scheduler.clear()
            tokens = rng.integers(0, config.vocab, args.prompt).tolist()
            scheduler.forward([Row(0, tokens, [False] * (len(tokens) - 1) + [True])])
            return len(tokens)

        yield timed(read, args)

        def step() -> int:
            for token in rng.integers(0, config.vocab, args.steps).tolist():
                scheduler.forward([Row(0, [token])])
            return int(args.steps)

        yield timed(step, args)
        engine.close()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="0.7B")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch-threads", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--linear-class", choices=("bitlinear", "autobitlinear"), default="bitlinear")
    parser.add_argument("--eager", action="store_true", help="transformers without its torch.compile")
    parser.add_argument(
        "--cpu-time", action="store_true", help="a second is one of this process' CPU time, on a busy machine"
    )
    parser.add_argument("--library", help="a bundle or a .so (default: the best here)")
    parser.add_argument("--skip", nargs="*", default=[], choices=("transformers", "optimized", "engine"))
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="text")
    args = parser.parse_args()
    config = find_model(args.model)
    import torch  # with transformers 5 s, which --help and a wrong model need not wait for

    import bitgen.hf

    torch.set_num_threads(args.torch_threads or args.threads)
    torch._dynamo.config.disable = args.eager
    rows = []

    def add(name: str, speeds: Iterable[list[float]]) -> None:
        middle = []
        for found in speeds:
            center = statistics.median(found)
            middle += [center, max(abs(each - center) for each in found)]
        rows.append((name, *middle))
        print(f"{name}: {middle}", file=sys.stderr)

    if not {"transformers", "optimized"} <= set(args.skip):
        model = random_bitnet(config, getattr(torch, args.dtype), args.linear_class)
        if "transformers" not in args.skip:
            add(f"transformers, {args.linear_class}, {args.dtype}", time_torch(model, args))
        for activations in () if "optimized" in args.skip else ("transformers", "bitgen"):
            bitgen.hf.optimize(model, library=args.library, threads=args.threads, activations=activations)
            add(f"optimised, activations {activations}", time_torch(model, args))
        del model
    if "engine" not in args.skip:
        add("bitgen's engine", time_engine(config, args))
    columns = (
        Column("what", "what"),
        Column("prompt_ts", f"prompt of {args.prompt}, t/s", ",.2f"),
        Column("prompt_off", "±", ",.2f"),
        Column("decode_ts", "decode, t/s", ",.2f"),
        Column("decode_off", "±", ",.2f"),
    )
    print(render_tables([Table(f"{args.model}, {args.threads} threads", columns, rows)], args.output))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitgenError as error:
        print(f"hf: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
