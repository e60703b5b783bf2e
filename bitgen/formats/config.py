"""What a model is, apart from its weights: sizes, positions, activation; the presets of configs/models/."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError, UsageError, nearest_names
from bitgen.families.base import COMMON_GROUP, TERNARY
from bitgen.formats.rope import Yarn
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml
from bitgen.spec import Shape, StepSizes, WeightKind

Floats: TypeAlias = NDArray[np.float32]
Activation: TypeAlias = Literal["silu", "relu2"]

# Far above every model there is: a damaged file must not talk the loop into absurd allocations.
_SIZE_MAX = 1 << 24
_HEAD_DIM_MAX = 1 << 14
_SIZES = ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "context")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def printable(text: str) -> str:
    """``text`` without characters that could steer a terminal or that no encoding can write."""
    return "".join(c if c.isprintable() else "?" for c in text)


def check_head_dim(head_dim: int, where: str) -> int:
    """``head_dim`` when it is one; tables of its size are made before a ModelConfig can check it."""
    if not 2 <= head_dim <= _HEAD_DIM_MAX:
        raise FileError(f"{where}: heads of {head_dim} are not possible")
    return head_dim


@dataclass(frozen=True)
class Matmul:
    """One matrix a token is multiplied with: y (m) = W (m, k) x (k), ``count`` times a token."""

    role: str  # qkv, o, gate_up, down, head; with norms of inputs q, k, v, gate, up by themselves
    m: int
    k: int
    count: int

    @property
    def shape(self) -> Shape:
        return Shape(self.m, self.k)


@dataclass(frozen=True)
class ModelConfig:
    """The hyperparameters of a decoder-only transformer with ternary matrices, in elements.

    Rows of q and k are always in the rotate-half convention, whatever the file holds: RoPE turns the pairs
    (i, i + head_dim / 2) by position * rope_theta^(-2 i / head_dim) / rope_divisors[i].
    FileError when the numbers make no model.
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
    activation: Activation
    sub_norms: bool  # an RMSNorm before o (attn_sub_norm, inner_attn_ln) and before down (ffn_sub_norm)
    tied_head: bool  # the LM head is the embedding
    norm_eps: float
    architecture: str  # as GGUF's general.architecture calls it: bitnet, llama, qwen3
    qk_norm: bool = field(default=False, kw_only=True)  # an RMSNorm of each head of q and of k before RoPE
    input_norms: bool = field(default=False, kw_only=True)  # RMSNorms of the input of q, k, v, gate and up
    group: int = field(default=0, kw_only=True)  # its matrices run in groups of so many, or finer
    ternary_head: bool = field(default=False, kw_only=True)  # the LM head is a matrix like the others
    weights: str = field(default="ternary", kw_only=True)  # of its matrices, see `Family.weights`
    context: int = field(default=4096, kw_only=True)  # the largest number of positions it was made for
    rope_factors: tuple[float, ...] | None = field(default=None, kw_only=True)  # (head_dim / 2)
    yarn: Yarn | None = field(default=None, kw_only=True)  # stretches RoPE, on top of rope_factors
    # Positions that a token attends to in each layer, the last of them its own, 0: all; (): all in all layers
    windows: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        for size in _SIZES:
            value = getattr(self, size)
            if not 1 <= value <= _SIZE_MAX:
                wrong = "greater than 0" if value < 1 else f"at most {_SIZE_MAX}"
                raise FileError(f"{size} must be {wrong}, found {value}")
        for number in ("rope_theta", "norm_eps"):
            if not 0 < getattr(self, number) < math.inf:
                raise FileError(f"{number} must be greater than 0 and finite, found {getattr(self, number)}")
        if self.heads % self.kv_heads:
            raise FileError(f"kv_heads must divide heads, found {self.kv_heads} and {self.heads}")
        if self.head_dim % 2:
            raise FileError(f"head_dim must be even (RoPE rotates pairs), found {self.head_dim}")
        half = self.head_dim // 2
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            raise FileError(f"windows must be {self.layers} numbers of positions, one a layer")
        factors = self.rope_factors
        if factors is not None and not (len(factors) == half and all(0 < f < math.inf for f in factors)):
            raise FileError(f"rope_factors must be {half} positive numbers")

    @property
    def rope_divisors(self) -> Floats | None:
        """What the frequencies of RoPE are divided by, float32 (head_dim / 2); None: nothing."""
        factors = None if self.rope_factors is None else np.array(self.rope_factors, np.float32)
        if self.yarn is None:
            return factors
        stretched = self.yarn.divisors(self.rope_theta, self.head_dim)
        return stretched if factors is None else stretched * factors

    @property
    def rope_scale(self) -> float:
        """What cosines and sines of RoPE are multiplied by."""
        return 1.0 if self.yarn is None else self.yarn.scale

    @property
    def kind(self) -> WeightKind:
        """What its matrices are, for layouts and records."""
        return WeightKind(self.weights, self.group)

    @property
    def q_rows(self) -> int:
        """Rows of q, columns of o: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Rows of k and of v: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    @property
    def matmuls(self) -> tuple[Matmul, ...]:
        """The ternary matrices as the runtime runs them: q, k, v stacked, and gate, up stacked.

        The parts of a stack share one input, so they run as one matmul with a weight scale a row; with a norm
        of its input each runs by itself. The LM head is listed where it is ternary.
        """
        head = (Matmul("head", self.vocab, self.hidden, 1),) if self.ternary_head else ()
        return (*self.layer_matmuls, *head)

    @property
    def layer_matmuls(self) -> tuple[Matmul, ...]:
        """Those of the layers."""
        q_rows, kv_rows, ffn = self.q_rows, self.kv_rows, self.ffn
        qkv, gate_up = {"qkv": q_rows + 2 * kv_rows}, {"gate_up": 2 * ffn}
        if self.input_norms:
            qkv, gate_up = {"q": q_rows, "k": kv_rows, "v": kv_rows}, {"gate": ffn, "up": ffn}
        return (
            *(Matmul(role, m, self.hidden, self.layers) for role, m in qkv.items()),
            Matmul("o", self.hidden, q_rows, self.layers),
            *(Matmul(role, m, self.hidden, self.layers) for role, m in gate_up.items()),
            Matmul("down", self.hidden, ffn, self.layers),
        )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The distinct shapes of the matmuls."""
        return tuple(dict.fromkeys(matmul.shape for matmul in self.matmuls))

    @property
    def step_sizes(self) -> StepSizes:
        """The sizes that a forward pass for this model has as constants."""
        return StepSizes(self.hidden, self.q_rows, self.ffn, self.head_dim)

    @property
    def ternary_weights(self) -> int:
        """How many ternary weights of layers a token is multiplied with."""
        return sum(matmul.m * matmul.k * matmul.count for matmul in self.layer_matmuls)

    @property
    def parameters(self) -> int:
        """Weights of all matrices, embedding and LM head once where they are one."""
        return self.ternary_weights + self.vocab * self.hidden * (1 if self.tied_head else 2)


@dataclass(frozen=True)
class ModelPreset(ModelConfig):
    """A config that has names on the command line: one YAML file of configs/models/.

    FileError when the numbers make no model or a name cannot be a file's.
    """

    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for alias in (self.alias, *self.aliases):
            if not _ALIAS.fullmatch(alias):
                raise FileError(f"{alias!r} cannot name files; use letters, digits, dot, dash, underscore")
        if self.weights == TERNARY and self.group > COMMON_GROUP:
            raise FileError(f"ternary weights run in groups of {COMMON_GROUP} at most, found {self.group}")

    @property
    def alias(self) -> str:
        """The short name, safe as part of a file name: the first alias, or the name after its last slash."""
        return self.aliases[0] if self.aliases else self.name.rpartition("/")[2]

    @property
    def names(self) -> frozenset[str]:
        """Everything it answers to, in lower case."""
        return frozenset(name.casefold() for name in (self.name, *self.aliases))

    @classmethod
    def of(cls, config: ModelConfig, alias: str) -> ModelPreset:
        """The preset of a model file: its config under a name that can be a file's."""
        known: dict[str, Any] = vars(config)
        return cls(**{**known, "name": config.name or alias, "aliases": (alias,)})


def load_models(folder: Path | None = None) -> tuple[ModelPreset, ...]:
    """The presets of ``folder`` (default: configs/models/), smallest model first.

    BitgenError when a file is wrong or two presets answer to the same name.
    """
    files = sorted((folder if folder is not None else configs_dir() / "models").glob("*.yaml"))
    owner: dict[str, Path] = {}
    presets = []
    for file in files:
        preset = load_model(file)
        for name in preset.names:
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
    for preset in presets:
        if name_or_path.casefold() in preset.names:
            return preset
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return load_model(name_or_path)
    known = [name for preset in presets for name in (*preset.aliases, preset.name)]
    near = nearest_names(name_or_path, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    others = "`bitgen models` lists the presets; a .yaml file, a model file or tiny works too"
    raise UsageError(f"unknown model {name_or_path!r}: {hint}{others}")


def preset_name(config: ModelConfig) -> str | None:
    """The preset with the same matrices, for `bitgen tune --model`."""

    def matrices(of: ModelConfig) -> tuple[str, int, frozenset[Shape]]:
        return of.weights, of.group, frozenset(of.shapes)

    return next((m.alias for m in load_models() if matrices(m) == matrices(config)), None)
