"""The text of one request as it comes."""

from __future__ import annotations

from collections.abc import Iterator

from bitgen.inference.scheduler import Scheduler
from bitgen.inference.sequence import Finish, Request, Sequence
from bitgen.progress import Report


class Generation:
    """The text of one answer as it comes: iterate over its pieces.

    ``text`` is what came so far, ``finish`` why it ended (None before): end (the model ended it), stop (a
    stop text), length (max_tokens) or context (the context is full).
    """

    def __init__(self, scheduler: Scheduler, request: Request, progress: Report | None = None) -> None:
        self.request = request
        self._sequence: Sequence | None = None
        self._pieces = self._run(scheduler, progress)

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def text(self) -> str:
        return self._sequence.text if self._sequence else ""

    @property
    def tokens(self) -> list[int]:
        """The tokens that were sampled."""
        return list(self._sequence.tokens) if self._sequence else []

    @property
    def finish(self) -> Finish | None:
        return self._sequence.finish if self._sequence else None

    @property
    def seed(self) -> int | None:
        """The seed it was sampled with; None before the first token."""
        return self._sequence.seed if self._sequence else None

    def _run(self, scheduler: Scheduler, progress: Report | None) -> Iterator[str]:
        for sequence, piece in scheduler.run([self.request], progress):
            self._sequence = sequence
            if piece:
                yield piece
