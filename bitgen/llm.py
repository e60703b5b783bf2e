"""`bitgen.LLM`: a model that can be asked for text, on any machine with a kernel library or a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitgen.errors import ToolchainError
from bitgen.formats.config import ModelConfig
from bitgen.inference.llm import LLM as _LLM
from bitgen.inference.llm import find_library, preset_name, tuned_shapes


class LLM(_LLM):
    """`bitgen.inference.llm.LLM`; without a library it builds the untuned one (seconds, once)."""

    def _find_library(self, config: ModelConfig, progress: Callable[[str], None] | None) -> Path:
        return library_for(config, progress)


def library_for(config: ModelConfig, progress: Callable[[str], None] | None = None) -> Path:
    """The library to run a model with: one with winners for its matrices, else any, else the untuned one.

    What is missing is built now (seconds, once): the untuned library, and before it one with the winners that
    were tuned here or are committed for this CPU family. ToolchainError when there is neither library nor
    compiler.
    """
    bundle = find_library(config)
    if bundle is not None and tuned_shapes(config, (kernel.shape for kernel in bundle.manifest.kernels)):
        return bundle.path
    if (name := preset_name(config)) is not None:
        try:
            known = _build_known(name, progress)
        except ToolchainError:
            if bundle is None:
                raise
            known = None  # no compiler: what is there runs
        if known is not None:
            return known
    if bundle is not None:
        return bundle.path
    from bitgen.api import load

    if progress:
        progress("building the default kernels, once")
    with load() as table:
        return table.path


def _build_known(preset: str, progress: Callable[[str], None] | None) -> Path | None:
    """The library of a preset, if winners are known for any of its shapes."""
    from bitgen.api.libraries import build, choices_for
    from bitgen.api.models import preset_of
    from bitgen.api.workshop import Workshop

    workshop = Workshop()
    if not choices_for(preset_of(preset), workshop, workshop.isa(None)):
        return None
    if progress:
        progress(f"building the kernels of {preset}, once")
    return build(preset)
