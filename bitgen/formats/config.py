"""What a model is, apart from its weights: sizes, positions, activation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError

Floats: TypeAlias = NDArray[np.float32]
Activation: TypeAlias = Literal["silu", "relu2"]

# Far above every model there is: a damaged file must not talk the loop into absurd allocations.
_SIZE_MAX = 1 << 24
_HEAD_DIM_MAX = 1 << 14


def printable(text: str) -> str:
    """``text`` without characters that could steer a terminal or that no encoding can write."""
    return "".join(c if c.isprintable() else "?" for c in text)


def check_head_dim(head_dim: int, where: str) -> int:
    """``head_dim`` when it is one; tables of its size are made before a ModelConfig can check it."""
    if not 2 <= head_dim <= _HEAD_DIM_MAX:
        raise FileError(f"{where}: heads of {head_dim} are not possible")
    return head_dim


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of a decoder-only transformer with ternary matrices.

    Rows of q and k are always in the rotate-half convention, whatever the file holds: RoPE turns the pairs
    (i, i + head_dim / 2) by position * rope_theta^(-2 i / head_dim) / rope_factors[i].
    FileError when the numbers make no model.
    """

    architecture: str  # as the file names it: bitnet, bitnet-25, bitnet-b1.58, llama
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int  # the largest number of positions the model was made for
    rope_theta: float
    activation: Activation
    sub_norms: bool  # an RMSNorm before the matrices o and down
    norm_eps: float
    tied_head: bool  # logits = embedding @ x
    name: str = ""
    qk_norm: bool = False
    rope_factors: Floats | None = field(default=None, compare=False)  # (head_dim / 2), divide the frequencies

    def __post_init__(self) -> None:
        for size in ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "context"):
            value = getattr(self, size)
            if not 1 <= value <= _SIZE_MAX:
                raise self._wrong(f"{size} is {value}")
        if self.heads % self.kv_heads:
            raise self._wrong(f"{self.heads} heads cannot share {self.kv_heads} key-value heads")
        if self.head_dim % 2:
            raise self._wrong(f"head_dim is {self.head_dim}, an odd number that RoPE cannot turn in pairs")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
            raise self._wrong(f"rope_theta is {self.rope_theta}")
        if not 0 <= self.norm_eps <= 1:
            raise self._wrong(f"norm_eps is {self.norm_eps}")
        if self.activation not in ("silu", "relu2"):
            raise self._wrong(f"the activation {self.activation!r} is not supported (silu, relu2 are)")
        factors = self.rope_factors
        if factors is not None and not (
            factors.shape == (self.head_dim // 2,) and np.isfinite(factors).all() and (factors > 0).all()
        ):
            raise self._wrong(f"the RoPE factors must be {self.head_dim // 2} positive numbers")

    def _wrong(self, what: str) -> BitgenError:
        return FileError(f"this {self.architecture} model cannot be run: {what}")

    @property
    def q_rows(self) -> int:
        """Rows of q, columns of o: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of k and of v: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim
