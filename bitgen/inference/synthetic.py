"""Models of random weights: to time a preset's shape without a file, and to test on.

Small matrices are random throughout; large ones repeat a random block of rows, because how fast a kernel
runs does not depend on the weights, and three billion random numbers take a while.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitgen.formats.architectures import matrices_of, norms_of
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.weights import DenseMatrix, LayerWeights, TernaryMatrix, Weights
from bitgen.spec import Shape

_BLOCK = 1 << 20  # random weights a matrix


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights of a model that says nothing: a third of them zero, scaled so that activations stay near 1.

    The embedding and the LM head are f16.
    """
    rng = np.random.default_rng(seed)

    def norm(size: int) -> Floats:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    def layer() -> LayerWeights:
        matrices = {role: _ternary(rng, *t.shape(config)) for role, t in matrices_of(config).items()}
        return LayerWeights.of(
            matrices, {field: norm(*t.shape(config)) for field, t in norms_of(config).items()}
        )

    return Weights(
        config=config,
        embedding=_dense(rng, config.vocab, config.hidden),
        lm_head=None if config.tied_head else _dense(rng, config.vocab, config.hidden),
        final_norm=norm(config.hidden),
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
