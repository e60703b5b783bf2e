"""Train the tiny BitNet b1.58 model that ships with bitgen (models/tiny.gguf), from nothing to a GGUF file.

    python tools/train_tiny.py --text kjv.txt --out build/tiny --minutes 30

An optional tool: it needs PyTorch (CPU), tokenizers and safetensors; `pip install bitgen[oracle]` brings
them. The text: one verse or paragraph a line, an empty line between chapters (docs/guide/tiny-model.md
says how to get it). A longer run gives a better model; what is written is a whole model at any time.
Every --save-minutes and at the end it writes into --out

    config.json, model.safetensors, tokenizer.json     a Hugging Face folder as BitNetForCausalLM packs it
    tiny.gguf                                          the same model, converted by bitgen
    heldout.txt                                        chapters that were not trained on
    figures.json                                       the run, and the perplexity of heldout.txt by PyTorch

The model, as Microsoft's BitNet b1.58 (T tokens, h hidden, f feed-forward):
    x += o(norm(attention(rope(q(norm(x))), rope(k(norm(x))), v(norm(x)))))        x: float32 (T, h)
    x += down(norm(relu(gate(norm(x)))^2 * up(norm(x))))
and every matrix a BitLinear: weights round(clamp(W / mean|W|, -1, 1)) * mean|W|, activations per token
int8 with absmax; gradients pass straight through both roundings (master weights W are kept in float32).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import Tensor, nn

END = "<|endoftext|>"
HELD_OUT_EVERY = 97  # chapters; prime, so that it is in step with nothing


@dataclass(frozen=True)
class Sizes:
    """The shape of the model; k of every matrix is a multiple of 128, so that I2_S holds it."""

    vocab: int = 2048
    hidden: int = 256
    ffn: int = 512
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 512
    theta: float = 10000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


# ---- The model ------------------------------------------------------------------


def ternary(w: Tensor) -> tuple[Tensor, Tensor]:
    """(codes -1, 0, 1 of w's shape, scale () = mean|w|, at least 1e-5)."""
    scale = w.abs().mean().clamp(min=1e-5)
    return (w / scale).round().clamp(-1, 1), scale


class BitMatmul(torch.autograd.Function):
    """y = x w^T for stacked matrices that share an input, both sides quantised; straight-through gradients.

    x float32 (..., k), w float32 (m_i, k) each -> float32 (..., sum m_i). ``dtype`` is the type that codes
    are multiplied in: bfloat16 holds -128..127 and -1, 0, 1 exactly and is twice as fast where the CPU has
    it; float32 keeps the sums exact too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, *ws: Tensor) -> Tensor:
        codes, scales = zip(*(ternary(w) for w in ws), strict=True)
        q = torch.cat(codes).to(dtype)
        rows = torch.cat([s.expand(len(w)) for s, w in zip(scales, ws, strict=True)])
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        xq = (x * s).round().clamp(-128, 127).to(dtype)
        ctx.save_for_backward(xq, s, q, rows)
        ctx.sizes = [len(w) for w in ws]
        if dtype == torch.float32:
            return (xq @ q.T) * (1 / s * rows)
        return (xq @ q.T).float().mul_(1 / s).mul_(rows)  # one pass less over the output

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        xq, s, q, rows = ctx.saved_tensors
        g = g.to(q.dtype)
        gx = (g @ (q * rows[:, None].to(q.dtype))).float()
        gw = (g.flatten(0, -2).T @ (xq / s).to(q.dtype).flatten(0, -2)).float()
        return gx, None, *gw.split(ctx.sizes)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def bit_matmul(x: Tensor, compute: torch.dtype, *weights: Tensor) -> Tensor:
    """`BitMatmul` of ``x`` and ``weights``, whose products stand beside each other."""
    apply: Callable[..., Tensor] = BitMatmul.apply
    return apply(x, compute, *weights)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on (batch, heads, T, head_dim): pairs (i, i + head_dim / 2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    """One layer; ``compute`` is the type its codes are multiplied in."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        z, self.sizes, self.compute = sizes, sizes, torch.bfloat16

        def matrix(m: int, k: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(m, k) * 0.02)

        self.q = matrix(z.heads * z.head_dim, z.hidden)
        self.k = matrix(z.kv_heads * z.head_dim, z.hidden)
        self.v = matrix(z.kv_heads * z.head_dim, z.hidden)
        self.o = matrix(z.hidden, z.heads * z.head_dim)
        self.gate, self.up = matrix(z.ffn, z.hidden), matrix(z.ffn, z.hidden)
        self.down = matrix(z.hidden, z.ffn)
        self.attn_norm = nn.Parameter(torch.ones(z.hidden))
        self.attn_sub_norm = nn.Parameter(torch.ones(z.heads * z.head_dim))
        self.ffn_norm = nn.Parameter(torch.ones(z.hidden))
        self.ffn_sub_norm = nn.Parameter(torch.ones(z.ffn))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        z = self.sizes
        batch, length = x.shape[:2]
        normed = rms_norm(x, self.attn_norm, z.eps)
        qkv = bit_matmul(normed, self.compute, self.q, self.k, self.v)
        heads = qkv.view(batch, length, -1, z.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [z.heads, z.kv_heads, z.kv_heads], 1)
        repeat = z.heads // z.kv_heads
        k, v = rotate(k, cos, sin).repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, -1)
        x = x + bit_matmul(rms_norm(attended, self.attn_sub_norm, z.eps), self.compute, self.o)
        normed = rms_norm(x, self.ffn_norm, z.eps)
        gate, up = bit_matmul(normed, self.compute, self.gate, self.up).chunk(2, -1)
        inner = rms_norm(gate.relu().square() * up, self.ffn_sub_norm, z.eps)
        return x + bit_matmul(inner, self.compute, self.down)


class Tiny(nn.Module):
    """Token ids (batch, T) -> logits float32 (batch, T, vocab). The embedding is the head too."""

    block: Callable[[Sizes], nn.Module] = Block
    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.randn(sizes.vocab, sizes.hidden) * 0.02)
        self.layers = nn.ModuleList(type(self).block(sizes) for _ in range(sizes.layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden))
        frequency = sizes.theta ** (-torch.arange(0, sizes.head_dim, 2, dtype=torch.float64) / sizes.head_dim)
        angle = torch.arange(sizes.context, dtype=torch.float64)[:, None] * frequency
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    @property
    def blocks(self) -> list[Any]:
        return list(self.layers)

    def stored(self) -> Tiny:
        """The model with the weights that a file holds."""
        stored = Tiny(self.sizes)
        stored.load_state_dict(self.state_dict())
        stored.embedding.copy_(self.embedding.half().float())
        return stored

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = F.embedding(ids, self.embedding)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        x = rms_norm(x, self.norm, self.sizes.eps)
        compute = self.blocks[0].compute
        return (x.to(compute) @ self.embedding.to(compute).T).float()


# ---- Text -----------------------------------------------------------------------


def read_chapters(path: Path) -> list[str]:
    """Chapters: blocks of lines between empty lines."""
    blocks = path.read_text(encoding="utf-8").split("\n\n")
    return [block.strip() for block in blocks if block.strip()]


def train_tokenizer(chapters: list[str], vocab: int) -> Any:
    """Byte-level BPE with GPT-2's pre-tokenizer; id 0 is END."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    if tokenizer.get_vocab_size() != vocab:
        raise SystemExit(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab}: give more text")
    return tokenizer


def token_stream(tokenizer: Any, chapters: list[str]) -> Tensor:
    """All chapters one after another, END before each; int64 (tokens)."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(chapters, add_special_tokens=False):
        ids += [0, *encoding.ids]
    return torch.tensor([*ids, 0])


# ---- Training -------------------------------------------------------------------


def learning_rate(progress: float, peak: float) -> float:
    """Warm up over 2 %, then a cosine down to 2 % of the peak."""
    if progress < 0.02:
        return peak * (0.1 + 0.9 * progress / 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 0.02) / 0.98)))


def window_at(progress: float, context: int) -> int:
    """Tokens of a sequence: short ones are cheaper and teach as much at first."""
    return context // 4 if progress < 0.6 else context // 2 if progress < 0.85 else context


def windows(length: int, size: int, generator: torch.Generator) -> list[int]:
    """Starts of windows that cover the stream once, shifted by a random offset, in random order."""
    offset = int(torch.randint(size, (1,), generator=generator))
    starts = torch.arange(offset, length - size - 1, size)
    return starts[torch.randperm(len(starts), generator=generator)].tolist()


def optimizer_for(model: Tiny, peak: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05, "peak": peak},
        {"params": [model.embedding], "weight_decay": 0.0, "peak": peak},
        {"params": others, "weight_decay": 0.0, "peak": peak},
    ]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)


@dataclass
class Run:
    """What happened so far; written to figures.json."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    loss: float = math.nan  # nats a token, a running mean


def gradients(model: Tiny, batch: Tensor, workers: ThreadPoolExecutor, parts: int) -> float:
    """Set .grad to the gradient of the mean loss of ``batch`` (sequences, T + 1); return that loss.

    Each part of the batch runs on a thread of its own, once through: threads inside each operation would wait
    for each other thousands of times a step, which on a busy machine takes most of it.
    """
    parameters = list(model.parameters())

    def part(ids: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        logits = model(ids[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, ids[:, 1:].flatten()) * (len(ids) / len(batch))
        return loss.item(), torch.autograd.grad(loss, parameters)

    results = list(workers.map(part, batch.chunk(parts)))
    for parameter, *grads in zip(parameters, *(grads for _, grads in results), strict=True):
        parameter.grad = sum(grads[1:], grads[0])
    return sum(loss for loss, _ in results)


def train(model: Tiny, stream: Tensor, args: argparse.Namespace, save: Any) -> Run:
    """AdamW for --minutes, on windows that grow (`window_at`). ``save(run)`` now and then."""
    optimizer = optimizer_for(model, args.lr)
    generator = torch.Generator().manual_seed(args.seed)
    workers = ThreadPoolExecutor(args.threads)
    run, started, saved, printed = Run(), time.monotonic(), time.monotonic(), 0.0
    starts: list[int] = []
    size = 0
    while run.seconds < 60 * args.minutes:
        progress = run.seconds / (60 * args.minutes)
        if size != window_at(progress, model.sizes.context):
            size, starts = window_at(progress, model.sizes.context), []
        count = max(1, args.batch // size)
        if len(starts) < count:
            starts = windows(len(stream), size, generator)
        batch = torch.stack([stream[at : at + size + 1] for at in (starts.pop() for _ in range(count))])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, group["peak"])
        loss = gradients(model, batch, workers, args.threads)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.steps, run.tokens = run.steps + 1, run.tokens + count * size
        weight = max(0.02, 1 / run.steps)
        run.loss = (run.loss if run.steps > 1 else 0.0) * (1 - weight) + weight * loss
        run.seconds = time.monotonic() - started
        if run.seconds - printed > 15:
            printed = run.seconds
            rate = f"{run.tokens / run.seconds:.0f} tokens/s"
            print(f"{run.seconds:6.0f} s  step {run.steps}  {rate}  loss {run.loss:.3f}", flush=True)
        if time.monotonic() - saved > 60 * args.save_minutes:
            save(run)
            saved = time.monotonic()
    save(run)
    return run


@torch.no_grad()
def perplexity(model: Tiny, ids: list[int]) -> dict[str, float | int]:
    """Of the second half of each window of the context's length, as llama.cpp and bitgen compute it.

    In float32, so that every integer sum is exact. SystemExit when ``ids`` do not fill two windows.
    """
    set_compute(model, torch.float32)
    size = model.sizes.context
    if len(ids) < 2 * size:
        raise SystemExit(f"the held-out text has {len(ids)} tokens and needs {2 * size}: give more text")
    half, total, count = size // 2, 0.0, 0
    for at in range(0, len(ids) - size + 1, size):
        window = torch.tensor(ids[at : at + size])
        logits = model(window[None])[0, half:-1].double()
        total += float(F.cross_entropy(logits, window[half + 1 :], reduction="sum"))
        count += size - half - 1
    set_compute(model, torch.bfloat16)
    return {"perplexity": math.exp(total / count), "tokens": count, "context": size}


def set_compute(model: Tiny, dtype: torch.dtype) -> None:
    for block in model.blocks:
        block.compute = dtype


@torch.no_grad()
def greedy(model: Tiny, ids: list[int], count: int) -> list[int]:
    """``ids`` and the ``count`` likeliest tokens after them, in float32."""
    set_compute(model, torch.float32)
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
    set_compute(model, torch.bfloat16)
    return ids


# ---- Files ----------------------------------------------------------------------

_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}


def packed(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 (m / 4, k), scale float32 (1)): byte[r, c] = sum of (w[i m/4 + r, c] + 1) << 2i."""
    codes, scale = ternary(w)
    quarters = (codes.numpy() + 1).astype(np.uint8).reshape(4, -1, w.shape[1])
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6, scale.numpy().reshape(1)


def hf_tensors(model: Tiny) -> dict[str, np.ndarray]:
    """The checkpoint as BitNetForCausalLM stores it offline: packed codes, weight_scale multiplies."""
    out = {
        "model.embed_tokens.weight": model.embedding.numpy().astype(np.float16),
        "model.norm.weight": model.norm.numpy(),
    }
    for i, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            key = f"model.layers.{i}.{_NAMES[name]}"
            if parameter.ndim == 1:
                out[f"{key}.weight"] = parameter.numpy()
            else:
                out[f"{key}.weight"], out[f"{key}.weight_scale"] = packed(parameter)
    return out


def hf_config(sizes: Sizes) -> dict[str, Any]:
    return {
        "_name_or_path": "bitgen tiny",
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "hidden_act": "relu2",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.theta,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }


@dataclass(frozen=True)
class Kind:
    """A model that can be trained, and how it is stored: tensors, config.json, the type of the GGUF file."""

    model: type[Tiny]
    tensors: Callable[[Any], dict[str, np.ndarray]]
    config: Callable[[Sizes], dict[str, Any]]
    gguf_type: str
    gguf_name: str


BITNET = Kind(Tiny, hf_tensors, hf_config, "i2_s", "tiny.gguf")


@torch.no_grad()
def save_model(
    out: Path, kind: Kind, model: Tiny, tokenizer: Any, held_out: str, figures: dict[str, Any]
) -> None:
    """Everything the module's docstring lists; the figures are those of the weights as they are stored."""
    from safetensors.numpy import save_file

    from bitgen.formats.convert import convert

    stored = model.stored()
    save_file(kind.tensors(stored), out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(kind.config(model.sizes), indent=2) + "\n")
    settings = {"bos_token": END, "eos_token": END, "add_bos_token": False}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    convert(out, out / kind.gguf_name, kind.gguf_type)
    figures["heldout"] = perplexity(stored, tokenizer.encode(held_out).ids)
    greedy_texts = []
    for prompt in ("And it came to pass", "In the beginning", "Once upon a time", "The king said"):
        ids = tokenizer.encode(prompt).ids
        new = greedy(stored, ids, 48)[len(ids) :]
        greedy_texts.append({"prompt": prompt, "ids": ids, "tokens": new, "text": tokenizer.decode(new)})
    figures["greedy"] = greedy_texts
    text = json.dumps(figures, indent=1)
    text = re.sub(r"\[[\d,\s]*\]", lambda numbers: " ".join(numbers[0].split()), text)  # ids on one line
    (out / "figures.json").write_text(text + "\n")


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8; an empty line between chapters")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--minutes", type=float, default=30, help="of training (30)")
    parser.add_argument("--save-minutes", type=float, default=3, help="between checkpoints (3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1024, help="tokens a step (1024)")
    parser.add_argument("--lr", type=float, default=3e-3, help="the peak (0.003)")
    parser.add_argument("--layers", type=int, default=Sizes.layers)
    parser.add_argument("--ffn", type=int, default=Sizes.ffn, help="a multiple of 128, for I2_S")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def train_and_save(args: argparse.Namespace, kind: Kind, sizes: Sizes) -> None:
    """What `main` does, for a kind of model."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    chapters = read_chapters(args.text)
    held_out = "\n".join(chapters[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]) + "\n"
    trained_on = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    (args.out / "heldout.txt").write_text(held_out, encoding="utf-8")
    tokenizer = train_tokenizer(trained_on, sizes.vocab)
    stream = token_stream(tokenizer, trained_on)
    model = kind.model(sizes)
    parameters = sum(p.numel() for p in model.parameters())
    millions = parameters / 1e6
    print(f"{len(trained_on)} chapters, {len(stream)} tokens; {millions:.2f} M parameters", flush=True)

    def save(run: Run) -> None:
        figures: dict[str, Any] = {
            "sizes": asdict(sizes),
            "parameters": parameters,
            "text_tokens": len(stream),
            "text_characters": sum(map(len, trained_on)),
            "training": {
                "seconds": round(run.seconds),
                "steps": run.steps,
                "tokens": run.tokens,
                "loss": round(run.loss, 4),
                "batch": args.batch,
                "lr": args.lr,
                "seed": args.seed,
                "torch": torch.__version__,
            },
        }
        save_model(args.out, kind, model, tokenizer, held_out, figures)
        print(f"saved: held-out perplexity {figures['heldout']['perplexity']:.3f}", flush=True)
        print(f"  {figures['greedy'][0]['prompt']}|{figures['greedy'][0]['text']}", flush=True)

    train(model, stream, args, save)


def main(argv: list[str] | None = None) -> None:
    args = options(str(__doc__).split("\n", 1)[0]).parse_args(argv)
    train_and_save(args, BITNET, Sizes(layers=args.layers, ffn=args.ffn))


if __name__ == "__main__":
    main()
