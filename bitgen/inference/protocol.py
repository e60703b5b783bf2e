"""What the scheduler asks of whatever runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from bitgen.formats.config import Floats, ModelConfig
from bitgen.inference.memory import Memory
from bitgen.inference.wants import Answer, Want

Ints: TypeAlias = NDArray[np.int32]


class EngineProtocol(Protocol):
    """What runs the model: `bitgen.inference.engine.Engine`, or a stand-in."""

    @property
    def config(self) -> ModelConfig: ...

    context: int  # positions of a sequence
    max_batch: int  # sequences

    @overload
    def forward(self, tokens: Ints, positions: Ints, sequences: Ints, wants: NDArray[np.bool_]) -> Floats: ...

    @overload
    def forward(
        self, tokens: Ints, positions: Ints, sequences: Ints, wants: Sequence[Want]
    ) -> list[Answer]: ...

    def truncate(self, sequence: int, length: int) -> None: ...

    def release(self, sequence: int, length: int) -> None: ...

    def copy(self, source: int, target: int, length: int) -> None: ...

    def cached(self, sequence: int) -> bytes: ...

    def restore(self, sequence: int, length: int, data: bytes) -> None: ...

    def sequence_bytes(self, positions: int) -> int: ...

    @property
    def memory(self) -> Memory: ...

    @property
    def head_bytes(self) -> int: ...

    head_error: float

    def close(self) -> None: ...
