"""How a model's file says that a vector of a text is made of the states of its tokens."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, cast

from bitgen.errors import FileError
from bitgen.formats.architectures import ARCHITECTURES
from bitgen.formats.gguf import U32
from bitgen.formats.model_file import ModelFile
from bitgen.formats.source import Settings, read_json, short

Pooling: TypeAlias = Literal["last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean")
_GGUF = {"mean": 1, "last": 3}  # llama.cpp's numbers; 0 is none
_MODE = "pooling_mode_"
_HF: dict[str, Pooling] = {f"{_MODE}mean_tokens": "mean", f"{_MODE}lasttoken": "last"}


def pooling_of(file: ModelFile) -> Pooling | None:
    """What a model's file says, or is known of its architecture; None: nothing.

    FileError for a pooling that is not supported.
    """
    if file.container == "gguf":
        keys = Settings(file.path, file.metadata, f"{file.metadata['general.architecture']}.")
        number = keys.integer("pooling_type", 0)
        names = {value: name for name, value in _GGUF.items()}
        if number and number not in names:
            raise keys.error("pooling_type", f"is {number}; 1 (mean) and 3 (last) are supported")
        named = ARCHITECTURES.get(file.config.architecture)
        return "last" if named and named.last_token else cast("Pooling | None", names.get(number))
    path = file.path / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    modes = [key for key, value in read_json(path).items() if key.startswith(_MODE) and value is True]
    if len(modes) != 1 or modes[0] not in _HF:
        found = ", ".join(map(short, modes)) or "no pooling"
        raise FileError(f"{path} asks for {found}; one of {', '.join(_HF)} is supported")
    return _HF[modes[0]]


def pooling_metadata(file: ModelFile, architecture: str) -> dict[str, Any]:
    """The same as a GGUF file says it."""
    pooling = pooling_of(file)
    return {} if pooling is None else {f"{architecture}.pooling_type": U32(_GGUF[pooling])}
