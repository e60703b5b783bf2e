"""Train the tiny Qwen3 with ternary weights in groups that ships with bitgen (models/tiny_qwen3.gguf).

    python tools/train_tiny_qwen3.py --text kjv.txt --out build/tiny_qwen3 --minutes 20

Text, options and files are those of tools/train_tiny.py; the GGUF file is tiny_qwen3.gguf, of type PTQ1_0.

The model, as Qwen3 (T tokens, h hidden, f feed-forward), with activations that nothing rounds:
    x += o(attention(rope(head_norm(q(norm(x)))), rope(head_norm(k(norm(x)))), v(norm(x))))   x: float (T, h)
    x += down(silu(gate(norm(x))) * up(norm(x)))
and all its matrices, embedding and head too, as Ternary Bonsai has them: of each 128 weights along a row the
scale s = mean|W| and codes round(clamp(W / s, -1, 1)); gradients pass straight through the rounding. A scale
is rounded to bfloat16, so that training multiplies with the very weights that a file of half floats holds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everyone calls it
from torch import Tensor, nn
from train_tiny import Kind, Sizes, Tiny, hf_config, options, rms_norm, rotate, train_and_save

GROUP = 128
_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_NAMES = {
    **{name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


@torch.no_grad()
def in_groups(w: Tensor) -> Tensor:
    """-s, 0 or s for each weight of w (m, k), s bfloat16 a group."""
    groups = w.reshape(len(w), -1, GROUP)
    scale = groups.abs().mean(-1, keepdim=True).clamp(min=1e-5).bfloat16().float()
    return ((groups / scale).round().clamp(-1, 1) * scale).view_as(w)


class Block(nn.Module):
    """One layer; ``compute`` is the type that it multiplies in, ``stored``: its weights are ternary."""

    attn_norm: Tensor
    ffn_norm: Tensor
    q_norm: Tensor
    k_norm: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        z, self.sizes, self.compute, self.stored = sizes, sizes, torch.bfloat16, False
        rows = {"q": z.heads * z.head_dim, "o": z.hidden, "gate": z.ffn, "up": z.ffn, "down": z.hidden}
        columns = {"o": z.heads * z.head_dim, "down": z.ffn}
        for name in _MATRICES:
            m, k = rows.get(name, z.kv_heads * z.head_dim), columns.get(name, z.hidden)
            self.register_parameter(name, nn.Parameter(torch.randn(m, k) * 0.02))
        for name, size in (("attn", z.hidden), ("ffn", z.hidden), ("q", z.head_dim), ("k", z.head_dim)):
            self.register_parameter(f"{name}_norm", nn.Parameter(torch.ones(size)))

    def multiply(self, x: Tensor, *names: str) -> Tensor:
        """The products of ``x`` with some matrices, beside each other."""
        w = torch.cat([self.get_parameter(name) for name in names])
        if not self.stored:
            w = w + (in_groups(w) - w).detach()
        return (x.to(self.compute) @ w.to(self.compute).T).float()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        z, norm = self.sizes, partial(rms_norm, eps=self.sizes.eps)
        batch, length = x.shape[:2]
        qkv = self.multiply(norm(x, self.attn_norm), "q", "k", "v")
        heads = qkv.view(batch, length, -1, z.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [z.heads, z.kv_heads, z.kv_heads], 1)
        q, k = rotate(norm(q, self.q_norm), cos, sin), rotate(norm(k, self.k_norm), cos, sin)
        repeat = z.heads // z.kv_heads
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.multiply(attended.transpose(1, 2).reshape(batch, length, -1), "o")
        gate, up = self.multiply(norm(x, self.ffn_norm), "gate", "up").chunk(2, -1)
        return x + self.multiply(F.silu(gate) * up, "down")


class TinyQwen3(Tiny):
    """Token ids (batch, T) -> logits float32 (batch, T, vocab). The embedding, ternary too, is the head."""

    block = Block

    def forward(self, ids: Tensor) -> Tensor:
        first = self.blocks[0]
        w: Tensor = self.embedding
        if not first.stored:
            w = w + (in_groups(w) - w).detach()
        x = F.embedding(ids, w)
        for layer in self.layers:
            x = layer(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        x = rms_norm(x, self.norm, self.sizes.eps)
        return (x.to(first.compute) @ w.to(first.compute).T).float()

    def stored(self) -> TinyQwen3:
        stored = TinyQwen3(self.sizes)
        stored.load_state_dict(self.state_dict())
        stored.embedding.copy_(in_groups(self.embedding))
        for block in stored.blocks:
            block.stored = True
            for name in _MATRICES:
                matrix = block.get_parameter(name)
                matrix.copy_(in_groups(matrix))
        return stored


def hf_tensors(model: TinyQwen3) -> dict[str, np.ndarray]:
    """The checkpoint as Qwen3ForCausalLM stores it, in half floats, which hold the weights exactly."""
    out = {
        "model.embed_tokens.weight": model.embedding.numpy().astype(np.float16),
        "model.norm.weight": model.norm.numpy(),
    }
    for i, layer in enumerate(model.layers):
        for name, parameter in layer.named_parameters():
            values = parameter.numpy()
            key = f"model.layers.{i}.{_NAMES[name]}.weight"
            out[key] = values if parameter.ndim == 1 else values.astype(np.float16)
    return out


def qwen3_config(sizes: Sizes) -> dict[str, Any]:
    config = hf_config(sizes)
    del config["quantization_config"]
    return {
        **config,
        "_name_or_path": "bitgen tiny qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
    }


QWEN3 = Kind(TinyQwen3, hf_tensors, qwen3_config, "ptq1_0", "tiny_qwen3.gguf")


def main(argv: list[str] | None = None) -> None:
    args = options(str(__doc__).split("\n", 1)[0]).parse_args(argv)
    train_and_save(args, QWEN3, Sizes(layers=args.layers, ffn=args.ffn, eps=1e-6))


if __name__ == "__main__":
    main()
