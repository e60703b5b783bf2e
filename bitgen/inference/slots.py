"""What the slots of a KV cache hold, which of them a sequence gets, and what is given up for it.

A running sequence reserves the memory of all positions that it may come to: it is never stopped for want of
it. A slot whose sequence has ended is parked: it keeps its tokens for texts that start alike until its place
or its memory is needed, the one that was used least recently first. What an operator pins stays, and serves
everybody.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Items

from bitgen.errors import UsageError
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.sequence import Request, Sequence

_SHARED_MIN = 16  # a common start of two prompts that is shorter than this is computed twice
# A slot is taken over with what it holds where so many times less is lost than kept, or next to nothing.
# Otherwise the start is copied: the 76 kB a position of 2B-4T are 0.01 ms at 8 GB/s, and a token of a prompt
# takes milliseconds.
_KEPT_A_LOST = 64


class Slots:
    """The slots of an engine; without a capacity all may run, and their memory has no limit."""

    def __init__(self, engine: EngineProtocol, capacity: Capacity | None = None) -> None:
        self.engine = engine
        self.parallel = engine.max_batch if capacity is None else min(capacity.parallel, engine.max_batch)
        self.tokens: list[list[int]] = [[] for _ in range(engine.max_batch)]  # of each slot
        self.owner = [""] * engine.max_batch  # whose request computed them
        self.pinned: set[int] = set()
        self._shared = capacity is not None and capacity.shared
        self._pins = 0 if capacity is None else capacity.pinned
        self._limit = None if capacity is None else engine.memory.cache
        self._used = [0] * engine.max_batch  # when a slot was last given away, in placements
        self._placed = 0
        self._written = [0] * engine.max_batch  # positions whose memory was not given back since
        self._bytes: dict[int, int] = {}  # of so many positions
        # The engine may hold more than is written down here, never less: what another scheduler left, and
        # what a Ctrl-C in the middle of a pass, a copy or a truncation leaves.
        self.unsure = True

    # ---- Memory ----

    def bytes_of(self, positions: int) -> int:
        """Bytes of the keys and values of a sequence of so many positions."""
        if positions not in self._bytes:
            self._bytes[positions] = self.engine.sequence_bytes(positions) if positions else 0
        return self._bytes[positions]

    def reserved(self, request: Request) -> int:
        """Positions that a request may come to."""
        most = self.engine.context
        return most if request.max_tokens is None else min(most, len(request.prompt) + request.max_tokens)

    def fit(self, running: Iterable[Request], request: Request) -> bool:
        """Whether a request has memory beside those that run, if all that is parked were given up."""
        return self._limit is None or self.bytes_of(self.reserved(request)) <= self._free_bytes(running)

    def _free_bytes(self, running: Iterable[Request]) -> int:
        """What neither running requests nor pins may take."""
        pinned = sum(self.bytes_of(len(self.tokens[slot])) for slot in self.pinned)
        taken = sum(self.bytes_of(self.reserved(request)) for request in running)
        return (self._limit or 0) - pinned - taken

    @property
    def held_bytes(self) -> int:
        """Bytes that slots have written to and not given back."""
        return sum(map(self.bytes_of, self._written))

    def _make_room(self, running: dict[int, Sequence]) -> None:
        """Give up parked slots, the least recently used first, until all that run have their memory."""
        if self._limit is None:
            return
        for slot, sequence in running.items():
            if self._written[slot] > self.reserved(sequence.request):
                self._release(slot, len(self.tokens[slot]))
        parked = [slot for slot in self._by_use() if slot not in running and slot not in self.pinned]
        taken = sum(self.bytes_of(self._written[slot]) for slot in parked)
        free = self._free_bytes(sequence.request for sequence in running.values())
        for slot in parked:
            if taken <= free:
                return
            taken -= self.bytes_of(self._written[slot])
            self._release(slot, 0)

    def _release(self, slot: int, length: int) -> None:
        self.unsure = True
        del self.tokens[slot][length:]
        self.engine.release(slot, length)
        self._written[slot] = length

    def _by_use(self) -> list[int]:
        """All slots, those that hold nothing first, then the one that was used least recently."""
        return sorted(range(len(self.tokens)), key=lambda slot: (bool(self.tokens[slot]), self._used[slot]))

    # ---- Sequences ----

    def place(self, sequence: Sequence, running: dict[int, Sequence]) -> int:
        """Give a sequence a free slot, and put it among the ``running`` ones.

        That is the slot which holds most of its tokens, if little else is lost with it; else the one that was
        used least recently, and what another holds of its tokens is copied (`share`).
        """
        free = [slot for slot in self._by_use() if slot not in running and slot not in self.pinned]
        best = max(free, key=lambda slot: (self.common(slot, sequence), -self._used[slot]))
        common = self.common(best, sequence)
        lost = len(self.tokens[best]) - common
        taken_over = common and (lost < _SHARED_MIN or _KEPT_A_LOST * lost <= common)
        slot = best if taken_over else free[0]
        self._placed += 1
        for used in {slot, best} if common >= _SHARED_MIN else {slot}:
            self._used[used] = self._placed
        running[slot] = sequence
        self.forget(slot, self.common(slot, sequence))
        self.owner[slot] = sequence.request.owner
        self._make_room(running)
        return slot

    def common(self, slot: int, sequence: Sequence) -> int:
        """How many tokens that a slot holds spare a sequence their computation."""
        request = sequence.request
        known = self._shared or slot in self.pinned or request.owner == self.owner[slot]
        whole = request.score_prompt or request.pooling == "mean"  # every token's row is wanted
        if not known or (whole and not sequence.tokens):
            return 0
        most = len(sequence.whole) - 1  # the last token is computed for its logits
        return min(common_start(self.tokens[slot], sequence.whole), most)

    def share(self, slot: int, sequence: Sequence) -> None:
        """Where another slot holds much more of a sequence, make its slot a copy of that."""
        best = max(range(len(self.tokens)), key=lambda other: self.common(other, sequence))
        common = self.common(best, sequence)
        if common >= len(self.tokens[slot]) + _SHARED_MIN:
            self.copy(best, slot, common)

    # ---- Tokens ----

    def copy(self, source: int, target: int, length: int) -> None:
        """Make a slot hold the first ``length`` tokens of another, and nothing else."""
        self.forget(target, 0)
        self.unsure = True
        self.engine.copy(source, target, length)
        self.add(target, self.tokens[source][:length])

    def add(self, slot: int, tokens: Items[int]) -> None:
        """The engine computed ``tokens`` behind what a slot holds."""
        self.tokens[slot] += tokens
        self._written[slot] = max(self._written[slot], len(self.tokens[slot]))

    def forget(self, slot: int, length: int) -> None:
        """Keep the first ``length`` tokens of a slot."""
        if length < len(self.tokens[slot]):
            self.unsure = True
            del self.tokens[slot][length:]
            self.engine.truncate(slot, length)

    def settle(self) -> None:
        """Make the engine hold no more than is written down."""
        for slot, tokens in enumerate(self.tokens):
            self.engine.truncate(slot, len(tokens))

    # ---- What outlives sequences ----

    def next_pin(self) -> int:
        """The slot for what is to be pinned: the last ones, as many as there are for it."""
        if len(self.pinned) >= self._pins:
            raise UsageError(f"there are {self._pins} slots for what is pinned")
        return len(self.tokens) - 1 - len(self.pinned)

    def pin(self, slot: int) -> None:
        """Keep what a slot holds for everybody. UsageError where no whole text has room beside it."""
        self.pinned.add(slot)
        needed = self.bytes_of(self.engine.context)
        if self._limit is not None and self._free_bytes([]) < needed:
            raise UsageError(
                f"beside what is pinned, {self._limit / 2**20:.1f} MiB of keys and values hold no text of "
                f"{self.engine.context} positions, which takes up to {needed / 2**20:.1f} MiB"
            )

    def recent(self) -> list[int]:
        """The slots that are not pinned and hold something, the one that was used last first."""
        return [slot for slot in reversed(self._by_use()) if self.tokens[slot] and slot not in self.pinned]

    def fill(self, slot: int, owner: str, tokens: Items[int], data: bytes) -> bool:
        """Make a slot hold tokens with their bytes; False where there is no memory for them."""
        if self._limit is not None and self.held_bytes + self.bytes_of(len(tokens)) > self._limit:
            return False
        self.forget(slot, 0)
        self.unsure = True
        self.engine.restore(slot, len(tokens), data)
        self.owner[slot] = owner
        self.tokens[slot] = []
        self.add(slot, tokens)
        return True


def common_start(held: Items[int], tokens: Items[int]) -> int:
    """How many tokens two texts have in common at their start."""
    most = min(len(held), len(tokens))
    for size in (min(most, _SHARED_MIN), most):  # few start alike, and copies of all take their time
        if list(held[:size]) != list(tokens[:size]):
            return next(i for i in range(size) if held[i] != tokens[i])
    return most
