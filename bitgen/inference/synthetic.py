"""Models of random weights: to time a preset's shape without a file, and to test on.

Small matrices are random throughout; large ones repeat a random block of rows, because how fast a kernel
runs does not depend on the weights, and three billion random numbers take a while.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitgen.config import ModelPreset
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.weights import DenseMatrix, LayerWeights, TernaryMatrix, Weights
from bitgen.spec import Shape

_BLOCK = 1 << 20  # random weights a matrix


def config_of(preset: ModelPreset, *, layers: int | None = None, context: int = 4096) -> ModelConfig:
    """The model of a preset; ``layers`` for one with fewer of them."""
    return ModelConfig(
        architecture=preset.architecture,
        name=preset.name,
        hidden=preset.hidden,
        ffn=preset.ffn,
        layers=layers or preset.layers,
        heads=preset.heads,
        kv_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        vocab=preset.vocab,
        context=context,
        rope_theta=preset.rope_theta,
        activation=preset.activation,
        sub_norms=preset.sub_norms,
        norm_eps=preset.norm_eps,
        tied_head=preset.tied_head,
    )


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights of a model that says nothing: a third of them zero, scaled so that activations stay near 1.

    The embedding and the head are f16.
    """
    rng = np.random.default_rng(seed)
    q, kv, hidden, ffn = config.q_rows, config.kv_rows, config.hidden, config.ffn

    def norm(size: int) -> Floats:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    def layer() -> LayerWeights:
        stack = TernaryMatrix.stack
        return LayerWeights(
            qkv=stack([_ternary(rng, m, hidden) for m in (q, kv, kv)]),
            o=_ternary(rng, hidden, q),
            gate_up=stack([_ternary(rng, ffn, hidden) for _ in range(2)]),
            down=_ternary(rng, hidden, ffn),
            attn_norm=norm(hidden),
            ffn_norm=norm(hidden),
            attn_sub_norm=norm(q) if config.sub_norms else None,
            ffn_sub_norm=norm(ffn) if config.sub_norms else None,
        )

    return Weights(
        config=config,
        embedding=_dense(rng, config.vocab, hidden),
        head=None if config.tied_head else _dense(rng, config.vocab, hidden),
        final_norm=norm(hidden),
        layers=tuple(layer() for _ in range(config.layers)),
    )


def _ternary(rng: np.random.Generator, m: int, k: int) -> TernaryMatrix:
    rows = max(1, min(m, _BLOCK // k))
    block = rng.integers(-1, 2, (rows, k), dtype=np.int8)
    scale = np.array([rng.uniform(0.8, 1.2) / np.sqrt(k * 2 / 3)], np.float32)

    def decode(begin: int, end: int) -> NDArray[np.int8]:
        return block[np.arange(begin, end) % rows]

    return TernaryMatrix("random", Shape(m, k), decode, lambda: scale)


def _dense(rng: np.random.Generator, rows: int, cols: int) -> DenseMatrix:
    block = rng.standard_normal(min(rows * cols, _BLOCK), np.float32).astype("<f2")
    values = np.resize(block, (rows, cols))
    return DenseMatrix("random", "f16", (rows, cols), values.view(np.uint8).reshape(rows, 2 * cols))
