"""What a forward pass is asked for, and where C writes it: a ``struct bitgen_row`` for each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.abi import constants, ffi
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelConfig
from bitgen.inference.wants import Answer, Best, Chosen, Hidden, Logits, Nothing, Want

_WANT_HIDDEN, _WANT_LOGITS, _WANT_BEST = (
    getattr(constants, f"BITGEN_WANT_{name}") for name in ("HIDDEN", "LOGITS", "BEST")
)
_OUTPUTS = {Hidden: ("hidden", _WANT_HIDDEN), Logits: ("vocab", _WANT_LOGITS)}  # sizes in ModelConfig


@dataclass(frozen=True)
class Rows:
    """The ``struct bitgen_row`` of each token, what they point to, and how the answer is made of that."""

    rows: Any
    kept: list[Any]
    result: Callable[[], Any]


def logit_rows(wanted: Sequence[bool], config: ModelConfig) -> Rows:
    """Rows that write the logits of the ``wanted`` tokens to one array."""
    rows = [row for row, flag in enumerate(wanted) if flag]
    logits = np.empty((len(rows), config.vocab), np.float32)
    structs = ffi.new("struct bitgen_row[]", len(wanted))
    if rows:
        first = ffi.from_buffer("float[]", logits)
        for at, row in enumerate(rows):
            structs[row].want = _WANT_LOGITS
            structs[row].out = first + at * config.vocab
    return Rows(structs, [logits], lambda: logits)


def want_rows(wants: Sequence[Want], config: ModelConfig) -> Rows:
    """Rows that write each answer to arrays of its own."""
    structs = ffi.new("struct bitgen_row[]", len(wants))
    kept: list[Any] = []  # arrays and their addresses, until C has read and written them

    def pointer(kind: str, values: NDArray[Any]) -> Any:
        kept.append(ffi.from_buffer(kind, values))
        return kept[-1]

    answers: list[Answer] = []
    for struct, want in zip(structs, wants, strict=True):
        if isinstance(want, Nothing):
            answers.append(None)
        elif isinstance(want, Best):
            answers.append(_fill_best(struct, want, config.vocab, pointer))
        else:
            size, kind = _OUTPUTS[type(want)]
            struct.want = kind
            values = np.empty(getattr(config, size), np.float32)
            struct.out = pointer("float[]", values)
            answers.append(values)
    return Rows(structs, kept, lambda: [a.trimmed() if isinstance(a, Chosen) else a for a in answers])


def _fill_best(struct: Any, want: Best, vocab: int, pointer: Callable[[str, NDArray[Any]], Any]) -> Chosen:
    if not 0 <= want.k <= vocab:
        raise BitgenError(f"k must be 0 to {vocab}, the vocabulary, not {want.k}")
    chosen = Chosen(
        np.empty(want.k, np.int32), np.empty(want.k, np.float32), np.empty(len(want.named), np.float32)
    )
    struct.want, struct.best = _WANT_BEST, want.k
    struct.ids, struct.out = pointer("int32_t[]", chosen.ids), pointer("float[]", chosen.logits)
    if want.allowed is not None:
        words = -(-vocab // 32)
        if want.allowed.shape != (words,) or want.allowed.dtype != np.uint32:
            raise BitgenError(f"allowed must be uint32 ({words},), a bit for each token of the vocabulary")
        struct.allowed = pointer("uint32_t[]", np.ascontiguousarray(want.allowed))
    struct.bias_count, struct.named_count = len(want.bias), len(want.named)
    if want.bias:
        check_tokens(list(want.bias), vocab)
        with np.errstate(over="ignore"):  # beyond float32 is infinity, which is refused
            bias = np.fromiter(want.bias.values(), np.float32, len(want.bias))
        if not np.isfinite(bias).all():
            raise BitgenError("a bias must be finite: leave a token out with `allowed`")
        struct.bias_id = pointer("int32_t[]", np.fromiter(want.bias, np.int32, len(want.bias)))
        struct.bias = pointer("float[]", bias)
    if want.named:
        check_tokens(list(want.named), vocab)
        struct.named = pointer("int32_t[]", np.array(want.named, np.int32))
        struct.named_out = pointer("float[]", chosen.named)
    return chosen


def check_tokens(ids: Sequence[int], vocab: int) -> None:
    """BitgenError for a token that is not in the vocabulary; there is one at least."""
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise BitgenError(f"token {wrong} is not in the vocabulary of {vocab}")
