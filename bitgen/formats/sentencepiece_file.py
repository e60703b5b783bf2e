"""tokenizer.model, the file of SentencePiece: a protobuf message with pieces, scores and a few settings.

A reader of the fields that matter, bounded by the bytes it is given::

    ModelProto      1 pieces {1 piece text, 2 score float, 3 type enum}, 2 trainer_spec, 3 normalizer_spec
    trainer_spec    3 model_type enum (1 unigram, 2 bpe), 40 unk_id, 41 bos_id, 42 eos_id, 43 pad_id
    normalizer_spec 3 add_dummy_prefix

The types of pieces have the numbers that GGUF uses.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.tokenizer.data import TokenizerData

_PIECES_MAX = 1 << 22
_VARINT_BYTES_MAX = 10
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5
_BPE = 2


def read_tokenizer_model(path: Path, content: bytes, added: Mapping[int, tuple[str, bool]]) -> TokenizerData:
    """The vocabulary of ``content``. ``added``: id -> (text, special) of tokens that other files add.

    FileError when the file is damaged, or of SentencePiece's other model, unigram.
    """
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    settings: dict[int, int] = {}
    prefix = True
    for number, value in _fields(path, content):
        if number == 1 and isinstance(value, bytes):
            if len(tokens) >= _PIECES_MAX:
                raise _damaged(path, f"more than {_PIECES_MAX} pieces")
            token, score, kind = _piece(path, value)
            tokens.append(token)
            scores.append(score)
            types.append(kind)
        elif number == 2 and isinstance(value, bytes):
            settings.update((n, v) for n, v in _fields(path, value) if isinstance(v, int))
        elif number == 3 and isinstance(value, bytes):
            prefix = dict(_fields(path, value)).get(3, 1) != 0
    if not tokens:
        raise _damaged(path, "it has no pieces")
    if settings.get(3, 1) != _BPE:
        raise FileError(f"{path} is a unigram model; bitgen reads those of type BPE, or tokenizer.json")
    for i in sorted(added):
        if i > _PIECES_MAX:
            raise _damaged(path, f"an added token has the id {i}")
        while len(tokens) <= i:
            tokens.append(f"[PAD{len(tokens)}]")
            scores.append(0.0)
            types.append(_UNUSED)
        tokens[i], special = added[i]
        types[i] = _CONTROL if special else _USER

    def setting(number: int, default: int) -> int | None:
        i = settings.get(number, default)
        return i if 0 <= i < len(tokens) else None

    bos, eos = setting(41, 1), setting(42, 2)
    return TokenizerData(
        model="llama",
        tokens=tuple(tokens),
        scores=np.array(scores, np.float32),
        types=np.array(types, np.int32),
        bos=bos,
        eos=eos,
        unknown=setting(40, 0),
        pad=setting(43, -1),
        end_ids=() if eos is None else (eos,),
        add_bos=True,
        add_space_prefix=prefix,
    )


def _damaged(path: Path, what: str) -> BitgenError:
    return FileError(f"{path} is damaged or no SentencePiece model: {what}")


def _piece(path: Path, message: bytes) -> tuple[str, float, int]:
    token, score, kind = "", 0.0, _NORMAL
    for number, value in _fields(path, message):
        if number == 1 and isinstance(value, bytes):
            token = value.decode("utf-8", "surrogateescape")
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = value
    if not 1 <= kind <= 6:
        raise _damaged(path, f"a piece of type {kind}")
    return token, score, kind


def _fields(path: Path, message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(number, value) of a message: integers, 32-bit floats, texts or messages as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(path, message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(path, message, at)
            # Negative ids are written as 64-bit two's complement.
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        size = {1: 8, 5: 4}.get(kind, -1)
        if kind == 2:
            size, at = _varint(path, message, at)
        if not 0 <= size <= len(message) - at:
            raise _damaged(path, "a field ends after its message")
        raw = message[at : at + size]
        at += size
        yield key >> 3, struct.unpack("<f", raw)[0] if kind == 5 else raw


def _varint(path: Path, message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(message[at : at + _VARINT_BYTES_MAX]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & ((1 << 64) - 1), at + i + 1
    raise _damaged(path, "a number that does not end")
