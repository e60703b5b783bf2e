"""A model's forward pass in float32, a layer at a time: what its matrices are multiplied with.

For calibration, and to measure weights that no kernel runs. Activations stay floats; only the current layer's
weights are decoded, a bounded block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.weights import Weights

Squares: TypeAlias = Mapping[str, Floats]  # of each matrix of a layer, by its role
Linear: TypeAlias = Callable[[str, TernaryMatrix, Floats], Floats]  # role, matrix, x (n, k) -> (n, m)
_ROWS_VALUES = 1 << 24  # weights decoded at once: 64 MB


def multiply(matrix: TernaryMatrix, x: Floats) -> Floats:
    """The product x W^T, x (n, k): float32 (n, m)."""
    m, k = matrix.shape.m, matrix.shape.k
    step = max(1, _ROWS_VALUES // k // 16) * 16
    y = np.empty((len(x), m), np.float32)
    for begin in range(0, m, step):
        end = min(begin + step, m)
        y[:, begin:end] = x @ matrix.values(begin, end).T
    return y


def input_squares(weights: Weights, windows: Sequence[Sequence[int]]) -> Iterator[Squares]:
    """Of each layer and matrix the mean square of its inputs over texts of one length, float32 (k)."""
    squares: dict[str, Floats] = {}

    def linear(role: str, matrix: TernaryMatrix, x: Floats) -> Floats:
        squares[role] = np.square(x).mean(axis=0)
        return multiply(matrix, x)

    x = weights.embedding.gather(np.array(windows, np.int32).reshape(-1)).astype(np.float32)
    for index in range(weights.config.layers):
        x = run_layer(weights, index, x, len(windows), linear)
        yield dict(squares)


def run_layer(weights: Weights, index: int, x: Floats, texts: int, linear: Linear) -> Floats:
    """The residual stream float32 (texts * n, hidden) after a layer, of ``texts`` texts of n tokens."""
    c, layer, eps = weights.config, weights.layers[index], weights.config.norm_eps
    n = len(x) // texts
    qkv = linear("qkv", layer.qkv, _norm(x, layer.attn_norm, eps)).reshape(texts, n, -1, c.head_dim)
    q, k, v = (part.swapaxes(1, 2) for part in np.split(qkv, [c.heads, c.heads + c.kv_heads], axis=2))
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = _norm(q, layer.q_norm, eps), _norm(k, layer.k_norm, eps)
    attended = _attend(_rope(q, c), _rope(k, c), v, c.windows[index] if c.windows else 0)
    attended = attended.swapaxes(1, 2).reshape(texts * n, c.q_rows)
    if layer.attn_sub_norm is not None:
        attended = _norm(attended, layer.attn_sub_norm, eps)
    x = x + linear("o", layer.o, attended)
    gate, up = np.split(linear("gate_up", layer.gate_up, _norm(x, layer.ffn_norm, eps)), 2, axis=1)
    with np.errstate(over="ignore"):
        inner = (gate / (1 + np.exp(-gate)) if c.activation == "silu" else np.maximum(gate, 0) ** 2) * up
    if layer.ffn_sub_norm is not None:
        inner = _norm(inner, layer.ffn_sub_norm, eps)
    return x + linear("down", layer.down, inner)


def logits(weights: Weights, x: Floats) -> Floats:
    """float32 (n, vocab) of the residual stream (n, hidden) behind the last layer."""
    normed = _norm(x, weights.final_norm, weights.config.norm_eps)
    return normed @ weights.output.rows(0, weights.config.vocab).T


def _norm(x: Floats, weight: Floats, eps: float) -> Floats:
    normed: Floats = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed


def _rope(x: Floats, config: ModelConfig) -> Floats:
    """Of x (texts, heads, n, head_dim) the pairs (i, i + head_dim / 2) turned by position * frequency."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_divisors is not None:
        frequency = frequency / config.rope_divisors
    angle = np.arange(x.shape[2])[:, None] * frequency
    cos, sin = ((f(angle) * config.rope_scale).astype(np.float32) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attend(q: Floats, k: Floats, v: Floats, window: int) -> Floats:
    """Causal attention, to a window or (0) all: q (texts, heads, n, head_dim), k and v with kv_heads -> q."""
    heads, n = q.shape[1], q.shape[2]
    seen = np.tri(n, dtype=bool) & ~np.tri(n, k=-(window or n), dtype=bool)
    hidden = np.where(seen, np.float32(0), np.float32(-np.inf))
    out: NDArray[np.float32] = np.empty_like(q)
    for text in range(len(q)):  # a text at a time: scores are heads * n * n floats
        keys, values = (each[text].repeat(heads // k.shape[1], axis=0) for each in (k, v))
        scores = q[text] @ keys.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[3])) + hidden
        shares: NDArray[np.float32] = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[text] = shares / shares.sum(axis=-1, keepdims=True) @ values
    return out
