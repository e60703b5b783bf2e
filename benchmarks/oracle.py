"""Engines for benchmarks/serve.py whose answers are known: at the cost of a real one, and at none."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from bitgen.formats.config import ModelConfig
from bitgen.inference.memory import Memory
from bitgen.inference.protocol import EngineProtocol
from bitgen.inference.wants import Best, Chosen
from bitgen.tokenizer.data import TokenizerData

_FIRST = 300  # token ids below are control tokens and single bytes
_BYTE, _NORMAL, _CONTROL = 6, 1, 3  # types of tokens


def plain_tokens(vocab: int) -> TokenizerData:
    """A tokenizer of ``vocab`` tokens, each a word of its own: for models that have none."""
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"\u2581w{number}" for number in range(len(tokens), vocab)]
    types = [_CONTROL] * 2 + [_BYTE] * 256 + [_NORMAL] * (vocab - 258)
    scores = np.zeros(vocab, np.float32)
    return TokenizerData(
        model="llama", tokens=tuple(tokens), types=np.array(types, np.int32), scores=scores, bos=0, eos=1
    )


class Script:
    """Which token stands at each position of every text: a period of random ones, over and over."""

    def __init__(self, vocab: int, period: int, seed: int = 0) -> None:
        rng = random.Random(seed)  # noqa: S311 - no secret
        self._tokens = [rng.randrange(_FIRST, vocab) for _ in range(period)]
        self._seed = seed

    def at(self, position: int) -> int:
        return self._tokens[position % len(self._tokens)]

    def guess(self, position: int, p: float) -> int:
        """The same with probability ``p``, for each position alone; else another token."""
        right = random.Random(f"{self._seed} {position}").random() < p  # noqa: S311 - no secret
        return self.at(position) if right else _FIRST - 1


class _Scripted:
    """An engine that computes all that it is asked for and then says what ``following`` knows."""

    def __init__(self, engine: EngineProtocol, following: Callable[[int], int]) -> None:
        self._engine, self._following = engine, following

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, tokens: Any, positions: Any, sequences: Any, wants: Any) -> Any:
        answers = self._engine.forward(tokens % self._engine.config.vocab, positions, sequences, wants)
        if isinstance(answers, np.ndarray):  # nobody samples from these
            return answers
        return [
            _only(self._following(position + 1)) if isinstance(answer, Chosen) else answer
            for position, answer in zip(positions.tolist(), answers, strict=True)
        ]


def scripted(engine: EngineProtocol, following: Callable[[int], int]) -> EngineProtocol:
    """``engine`` at its cost, which finds the token ``following(position)`` the best at each position."""
    return cast("EngineProtocol", _Scripted(engine, following))


class Instant:
    """An engine that answers at once, up to ``context`` tokens; the time is that of everything else."""

    def __init__(self, config: ModelConfig, context: int, batch: int) -> None:
        self.config, self.context, self.max_batch = config, context, batch
        self.memory, self.head_bytes, self.head_error = Memory(0, 0, 0), 0, 0.0
        self.thread_s = 0.0  # CPU time of the thread that asks, at its last question
        self._word = _only(_FIRST)

    def forward(self, tokens: Any, positions: Any, sequences: Any, wants: Any) -> Any:
        del tokens, positions, sequences
        self.thread_s = time.thread_time()
        return [self._word if isinstance(want, Best) else None for want in wants]

    def truncate(self, sequence: int, length: int) -> None: ...

    def release(self, sequence: int, length: int) -> None: ...

    def sequence_bytes(self, positions: int) -> int:
        return positions

    def copy(self, source: int, target: int, length: int) -> None: ...

    def cached(self, sequence: int) -> bytes:
        del sequence
        return b""

    def restore(self, sequence: int, length: int, data: bytes) -> None: ...

    def close(self) -> None: ...


def _only(token: int) -> Chosen:
    """An answer that leaves no choice."""
    return Chosen(np.array([token], np.int32), np.zeros(1, np.float32), np.zeros(0, np.float32))
