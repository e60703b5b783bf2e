"""MiniCPM's scalars: a llama whose embeddings, branches and logits are multiplied by constants.

They are folded into what is read, so that nothing has to know of them when the model runs. RMSNorm does not
see how long the residual stream is, apart from its eps: with x' = x / e the embedding needs no factor,
branches get r / e (in the scales of o and down), and eps becomes eps / e^2; the last norm takes the factor of
the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitgen.formats.config import Floats
from bitgen.formats.source import Settings
from bitgen.formats.stored_matrix import TernaryMatrix

_BASE = 256.0  # the width whose logits are as they are, of files that do not say it


def _positive(settings: Settings, key: str, default: float) -> float:
    value = settings.number(key, default)
    if not 1e-6 < value < 1e6:
        raise settings.error(key, f"is {value:g}, which is no factor")
    return value


@dataclass(frozen=True)
class Scalars:
    """What embeddings, the output of each branch, and logits are multiplied by."""

    embedding: float = 1.0
    branch: float = 1.0
    logits: float = 1.0

    @classmethod
    def of_gguf(cls, keys: Settings, hidden: int, layers: int) -> Scalars:
        """Older files have none of the keys, and the constants of the first MiniCPM."""
        return cls(
            _positive(keys, "embedding_scale", 12.0),
            _positive(keys, "residual_scale", 1.4 / math.sqrt(max(1, layers))),
            1 / _positive(keys, "logit_scale", max(1, hidden) / _BASE),
        )

    @classmethod
    def of_hf(cls, settings: Settings, hidden: int, layers: int) -> Scalars:
        """config.json of MiniCPMForCausalLM."""
        return cls(
            _positive(settings, "scale_emb", 1.0),
            _positive(settings, "scale_depth", 1.0) / math.sqrt(max(1, layers)),
            _positive(settings, "dim_model_base", max(1.0, hidden)) / max(1, hidden),
        )

    def eps(self, eps: float) -> float:
        return eps / self.embedding**2

    def matrices(self, matrices: Mapping[str, TernaryMatrix]) -> dict[str, TernaryMatrix]:
        """Those of a layer, by their roles."""
        factor = np.array([self.branch / self.embedding], np.float32)
        folded = {} if factor[0] == 1 else {role: matrices[role].scaled(factor) for role in ("o", "down")}
        return {**matrices, **folded}

    def final(self, norm: Floats) -> Floats:
        """The last norm."""
        return norm * np.float32(self.logits)
