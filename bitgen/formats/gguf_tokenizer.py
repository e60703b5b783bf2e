"""The tokenizer metadata of a GGUF file: read, and written from the tokenizer of a Hugging Face folder.

When writing, the whole tokenizer.json goes in under `tokenizer.huggingface.json`, which bitgen reads back:
the tokens stay exactly those of the source. For other programs the vocabulary follows in their own form
(`tokenizer.ggml.*`): byte-level BPE as `gpt2` with merges and the name of its pre-tokenizer, BPE with byte
fallback as `llama` with scores, and so a tokenizer.model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bitgen.errors import FileError
from bitgen.formats.gguf import U32, GgufFile
from bitgen.formats.hf_tokenizer import added_ids
from bitgen.formats.source import Settings, parse_json, short
from bitgen.tokenizer.bpe import PRE_TOKENIZERS
from bitgen.tokenizer.data import TokenizerData

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def gguf_tokenizer(file: GgufFile) -> TokenizerData:
    """The tokenizer's metadata. FileError when a field is of the wrong type or length."""
    keys = Settings(file.path, file.metadata, "tokenizer.")
    tokens = _array(keys, "ggml.tokens", tuple)
    types = _array(keys, "ggml.token_type", np.ndarray)
    scores = _array(keys, "ggml.scores", np.ndarray)
    for key, array in (("ggml.token_type", types), ("ggml.scores", scores)):
        if array is not None and len(array) != len(tokens or ()):
            raise keys.error(key, f"has {len(array)} elements for {len(tokens or ())} tokens")
    ids = {name: _token_id(keys, f"ggml.{name}_token_id", len(tokens or ())) for name in _TOKEN_IDS}
    ends = _array(keys, _ENDS, np.ndarray)
    if ends is not None and not (ends.dtype.kind in "iu" and all(0 <= i < len(tokens or ()) for i in ends)):
        raise keys.error(_ENDS, f"is {short(ends.tolist())}; there are {len(tokens or ())} tokens")
    known = [ids["eos"], ids["eot"], ids["eom"], *(() if ends is None else ends.tolist())]
    return TokenizerData(
        json=keys.text("huggingface.json") or None,
        model=keys.text("ggml.model"),
        pre=keys.text("ggml.pre"),
        tokens=tokens or (),
        scores=None if scores is None else scores.astype(np.float32),
        types=None if types is None else types.astype(np.int32),
        merges=_array(keys, "ggml.merges", tuple) or (),
        bos=ids["bos"],
        eos=ids["eos"],
        eot=ids["eot"],
        unknown=ids["unknown"],
        pad=ids["padding"],
        end_ids=tuple(dict.fromkeys(i for i in known if i is not None)),
        add_bos=keys.flag("ggml.add_bos_token"),
        add_eos=keys.flag("ggml.add_eos_token"),
        add_space_prefix=keys.flag("ggml.add_space_prefix"),
        chat_template=keys.text("chat_template") or None,
    )


# All tokens that end an answer: generation_config.json may list more than GGUF has names for.
_ENDS = "bitgen.end_token_ids"
_TOKEN_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")


def _array(keys: Settings, key: str, kind: type) -> Any:
    value = keys.raw(key)
    if value is not None and not isinstance(value, kind):
        raise keys.error(key, f"is {short(value)}, not the array it should be")
    return value


def _token_id(keys: Settings, key: str, vocab: int) -> int | None:
    value = keys.get(key)
    if value is None or value in (-1, 0xFFFFFFFF):  # both are written for "none"
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < max(vocab, 1):
        raise keys.error(key, f"is {short(value)}; there are {vocab} tokens")
    return value


# ---- Writing ----


def tokenizer_metadata(data: TokenizerData, vocab: int) -> tuple[dict[str, Any], list[str]]:
    """Metadata for a GGUF file of ``vocab`` tokens, and notes for the user.

    FileError when tokenizer.json is damaged or has tokens beyond ``vocab``.
    """
    notes: list[str] = []
    if data.json is None:
        out, tokenizer = _pieces(data, vocab), {}
    else:
        tokenizer = parse_json(data.json.encode("utf-8", "surrogatepass"), "tokenizer.json")
        out = _from_json(tokenizer, data, vocab, notes)
    for name, value in (
        ("bos", data.bos),
        ("eos", data.eos),
        ("unknown", data.unknown),
        ("padding", data.pad),
    ):
        if value is not None and value < vocab:
            out[f"tokenizer.ggml.{name}_token_id"] = U32(value)
    if data.eot is not None and data.eot < vocab:
        out["tokenizer.ggml.eot_token_id"] = U32(data.eot)
    ends = [i for i in data.end_ids if i < vocab]
    if set(ends) - {data.eos, data.eot}:
        out[f"tokenizer.{_ENDS}"] = np.array(ends, np.int32)
    add_bos = data.add_bos if data.add_bos is not None else _adds_bos(tokenizer, data.bos)
    if add_bos is not None:
        out["tokenizer.ggml.add_bos_token"] = add_bos
    if data.add_eos is not None:
        out["tokenizer.ggml.add_eos_token"] = data.add_eos
    if data.add_space_prefix is not None:
        out["tokenizer.ggml.add_space_prefix"] = data.add_space_prefix
    if data.chat_template is not None:
        out["tokenizer.chat_template"] = data.chat_template
    if data.json is not None:
        out["tokenizer.huggingface.json"] = data.json
    return out, notes


def _from_json(
    tokenizer: Mapping[str, Any], data: TokenizerData, vocab: int, notes: list[str]
) -> dict[str, Any]:
    model = tokenizer.get("model")
    model = model if isinstance(model, Mapping) else {}
    if model.get("type", "BPE") == "BPE" and isinstance(model.get("vocab"), Mapping):
        return _vocabulary(tokenizer, model, data, vocab, notes)
    kind = repr(model.get("type"))[:40]
    notes.append(
        f"the tokenizer is {kind}: the file keeps its tokenizer.json only, which llama.cpp does not read"
    )
    return {}


def _pieces(data: TokenizerData, vocab: int) -> dict[str, Any]:
    """The pieces of a tokenizer.model, filled up to ``vocab`` tokens."""
    if data.model != "llama" or data.scores is None or data.types is None:
        raise FileError("the model has no tokenizer to convert")
    extra = vocab - len(data.tokens)
    if extra < 0:
        raise FileError(f"the tokenizer has {len(data.tokens)} tokens; the model has {vocab} rows")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*data.tokens, *(f"[PAD{len(data.tokens) + i}]" for i in range(extra))],
        "tokenizer.ggml.token_type": np.concatenate([data.types, np.full(extra, _UNUSED, np.int32)]),
        "tokenizer.ggml.scores": np.concatenate([data.scores, np.zeros(extra, np.float32)]),
    }


def _vocabulary(
    tokenizer: Mapping[str, Any], model: Mapping[str, Any], data: TokenizerData, vocab: int, notes: list[str]
) -> dict[str, Any]:
    byte_level = "ByteLevel" in _types(tokenizer.get("pre_tokenizer")) | _types(tokenizer.get("decoder"))
    tokens = [f"[PAD{i}]" for i in range(vocab)]
    types = np.full(vocab, _UNUSED, np.int32)
    ids = model["vocab"]
    for token, i in ids.items():
        _put(tokens, token, i)
        types[i] = _BYTE if not byte_level and _BYTE_TOKEN.fullmatch(token) else _NORMAL
    for token, i in added_ids(tokenizer).items():
        _put(tokens, token, i)
        types[i] = _CONTROL if token in _specials(tokenizer) else _USER
    unknown = data.unknown if data.unknown is not None else ids.get(model.get("unk_token") or "")
    if isinstance(unknown, int) and 0 <= unknown < vocab and not byte_level:
        types[unknown] = _UNKNOWN
    merges = _merges(model.get("merges"))
    out: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if byte_level:
        pre = _pre_name(tokenizer.get("pre_tokenizer"))
        if pre is None:
            notes.append(
                "its pre-tokenizer has no name in GGUF: llama.cpp may cut words elsewhere than bitgen does"
            )
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or "default", **out,
                "tokenizer.ggml.merges": merges}  # fmt: skip
    scores = np.zeros(vocab, np.float32)
    for rank, merge in reversed(list(enumerate(merges))):  # the first merge that makes a token counts
        i = ids.get(merge.replace(" ", "", 1) if merge[:1] != " " else merge[1:])
        if isinstance(i, int):
            scores[i] = -(rank + 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **out,
        "tokenizer.ggml.scores": scores,
    }


def _put(tokens: list[str], token: str, i: object) -> None:
    if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < len(tokens):
        raise FileError(
            f"tokenizer.json: the token {token[:40]!r} has the id {i!r:.40}; the model has "
            f"{len(tokens)} rows",
        )
    tokens[i] = token


def _merges(merges: object) -> list[str]:
    """Merges as "left right", from texts or pairs."""
    out = []
    for merge in merges if isinstance(merges, list) else []:
        pair = merge if isinstance(merge, str) else " ".join(merge) if _is_pair(merge) else None
        if pair is None:
            raise FileError("tokenizer.json: a merge is neither a text nor a pair of texts")
        out.append(pair)
    return out


def _is_pair(merge: object) -> bool:
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge)


def _specials(tokenizer: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(
        t["content"]
        for t in tokenizer["added_tokens"]
        if isinstance(t, Mapping) and t.get("special") is True and isinstance(t.get("content"), str)
    )


def _parts(step: object) -> list[Mapping[str, Any]]:
    """A pipeline step and, of a Sequence, its own steps."""
    if not isinstance(step, Mapping):
        return []
    inner = step.get("pretokenizers") or step.get("decoders") or step.get("processors")
    if step.get("type") == "Sequence" and isinstance(inner, list):
        return [part for part in inner if isinstance(part, Mapping)]
    return [step]


def _types(step: object) -> set[str]:
    return {str(part.get("type")) for part in _parts(step)}


def _pre_name(step: object) -> str | None:
    """The name that GGUF has for the regular expressions of a pre-tokenizer."""
    patterns = []
    for part in _parts(step):
        pattern = part.get("pattern")
        if (
            part.get("type") == "Split"
            and isinstance(pattern, Mapping)
            and isinstance(pattern.get("Regex"), str)
        ):
            patterns.append(pattern["Regex"])
        elif part.get("type") == "Digits" and part.get("individual_digits") is True:
            patterns.append(r"\p{N}")
        elif part.get("type") == "ByteLevel" and part.get("use_regex", True) is not False:
            patterns.append(PRE_TOKENIZERS["gpt-2"].patterns[0])
    preferred = ("llama-bpe", "gpt-2", "qwen2", "smollm", *PRE_TOKENIZERS)
    return next((name for name in preferred if PRE_TOKENIZERS[name].patterns == tuple(patterns)), None)


def _adds_bos(tokenizer: Mapping[str, Any], bos: int | None) -> bool | None:
    """Whether the post-processor starts every text with BOS; None where it does not tell."""
    if bos is None:
        return None
    names = {token for token, i in added_ids(tokenizer).items() if i == bos}
    for part in _parts(tokenizer.get("post_processor")):
        single = part.get("single")
        first = single[0] if isinstance(single, list) and single else None
        if isinstance(first, Mapping) and isinstance(first.get("SpecialToken"), Mapping):
            return first["SpecialToken"].get("id") in names
    return None
