"""Texts that follow a grammar: which tokens may come next, by llguidance (the extra json).

::

    grammars = Grammars(tokenizer, vocab)
    grammar = grammars.json_schema({"type": "object"})   # once, takes milliseconds; any thread
    state = grammar.start()                              # for each text
    state.allowed()                                      # a mask of the vocabulary
    state.take(token)
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bitgen.errors import BitgenError, UsageError
from bitgen.inference.wants import Mask
from bitgen.tokenizer.tokenizer import Tokenizer

SCHEMA_BYTES_MAX = 1 << 16
_GRAMMARS_KEPT = 32
# One space behind a comma and a colon, as Python's json writes: small models that may write white space only.
_SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SYMBOLS_MAX = 50_000  # of a compiled grammar, a tenth of llguidance's own limit


class Grammar:
    """A grammar that is compiled; `start` is called for each text that is to follow it."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._vocab = vocab

    def start(self) -> GrammarState:
        return GrammarState(self._matcher.deep_copy(), self._vocab)


class GrammarState:
    """How far a text has come."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab // 32)

    def allowed(self, drafted: Sequence[int] = ()) -> Mask:
        """The tokens that may come next, after ``drafted`` tokens that are not sure yet.

        BitgenError when the grammar is beyond llguidance's limits for a step.
        """
        taken = self._matcher.try_consume_tokens(list(drafted)) if drafted else 0
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        if taken:
            self._matcher.rollback(taken)
        self._check()
        if not mask.any():
            raise BitgenError("the text cannot follow its grammar: no token fits")
        return mask

    def forced(self) -> list[int]:
        """Tokens that come next because nothing else may."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else tokens

    def take(self, token: int) -> bool:
        """Go on with a token; False when the text is complete and cannot go on."""
        self._matcher.consume_token(token)
        self._check()
        return not self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise BitgenError(f"the text cannot follow its grammar: {_line(self._matcher.get_error())}")


class Grammars:
    """Makes grammars for one tokenizer, and keeps the last ones. Its methods may be called from any thread.

    BitgenError when llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        try:
            import llguidance
        except ModuleNotFoundError:
            raise BitgenError("llguidance is not installed: pip install 'bitgen[json]'") from None
        self._library: Any = llguidance
        self._vocab = vocab
        size = max(vocab, tokenizer.size)
        wrapper = llguidance.TokenizerWrapper(_Wrapped(tokenizer))
        ends = sorted(tokenizer.end_ids)
        self._tokenizer = llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=ends or None)
        self._limits = llguidance.LLParserLimits(max_grammar_size=_SYMBOLS_MAX, verbose_errors=False)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: Any) -> Grammar:
        """JSON that a schema allows. UsageError for one that is too large, or that cannot be honoured."""
        return self._compile(f"start: {self.json_rule(schema)}")

    def calls(self, tools: Iterable[tuple[str, Any]]) -> Grammar:
        """A call of one of the tools (name, schema of its arguments): {"name": ..., "arguments": ...}."""
        rules = []
        for i, (name, schema) in enumerate(tools):
            start = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            rules.append(f'call_{i}: {start} {self.json_rule(schema)} "}}"')
        choice = " | ".join(f"call_{i}" for i in range(len(rules)))
        return self._compile("\n".join((f"start: {choice}", *rules)))

    @staticmethod
    def json_rule(schema: Any) -> str:
        """A schema as a rule of a grammar; each is a document of its own, so its references stay right."""
        if not isinstance(schema, Mapping):
            raise UsageError(f"a JSON schema is an object, not {type(schema).__name__}")
        text = json.dumps({**schema, "x-guidance": _SPACING})
        if len(text) > SCHEMA_BYTES_MAX:
            raise UsageError(f"a JSON schema has {SCHEMA_BYTES_MAX} bytes at most, not {len(text)}")
        return f"%json {text}"

    def _compile(self, rules: str) -> Grammar:
        with self._lock:
            if (grammar := self._kept.get(rules)) is not None:
                self._kept.move_to_end(rules)
                return grammar
        matcher = self._library.LLMatcher(
            self._tokenizer,
            self._library.LLMatcher.grammar_from_lark(rules),
            limits=self._limits,
            log_level=0,
        )
        # What compiles may still be beyond the limits of a step: the start tells, where anything may come.
        tried = matcher.deep_copy()
        if not tried.is_error():
            tried.compute_bitmask()
        if not tried.is_error():
            tried.try_consume_tokens(tried.compute_ff_tokens())
            tried.compute_bitmask()
        if tried.is_error():
            raise UsageError(f"the JSON schema cannot be used: {_line(tried.get_error())}")
        grammar = Grammar(matcher, self._vocab)
        with self._lock:
            self._kept[rules] = grammar
            while len(self._kept) > _GRAMMARS_KEPT:
                self._kept.popitem(last=False)
        return grammar


class _Wrapped:
    """A tokenizer as llguidance wants one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos
        self.eos_token_id = min(tokenizer.end_ids, default=0) if tokenizer.eos is None else tokenizer.eos
        self.tokens = [tokenizer.piece(i, special=True) for i in range(tokenizer.size)]
        self.special_token_ids = sorted(tokenizer.control_ids)

        special = tokenizer.control_ids
        self._ids = {token: i for i, token in enumerate(self.tokens) if token and i not in special}
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens that print exactly ``text``; those of a tokenizer that puts a space in front do not."""
        ids = self._tokenizer.encode(text.decode("utf-8", "replace"), special=False, parse=False)
        return ids if b"".join(self.tokens[i] for i in ids) == text else self._greedy(text)

    def _greedy(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again."""
        ids, at = [], 0
        while at < len(text):
            ends = range(min(len(text), at + self._longest), at, -1)
            end = next((end for end in ends if text[at:end] in self._ids), None)
            if end is None:  # no token prints this byte
                break
            ids.append(self._ids[text[at:end]])
            at = end
        return ids


def _line(message: str) -> str:
    """What llguidance says, without the place in the rules that are made of a schema, as one line."""
    said = re.split(r"\n\s*\d+ \| ", message)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): ", "", said).split())[:300]
