"""Small tokenizers and models of random weights that several test modules talk to."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from reference_model import ReferenceEngine, small_config

from bitgen.inference.synthetic import random_weights
from bitgen.llm import LLM
from bitgen.tokenizer.data import TokenizerData

SPACE = "\u2581"
WORDS = (
    f"{SPACE}t {SPACE}th {SPACE}the he in er an {SPACE}a {SPACE}an {SPACE}and re on {SPACE}{SPACE} nd".split(
        " "
    )
)


def piece_data(**changes: Any) -> TokenizerData:
    """A SentencePiece model: 3 special tokens, 256 bytes, letters, some words; ids in that order."""
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz.,"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *WORDS]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(letters) + len(WORDS))
    scores = [0.0] * 259 + [-1e4] * len(letters) + [-float(i) for i in range(len(WORDS))]
    fields: dict[str, Any] = {
        "model": "llama",
        "tokens": tuple(tokens),
        "types": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "bos": 1,
        "eos": 2,
    }
    return TokenizerData(**{**fields, **changes})


@lru_cache(maxsize=8)
def weights(seed: int = 0, **changes: Any) -> Any:
    """Random weights for `piece_data`; with a head of its own, or every token would repeat itself."""
    config = small_config(**{"vocab": len(piece_data().tokens), "tied_head": False, **changes})
    return random_weights(config, seed)


def small_llm(*, context: int = 256, batch: int = 4, seed: int = 0, **changes: Any) -> LLM:
    """A model that writes nonsense, on the numpy engine."""
    model = weights(seed)
    engine = ReferenceEngine(model, context=context, max_batch=batch)
    return LLM.over(engine, model.config, piece_data(**changes))
