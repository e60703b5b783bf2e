"""Vectors of texts: what a model makes of a whole text, as one direction.

The state behind the last norm, of the last token or the mean of all (as the model was trained), divided by
its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitgen.errors import UsageError
from bitgen.formats.pooling import POOLINGS, Pooling
from bitgen.inference.directions import direction
from bitgen.inference.passes import Row
from bitgen.inference.scheduler import Scheduler
from bitgen.inference.wants import Floats, Hidden, Nothing, Want

_BATCH = 2048  # tokens of one forward pass, or of one longer text


def checked_pooling(name: str) -> Pooling:
    """UsageError for a name that is none."""
    for pooling in POOLINGS:
        if pooling == name:
            return pooling
    raise UsageError(f"pooling must be {' or '.join(POOLINGS)}, not {name!r}")


def embed(scheduler: Scheduler, texts: Sequence[Sequence[int]], pooling: Pooling) -> Iterator[Floats]:
    """Of each text, its token ids, a vector float32 (hidden) of length 1, in order.

    Several short texts run in one forward pass, each in a sequence of its own. UsageError when a text is
    longer than the context, or empty.
    """
    for number, ids in enumerate(texts):
        if not ids:
            raise UsageError(f"text {number + 1} is empty: it has no token")
        scheduler.check(ids)
    at = 0
    while at < len(texts):
        batch = [texts[at]]
        while (
            at + len(batch) < len(texts)
            and len(batch) < len(scheduler.unpinned)
            and sum(map(len, batch)) + len(texts[at + len(batch)]) <= _BATCH
        ):
            batch.append(texts[at + len(batch)])
        at += len(batch)
        scheduler.clear()
        yield from _run(scheduler, batch, pooling)
    scheduler.clear()


def _run(scheduler: Scheduler, batch: Sequence[Sequence[int]], pooling: Pooling) -> Iterator[Floats]:
    wants: list[Want] = []
    for ids in batch:
        rest: Want = Hidden() if pooling == "mean" else Nothing()
        wants += [rest] * (len(ids) - 1) + [Hidden()]
    answers = scheduler.answers([Row(slot, list(ids)) for slot, ids in enumerate(batch)], wants)
    at = 0
    for ids in batch:
        states = [state for state in answers[at : at + len(ids)] if state is not None]
        at += len(ids)
        yield direction(states)
