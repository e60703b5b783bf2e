"""transformers as it is, the same model on bitgen's kernels, and bitgen's engine, on random weights.

    python benchmarks/hf.py --model 2B-4T --prompt 64 --steps 4 --repeats 3 --threads 2

All three run a model of a preset's sizes (``--layers``: with fewer layers): transformers packed BitLinears
(`linear_class: bitlinear`), as microsoft's checkpoints have them, the engine the same shapes. Each --mode of
PyTorch has its rows: eager compiles nothing; own is how transformers comes, which compiles the rounding and
the unpacking of BitLinear; compile is torch.compile over the whole model, decoding with a static cache. A row
is tokens a second of a prompt and of decoding with a KV cache, medians over the repeats, and the largest of
their deviations from it; the first repeat, which compiles, is not counted. PyTorch has as many threads as
bitgen (``--torch-threads`` for another number): both pools are there at once.
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
from bitgen.inference.passes import Row
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.synthetic import random_weights
from bitgen.library import library_for
from bitgen.runtime import load

MODES = ("eager", "own", "compile")


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


def time_torch(model: Any, mode: str, args: argparse.Namespace) -> list[list[float]]:
    """Of prompts, then of decoding behind one."""
    import torch
    import transformers

    torch._dynamo.reset()
    torch._dynamo.config.disable = mode == "eager"
    called = torch.compile(model) if mode == "compile" else model
    vocab, prompts, steps = model.config.vocab_size, int(args.prompt), int(args.steps)
    prompt = torch.randint(0, vocab, (1, args.prompt))
    context = args.prompt + args.steps * (args.repeats + 1)

    # A cache that grows would be compiled anew when its length changes.
    static = {"max_cache_len": context} if mode == "compile" else {}
    kind = transformers.StaticCache if static else transformers.DynamicCache
    held = kind(config=model.config, **static)

    def read() -> int:
        called(prompt, use_cache=True, logits_to_keep=1)
        return prompts

    def step() -> int:
        for _ in range(args.steps):
            called(torch.randint(0, vocab, (1, 1)), past_key_values=held, use_cache=True)
        return steps

    with torch.inference_mode():
        read_speeds = timed(read, args)
        model(prompt, past_key_values=held, use_cache=True, logits_to_keep=1)
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
    parser.add_argument("--layers", type=int, help="of the model (default: all)")
    parser.add_argument(
        "--mode", action="append", choices=MODES, help="of PyTorch; may be given again (eager, compile)"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="a second is one of this process' CPU time, on a busy machine"
    )
    parser.add_argument("--library", help="a bundle or a .so (default: the best here)")
    parser.add_argument("--skip", nargs="*", default=[], choices=("transformers", "optimized", "engine"))
    parser.add_argument("-o", "--output", choices=("text", "md", "csv", "json"), default="text")
    args = parser.parse_args()
    config = find_model(args.model)
    if args.layers is not None:
        config = replace(config, layers=min(args.layers, config.layers))
    import torch  # with transformers 5 s, which --help and a wrong model need not wait for

    import bitgen.hf

    torch.set_num_threads(args.torch_threads or args.threads)
    torch.manual_seed(0)
    modes = args.mode or ("eager", "compile")
    rows: list[tuple[object, ...]] = []

    def add_torch(name: str, mode: str) -> None:
        try:
            add(f"{name}, {mode}", time_torch(model, mode, args))
        except torch._dynamo.exc.InternalTorchDynamoError as error:
            rows.append((f"{name}, {mode}: PyTorch fails", None, None, None, None))
            print(f"{name}, {mode}: {str(error).strip().splitlines()[0]}", file=sys.stderr)

    def add(name: str, speeds: Iterable[list[float]]) -> None:
        middle: list[float] = []
        for found in speeds:
            center = statistics.median(found)
            middle += [center, max(abs(each - center) for each in found)]
        rows.append((name, *middle))
        print(f"{name}: {middle}", file=sys.stderr)

    if not {"transformers", "optimized"} <= set(args.skip):
        model = random_bitnet(config, getattr(torch, args.dtype), args.linear_class)
        for mode in () if "transformers" in args.skip else modes:
            add_torch(f"transformers, {args.linear_class}, {args.dtype}", mode)
        for activations in () if "optimized" in args.skip else ("transformers", "bitgen"):
            bitgen.hf.optimize(model, library=args.library, threads=args.threads, activations=activations)
            for mode in modes:
                add_torch(f"optimised, activations {activations}", mode)
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
    what = f"{args.model}, {config.layers} layers, {args.threads} threads"
    print(render_tables([Table(what, columns, rows)], args.output))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BitgenError as error:
        print(f"hf: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
