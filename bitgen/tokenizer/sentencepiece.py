"""SentencePiece's BPE as GGUF files hold it: pieces with scores, bytes where no piece fits.

Start from single characters; of all adjacent pairs whose concatenation is a piece, join the one with the
highest score, the leftmost among equals, until there is none. What is no piece then is written as bytes.
A list of merges cannot express this where two pairs make the same piece: it is done here as it is defined.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence

SPACE = "\u2581"  # the mark that stands for a space inside pieces

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_CACHED_WORDS = 1 << 16


def byte_of(piece: str) -> int | None:
    """The byte that a piece like ``<0x0A>`` stands for."""
    match = _BYTE_PIECE.fullmatch(piece)
    return int(match[1], 16) if match else None


class SentencePiece:
    """Splits text into the ids of its pieces; the caller has taken special tokens out and added BOS.

    ``ids`` maps a piece to its id, ``scores`` has one number an id. ``unknown`` stands for a byte that has no
    piece of its own; None leaves such a byte out.
    """

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float], unknown: int | None) -> None:
        self._ids = ids
        self._scores = scores
        self._unknown = unknown
        self._bytes = {byte: i for piece, i in ids.items() if (byte := byte_of(piece)) is not None}
        # Where no piece holds a space after something else, no merge ever crosses the start of a word: words
        # can be split one by one, and a word that was seen before is looked up.
        crosses = any(SPACE in piece.lstrip(SPACE) for piece in ids)
        self._word = None if crosses else re.compile(f"{SPACE}*[^{SPACE}]*")
        self._seen: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; a leading space is the caller's business."""
        marked = text.replace(" ", SPACE)
        if self._word is None:
            return self._split(marked)
        found: list[int] = []
        for word in self._word.findall(marked):
            ids = self._seen.get(word)
            if ids is None:
                ids = tuple(self._split(word))
                if len(self._seen) >= _CACHED_WORDS:
                    self._seen.clear()
                self._seen[word] = ids
            found += ids
        return found

    def _split(self, text: str) -> list[int]:
        """Merge a text without looking at words."""
        parts: list[str] = list(text)  # a part that was joined to its left neighbour becomes ""
        before = list(range(-1, len(parts) - 1))
        after = [*range(1, len(parts)), -1]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            joined = parts[left] + parts[right]
            piece = self._ids.get(joined)
            if piece is not None:
                heapq.heappush(queue, (-self._scores[piece], left, right, len(joined)))

        for i in range(1, len(parts)):
            offer(i - 1, i)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not parts[left] or not parts[right] or len(parts[left]) + len(parts[right]) != length:
                continue  # one of the two has been joined to something else since
            parts[left] += parts[right]
            parts[right] = ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                offer(left, after[left])
            if before[left] >= 0:
                offer(before[left], left)
        return [i for part in parts if part for i in self._pieces(part)]

    def _pieces(self, part: str) -> list[int]:
        """The id of a part, or those of its bytes."""
        piece = self._ids.get(part)
        if piece is not None:
            return [piece]
        bytes_of_part = part.encode("utf-8", "surrogateescape")
        ids = (self._bytes.get(byte, self._unknown) for byte in bytes_of_part)
        return [i for i in ids if i is not None]
