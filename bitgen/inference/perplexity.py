"""Perplexity of a text, over the same windows as llama.cpp's, and the distance to another model's.

The text's tokens (with BOS in front where the model uses one) are cut into windows of ``context`` tokens that
do not overlap; what is left at the end is not used. In each window the first token is replaced by BOS where
the model uses one, and the tokens of its second half are predicted: with first = context / 2, positions
first .. context - 2 each predict the next token. The result is exp of the mean negative log-likelihood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitgen.errors import UsageError
from bitgen.inference.divergence import (
    Comparison,
    Divergence,
    Floats,
    LogitsWriter,
    Reference,
    Windows,
    check_same,
)
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
    divergence: Divergence | None = None  # from the reference's predictions


def perplexity(
    llm: LLM,
    text: str,
    context: int = 512,
    most: int | None = None,
    *,
    against: Reference | None = None,
    save: LogitsWriter | None = None,
) -> Iterator[Perplexity]:
    """Estimates, one after each window, of ``most`` windows at most; the last one is the result.

    ``against`` gives what the predictions are compared with; ``save`` gets the logits. UsageError when the
    text is shorter than two windows, as in llama.cpp.
    """
    windows = _windows(llm, text, context, most)
    what = _described(llm, context, windows)
    others = against.logits(text, what) if against else itertools.repeat(None)
    if save:
        save.begin(what)
    compared = Comparison()
    sum_nll, sum_squares, count = 0.0, 0.0, 0
    for number, (window, other) in enumerate(zip(windows, others, strict=False), start=1):
        for row, target in _predictions(llm, window):
            nll = -log_softmax_at(row, target)
            sum_nll += nll
            sum_squares += nll * nll
            count += 1
            if save:
                save.add(row)
            if other is not None:
                compared.add(next(other), row)
        mean = sum_nll / count
        variance = sum_squares / count - mean * mean
        spread = math.sqrt(variance / (count - 1)) if variance > 0 and count > 1 else 0.0
        value = math.exp(mean) if mean < np.log(np.finfo(float).max) else math.inf
        yield Perplexity(
            value, spread * value, number, len(windows), count, compared.result if against else None
        )


@dataclass(frozen=True)
class ModelReference:
    """Another model that runs beside the first."""

    llm: LLM
    name: str

    def logits(self, text: str, windows: Windows) -> Iterator[Iterator[Floats]]:
        own = _windows(self.llm, text, windows.context, windows.windows)
        check_same(_described(self.llm, windows.context, own), windows, self.name)
        return ((row for row, _ in _predictions(self.llm, window)) for window in own)


def _windows(llm: LLM, text: str, context: int, most: int | None) -> list[list[int]]:
    """The token ids of each window, as the text has them."""
    if not 4 <= context <= llm.context:
        raise UsageError(
            f"a window must be 4 tokens or more and fit into the context of {llm.context}, not {context}",
        )
    if most is not None and most < 1:
        raise UsageError(f"the windows must be 1 or more, not {most}")
    ids = llm.tokenizer.encode(text, parse=False)
    total = len(ids) // context
    if total < 2:
        raise UsageError(
            f"the text has {len(ids)} tokens; two windows of {context} are the least: give more text or a "
            "smaller -c",
        )
    total = total if most is None else min(most, total)
    return [ids[number * context : (number + 1) * context] for number in range(total)]


def _described(llm: LLM, context: int, windows: Sequence[Sequence[int]]) -> Windows:
    return Windows.of(llm.config.vocab, context, windows, context - 1 - context // 2)


def _predictions(llm: LLM, window: Sequence[int]) -> Iterator[tuple[Floats, int]]:
    """(logits, the token that follows) of each position that predicts one."""
    first, ids = len(window) // 2, list(window)
    if llm.tokenizer.starts_with_bos and llm.tokenizer.bos is not None:
        ids[0] = llm.tokenizer.bos
    rows = (row for part in llm.logit_parts(ids, first) for row in part)
    yield from zip(rows, window[first + 1 :], strict=False)  # the last row predicts nothing that is there
