"""`bitgen.LLM`: a model that can be asked for text, on any machine with a kernel library or a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitgen.model.config import ModelConfig
from bitgen.model.llm import LLM as _LLM
from bitgen.model.llm import find_library


class LLM(_LLM):
    """`bitgen.model.llm.LLM`; without a library it builds the untuned one (seconds, once)."""

    def _find_library(self, config: ModelConfig, progress: Callable[[str], None] | None) -> Path:
        return library_for(config, progress)


def library_for(config: ModelConfig, progress: Callable[[str], None] | None = None) -> Path:
    """The library to run a model with: tuned for it, else any, else the untuned one, built now.

    BitgenError (EXIT_TOOLCHAIN) when it has to be built and there is no compiler.
    """
    bundle = find_library(config)
    if bundle is not None:
        return bundle.path
    from bitgen.api import load

    if progress:
        progress("building the default kernels, once")
    with load() as table:
        return table.path
