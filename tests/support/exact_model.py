"""The forward step bit for bit, in numpy float32: the order of every operation as in templates/step.

Of the three oracles this one answers "are these the right bits?": what the engine gives must be equal, on
every ISA level, for every number of threads and every batch. It repeats the engine's order of operations, so
it cannot say that a formula is right; `reference_model` does, and `torch_models` for what transformers runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from float_ops import fma, greater
from numpy.typing import NDArray

from bitgen.families.base import TERNARY
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.weights import Weights
from bitgen.inference.engine import OWN_ACTIVATIONS, inverse_frequencies
from bitgen.reference import (
    coded_int16_linear,
    grouped_int16_linear,
    int16_linear,
    quantize_activations,
    quantize_groups,
    scale_codes,
    scale_groups,
    scale_output,
)
from bitgen.spec import Layout

Floats = NDArray[np.float32]
F = np.float32
CHUNK = 128  # keys of one softmax
GROUP = 32  # of head_dim, that share a scale in 4 bits


def lanes(x: Floats, fill: float = 0.0) -> Floats:
    """(..., k) -> (..., blocks, 16), filled up."""
    k = x.shape[-1]
    padded = np.full((*x.shape[:-1], -(-k // 16) * 16), fill, F)
    padded[..., :k] = x
    return padded.reshape(*x.shape[:-1], -1, 16)


def tree(v: Floats) -> Floats:
    """The sum of the 16 lanes of the last axis."""
    for half in (8, 4, 2, 1):
        v = v[..., :half] + v[..., half : 2 * half]
    return v[..., 0]


def dot(a: Floats, b: Floats) -> Floats:
    """Sums of a * b over the last axis: 16 lanes in the order of k, then their tree."""
    x, y = np.broadcast_arrays(lanes(a), lanes(b))
    total = np.zeros((*x.shape[:-2], 16), F)
    for i in range(x.shape[-2]):
        total = fma(x[..., i, :], y[..., i, :], total)
    return tree(total)


def exponential(x: Floats) -> Floats:
    y = greater(np.full_like(x, -87), x)
    n = np.rint(y * F(1.44269504088896341))
    r = fma(n, np.full_like(n, 2.12194440e-4), fma(n, np.full_like(n, -0.693359375), y))
    p = np.full_like(r, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, np.full_like(r, c))
    p = fma(p, r * r, r) + F(1)
    return np.where(x < -87, F(0), p * np.ldexp(F(1), n.astype(np.int32)))


def norm(x: Floats, weight: Floats, eps: float) -> Floats:
    mean = dot(x, x) / F(x.shape[-1])
    normed: Floats = (x * (F(1) / np.sqrt(mean + F(eps)))[..., None]) * weight
    return normed


Steps = dict[str, NDArray[np.int8]]  # "3.qkv" -> the quantised input (n, k) of that BitLinear


def linear(matrix: TernaryMatrix, x: Floats, steps: Steps, name: str, group: int) -> Floats:
    if group:
        xq, scale = quantize_groups(x, group)
        steps[name] = xq
        if matrix.weights != TERNARY:
            codes = matrix.coded(0, matrix.shape.m, group)
            return scale_codes(xq, codes, scale, Layout(matrix.weights, 16, group))
        return scale_groups(
            xq, matrix.rows(0, matrix.shape.m), scale, matrix.scales(0, matrix.shape.m, group), group
        )
    xq, scale = quantize_activations(x)
    steps[name] = xq
    acc = (xq.astype(np.float64) @ matrix.rows(0, matrix.shape.m).T.astype(np.float64)).astype(np.int32)
    return scale_output(acc, scale, np.broadcast_to(matrix.scale, (matrix.shape.m,)))


def linear_int16(matrix: TernaryMatrix, x: Floats, group: int) -> Floats:
    m = matrix.shape.m
    if matrix.weights != TERNARY:
        return coded_int16_linear(x, matrix.coded(0, m, group), Layout(matrix.weights, 16, group))
    if group:
        return grouped_int16_linear(x, matrix.rows(0, m), matrix.scales(0, m, group), group)
    return int16_linear(x, matrix.rows(0, m), np.broadcast_to(matrix.scale, (m,)))


def gate(gate_up: Floats, activation: str) -> Floats:
    g, up = np.split(gate_up, 2, axis=1)
    if activation == "relu2":
        positive = greater(np.zeros_like(g), g)
        return positive * positive * up
    return g / (F(1) + exponential(F(0) - greater(np.full_like(g, -88), g))) * up


def rotate(x: Floats, turn: tuple[Floats, Floats], scale: np.float32) -> Floats:
    """x (n, heads, head_dim), turn: cosines and sines (n, half)."""
    c, s = (t[:, None, :] for t in turn)
    a, b = np.split(x, 2, axis=2)
    return np.concatenate([(a * c - b * s) * scale, (b * c + a * s) * scale], axis=2)


def kept(x: Floats, kv: str) -> tuple[Floats, Floats]:
    """Keys or values (n, heads, head_dim) as the cache holds them, and their scales (n, heads, groups)."""
    ones = np.ones((*x.shape[:2], 1), F)
    if kv == "f32":
        return x, ones
    if kv == "f16":
        return x.astype(np.float16).astype(F), ones
    if kv == "q8":
        q, scale = quantize_activations(x.reshape(-1, x.shape[2]))
        return q.astype(F).reshape(x.shape), scale.reshape(*x.shape[:2], 1)
    codes, scales = zip(*(four_bits(x[..., d : d + GROUP]) for d in range(0, x.shape[2], GROUP)), strict=True)
    return np.concatenate(codes, axis=2), np.concatenate(scales, axis=2)


def four_bits(x: Floats) -> tuple[Floats, Floats]:
    """A group (n, heads, up to 32) as codes -8 .. 7 and scales (n, heads, 1); what is largest becomes -8."""
    top, low = np.maximum(x.max(axis=2), F(0)), np.maximum((F(0) - x).max(axis=2), F(0))
    scale = (np.where(top >= low, -top, low) * F(0.125)).astype(np.float16).astype(F)[..., None]
    with np.errstate(divide="ignore"):
        step = np.where(scale == 0, F(0), F(1) / scale)
    return np.clip(np.rint(x * step), -8, 7).astype(F), scale


def attention(
    q: Floats, keys: tuple[Floats, Floats], values: tuple[Floats, Floats], window: int = 0
) -> Floats:
    """q (n, heads, head_dim), already scaled, over one sequence from position 0 on: (n, heads, head_dim).

    ``window``: of so many positions, the last of them its own; 0: of all.
    """
    at = np.arange(len(q))
    first = np.maximum(0, at + 1 - window) if window else np.zeros_like(at)
    n, heads, hd = q.shape
    k, k_scale, v, v_scale = (a.repeat(heads // a.shape[1], axis=1) for a in (*keys, *values))
    k_group = GROUP if k_scale.shape[2] > 1 else hd
    v_scale = v_scale.repeat(GROUP if v_scale.shape[2] > 1 else hd, axis=2)[..., :hd]
    most = np.full((n, heads), -np.inf, F)
    total, out = np.zeros((n, heads), F), np.zeros((n, heads, hd), F)
    for begin in range(0, n, CHUNK):
        part = slice(begin, min(begin + CHUNK, n))
        score = np.zeros((n, heads, part.stop - begin), F)
        for group in range(k_scale.shape[2]):
            sums = np.zeros_like(score)
            for d in range(group * k_group, min((group + 1) * k_group, hd)):
                key = k[None, part, :, d].swapaxes(1, 2)
                sums = fma(np.broadcast_to(q[:, :, d, None], sums.shape), key, sums)
            scales = np.broadcast_to(k_scale[None, part, :, group].swapaxes(1, 2), sums.shape)
            score = fma(sums, scales, score)
        key_at = np.arange(begin, part.stop)
        seen = (key_at <= at[:, None]) & (key_at >= first[:, None])
        score = np.where(seen[:, None, :], score, F(-np.inf))
        rows = seen.any(axis=1)  # the others see nothing of this chunk
        top = score[rows].max(axis=2)
        p = exponential(score[rows] - top[..., None])
        blocks = lanes(p)
        sums = np.zeros((*p.shape[:2], 16), F)
        for i in range(blocks.shape[2]):
            sums = sums + blocks[:, :, i]
        chunk_total = tree(sums)
        product = np.zeros((*p.shape[:2], hd), F)
        for i in range(p.shape[2]):
            scaled = p[:, :, i, None] * v_scale[None, begin + i]
            product = fma(scaled, np.broadcast_to(v[None, begin + i], product.shape), product)
        larger = greater(most[rows], top)
        a, b = exponential(most[rows] - larger), exponential(top - larger)
        most[rows] = larger
        total[rows] = fma(total[rows], a, chunk_total * b)
        out[rows] = fma(out[rows], np.broadcast_to(a[..., None], product.shape), product * b[..., None])
    return out / total[..., None]


def exact_logits(
    weights: Weights, ids: Any, kv: str = "f16", steps: Steps | None = None, activations: str | None = None
) -> Floats:
    """Logits float32 (len(ids), vocab) of one text; ``steps`` gets what a BitLinear multiplied in int8."""
    mode = activations or OWN_ACTIVATIONS
    with np.errstate(all="ignore"):
        return _logits(weights, np.asarray(ids), kv, {} if steps is None else steps, mode)


def _logits(weights: Weights, ids: NDArray[np.int64], kv: str, steps: Steps, activations: str) -> Floats:
    c, n = weights.config, len(ids)
    angle = (np.arange(n, dtype=F)[:, None] * inverse_frequencies(c)).astype(np.float64)
    turn = np.cos(angle).astype(F) * F(c.rope_scale), np.sin(angle).astype(F) * F(c.rope_scale)
    x = weights.embedding.gather(ids)

    def multiply(matrix: TernaryMatrix, x: Floats, name: str) -> Floats:
        group = weights.group_of(matrix)
        if activations == "int16":
            return linear_int16(matrix, x, group)
        return linear(matrix, x, steps, name, group)

    def multiply_apart(parts: str, x: Floats, number: int) -> Floats:
        """Matrices of one input, each with a norm of its own."""
        layer, outputs = weights.layers[number], []
        for role in parts.split():
            own = norm(x, getattr(layer, f"{role}_norm_in"), c.norm_eps)
            outputs.append(multiply(layer.split(c)[role], own, f"{number}.{role}"))
        return np.concatenate(outputs, axis=1)

    for number, layer in enumerate(weights.layers):
        shared = norm(x, layer.attn_norm, c.norm_eps)
        if c.input_norms:
            qkv = multiply_apart("q k v", shared, number)
        else:
            qkv = multiply(layer.qkv, shared, f"{number}.qkv")
        q, k, v = np.split(qkv, [c.q_rows, c.q_rows + c.kv_rows], axis=1)
        q, k = q.reshape(n, c.heads, -1), k.reshape(n, c.kv_heads, -1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = norm(q, layer.q_norm, c.norm_eps), norm(k, layer.k_norm, c.norm_eps)
        q = rotate(q, turn, F(1) / F(np.sqrt(c.head_dim)))
        k = rotate(k, turn, F(1))
        window = c.windows[number] if c.windows else 0
        inner = attention(q, kept(k, kv), kept(v.reshape(n, c.kv_heads, -1), kv), window).reshape(n, -1)
        if layer.attn_sub_norm is not None:
            inner = norm(inner, layer.attn_sub_norm, c.norm_eps)
        x = x + multiply(layer.o, inner, f"{number}.o")
        shared = norm(x, layer.ffn_norm, c.norm_eps)
        if c.input_norms:
            gate_up = multiply_apart("gate up", shared, number)
        else:
            gate_up = multiply(layer.gate_up, shared, f"{number}.gate_up")
        inner = gate(gate_up, c.activation)
        if layer.ffn_sub_norm is not None:
            inner = norm(inner, layer.ffn_sub_norm, c.norm_eps)
        x = x + multiply(layer.down, inner, f"{number}.down")
    x = norm(x, weights.final_norm, c.norm_eps)
    if weights.ternary_head is not None:
        return multiply(weights.ternary_head, x, "head")
    return np.stack([dot(weights.output.rows(0, c.vocab), row) for row in x])
