"""Text to token ids and back, from a tokenizer.json or from what a GGUF file says about its tokenizer.

::

    tokenizer = Tokenizer(data)                     # data: bitgen.formats.config.TokenizerData
    ids = tokenizer.encode("Hello")                 # with BOS where the model wants it
    text = tokenizer.decode(ids)
    stream = tokenizer.stream()                     # whole characters as tokens arrive
    pieces = [stream.feed(i) for i in ids] + [stream.close()]

The library ``tokenizers`` encodes, except for SentencePiece models of GGUF files (`sentencepiece`). Ids
become bytes by a table of our own, so that a character spread over several tokens is never cut.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.tokenizer.bpe import PreTokenizer, build_bpe, bytes_of, pre_tokenizer
from bitgen.tokenizer.data import TokenizerData
from bitgen.tokenizer.sentencepiece import SPACE, SentencePiece, byte_of

T = TypeVar("T")

_LONG = 1 << 14  # characters of a text that takes milliseconds

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6  # token types of GGUF

# Tokens that end an answer though a file may not say so; llama.cpp ends at the same ones.
_END_TOKENS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
)


class Tokenizer:
    """Encodes and decodes. FileError when the data make no tokenizer.

    ``bos`` and ``eos`` are ids or None, ``end_ids`` every id that ends an answer, ``notes`` what a user
    should know about guesses that had to be made.
    """

    def __init__(self, data: TokenizerData) -> None:
        self.data = data
        self.notes: list[str] = []
        if data.json is not None:
            self._make_from_json(data.json)
        elif data.model == "llama":
            self._make_from_pieces()
        elif data.model == "gpt2":
            self._make_from_bpe()
        else:
            found = f"the tokenizer {data.model!r}" if data.model else "no tokenizer"
            raise FileError(
                f"the model file holds {found}; supported are tokenizer.json, llama (SentencePiece) and "
                "gpt2 (BPE)",
            )
        self.end_ids = frozenset(
            [*data.end_ids, *(i for i in (self.eos, data.eot) if i is not None)]
            + [self.ids[token] for token in _END_TOKENS if token in self.ids]
        )

    # ---- What is known of every token ----

    ids: Mapping[str, int]  # text of a token, as the vocabulary spells it -> id
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool
    size: int  # one more than the largest id
    _text_of: Callable[[int], bytes]  # what a token prints; KeyError or IndexError for none
    _hidden: frozenset[int]  # control tokens: they print nothing
    _strip: bool  # one space before the text was added when it was encoded
    _encode_text: Callable[[str, bool, bool], list[int]]  # text, special tokens around, special tokens inside

    @cached_property
    def starts_with_bos(self) -> bool:
        """Whether `encode` starts a text with BOS, by a flag or by the post-processor of a tokenizer.json."""
        return self.bos is not None and self.encode("")[:1] == [self.bos]

    def token(self, i: int | None) -> str:
        """How a token is written, "" for None and for an id without a token."""
        return "" if i is None else self._bytes(i).decode("utf-8", "replace")

    def _bytes(self, i: int) -> bytes:
        try:
            return self._text_of(i) if i >= 0 else b""
        except (IndexError, KeyError):  # models have more rows of logits than there are tokens
            return b""

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that print nothing."""
        return self._hidden

    def encode(self, text: str, *, special: bool = True, parse: bool = True) -> list[int]:
        """The ids of ``text``.

        ``special`` adds BOS and EOS where the model was trained with them; ``parse`` reads special tokens
        that are spelled out in the text as such. UsageError for a text with lone surrogates,
        which is how bytes of a command line that are no UTF-8 come.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the text is not UTF-8 at character {error.start}") from None
        return self._encode_text(text, special, parse)

    def piece(self, i: int, *, special: bool = False) -> bytes:
        """The bytes a token prints; control tokens print only with ``special``."""
        return b"" if i in self._hidden and not special else self._bytes(i)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        pieces = b"".join(self.piece(i, special=special) for i in ids)
        if self._strip and pieces.startswith(b" "):
            pieces = pieces[1:]
        return pieces.decode("utf-8", "replace")

    def stream(self, *, special: bool = False) -> TokenStream:
        """For tokens that arrive one by one."""
        return TokenStream(self, special)

    # ---- tokenizer.json ----

    def _make_from_json(self, text: str) -> None:
        data = self.data
        encoder, content = _read_json(text)
        self.ids = _guarded(lambda: encoder.get_vocab(with_added_tokens=True))
        added = _guarded(encoder.get_added_tokens_decoder)
        decode, self._strip = _decoder_of(content.get("decoder"))
        texts = {i: decode(token) for token, i in self.ids.items()}
        texts.update({i: token.content.encode() for i, token in added.items()})
        self.size = max(texts, default=-1) + 1
        self._text_of = texts.__getitem__
        self._hidden = frozenset(i for i, token in added.items() if token.special)
        self.bos, self.eos = data.bos, data.eos
        self.add_bos, self.add_eos = bool(data.add_bos), bool(data.add_eos)

        # One for each way to read special tokens: a switch would be turned under another thread's text.
        encoders = {True: encoder}

        def encode(text: str, special: bool, parse: bool) -> list[int]:
            if parse not in encoders:
                other = _guarded(lambda: _encoder_of(data.json or ""))
                other.encode_special_tokens = True
                encoders[parse] = other
            ids = _guarded(lambda: _ids_of(encoders[parse], text, special))
            # The post-processor adds them; older files leave it to tokenizer_config.json.
            if special and data.add_bos and data.bos is not None and ids[:1] != [data.bos]:
                ids.insert(0, data.bos)
            return ids

        self._encode_text = encode

    # ---- GGUF ----

    def _make_from_pieces(self) -> None:
        data = self.data
        self._make_table(lambda token: token.replace(SPACE, " ").encode("utf-8", "surrogateescape"))
        self._take_ids(bos=1, eos=2, add_bos=True)
        prefix = data.add_space_prefix is not False
        self._strip = prefix
        scores = [0.0] * len(data.tokens) if data.scores is None else data.scores.tolist()
        if len(scores) < len(data.tokens):
            raise FileError(f"the tokenizer has {len(data.tokens)} tokens and {len(scores)} scores")
        unknown = self._known(data.unknown if data.unknown is not None else 0)
        pieces = SentencePiece(self.ids, scores, unknown)

        def encode(text: str, after_special: bool) -> list[int]:
            return pieces.encode(" " + text if prefix and after_special else text)

        self._encode_text = self._encoder(encode)

    def _make_from_bpe(self) -> None:
        data = self.data
        self._make_table(bytes_of)
        pre, note = pre_tokenizer(data.pre, self.ids)
        if note:
            self.notes.append(note)
        self._take_ids(bos=11, eos=11, add_bos=pre.add_bos)
        self._strip = False
        self._pre = pre

        def encode(text: str, after_special: bool) -> list[int]:  # noqa: ARG001 - words start alike everywhere
            return _guarded(lambda: _ids_of(self._bpe, text, special=False))

        self._encode_text = self._encoder(encode)

    _pre: PreTokenizer

    @cached_property
    def _bpe(self) -> Any:
        """Made when something is encoded: it takes half a second for the vocabulary of Llama 3."""
        return _guarded(lambda: build_bpe(self.ids, self.data.merges, self._pre))

    def _make_table(self, decode: Callable[[str], bytes]) -> None:
        """``ids``, the bytes of each token, and which tokens are special, from a GGUF vocabulary."""
        data = self.data
        tokens, types = data.tokens, data.types
        if not tokens:
            raise FileError("the model file names a tokenizer and holds no tokens for it")
        if types is not None and len(types) < len(tokens):
            raise FileError(f"the tokenizer has {len(tokens)} tokens and {len(types)} types")
        kinds: Mapping[int, int] = {}  # of the tokens that are not normal
        if types is not None:
            kinds = {i: int(types[i]) for i in np.flatnonzero(types[: len(tokens)] != _NORMAL).tolist()}
        self.ids = dict(
            zip(reversed(tokens), range(len(tokens) - 1, -1, -1), strict=True)
        )  # the first of equals

        def text_of(i: int) -> bytes:
            token, kind = tokens[i], kinds.get(i, _NORMAL)
            byte = byte_of(token) if kind == _BYTE else None
            if byte is not None:
                return bytes([byte])
            if kind in (_UNKNOWN, _CONTROL, _USER):
                return token.encode("utf-8", "surrogateescape")
            return decode(token)

        self.size = len(tokens)
        self._text_of = text_of
        control = {i for i, kind in kinds.items() if kind in (_UNKNOWN, _CONTROL)}
        # Some converters mark the tokens that end an answer as ordinary text.
        control.update(self.ids[token] for token in _END_TOKENS if token in self.ids)
        self._hidden = frozenset(control)
        special = control.union(i for i, kind in kinds.items() if kind == _USER)
        self._special = {tokens[i]: i for i in special if tokens[i]}

    _special: Mapping[str, int]  # tokens that are found in the text before anything else is

    def _take_ids(self, bos: int, eos: int, add_bos: bool) -> None:
        """BOS and EOS as the file has them, else the defaults of its kind of tokenizer."""
        data = self.data
        self.bos = self._known(bos if data.bos is None else data.bos)
        self.eos = self._known(eos if data.eos is None else data.eos)
        self.add_bos = (add_bos if data.add_bos is None else data.add_bos) and self.bos is not None
        self.add_eos = bool(data.add_eos) and self.eos is not None

    def _known(self, i: int) -> int | None:
        return i if 0 <= i < len(self.data.tokens) else None

    def _encoder(self, encode: Callable[[str, bool], list[int]]) -> Callable[[str, bool, bool], list[int]]:
        """Take special tokens out of the text, encode what is between them, add BOS and EOS.

        ``encode(text, after_special)``: whether the text follows a special token or starts the whole.
        """

        def whole(text: str, special: bool, parse: bool) -> list[int]:
            ids: list[int] = []
            if special and self.add_bos and self.bos is not None:
                ids.append(self.bos)
            after_special = True  # as the first word is
            for part, i in self._parts(text, parse):
                if i is not None:
                    ids.append(i)
                    after_special = True
                elif part:
                    ids += encode(part, after_special)
                    after_special = False
            if special and self.add_eos and self.eos is not None:
                ids.append(self.eos)
            return ids

        return whole

    def _parts(self, text: str, parse: bool) -> Iterable[tuple[str, int | None]]:
        """Text and special tokens in turn; without ``parse`` only tokens that users defined are special."""
        present = [
            token for token, i in self._special.items() if token in text and (parse or i not in self._hidden)
        ]
        if not present:
            yield text, None
            return
        present.sort(key=len, reverse=True)  # of two that start at the same place the longer one is meant
        at = 0
        for match in re.finditer("|".join(map(re.escape, present)), text):
            yield text[at : match.start()], None
            yield match[0], self._special[match[0]]
            at = match.end()
        yield text[at:], None


class TokenStream:
    """Tokens in, text out: a character leaves when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, i: int) -> str:
        """The characters that are complete with token ``i``; "" while one is not."""
        return self._decoder.decode(self._tokenizer.piece(i, special=self._special))

    def close(self) -> str:
        """What is left: U+FFFD where the tokens end inside a character, else ""."""
        return self._decoder.decode(b"", final=True)


def _ids_of(encoder: Any, text: str, special: bool) -> list[int]:
    """The ids of a text by the library ``tokenizers``.

    Its `encode` keeps the interpreter's lock, a second for 1 MB, in which a server would stand still;
    `encode_batch` does not, but starts threads, which short texts are not worth.
    """
    if len(text) <= _LONG:
        found = encoder.encode(text, add_special_tokens=special)
    else:
        found = encoder.encode_batch([text], add_special_tokens=special)[0]
    ids: list[int] = found.ids
    return ids


def _guarded(call: Callable[[], T]) -> T:
    """``call()``; what the library ``tokenizers`` raises, its panics included, as BitgenError."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, BitgenError):
        raise
    except BaseException as error:  # a PanicException is no Exception
        raise FileError(f"the tokenizer cannot be used: {error}") from error


def _read_json(text: str) -> tuple[Any, Mapping[str, Any]]:
    """The encoder of a tokenizer.json and the file's content. BitgenError when it is not one."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"tokenizer.json is not valid JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise FileError("tokenizer.json holds no tokenizer model")
    return _guarded(lambda: _encoder_of(text)), content


def _encoder_of(text: str) -> Any:
    from tokenizers import Tokenizer as Encoder

    encoder = Encoder.from_str(text)
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _decoder_of(decoder: Any) -> tuple[Callable[[str], bytes], bool]:
    """From token to bytes, as the decoder of a tokenizer.json says; and whether a space in front goes.

    BitgenError names a decoder that does not work token by token.
    """
    parts = _decoder_parts(decoder)
    kinds = {str(part.get("type")) for part in parts}
    if not kinds:
        return lambda token: token.encode(), False
    if kinds == {"ByteLevel"}:
        return bytes_of, False
    known = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if not kinds <= known:
        names = ", ".join(sorted(kinds - known))
        raise FileError(
            f"tokenizer.json decodes with {names}; supported are ByteLevel, Metaspace, Replace, "
            "ByteFallback, Fuse and Strip",
        )

    def pieces(token: str) -> bytes:
        byte = byte_of(token) if "ByteFallback" in kinds else None
        return token.replace(SPACE, " ").encode() if byte is None else bytes([byte])

    strip = any(
        (part.get("type") == "Strip" and part.get("start"))
        or (part.get("type") == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in parts
    )
    return pieces, strip


def _decoder_parts(decoder: Any) -> list[Mapping[str, Any]]:
    """The decoders of a sequence, nested ones included."""
    if not isinstance(decoder, dict):
        return []
    inner = decoder.get("decoders")
    if decoder.get("type") == "Sequence" and isinstance(inner, list):
        return [part for each in inner for part in _decoder_parts(each)]
    return [decoder]
