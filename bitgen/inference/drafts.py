"""Drafts for speculative decoding: tokens that may come next, to be checked by one forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from bitgen.inference import FEW

_FIRST = 8  # tokens of the first draft


class PromptLookupDrafter:
    """Prompt lookup: where the last few tokens were seen before, what followed them may follow again."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the last tokens -> the place of the next one
        self._here: dict[int, int | None] = {}  # length of the run of tokens -> the same for the current end
        self._most = _FIRST
        for end in range(1, len(tokens) + 1):
            self._add(tokens, end)

    def add(self, tokens: Sequence[int]) -> None:
        """A token was appended to ``tokens``."""
        self._add(tokens, len(tokens))

    def draft(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the last time, for the longest run that is known, and over again where that ends."""
        most = min(most, self._most)
        at = self._here.get(3)
        if at is None:
            at = self._here.get(2)
        if at is None or most <= 0:
            return []
        draft = list(tokens[at : at + most])
        period = len(tokens) - at
        while len(draft) < most:
            draft.append(draft[-period])
        return draft

    def learn(self, drafted: int, accepted: int) -> None:
        """Draft more while drafts are accepted, fewer when they are not: a wrong token costs a row."""
        self._most = min(FEW - 1, 2 * drafted) if accepted == drafted else max(2, accepted + 1)

    def _add(self, tokens: Sequence[int], end: int) -> None:
        for size in (3, 2):
            if end >= size:
                run = tuple(tokens[end - size : end])
                self._here[size] = self._after.get(run)
                self._after[run] = end
