"""Model presets (configs/models/*.yaml): the shapes of a model, without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitgen.errors import BitgenError, FileError, UsageError, nearest_names
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Matmul:
    """One matrix a token is multiplied with: y (m) = W (m, k) x (k), ``count`` times a token."""

    role: str  # qkv, o, gate_up, down
    m: int
    k: int
    count: int


@dataclass(frozen=True)
class ModelPreset:
    """The shape of a model, in elements; ``norm_eps`` and ``rope_theta`` as the architecture defines them.

    BitgenError when a size is not positive, kv_heads does not divide heads, or a name cannot be a file's.
    """

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    activation: Literal["silu", "relu2"]
    sub_norms: bool  # a norm before o (attn_sub_norm, inner_attn_ln) and before down (ffn_sub_norm)
    tied_head: bool  # the LM head is the embedding
    norm_eps: float
    architecture: str  # as GGUF's general.architecture calls it
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "hidden",
            "ffn",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab",
            "rope_theta",
            "norm_eps",
        )
        for field in sizes:
            if not getattr(self, field) > 0:
                raise BitgenError(f"{field} must be greater than 0, found {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise BitgenError(f"kv_heads must divide heads, found {self.kv_heads} and {self.heads}")
        if self.head_dim % 2:
            raise BitgenError(f"head_dim must be even (RoPE rotates pairs), found {self.head_dim}")
        for alias in (self.alias, *self.aliases):
            if not _ALIAS.fullmatch(alias):
                raise BitgenError(f"{alias!r} cannot name files; use letters, digits, dot, dash, underscore")

    @property
    def alias(self) -> str:
        """The short name, safe as part of a file name: the first alias, or the name after its last slash."""
        return self.aliases[0] if self.aliases else self.name.rpartition("/")[2]

    @property
    def matmuls(self) -> tuple[Matmul, ...]:
        """The ternary matrices as the runtime runs them: q, k, v stacked, and gate, up stacked.

        The parts of a stack share one input, so they run as one matmul with a weight scale a row.
        The LM head is not ternary and is not listed.
        """
        queries, keys_values = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return (
            Matmul("qkv", queries + keys_values, self.hidden, self.layers),
            Matmul("o", self.hidden, queries, self.layers),
            Matmul("gate_up", 2 * self.ffn, self.hidden, self.layers),
            Matmul("down", self.hidden, self.ffn, self.layers),
        )

    @property
    def ternary_weights(self) -> int:
        """How many ternary weights a token is multiplied with."""
        return sum(matmul.m * matmul.k * matmul.count for matmul in self.matmuls)


def load_models(folder: Path | None = None) -> tuple[ModelPreset, ...]:
    """The presets of ``folder`` (default: configs/models/), smallest model first.

    BitgenError when a file is wrong or two presets answer to the same name.
    """
    files = sorted((folder if folder is not None else configs_dir() / "models").glob("*.yaml"))
    owner: dict[str, Path] = {}
    presets = []
    for file in files:
        preset = load_model(file)
        for name in {preset.name.casefold(), *(alias.casefold() for alias in preset.aliases)}:
            if name in owner:
                raise FileError(f"{file}: the name {name!r} already belongs to {owner[name]}")
            owner[name] = file
        presets.append(preset)
    return tuple(sorted(presets, key=lambda preset: (preset.ternary_weights, preset.name)))


def load_model(file: str | Path) -> ModelPreset:
    """The preset one YAML file holds; FileError when it is wrong."""
    return load(ModelPreset, load_yaml(file), str(file))


def find_model(name_or_path: str, models: tuple[ModelPreset, ...] | None = None) -> ModelPreset:
    """The preset with this name or alias, whatever its case, or the one in the YAML file of this path.

    UsageError for an unknown name, with the nearest known ones.
    """
    presets = load_models() if models is None else models
    wanted = name_or_path.casefold()
    for preset in presets:
        if wanted in (preset.name.casefold(), *(alias.casefold() for alias in preset.aliases)):
            return preset
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return load_model(name_or_path)
    known = [name for preset in presets for name in (*preset.aliases, preset.name)]
    near = nearest_names(name_or_path, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    message = (
        f"unknown model {name_or_path!r}: {hint}`bitgen models` lists the presets; a .yaml path works too"
    )
    raise UsageError(message)
