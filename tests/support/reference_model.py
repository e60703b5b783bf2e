"""A whole model in plain numpy, from the formulas: what a model computes, up to float32 noise.

Of the three oracles this one answers "is it the right formula?", for every architecture, and stands in
for the engine where a test is about what drives it. `exact_model` answers "are these the right bits?",
`torch_models` "does the world agree?", for files and architectures of transformers.

Everything is float64 except what is float32 by definition: the input of a BitLinear, which is rounded to
float32 and quantised as `bitgen.reference` says, and its output. Slow, for small models only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from wanted import answers_wants

from bitgen.formats.config import ModelConfig
from bitgen.formats.quants import DENSE
from bitgen.formats.stored_matrix import CodedMatrix, TernaryMatrix
from bitgen.formats.weights import DenseMatrix, Weights
from bitgen.inference.memory import Memory
from bitgen.reference import quantize_activations, quantize_groups, scale_output

Doubles = NDArray[np.float64]
TIE = 1e-3  # of an int8 step: how far from the middle of two values float32 sums may move an activation


def small_config(**changes: Any) -> ModelConfig:
    """A small model with odd sizes; ``changes`` replace fields."""
    fields: dict[str, Any] = {
        "architecture": "bitnet",
        "hidden": 100,
        "ffn": 150,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "name": "",
        "head_dim": 26,
        "vocab": 97,
        "context": 256,
        "rope_theta": 10000.0,
        "activation": "silu",
        "sub_norms": True,
        "norm_eps": 1e-5,
        "tied_head": True,
    }
    return ModelConfig(**{**fields, **changes})


def random_dense(kind: str, rows: int, cols: int) -> DenseMatrix:
    """Random bytes with scales that are small half floats."""
    rng = np.random.default_rng(3)
    t = DENSE[kind]
    data = rng.integers(0, 256, (rows, cols // t.block, t.block_bytes), dtype=np.uint8)
    small = rng.uniform(-0.02, 0.02, (rows, cols // t.block, 2)).astype("<f2").view(np.uint8)
    if kind in ("f32", "f16", "bf16"):
        values = rng.standard_normal((rows, cols), np.float32)
        as_bf16 = (values.view(np.uint32) >> 16).astype(np.uint16)
        stored = {"f32": values, "f16": values.astype("<f2"), "bf16": as_bf16}[kind]
        return DenseMatrix("dense", kind, (rows, cols), stored.view(np.uint8).reshape(rows, -1))
    for at, which in {"q8_0": [(0, 0)], "q4_0": [(0, 0)], "q4_1": [(0, 0), (2, 1)], "q4_k": [(0, 0), (2, 1)],
                      "q6_k": [(208, 0)]}[kind]:  # fmt: skip
        data[..., at : at + 2] = small[..., 2 * which : 2 * which + 2]
    return DenseMatrix("dense", kind, (rows, cols), data.reshape(rows, -1))


def rms_norm(x: Doubles, weight: NDArray[np.float32], eps: float) -> Doubles:
    """x (n, d) -> x / sqrt(mean(x^2) + eps) * weight (d)."""
    normed: Doubles = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return normed


def rope(x: Doubles, positions: NDArray[np.int32], config: ModelConfig) -> Doubles:
    """x (n, heads, head_dim): the pairs (i, i + head_dim / 2) turned by position * frequency."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-np.arange(half) / half)
    if config.rope_divisors is not None:
        frequency = frequency / config.rope_divisors
    angle = positions[:, None, None] * frequency  # (n, 1, half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle) * config.rope_scale, np.sin(angle) * config.rope_scale
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def activate(gate: Doubles, up: Doubles, activation: str) -> Doubles:
    gated = gate / (1 + np.exp(-gate)) if activation == "silu" else np.maximum(gate, 0) ** 2
    return gated * up


@dataclass
class Step:
    """One BitLinear as it ran: its quantised input and its exact integers."""

    name: str  # "3.qkv"
    xq: NDArray[np.int8]  # (n, k)
    x_scale: NDArray[np.float32]  # (n)
    acc: NDArray[np.int32]  # (n, m)


@dataclass
class ReferenceEngine:
    """The engine's interface over the formulas. ``kv`` f32 keeps keys and values as float32, f16 as float16.

    With ``steps`` a list, every BitLinear is appended to it. ``given``, by the name of a BitLinear, holds
    int8 (n, k) that take the place of the rounded activations, which follows another program's roundings:
    each must be what the activation rounds to, give or take TIE. ``rounds`` False: activations stay floats.
    """

    weights: Weights
    context: int = 256
    max_batch: int = 4
    kv: str = "f32"
    steps: list[Step] | None = None
    given: Mapping[str, NDArray[np.int8]] | None = None
    rounds: bool = True
    calls: list[int] = field(default_factory=list)  # tokens of each forward call
    memory: Memory = field(default_factory=lambda: Memory(0, 0, 0))
    head_bytes: int = 0
    head_error: float = 0.0

    def __post_init__(self) -> None:
        c = self.weights.config
        shape = (self.max_batch, c.layers, self.context, c.kv_heads, c.head_dim)
        dtype = {"f32": np.float32, "f16": np.float16}[self.kv]
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.lengths = [0] * self.max_batch
        self._matrices: dict[int, NDArray[np.float64]] = {}
        self._parts: dict[int, dict[str, TernaryMatrix]] = {}  # kept: `_matrices` knows them by their ids
        self._head = self.weights.output.rows(0, c.vocab).astype(np.float64)

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    @property
    def memory_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @answers_wants
    def forward(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        outputs: NDArray[np.bool_],
    ) -> Any:
        """Logits float32 (outputs.sum(), vocab) of the tokens chosen by ``outputs``."""
        tokens, positions = np.asarray(tokens, np.int32), np.asarray(positions, np.int32)
        self.calls.append(len(tokens))
        for token, position, sequence in zip(tokens, positions, sequences, strict=True):
            assert 0 <= token < self.config.vocab
            assert position == self.lengths[sequence] < self.context, "positions must continue the sequence"
            self.lengths[sequence] += 1
        x = self.weights.embedding.gather(tokens).astype(np.float64)
        for number in range(self.config.layers):
            x = self._layer(number, x, positions, sequences)
        x = rms_norm(x[np.asarray(outputs, bool)], self.weights.final_norm, self.config.norm_eps)
        if self.weights.ternary_head is not None:
            return self._linear("head", self.weights.ternary_head, x).astype(np.float32)
        return (x @ self._head.T).astype(np.float32)

    def truncate(self, sequence: int, length: int) -> None:
        assert 0 <= length <= self.lengths[sequence]
        self.lengths[sequence] = length

    def release(self, sequence: int, length: int) -> None:
        self.truncate(sequence, length)

    def sequence_bytes(self, positions: int) -> int:
        return self.memory_bytes // self.max_batch // self.context * positions

    def copy(self, source: int, target: int, length: int) -> None:
        self.keys[target], self.values[target] = self.keys[source], self.values[source]
        self.lengths[target] = length

    def cached(self, sequence: int) -> bytes:
        n = self.lengths[sequence]
        return self.keys[sequence, :, :n].tobytes() + self.values[sequence, :, :n].tobytes()

    def restore(self, sequence: int, length: int, data: bytes) -> None:
        for part, array in enumerate((self.keys, self.values)):
            half = len(data) // 2
            values = np.frombuffer(data[part * half : (part + 1) * half], array.dtype)
            array[sequence, :, :length] = values.reshape(array[sequence, :, :length].shape)
        self.lengths[sequence] = length

    def close(self) -> None:
        """Nothing to free."""

    def _layer(self, number: int, x: Doubles, positions: Any, sequences: Any) -> Doubles:
        c, layer, eps = self.config, self.weights.layers[number], self.config.norm_eps
        n = len(x)
        qkv = self._shared(number, "qkv", "q k v", rms_norm(x, layer.attn_norm, eps))
        q, k, v = np.split(qkv, [c.q_rows, c.q_rows + c.kv_rows], axis=1)
        q, k = q.reshape(n, c.heads, c.head_dim), k.reshape(n, c.kv_heads, c.head_dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
        q, k = rope(q, positions, c), rope(k, positions, c)
        self.keys[sequences, number, positions] = k
        self.values[sequences, number, positions] = v.reshape(n, c.kv_heads, c.head_dim)
        rows = [self._attend(number, *each) for each in zip(q, positions, sequences, strict=True)]
        attended = np.stack(rows).reshape(n, c.q_rows)
        if layer.attn_sub_norm is not None:
            attended = rms_norm(attended, layer.attn_sub_norm, eps)
        x = x + self._linear(f"{number}.o", layer.o, attended)
        gate_up = self._shared(number, "gate_up", "gate up", rms_norm(x, layer.ffn_norm, eps))
        inner = activate(gate_up[:, : c.ffn], gate_up[:, c.ffn :], c.activation)
        if layer.ffn_sub_norm is not None:
            inner = rms_norm(inner, layer.ffn_sub_norm, eps)
        return x + self._linear(f"{number}.down", layer.down, inner)

    def _shared(self, number: int, stack: str, parts: str, x: Doubles) -> Doubles:
        """The outputs of matrices that share an input: stacked, or each with a norm of its own before it."""
        layer, config = self.weights.layers[number], self.config
        if not config.input_norms:
            return self._linear(f"{number}.{stack}", getattr(layer, stack), x)
        matrices = self._parts.setdefault(number, layer.split(config))
        outputs = [
            self._linear(
                f"{number}.{role}",
                matrices[role],
                rms_norm(x, getattr(layer, f"{role}_norm_in"), config.norm_eps),
            )
            for role in parts.split()
        ]
        return np.concatenate(outputs, axis=1)

    def _attend(self, number: int, q: Doubles, position: int, sequence: int) -> Doubles:
        """q (heads, head_dim) over keys and values up to its position, in its window -> the same shape."""
        group = self.config.heads // self.config.kv_heads
        window = self.config.windows[number] if self.config.windows else 0
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        keys = self.keys[sequence, number, seen].astype(np.float64).repeat(group, axis=1)
        values = self.values[sequence, number, seen].astype(np.float64).repeat(group, axis=1)
        scores = np.einsum("hd,phd->hp", q, keys) / np.sqrt(self.config.head_dim)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        mixed: Doubles = np.einsum("hp,phd->hd", shares, values)
        return mixed

    def _linear(self, name: str, matrix: TernaryMatrix, x: Doubles) -> Doubles:
        if not self.rounds:
            product: Doubles = x @ matrix.values(0, matrix.shape.m).astype(np.float64).T
            return product
        if group := self.weights.group_of(matrix):
            return self._in_groups(name, matrix, x, group)
        xq, x_scale = quantize_activations(x.astype(np.float32))
        if self.given is not None:
            off = np.abs(x / x_scale[:, None] - self.given[name]).max()
            assert off < 0.5 + TIE, f"{name}: an activation is {off} from its int8 value"
            xq = self.given[name]
        w = self._matrices.get(id(matrix))
        if w is None:
            w = self._matrices[id(matrix)] = matrix.rows(0, matrix.shape.m).astype(np.float64)
        acc = (xq.astype(np.float64) @ w.T).astype(np.int32)
        if self.steps is not None:
            self.steps.append(Step(name, xq, x_scale, acc))
        return scale_output(acc, x_scale, np.broadcast_to(matrix.scale, (matrix.shape.m,))).astype(np.float64)

    def _in_groups(self, name: str, matrix: TernaryMatrix, x: Doubles, group: int) -> Doubles:
        """The product of the weights, each times its scale, with the activations rounded in groups."""
        (m, k), n = (matrix.shape.m, matrix.shape.k), len(x)
        xq, x_scale = quantize_groups(x.astype(np.float32), group)
        steps = np.repeat(x_scale, group, axis=1)[:, :k].astype(np.float64)
        if self.given is not None:
            off = np.abs(x / steps - self.given[name][-n:]).max()
            assert off < 0.5 + TIE, f"{name}: an activation is {off} from its int8 value"
            xq = self.given[name][-n:]
        if isinstance(matrix, CodedMatrix):
            coded: Doubles = (xq * steps) @ matrix.values(0, m).astype(np.float64).T
            return coded
        scales = np.repeat(matrix.scales(0, m, group), group, axis=1)[:, :k].astype(np.float64)
        product: Doubles = (xq * steps) @ (matrix.rows(0, m) * scales).T
        return product


def logits_of(weights: Weights, ids: Sequence[int], **options: Any) -> NDArray[np.float32]:
    """Logits float32 (len(ids), vocab) of one text."""
    n = len(ids)
    engine = ReferenceEngine(weights, context=n, max_batch=1, **options)
    logits: NDArray[np.float32] = engine.forward(
        np.asarray(ids, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.int32), np.ones(n, bool)
    )
    return logits
