"""Models of random weights: to time a preset's shape without a file, and to test on.

Small matrices are random throughout; large ones repeat a random block of rows, because how fast a kernel
runs does not depend on the weights, and three billion random numbers take a while.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitgen.families.base import TERNARY as TERNARY_WEIGHTS
from bitgen.families.base import Codes
from bitgen.formats.architectures import matrices_of, norms_of
from bitgen.formats.coded import IQ4_NL
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.matrices import ternary_head
from bitgen.formats.ternary import TERNARY, encode_blocks
from bitgen.formats.weights import (
    CodedMatrix,
    DenseMatrix,
    GroupScales,
    LayerWeights,
    TernaryMatrix,
    Weights,
)
from bitgen.spec import EVERY_FAMILY, Shape

_BLOCK = 1 << 20  # random weights a matrix
_TERNARY = "pq2_0"  # of an embedding whose matrices run in groups


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights of a model that says nothing: a third of them zero, scaled so that activations stay near 1.

    The embedding and the LM head are f16, or as Ternary Bonsai has them where the model runs in groups that
    they are whole blocks of.
    """
    rng = np.random.default_rng(seed)

    def norm(size: int) -> Floats:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    def layer() -> LayerWeights:
        matrices = {
            role: _ternary(rng, t.shape(config), config.group)
            if config.weights == TERNARY_WEIGHTS
            else _coded(rng, t.shape(config), config)
            for role, t in matrices_of(config).items()
        }
        return LayerWeights.of(
            matrices, {field: norm(*t.shape(config)) for field, t in norms_of(config).items()}
        )

    is_ternary = config.weights == TERNARY_WEIGHTS and config.group == TERNARY[_TERNARY].block
    is_ternary = is_ternary and config.hidden % config.group == 0
    dense = _ternary_rows if is_ternary else _dense
    embedding = dense(rng, config.vocab, config.hidden)
    lm_head = None if config.tied_head else dense(rng, config.vocab, config.hidden)
    head = embedding if lm_head is None else lm_head
    return Weights(
        config=config,
        embedding=embedding,
        lm_head=lm_head,
        final_norm=norm(config.hidden),
        layers=tuple(layer() for _ in range(config.layers)),
        ternary_head=ternary_head(head, 0),
    )


def _ternary(rng: np.random.Generator, shape: tuple[int, ...], group: int) -> TernaryMatrix:
    m, k = shape
    rows = max(1, min(m, _BLOCK // k))
    block = rng.integers(-1, 2, (rows, k), dtype=np.int8)
    size = (rows, -(-k // group)) if group else 1
    scale = (rng.uniform(0.8, 1.2, size) / np.sqrt(k * 2 / 3)).astype(np.float32)

    def decode(begin: int, end: int) -> NDArray[np.int8]:
        return block[np.arange(begin, end) % rows]

    def scales(begin: int, end: int) -> Floats:
        some: Floats = halves[np.arange(begin, end) % rows]
        return some

    halves = scale.astype(np.float16).astype(np.float32)  # as files have them
    groups = GroupScales(lambda: group, scales) if group else None
    return TernaryMatrix("random", Shape(m, k), decode, lambda: scale, groups)


def _coded(rng: np.random.Generator, shape: tuple[int, ...], config: ModelConfig) -> CodedMatrix:
    m, k = shape
    rows, family = max(1, min(m, _BLOCK // k)), EVERY_FAMILY[config.weights]
    block = rng.integers(0, 16, (rows, k), dtype=np.uint8)
    table = np.array([IQ4_NL], np.int8) if family.by_table else None
    values = np.arange(16) - 7.5 if table is None else np.array(IQ4_NL, np.float64)
    size = (rows, -(-k // config.group))
    scale = rng.uniform(0.8, 1.2, size) / np.sqrt(k * np.mean(np.square(values)))
    halves = scale.astype(np.float16).astype(np.float32)
    offsets = (halves * -7.5).astype(np.float16).astype(np.float32)

    def read(begin: int, end: int) -> Codes:
        at = np.arange(begin, end) % rows
        return Codes(block[at], halves[at], offsets[at] if family.scales > 1 else None, table)

    return CodedMatrix.make("random", Shape(m, k), config.weights, config.group, read)


def _ternary_rows(rng: np.random.Generator, rows: int, cols: int) -> DenseMatrix:
    some = min(rows, max(1, _BLOCK // cols))
    w = rng.integers(-1, 2, (some, cols), dtype=np.int8)
    scale = rng.uniform(0.8, 1.2, (some, cols // TERNARY[_TERNARY].block)).astype(np.float32)
    block = encode_blocks(_TERNARY, w, scale)
    return DenseMatrix("random", _TERNARY, (rows, cols), np.resize(block, (rows, block.shape[1])))


def _dense(rng: np.random.Generator, rows: int, cols: int) -> DenseMatrix:
    block = rng.standard_normal(min(rows * cols, _BLOCK), np.float32).astype("<f2")
    values = np.resize(block, (rows, cols))
    return DenseMatrix("random", "f16", (rows, cols), values.view(np.uint8).reshape(rows, 2 * cols))
