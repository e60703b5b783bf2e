"""What a model file says about its tokenizer, as the readers of all formats give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenizerData:
    """All a file says about its tokenizer; nothing is interpreted here.

    ``json`` is the text of a tokenizer.json where there is one and wins over the other fields. The rest comes
    from GGUF metadata (``tokenizer.ggml.*``) or from tokenizer_config.json and generation_config.json.
    """

    json: str | None = None
    model: str = ""  # "llama" (SentencePiece), "gpt2" (byte-level BPE)
    pre: str = ""  # name of the pre-tokenizer of gpt2 models
    tokens: tuple[str, ...] = ()  # bytes that are no UTF-8 come as surrogates (errors="surrogateescape")
    scores: NDArray[np.float32] | None = None  # (len(tokens))
    types: NDArray[np.int32] | None = None  # 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte
    merges: tuple[str, ...] = ()
    bos: int | None = None
    eos: int | None = None
    eot: int | None = None
    unknown: int | None = None
    pad: int | None = None
    end_ids: tuple[int, ...] = ()  # every token that ends an answer, eos and eot included
    add_bos: bool | None = None
    add_eos: bool | None = None
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)  # tokenizer_config.json
