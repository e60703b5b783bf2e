"""Which kernel library a model runs on: one that is here, or one that is built now, once.

`bitgen.inference.opening` finds what is here and imports no compiler; what builds is imported where nothing
that is here will do.
"""

from __future__ import annotations

from pathlib import Path

from bitgen.bundle import Bundle, level_below_best, refused_features
from bitgen.bundle.manifest import in_every_library
from bitgen.cpu import detect_cpu
from bitgen.errors import BitgenError, ToolchainError
from bitgen.formats.config import ModelConfig, ModelPreset, find_model, preset_name
from bitgen.inference.opening import find_library, has_kernels, made_for_others, tuned_shapes
from bitgen.paths import tune_logs_dir
from bitgen.progress import Progress, Report


def library_for(config: ModelConfig, progress: Report | None = None) -> Path | Bundle:
    """The library to run a model with: one with winners for its matrices, else any, else the untuned one.

    What is missing is built now (seconds, once): the untuned library, and before it one with the winners that
    were tuned here or are committed for this CPU family. So is what is there for a lower ISA level than this
    CPU's best only, unless it was tuned for these matrices on this family: that is said. Where nothing can be
    built what is there runs. ToolchainError when there is neither library nor compiler.
    """
    say = progress or _say_nothing
    bundle = find_library(config, progress)
    slow = _slower_level(bundle)
    if bundle is not None and _is_made_for(bundle, config, slow):
        if slow:
            say(Progress(f"{slow}: `bitgen build` makes a faster one", lasting=True))
        return bundle
    known = _build_known(config, bundle, say)
    if known is not None:
        return known
    special = not in_every_library(config.kind)
    if bundle is not None and not made_for_others(bundle, config) and (special or not slow):
        if slow:
            say(Progress(slow, lasting=True))
        return bundle
    return _build_untuned(bundle, slow, say)


def _say_nothing(progress: Progress) -> None:
    """For whoever does not want to hear."""


def _slower_level(bundle: Bundle | None) -> str:
    """That a library is for a lower ISA level than this CPU's best, for people; empty where it is not."""
    cpu = detect_cpu()
    levels = level_below_best(bundle, cpu, refused_features(cpu)) if bundle is not None else None
    if bundle is None or levels is None:
        return ""
    return f"the library {bundle.manifest.name} is for {levels[0].name}, and this CPU runs {levels[1].name}"


def _is_made_for(bundle: Bundle, config: ModelConfig, slow: str) -> bool:
    """Whether nothing better is to be built: it was tuned for a model's matrices, or made for their kind."""
    family = detect_cpu().family
    if slow and bundle.manifest.cpu_family != family:
        return False
    if in_every_library(config.kind):
        if not tuned_shapes(config, (kernel.shape for kernel in bundle.manifest.kernels)):
            return False
    elif not has_kernels(bundle, config):
        return False
    # What was tuned here comes before what was shipped.
    return bundle.origin is None or not (tune_logs_dir() / f"{family}.jsonl").exists()


def _build_known(config: ModelConfig, bundle: Bundle | None, say: Report) -> Path | None:
    """The library of a known model, or of a kind that not every library serves; None where none is better.

    With a ``bundle`` at hand also where none can be built: no compiler, or no folder to write to.
    """
    name = preset_name(config)
    if name is None and in_every_library(config.kind):
        return None
    try:
        return _build(find_model(name) if name else _untuned(config), say)
    except BitgenError as error:
        if bundle is None:
            raise
        if not isinstance(error, ToolchainError):
            say(Progress(f"better kernels cannot be built: {error.message}", lasting=True))
        return None


def _untuned(config: ModelConfig) -> ModelPreset:
    """A model that nobody gave a name: libraries of default kernels are for its kind of weights."""
    return ModelPreset.of(config, f"untuned-{config.weights}-g{config.group}")


def _build(preset: ModelPreset, say: Report) -> Path | None:
    """The library of a preset, if winners are known for any of its shapes, or it needs other defaults."""
    from bitgen.api import build, choices_for
    from bitgen.environment import Environment

    env = Environment()
    if not choices_for(preset, env, env.isa(None)).entries:
        return None
    say(Progress(f"building the kernels of {preset.alias}, once"))
    return build(preset, progress=say)


def _build_untuned(bundle: Bundle | None, slow: str, say: Report) -> Path | Bundle:
    """The library of default kernels; where it cannot be built the one at hand."""
    from bitgen.api import untuned_library

    say(Progress("building the default kernels, once"))
    try:
        return untuned_library()
    except BitgenError as error:
        if bundle is None:
            raise
        if slow:
            say(Progress(f"{slow}, and one for that cannot be built: {error.message}", lasting=True))
        return bundle
