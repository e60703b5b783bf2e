"""Forward passes over the slots of a KV cache, of tokens as they are: nothing is sampled, nothing waits.

`Scheduler` stands on it and runs sequences. What of a text a slot holds already is not computed again, and
long ones are computed in parts, as long as Ctrl-C or sequences that run may be kept waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np

from bitgen.errors import FileError, UsageError
from bitgen.formats.config import Floats
from bitgen.inference.kv_memory import Capacity
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.slots import Slots, common_start
from bitgen.inference.wants import Nothing, Want

_CHUNK = 512  # prompt tokens a forward pass at most; Ctrl-C and progress are seen between passes
# What a pass of a prompt may take. Another one reads the weights again: 1.5 % of 128 tokens of a 3B.
_CHUNK_S = 1.5
_CHUNK_MIN = 64  # below this the kernels for many tokens do not pay
PART_MIN = 16  # tokens of a part at least, however long they take: the kernels for few tokens end here
_LOGITS_BYTES = 1 << 26  # of a part of the logits of a text


class Held(NamedTuple):
    """What a slot of the KV cache holds: whose request computed it, the tokens, and their bytes."""

    owner: str
    tokens: Items[int]
    data: bytes


class Row(NamedTuple):
    """The next tokens of the sequence in a slot of the KV cache, and which of them get logits (None: all)."""

    slot: int
    tokens: Items[int]
    wanted: Items[bool] | None = None


class Passes:
    """The forward passes of an engine, from one thread, in parts of ``max_stall_s`` (None: 1.5 s)."""

    def __init__(
        self,
        engine: EngineProtocol,
        capacity: Capacity | None = None,
        max_stall_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = engine
        self.max_stall_s = max_stall_s
        self.clock = clock
        self._slots = Slots(engine, capacity)
        self._token_s: float | None = None  # what a token of the last long part took

    def suspend(self) -> None:
        """Make sequences that run wait until their own run goes on; here are none."""

    def check(self, prompt: Items[int]) -> None:
        """UsageError when a prompt cannot be computed."""
        if not prompt:
            raise UsageError("the prompt is empty")
        if len(prompt) > self.engine.context:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens and the context holds {self.engine.context}: "
                "shorten it or ask for a larger context (-c)",
            )

    def forward(self, rows: Items[Row]) -> Floats:
        """One forward pass: logits float32 (wanted, vocab), in the order of ``rows`` and their tokens."""
        outputs = [flag for _, part, flags in rows for flag in (flags or [True] * len(part))]
        logits: Floats = self._run(rows, np.array(outputs, np.bool_))
        return logits

    def answers(self, rows: Items[Row], wants: Items[Want]) -> list[Any]:
        """The same for whatever each token wants: floats for `Logits`, `Chosen` for `Best`."""
        answers: list[Any] = self._run(rows, wants)
        return answers

    def _run(self, rows: Items[Row], wants: Any) -> Any:
        tokens = [token for _, part, _ in rows for token in part]
        held = self._slots.tokens
        positions = [len(held[slot]) + i for slot, part, _ in rows for i in range(len(part))]
        slots = [slot for slot, part, _ in rows for _ in part]
        if self._slots.unsure:
            self._slots.settle()
        self._slots.unsure = True
        started = self.clock()
        answers = self.engine.forward(
            np.array(tokens, np.int32), np.array(positions, np.int32), np.array(slots, np.int32), wants
        )
        for slot, part, _ in rows:
            self._slots.add(slot, part)
        self._slots.unsure = False
        if len(tokens) >= (_CHUNK_MIN if self.max_stall_s is None else PART_MIN):
            self._token_s = max(1e-9, (self.clock() - started) / len(tokens))
        return answers

    @property
    def unpinned(self) -> range:
        """The slots that hold nothing pinned: the first ones."""
        return range(self.engine.max_batch - len(self._slots.pinned))

    # ---- Texts in slots ----

    def lacking(self, slot: int, tokens: Items[int]) -> int:
        """How many of ``tokens`` a slot does not hold, at least the last."""
        return len(tokens) - min(common_start(self._slots.tokens[slot], tokens), len(tokens) - 1)

    def catch_up(self, slot: int, tokens: Items[int]) -> int:
        """Compute a part of ``tokens`` in a slot, but not the last; how many it lacks then."""
        part = self._rest(slot, tokens)[:-1][: self._chunk()]
        if part:
            self.forward([Row(slot, part, [False] * len(part))])
        return self.lacking(slot, tokens)

    def ask(self, slot: int, tokens: Items[int], want: Want) -> Any:
        """What ``want`` gives at the end of ``tokens``, of which a slot lacks few."""
        part = self._rest(slot, tokens)
        return self.answers([Row(slot, part)], [*[Nothing()] * (len(part) - 1), want])[-1]

    def _rest(self, slot: int, tokens: Items[int]) -> Items[int]:
        """What a slot lacks of ``tokens``, at least the last; all else that it holds is forgotten."""
        held = self._slots.tokens[slot]
        self._slots.forget(slot, min(common_start(held, tokens), len(tokens) - 1))
        return tokens[len(held) :]

    def hold(self, slot: int, tokens: Items[int]) -> None:
        """Make a slot hold ``tokens`` and nothing else; what any slot holds of them is not computed again.

        Sequences that run wait until their own run goes on.
        """
        self.suspend()
        self._slots.owner[slot] = ""
        commons = [common_start(held, tokens) for held in self._slots.tokens]
        if max(commons) > commons[slot]:  # a pass reads all weights
            self._slots.copy(commons.index(max(commons)), slot, max(commons))
        self._compute(slot, tokens)

    def score(self, ids: Items[int], first: int = 0) -> Iterator[Floats]:
        """Logits of given tokens from the token ``first`` on, in parts float32 (some tokens, vocab).

        Sequences that run wait, as for `hold`.
        """
        self.check(ids)
        self._slots.forget(0, 0)
        self._slots.owner[0] = ""
        most = self._logits_most()
        at = 0
        while at < len(ids):
            self.suspend()
            self._compute(0, ids[:at])  # nothing, unless another run had the slot
            part = ids[at : at + min(most, self._chunk())]
            logits = self.forward([Row(0, part, [at + i >= first for i in range(len(part))])])
            at += len(part)
            if len(logits):
                yield logits

    def clear(self, keep: int = 0) -> None:
        """Forget what each slot holds behind ``keep`` positions, but for what is pinned; as `hold` says."""
        self.suspend()
        for slot in self.unpinned:
            self._slots.forget(slot, keep)

    def _compute(self, slot: int, tokens: Items[int]) -> None:
        """Make a slot hold ``tokens`` and nothing else."""
        held = self._slots.tokens[slot]
        self._slots.forget(slot, common_start(held, tokens))
        while len(held) < len(tokens):
            part = tokens[len(held) : len(held) + self._chunk()]
            self.forward([Row(slot, part, [False] * len(part))])

    # ---- How much at once ----

    def _chunk(self) -> int:
        """How many prompt tokens to compute at once, so that Ctrl-C or other sequences soon get a turn."""
        if self.max_stall_s is None:
            least, seconds, unknown = _CHUNK_MIN, _CHUNK_S, 2 * _CHUNK_MIN
        else:
            least, seconds, unknown = PART_MIN, self.max_stall_s, PART_MIN
        if self._token_s is None:
            return unknown
        most = int(min(_CHUNK, seconds / self._token_s))
        return max(least, most // _CHUNK_MIN * _CHUNK_MIN if most >= _CHUNK_MIN else most)

    def _logits_most(self) -> int:
        """How many tokens may have all of their logits at once."""
        return max(32, min(_CHUNK, _LOGITS_BYTES // (4 * self.engine.config.vocab)))

    # ---- What outlives texts ----

    def pin(self, tokens: Items[int]) -> None:
        """Compute ``tokens`` and keep them in a slot, for whatever starts like them, of all owners.

        UsageError where there is no slot or no memory left for them; nothing may run.
        """
        self.check(tokens)
        slot = self._slots.next_pin()
        self.hold(slot, tokens)
        self._slots.pin(slot)

    def held(self) -> Iterator[Held]:
        """What the slots hold that are not pinned, the one that was used last first."""
        for slot in self._slots.recent():
            tokens = self._slots.tokens[slot]
            self.engine.truncate(slot, len(tokens))
            yield Held(self._slots.owner[slot], tuple(tokens), self.engine.cached(slot))

    def restore(self, held: Items[Held]) -> None:
        """Fill the slots, as far as there is room. FileError for what does not fit; nothing may run."""
        vocab, context = self.engine.config.vocab, self.engine.context
        for _, tokens, _ in held:
            if not all(0 <= token < vocab for token in tokens):
                raise FileError(f"tokens outside the vocabulary of {vocab}")
            if len(tokens) > context:
                raise FileError(f"{len(tokens)} positions do not fit into a context of {context}")
        for slot, (owner, tokens, data) in zip(self.unpinned, held, strict=False):
            if not self._slots.fill(slot, owner, tokens, data):
                return
