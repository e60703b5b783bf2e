"""Byte-level BPE as GGUF files hold it: vocabulary, merges, and the name of a pre-tokenizer.

The pre-tokenizer cuts the text into words before anything is merged. GGUF stores only its name, so the
regular expressions, which come from the models' own tokenizer.json, are listed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from bitgen.errors import FileError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # English contractions
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_QWEN35 = _SHORT + (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"|\p{N}|" + _CASED_TAIL
_GPT4O = _CASED % (_SHORT + "?", _SHORT + "?") + r"|\p{N}{1,3}|" + _CASED_TAIL
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """Regular expressions, applied one after the other: each cuts what is left into matches and the rest.

    ``whole_words``: a word that is a token stays one, whatever the merges say. ``add_bos`` where the file
    does not say it.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))
_BY_NAMES = {
    "default": _DEFAULT,
    "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": PreTokenizer(
        (_LLAMA3,), whole_words=True, add_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe glm4": PreTokenizer((_LLAMA3,)),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 jina-es jina-de gigachat mellum modern-bert "
    "jina-v1-en jina-v2-code jina-v2-es jina-v2-de roberta-bpe a.x-4.0": PreTokenizer((_GPT2,)),
    "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2": PreTokenizer((r"\p{N}", _GPT2)),
    "qwen2 stablelm2 deepseek-r1-qwen megrez hunyuan solar-open kormo grok-2 f2llmv2": PreTokenizer(
        (_QWEN2,)
    ),
    "qwen35": PreTokenizer((_QWEN35,)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer((_GPT4O,)),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(_DEEPSEEK3),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    name: pre for names, pre in _BY_NAMES.items() for name in names.split()
}

# Files that do not name it: what the words of these vocabularies were cut with when they were trained.
_TELLTALES = (
    (("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"), "llama-bpe"),
    (("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|object_ref_start|>"), "qwen2"),
)


def pre_tokenizer(name: str, vocabulary: Mapping[str, int]) -> tuple[PreTokenizer, str | None]:
    """The pre-tokenizer called ``name`` and a note for the user, or None.

    An empty name or "default" is what converters wrote that did not know better: a vocabulary that is known
    by its special tokens gets the one it was trained with, every other one the default of llama.cpp.
    FileError for a name that is not known: other words would give other tokens.
    """
    if name in ("", "default"):
        for tokens, known in _TELLTALES:
            if all(token in vocabulary for token in tokens):
                note = f"the file does not name its pre-tokenizer; its special tokens are those of {known}"
                return PRE_TOKENIZERS[known], note
        if not name:
            return _DEFAULT, "the file does not name its pre-tokenizer; the default may split words wrongly"
    if name not in PRE_TOKENIZERS:
        known_names = ", ".join(PRE_TOKENIZERS)
        raise FileError(f"unknown pre-tokenizer {name!r}; supported are {known_names}")
    return PRE_TOKENIZERS[name], None


@cache
def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte.

    Printable bytes of Latin-1 stand for themselves, the other 68 for U+0100, U+0101, ...
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def bytes_of(token: str) -> bytes:
    """The bytes a token of a byte-level vocabulary stands for; one that is not spelled so is plain text."""
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:
        return token.encode("utf-8", "surrogateescape")


def build_bpe(ids: Mapping[str, int], merges: Sequence[str], pre: PreTokenizer) -> Any:
    """A ``tokenizers.Tokenizer`` that encodes plain text; special tokens are the caller's business.

    Merges whose parts or whole are no tokens are left out; they could not lead to one.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for token, i in ids.items() if token.isprintable() or _is_text(token)}
    try:  # as they should be: half a second less than looking at every one
        pairs: Any = [tuple(merge.split(" ")) for merge in merges]
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.whole_words)
    except Exception:  # the library has no narrower one
        pairs = _possible(vocabulary, merges)
        model = models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre.whole_words)
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    return tokenizer


def _possible(vocabulary: Mapping[str, int], merges: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of two tokens to a third."""
    pairs = []
    for merge in merges:
        head, _, right = merge[1:].partition(" ")  # a part may itself start with a space
        left = merge[:1] + head
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            pairs.append((left, right))
    return pairs


def _is_text(token: str) -> bool:
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True
