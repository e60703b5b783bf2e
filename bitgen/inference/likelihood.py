"""How likely given texts are behind a context, which is computed once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bitgen.inference.passes import Row
from bitgen.inference.sampling import log_softmax_at
from bitgen.inference.scheduler import Scheduler

_TOKENS = 256  # of a forward pass at most: their logits are 131 MB with 128k tokens in the vocabulary


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of all tokens of an ending, and whether each is the likeliest one in its place."""

    logprob: float
    greedy: bool


def likelihoods(
    scheduler: Scheduler, context: Sequence[int], endings: Sequence[Sequence[int]]
) -> Iterator[Likelihood]:
    """Of each of ``endings``, in their order; neither they nor the context are empty.

    What slots of the KV cache hold of the context is not computed again, so contexts are best given in an
    order in which neighbours start alike. Short endings run side by side, as many as there are slots.
    UsageError when a context with its ending does not fit.
    """
    before, last = list(context[:-1]), context[-1]
    for part in _parts(endings, len(scheduler.unpinned)):
        scheduler.check([*context, *max(part, key=len)][:-1])
        for slot in range(len(part)):
            scheduler.hold(slot, before)
        fed = [[last, *ending[:-1]] for ending in part]
        sums, greedy = [0.0] * len(part), [True] * len(part)
        for at in range(0, max(map(len, fed)), _TOKENS):
            rows = [
                Row(slot, tokens[at : at + _TOKENS]) for slot, tokens in enumerate(fed) if at < len(tokens)
            ]
            logits = iter(scheduler.forward(rows))
            for slot, tokens, _ in rows:
                for token in part[slot][at : at + len(tokens)]:
                    row = next(logits)
                    sums[slot] += log_softmax_at(row, token)
                    greedy[slot] &= int(row.argmax()) == token
        yield from map(Likelihood, sums, greedy)


def _parts(endings: Sequence[Sequence[int]], slots: int) -> Iterator[Sequence[Sequence[int]]]:
    """Neighbours that fit into a forward pass; one that is too long for it is alone."""
    part: list[Sequence[int]] = []
    for ending in endings:
        if part and (len(part) == slots or sum(map(len, part)) + len(ending) > _TOKENS):
            yield part
            part = []
        part.append(ending)
    if part:
        yield part
