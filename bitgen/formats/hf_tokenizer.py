"""The tokenizer of a Hugging Face folder.

It is tokenizer.json, or SentencePiece's tokenizer.model where that is missing; the files beside it tell the
special tokens and the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard

from bitgen.formats.sentencepiece_file import read_tokenizer_model
from bitgen.formats.source import parse_json, read_bounded, read_json
from bitgen.tokenizer.data import TokenizerData

_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end_of_turn|>", "<end_of_turn>")


def hf_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerData:
    """``config`` is config.json. FileError when there is no tokenizer, or a damaged one."""
    settings = _optional_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        content = read_bounded(folder / "tokenizer.json", "; bitgen needs it to turn text into tokens")
        ids = added_ids(parse_json(content, str(folder / "tokenizer.json")))
        data = TokenizerData(json=content.decode("utf-8"))
    else:
        added = _added_tokens(folder, settings)
        path = folder / "tokenizer.model"
        data = read_tokenizer_model(path, read_bounded(path), added)
        ids = {token: i for i, token in enumerate(data.tokens)}
    generation = _optional_json(folder / "generation_config.json")

    def special(name: str, known: int | None) -> int | None:
        value = settings.get(f"{name}_token")
        if isinstance(value, Mapping):  # {"content": "<s>", ...}
            value = value.get("content")
        if isinstance(value, str) and value in ids:
            return ids[value]
        number = config.get(f"{name}_token_id")
        return number if known is None and _is_id(number) else known

    eos = special("eos", data.eos)
    ends = [eos, *_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    ends += [ids[name] for name in _END_OF_TURN if name in ids]
    add_bos = _flag(settings, "add_bos_token")
    return replace(
        data,
        bos=special("bos", data.bos),
        eos=eos if eos is not None else next((i for i in ends if i is not None), None),
        eot=next((ids[name] for name in _END_OF_TURN if name in ids), None),
        unknown=special("unk", data.unknown),
        pad=special("pad", data.pad),
        end_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
        add_bos=data.add_bos if add_bos is None else add_bos,
        add_eos=_flag(settings, "add_eos_token"),
        add_space_prefix=_prefix(settings, data),
        chat_template=_template(folder, settings),
        config=settings,
    )


def added_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Added (special) token -> id, from tokenizer.json; entries of the wrong form are left out."""
    added = tokenizer.get("added_tokens")
    return {
        t["content"]: t["id"]
        for t in (added if isinstance(added, list) else [])
        if isinstance(t, Mapping) and isinstance(t.get("content"), str) and _is_id(t.get("id"))
    }


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id -> (text, special) of the tokens that a tokenizer.model lacks, from the two files that tell them."""
    found = {
        i: (token, True) for token, i in _optional_json(folder / "added_tokens.json").items() if _is_id(i)
    }
    decoder = settings.get("added_tokens_decoder")
    for key, token in decoder.items() if isinstance(decoder, Mapping) else ():
        known = isinstance(token, Mapping) and isinstance(token.get("content"), str)
        if known and isinstance(key, str) and key.isdecimal() and len(key) < 10:
            found[int(key)] = (token["content"], token.get("special") is True)
    return found


def _prefix(settings: Mapping[str, Any], data: TokenizerData) -> bool | None:
    value = _flag(settings, "add_prefix_space")
    return data.add_space_prefix if value is None else value


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if _is_id(v)]


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _flag(settings: Mapping[str, Any], key: str) -> bool | None:
    value = settings.get(key)
    return value if isinstance(value, bool) else None


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, or chat_template of tokenizer_config.json: a text, or a list with a default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_bounded(path).decode("utf-8", "replace")
    value = settings.get("chat_template")
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, Mapping) and entry.get("name") == "default":
            value = entry.get("template")
    return value if isinstance(value, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
