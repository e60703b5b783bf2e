"""A model's shapes, however it is named."""

from __future__ import annotations

import re
from pathlib import Path

from bitgen.formats.config import ModelPreset, find_model
from bitgen.formats.open import open_model, shipped_model
from bitgen.spec import StepSizes


def preset_of(model: str | ModelPreset) -> ModelPreset:
    """The shapes of a preset (its name), a YAML file, or a model file or folder that `bitgen run` reads."""
    if isinstance(model, ModelPreset):
        return model
    path = Path(model)
    if (
        path.suffix.lower() not in (".gguf", ".safetensors")
        and not path.is_dir()
        and not shipped_model(model)
    ):
        return find_model(model)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    return ModelPreset.of(open_model(model).config, safe or "model")


def step_sizes(preset: ModelPreset) -> StepSizes:
    """The sizes that a forward step for this model has as constants."""
    return StepSizes(preset.hidden, preset.q_rows, preset.ffn, preset.head_dim)
