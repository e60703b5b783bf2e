"""The weights of a model: its embedding and head, its layers, and what they are together.

Matrices are decoded on demand (`stored_matrix`); dense ones are read row by row here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.quants import DENSE, dequantize
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.ternary import TERNARY, dequantize_blocks


@dataclass(frozen=True)
class DenseMatrix:
    """An embedding or an LM head (rows, cols) in the format of its file.

    ``data`` uint8 (rows, row_bytes) is a view of the mapped file: touching a row reads that row. ``type`` is
    one of quants.DENSE (f32, f16, bf16, q8_0, q6_k, q4_0, q4_1; q4_k and iq4_nl, for embeddings only), or
    ternary in blocks, one of ternary.TERNARY.
    """

    name: str
    type: str
    shape: tuple[int, int]
    data: NDArray[np.uint8] = field(repr=False)

    def __post_init__(self) -> None:
        rows, cols = self.shape
        kind = DENSE.get(self.type) or TERNARY[self.type]
        if self.data.dtype != np.uint8 or self.data.shape != (rows, kind.row_bytes(cols)):
            raise BitgenError(f"{self.name}: {self.data.shape} bytes are not {rows} x {cols} of {self.type}")

    def row(self, i: int) -> Floats:
        """Row i, float32 (cols), dequantised exactly."""
        values: Floats = self.rows(i, i + 1)[0]
        return values

    def rows(self, begin: int, end: int) -> Floats:
        """Rows [begin, end), float32 (end - begin, cols), dequantised exactly."""
        if not 0 <= begin <= end <= self.shape[0]:
            raise BitgenError(f"{self.name}: there are no rows {begin}..{end} in {self.shape[0]}")
        return self._values(self.data[begin:end])

    def gather(self, ids: NDArray[np.integer]) -> Floats:
        """The rows of ``ids``, float32 (len(ids), cols)."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape[0]:
            raise BitgenError(f"token ids must be 0..{self.shape[0] - 1}")
        return self._values(self.data[ids])

    @property
    def is_ternary(self) -> bool:
        """Whether it is ternary in blocks with scales."""
        return self.type in TERNARY

    def _values(self, data: NDArray[np.uint8]) -> Floats:
        if self.is_ternary:
            return dequantize_blocks(self.type, data, self.shape[1], self.name)
        return dequantize(self.type, data, self.shape[1])

    @classmethod
    def of(cls, values: Floats, name: str = "dense") -> DenseMatrix:
        """A float32 matrix in memory: for tests and random models."""
        values = np.ascontiguousarray(values, np.float32)
        rows, cols = values.shape
        return cls(name, "f32", (rows, cols), values.view(np.uint8).reshape(rows, cols * 4))


@dataclass(frozen=True)
class LayerWeights:
    """One block. Matrices that share their input are stacked: they run as one matmul."""

    qkv: TernaryMatrix  # (q_rows + 2 kv_rows, hidden): rows of q, then k, then v
    o: TernaryMatrix  # (hidden, q_rows)
    gate_up: TernaryMatrix  # (2 ffn, hidden): rows of gate, then up
    down: TernaryMatrix  # (hidden, ffn)
    attn_norm: Floats  # (hidden)
    ffn_norm: Floats  # (hidden)
    attn_sub_norm: Floats | None = None  # (q_rows), before o
    ffn_sub_norm: Floats | None = None  # (ffn), before down
    q_norm: Floats | None = None  # (head_dim), of each head of q before RoPE
    k_norm: Floats | None = None  # (head_dim), of each head of k
    q_norm_in: Floats | None = None  # (hidden), of the input of one matrix, as the next four
    k_norm_in: Floats | None = None
    v_norm_in: Floats | None = None
    gate_norm_in: Floats | None = None
    up_norm_in: Floats | None = None

    @classmethod
    def of(cls, matrices: Mapping[str, TernaryMatrix], norms: Mapping[str, Floats]) -> LayerWeights:
        """The layer of the matrices q, k, v, o, gate, up and down."""
        m, stack = matrices, TernaryMatrix.stack
        return cls(stack([m["q"], m["k"], m["v"]]), m["o"], stack([m["gate"], m["up"]]), m["down"], **norms)

    def split(self, config: ModelConfig) -> dict[str, TernaryMatrix]:
        """The matrices one by one, as `of` takes them."""
        q, kv, ffn = config.q_rows, config.kv_rows, config.ffn
        return {
            "q": self.qkv.slice(0, q),
            "k": self.qkv.slice(q, q + kv),
            "v": self.qkv.slice(q + kv, q + 2 * kv),
            "o": self.o,
            "gate": self.gate_up.slice(0, ffn),
            "up": self.gate_up.slice(ffn, 2 * ffn),
            "down": self.down,
        }

    @property
    def matrices(self) -> tuple[TernaryMatrix, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def as_run(self, config: ModelConfig) -> dict[str, TernaryMatrix]:
        """The matrices by the roles of the config's matmuls."""
        parts = self.split(config) if config.input_norms else {}
        return {one.role: parts.get(one.role) or getattr(self, one.role) for one in config.layer_matmuls}


@dataclass(frozen=True)
class Weights:
    """A whole model. ``lm_head`` is None when the embedding serves as it too.

    ``ternary_head`` is the matrix that makes logits once more, where it is ternary: kernels run it.
    """

    config: ModelConfig
    embedding: DenseMatrix  # (vocab, hidden)
    lm_head: DenseMatrix | None  # (vocab, hidden)
    final_norm: Floats  # (hidden)
    layers: tuple[LayerWeights, ...]
    ternary_head: TernaryMatrix | None = None

    def __post_init__(self) -> None:
        # Whether the head is ternary is found in the weights; the config lists what runs.
        config = replace(self.config, ternary_head=self.ternary_head is not None)
        object.__setattr__(self, "config", config)

    def group_of(self, matrix: TernaryMatrix) -> int:
        """The groups in which a matrix runs: its own, else those of the model; 0: a scale a row."""
        return matrix.kernel_group or self.config.group

    @property
    def output(self) -> DenseMatrix:
        """The matrix that makes logits: the LM head, or the embedding where they are tied."""
        return self.embedding if self.lm_head is None else self.lm_head
