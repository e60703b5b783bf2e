"""Texts of random tokens, and an engine that computes them piece by piece."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitgen.formats.config import ModelConfig
from bitgen.inference.engine import Engine


def ids_of(config: ModelConfig, n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, config.vocab, n).tolist()  # type: ignore[no-any-return]


def feed(engine: Engine, ids: list[int], cuts: list[int] | None = None, sequence: int = 0) -> Any:
    """Logits of a text that goes in by pieces."""
    parts, at = [], engine.lengths[sequence]
    for n in cuts or [len(ids)]:
        part, ids = ids[:n], ids[n:]
        positions = np.arange(at, at + len(part), dtype=np.int32)
        where = np.full(len(part), sequence, np.int32)
        parts.append(engine.forward(np.array(part, np.int32), positions, where, np.ones(len(part), bool)))
        at += len(part)
    return np.concatenate(parts)
