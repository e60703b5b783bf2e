"""bitgen: from this CPU and a ternary model's shapes to a verified, tuned kernel library.

The names below are the public Python API. They are imported when first used: `import bitgen` costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a tenth of the time of `bitgen --help`
    from typing import Any

    from bitgen.api import build as build
    from bitgen.api import load as load
    from bitgen.api import tune as tune
    from bitgen.cpu import Cpu as Cpu
    from bitgen.cpu import Isa as Isa
    from bitgen.cpu import detect_cpu as detect_cpu
    from bitgen.cpu import load_isas as load_isas
    from bitgen.cpu import resolve_isas as resolve_isas
    from bitgen.errors import BitgenError as BitgenError
    from bitgen.formats.config import ModelPreset as ModelPreset
    from bitgen.formats.config import find_model as find_model
    from bitgen.formats.config import load_models as load_models
    from bitgen.llm import LLM as LLM

_HOME = {
    "LLM": "bitgen.llm",
    "build": "bitgen.api",
    "load": "bitgen.api",
    "tune": "bitgen.api",
    "BitgenError": "bitgen.errors",
    "Cpu": "bitgen.cpu",
    "Isa": "bitgen.cpu",
    "ModelPreset": "bitgen.formats.config",
    "detect_cpu": "bitgen.cpu",
    "find_model": "bitgen.formats.config",
    "load_isas": "bitgen.cpu",
    "load_models": "bitgen.formats.config",
    "resolve_isas": "bitgen.cpu",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitgen' has no attribute {name!r}")
    if sys.platform == "win32" and _HOME[name] in ("bitgen.api", "bitgen.llm"):
        from bitgen.cpu import require_supported_os

        require_supported_os("Windows")  # raises, and says what there is
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
