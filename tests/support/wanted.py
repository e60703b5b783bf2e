"""For engines that know all logits only: what a row wants of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from bitgen.inference.wants import Best, Chosen, Nothing, unpack_mask


def best_of(logits: Any, want: Best) -> Chosen:
    """In numpy: bias, mask, the best k."""
    biased = logits.copy()
    for token, value in want.bias.items():
        biased[token] += np.float32(value)
    order = np.lexsort((np.arange(biased.size), -biased))
    if want.allowed is not None:
        order = order[unpack_mask(want.allowed, biased.size)[order]]
    order = order[: want.k]
    return Chosen(order.astype(np.int32), biased[order], biased[list(want.named)])


def answers_wants(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that takes flags becomes one that takes wants as well."""

    @wraps(forward)
    def answer(self: Any, tokens: Any, positions: Any, sequences: Any, wants: Any) -> Any:
        if isinstance(wants, np.ndarray):
            return forward(self, tokens, positions, sequences, wants)
        wanted = np.array([not isinstance(want, Nothing) for want in wants])
        rows = iter(forward(self, tokens, positions, sequences, wanted))
        found = [None if isinstance(want, Nothing) else next(rows) for want in wants]
        return [
            best_of(row, want) if isinstance(want, Best) else row
            for row, want in zip(found, wants, strict=True)
        ]

    return answer
