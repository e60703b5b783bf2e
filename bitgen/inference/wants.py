"""What a token's row of a forward pass may be asked for, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
Mask: TypeAlias = NDArray[np.uint32]  # a bit a token: id % 32 of word id / 32


def pack_mask(allowed: NDArray[np.bool_]) -> Mask:
    """A mask of bool (vocab)."""
    padded = np.zeros(-(-len(allowed) // 32) * 32, np.bool_)
    padded[: len(allowed)] = allowed
    return np.packbits(padded, bitorder="little").view(np.uint32)


def unpack_mask(mask: Mask, vocab: int) -> NDArray[np.bool_]:
    """Bool (vocab) of a mask."""
    return np.unpackbits(mask.view(np.uint8), count=vocab, bitorder="little").view(np.bool_)


def is_allowed(mask: Mask | None, token: int) -> bool:
    """Whether a mask lets a token pass; None lets all."""
    return mask is None or bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


@dataclass(frozen=True)
class Nothing:
    """A token whose keys and values only fill the cache."""


@dataclass(frozen=True)
class Hidden:
    """The state that the head reads: after the last norm, float32 (hidden)."""


@dataclass(frozen=True)
class Logits:
    """All logits, float32 (vocab)."""


@dataclass(frozen=True, eq=False)
class Best:
    """The ``k`` best logits of the allowed tokens, and the logits of the ``named`` ones.

    First ``bias`` (token -> what is added, finite) is added to the logits, then tokens that are not
    ``allowed`` are left out; None: all are. Named tokens need not be allowed.
    """

    k: int
    allowed: Mask | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    named: Sequence[int] = ()


Want: TypeAlias = Nothing | Hidden | Logits | Best


@dataclass(frozen=True, eq=False)
class Chosen:
    """What `Best` gives: ids int32 (k), their logits float32 (k), falling, the lower id first among equals.

    There are fewer than k where fewer tokens are allowed. ``named`` float32 has the logits of its ids.
    """

    ids: NDArray[np.int32]
    logits: Floats
    named: Floats

    def trimmed(self) -> Chosen:
        """Without the places that no allowed token was left for: C gives them the id -1."""
        count = int((self.ids >= 0).sum())
        return replace(self, ids=self.ids[:count], logits=self.logits[:count])


Answer: TypeAlias = Floats | Chosen | None
