"""From a model file to tokens: files -> weights -> engine -> text.

``open_model(path)`` reads a GGUF file or a Hugging Face folder into a `ModelFile`. Nothing below this package
imports optuna, the renderer or the toolchain: it runs where no compiler is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitgen.model.config import ModelConfig as ModelConfig
    from bitgen.model.files import open_model as open_model
    from bitgen.model.model_file import ModelFile as ModelFile
    from bitgen.model.weights import Weights as Weights

_HOME = {
    "ModelConfig": "bitgen.model.config",
    "ModelFile": "bitgen.model.model_file",
    "Weights": "bitgen.model.weights",
    "open_model": "bitgen.model.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitgen.model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
