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
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.matrices import ONE_BIT, ternary_head
from bitgen.formats.quants import IQ4_NL
from bitgen.formats.stored_matrix import BINARY, CodedMatrix, GroupScales, TernaryMatrix
from bitgen.formats.ternary import TERNARY, encode_blocks
from bitgen.formats.weights import DenseMatrix, LayerWeights, Weights
from bitgen.spec import EVERY_FAMILY, Shape

_BLOCK = 1 << 20  # random weights a matrix
# Of an embedding whose matrices run in groups of 128: as Bonsai has it.
_EMBEDDINGS = {TERNARY_WEIGHTS: "pq2_0", BINARY: ONE_BIT}


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
            role: random_matrix(rng, Shape(*t.shape(config)), config)
            for role, t in matrices_of(config).items()
        }
        return LayerWeights.of(
            matrices, {field: norm(*t.shape(config)) for field, t in norms_of(config).items()}
        )

    kind = _EMBEDDINGS.get(config.weights, "f16")
    if kind == "f16" or config.group != TERNARY[kind].block or config.hidden % config.group:
        kind = "f16"
    embedding = _rows(rng, config.vocab, config.hidden, kind)
    lm_head = None if config.tied_head else _rows(rng, config.vocab, config.hidden, kind)
    head = embedding if lm_head is None else lm_head
    return Weights(
        config=config,
        embedding=embedding,
        lm_head=lm_head,
        final_norm=norm(config.hidden),
        layers=tuple(layer() for _ in range(config.layers)),
        ternary_head=ternary_head(head, 0, binary=config.weights == BINARY),
    )


def random_matrix(rng: np.random.Generator, shape: Shape, config: ModelConfig) -> TernaryMatrix:
    """One of a model's matrices, of any shape."""
    make = _ternary if config.weights in _EMBEDDINGS else _coded
    return make(rng, shape, config)


def _signs(rng: np.random.Generator, size: tuple[int, int], *, binary: bool) -> NDArray[np.int8]:
    """-1, 0 and 1, or -1 and 1."""
    return 2 * rng.integers(0, 2, size, dtype=np.int8) - 1 if binary else rng.integers(-1, 2, size, np.int8)


def _ternary(rng: np.random.Generator, shape: Shape, config: ModelConfig) -> TernaryMatrix:
    (m, k), group, binary = (shape.m, shape.k), config.group, config.weights == BINARY
    rows = max(1, min(m, _BLOCK // k))
    block = _signs(rng, (rows, k), binary=binary)
    size = (rows, -(-k // group)) if group else 1
    scale = (rng.uniform(0.8, 1.2, size) / np.sqrt(k * 2 / 3)).astype(np.float32)

    def decode(begin: int, end: int) -> NDArray[np.int8]:
        return block[np.arange(begin, end) % rows]

    def scales(begin: int, end: int) -> Floats:
        some: Floats = halves[np.arange(begin, end) % rows]
        return some

    halves = scale.astype(np.float16).astype(np.float32)  # as files have them
    groups = GroupScales(lambda: group, scales) if group else None
    return TernaryMatrix("random", shape, decode, lambda: scale, groups, binary=binary)


def _coded(rng: np.random.Generator, shape: Shape, config: ModelConfig) -> CodedMatrix:
    m, k = shape.m, shape.k
    rows, family = max(1, min(m, _BLOCK // k)), EVERY_FAMILY[config.weights]
    block = rng.integers(0, family.codes, (rows, k), dtype=np.uint8)
    table = np.array([IQ4_NL], np.int8) if family.by_table else None
    values = np.arange(16) - 7.5 if table is None else np.array(IQ4_NL[: family.codes], np.float64)
    size = (rows, -(-k // config.group))
    scale = rng.uniform(0.8, 1.2, size) / np.sqrt(k * np.mean(np.square(values)))
    halves = scale.astype(np.float16).astype(np.float32)
    offsets = (halves * -7.5).astype(np.float16).astype(np.float32)

    def read(begin: int, end: int) -> Codes:
        at = np.arange(begin, end) % rows
        return Codes(block[at], halves[at], offsets[at] if family.scales > 1 else None, table)

    return CodedMatrix.make("random", shape, config.weights, config.group, read)


def _rows(rng: np.random.Generator, rows: int, cols: int, kind: str) -> DenseMatrix:
    """An embedding or a head: f16, or ternary in blocks."""
    if kind == "f16":
        return _dense(rng, rows, cols)
    some = min(rows, max(1, _BLOCK // cols))
    w = _signs(rng, (some, cols), binary=kind == ONE_BIT)
    scale = rng.uniform(0.8, 1.2, (some, cols // TERNARY[kind].block)).astype(np.float32)
    block = encode_blocks(kind, w, scale)
    return DenseMatrix("random", kind, (rows, cols), np.resize(block, (rows, block.shape[1])))


def _dense(rng: np.random.Generator, rows: int, cols: int) -> DenseMatrix:
    block = rng.standard_normal(min(rows * cols, _BLOCK), np.float32).astype("<f2")
    values = np.resize(block, (rows, cols))
    return DenseMatrix("random", "f16", (rows, cols), values.view(np.uint8).reshape(rows, 2 * cols))
