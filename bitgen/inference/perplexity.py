"""Perplexity of a text, over the same windows as llama.cpp's.

The text's tokens (with BOS in front where the model uses one) are cut into windows of ``context`` tokens that
do not overlap; what is left at the end is not used. In each window the first token is replaced by BOS where
the model uses one, and the tokens of its second half are predicted: with first = context / 2, positions
first .. context - 2 each predict the next token. The result is exp of the mean negative log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitgen.errors import UsageError
from bitgen.inference.sampling import log_softmax_at

if TYPE_CHECKING:
    from bitgen.llm import LLM


@dataclass(frozen=True)
class Perplexity:
    """The estimate after ``windows`` of ``total`` windows; ``error`` is its standard error."""

    value: float
    error: float
    windows: int
    total: int
    tokens: int  # predicted so far


def perplexity(llm: LLM, text: str, context: int = 512, most: int | None = None) -> Iterator[Perplexity]:
    """Estimates, one after each window, of ``most`` windows at most; the last one is the result.

    UsageError when the text is shorter than two windows, as in llama.cpp.
    """
    if not 4 <= context <= llm.context:
        raise UsageError(
            f"a window must be 4 tokens or more and fit into the context of {llm.context}, not {context}",
        )
    if most is not None and most < 1:
        raise UsageError(f"the windows must be 1 or more, not {most}")
    tokenizer = llm.tokenizer
    ids = tokenizer.encode(text, parse=False)
    total = len(ids) // context
    if total < 2:
        raise UsageError(
            f"the text has {len(ids)} tokens; two windows of {context} are the least: give more text or a "
            "smaller -c",
        )
    total = total if most is None else min(most, total)
    first = context // 2
    sum_nll, sum_squares, count = 0.0, 0.0, 0
    for number in range(total):
        window = ids[number * context : (number + 1) * context]
        targets = window[first + 1 :]
        if tokenizer.add_bos and tokenizer.bos is not None:
            window[0] = tokenizer.bos
        rows = (row for part in llm.logit_parts(window, first) for row in part)
        for row, target in zip(rows, targets, strict=False):  # the last row predicts nothing that is there
            nll = -log_softmax_at(row, target)
            sum_nll += nll
            sum_squares += nll * nll
        count += len(targets)
        mean = sum_nll / count
        variance = sum_squares / count - mean * mean
        spread = math.sqrt(variance / (count - 1)) if variance > 0 and count > 1 else 0.0
        value = math.exp(mean) if mean < np.log(np.finfo(float).max) else math.inf
        yield Perplexity(value, spread * value, number + 1, total, count)
