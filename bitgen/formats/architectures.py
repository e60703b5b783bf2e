"""The architectures that bitgen runs, one record each, for readers, writer, random models and engine.

To add one, add a record to ARCHITECTURES. Only new mathematics needs C as well (templates/step).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.formats.config import Activation, ModelConfig
from bitgen.spec import WeightKind


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model: its name in GGUF, its names in Hugging Face checkpoints, its shape.

    Names are without the suffix `.weight`, and for a tensor of a layer without the layer's prefix. ``sizes``
    are properties of a ModelConfig: (rows, columns) of a matrix, or (length,).
    """

    gguf: str
    hf: tuple[str, ...]
    sizes: tuple[str, ...]

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(getattr(config, size) for size in self.sizes)


# Of the whole model.
EMBEDDING = Tensor("token_embd", ("model.embed_tokens",), ("vocab", "hidden"))
LM_HEAD = Tensor("output", ("lm_head",), ("vocab", "hidden"))
FINAL_NORM = Tensor("output_norm", ("model.norm",), ("hidden",))
GGUF_LAYER, HF_LAYER = "blk.{}.", "model.layers.{}."

# Of a layer. Norms have the names of the fields of LayerWeights and of struct bitgen_layer.
_MATRICES = {
    "q": Tensor("attn_q", ("self_attn.q_proj",), ("q_rows", "hidden")),
    "k": Tensor("attn_k", ("self_attn.k_proj",), ("kv_rows", "hidden")),
    "v": Tensor("attn_v", ("self_attn.v_proj",), ("kv_rows", "hidden")),
    "o": Tensor("attn_output", ("self_attn.o_proj",), ("hidden", "q_rows")),
    "gate": Tensor("ffn_gate", ("mlp.gate_proj",), ("ffn", "hidden")),
    "up": Tensor("ffn_up", ("mlp.up_proj",), ("ffn", "hidden")),
    "down": Tensor("ffn_down", ("mlp.down_proj",), ("hidden", "ffn")),
}
_PRE_NORMS = {
    "attn_norm": Tensor("attn_norm", ("input_layernorm",), ("hidden",)),
    "ffn_norm": Tensor("ffn_norm", ("post_attention_layernorm",), ("hidden",)),
}
# Microsoft's names, then 1bitLLM's.
_SUB_NORMS = {
    "attn_sub_norm": Tensor(
        "attn_sub_norm", ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln"), ("q_rows",)
    ),
    "ffn_sub_norm": Tensor("ffn_sub_norm", ("mlp.ffn_sub_norm", "mlp.ffn_layernorm"), ("ffn",)),
}
# Of each head, before RoPE.
_QK_NORMS = {
    "q_norm": Tensor("attn_q_norm", ("self_attn.q_norm",), ("head_dim",)),
    "k_norm": Tensor("attn_k_norm", ("self_attn.k_norm",), ("head_dim",)),
}
# Of the input of each matrix, behind the norm that is there anyway; those before o and down are sub-norms.
_INPUT_NORMS = {
    "q_norm_in": Tensor("attn_q_norm_in", ("self_attn.q_proj.norm",), ("hidden",)),
    "k_norm_in": Tensor("attn_k_norm_in", ("self_attn.k_proj.norm",), ("hidden",)),
    "v_norm_in": Tensor("attn_v_norm_in", ("self_attn.v_proj.norm",), ("hidden",)),
    "attn_sub_norm": Tensor("attn_output_norm_in", ("self_attn.o_proj.norm",), ("q_rows",)),
    "gate_norm_in": Tensor("ffn_gate_norm_in", ("mlp.gate_proj.norm",), ("hidden",)),
    "up_norm_in": Tensor("ffn_up_norm_in", ("mlp.up_proj.norm",), ("hidden",)),
    "ffn_sub_norm": Tensor("ffn_down_norm_in", ("mlp.down_proj.norm",), ("ffn",)),
}


@dataclass(frozen=True)
class Architecture:
    """What an architecture's name implies and its files do not say."""

    name: str  # GGUF's general.architecture, unless `stored_as` is
    activation: Activation  # of the gate; config.json may say otherwise
    norms: Mapping[str, Tensor]  # of a layer
    matrices: Mapping[str, Tensor] = field(default_factory=lambda: _MATRICES)  # of a layer
    hf_classes: tuple[str, ...] = ()  # of transformers with this forward pass
    hf_rope_theta: float = 10000.0  # where config.json does not say it
    # Classes with attention to a window: how many layers without one come first where config.json does not
    # say it. 0: all layers have one, and no `use_sliding_window` is asked for.
    hf_sliding: Mapping[str, int] = field(default_factory=dict)
    interleaved: bool = False  # a GGUF file stores the rows of q and k for RoPE over (x[2i], x[2i + 1])
    group: int = 0  # activations were not quantised in training: each so many get a scale of their own
    master_weights: bool = True  # floats of a Hugging Face checkpoint are what training updates
    runs_as: str = ""  # another architecture, once MiniCPM's scalars are folded into the weights
    stored_as: str = ""  # GGUF's general.architecture, which another record has for a name
    told_by: str = ""  # of the norms the one whose tensor tells it from that record
    # Its vectors were trained on the last token. bitnet.cpp's converter writes "mean" where it finds nothing.
    last_token: bool = False

    @property
    def gguf_name(self) -> str:
        """GGUF's general.architecture."""
        return self.stored_as or self.name

    @property
    def input_norms(self) -> bool:
        """Whether q, k, v, gate and up have a norm of their input each."""
        return "q_norm_in" in self.norms

    @property
    def sub_norms(self) -> bool:
        """Whether there are norms before o and before down."""
        return "attn_sub_norm" in self.norms

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and of k has a norm before RoPE."""
        return "q_norm" in self.norms


_RECORDS = (
    # 1bitLLM's BitnetForCausalLM (small n) gates with silu, Microsoft's BitNetForCausalLM with relu^2.
    Architecture("bitnet", "silu", {**_PRE_NORMS, **_SUB_NORMS}, hf_classes=("BitnetForCausalLM",)),
    Architecture("bitnet-25", "relu2", {**_PRE_NORMS, **_SUB_NORMS}),
    Architecture(
        "bitnet-b1.58",
        "relu2",
        {**_PRE_NORMS, **_SUB_NORMS},
        hf_classes=("BitNetForCausalLM",),
        hf_rope_theta=500000.0,
    ),
    Architecture(
        "llama",
        "silu",
        _PRE_NORMS,
        hf_classes=("LlamaForCausalLM", "MistralForCausalLM"),
        hf_sliding={"MistralForCausalLM": 0},
        interleaved=True,
        master_weights=False,
    ),
    Architecture(
        "bitnet-embedding",
        "silu",
        {**_PRE_NORMS, **_QK_NORMS, **_INPUT_NORMS},
        hf_classes=("Qwen3Model", "Qwen3ForCausalLM"),
        hf_rope_theta=1000000.0,
        stored_as="qwen3",
        told_by="q_norm_in",
        last_token=True,
    ),
    Architecture(
        "qwen3",
        "silu",
        {**_PRE_NORMS, **_QK_NORMS},
        hf_classes=("Qwen3ForCausalLM", "Qwen3Model"),
        hf_sliding={"Qwen3ForCausalLM": 28, "Qwen3Model": 28},
        hf_rope_theta=1000000.0,
        group=128,
        master_weights=False,
    ),
    Architecture(
        "minicpm",
        "silu",
        _PRE_NORMS,
        hf_classes=("MiniCPMForCausalLM",),
        interleaved=True,
        group=128,
        master_weights=False,
        runs_as="llama",
    ),
)
ARCHITECTURES = {record.name: record for record in _RECORDS}


def gguf_names() -> list[str]:
    """Every general.architecture that has a record."""
    return list(dict.fromkeys(record.gguf_name for record in ARCHITECTURES.values()))


def hf_classes() -> list[str]:
    """Every class of transformers that has a record."""
    return list(dict.fromkeys(name for record in ARCHITECTURES.values() for name in record.hf_classes))


def stored_in_gguf(name: str, tensors: Container[str]) -> Architecture | None:
    """The record of a file with this general.architecture and these tensors; None: there is none."""
    records = (record for record in ARCHITECTURES.values() if record.gguf_name == name)
    return _first(records, lambda norm: f"{GGUF_LAYER.format(0)}{norm.gguf}.weight" in tensors)


def stored_in_hf(name: str, tensors: Container[str]) -> Architecture | None:
    """The same of a checkpoint of this class of transformers."""
    records = (record for record in ARCHITECTURES.values() if name in record.hf_classes)
    return _first(records, lambda norm: any(f"{HF_LAYER.format(0)}{n}.weight" in tensors for n in norm.hf))


def _first(records: Iterable[Architecture], has: Callable[[Tensor], bool]) -> Architecture | None:
    """The first whose telling norm is there, or that needs none."""
    return next((one for one in records if not one.told_by or has(one.norms[one.told_by])), None)


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture with the forward pass of ``config``, if possible the one it names. FileError: none."""
    # bitnet-25 and bitnet-b1.58 are one forward pass; the one that current programs write comes first.
    for name in (config.architecture, "bitnet", "bitnet-b1.58", *ARCHITECTURES):
        known = ARCHITECTURES.get(name)
        if known and known.activation == config.activation and _has_norms_of(known, config):
            return known
    norms = ["sub-norms"] * config.sub_norms + ["norms of q and k"] * config.qk_norm
    norms += ["norms of inputs"] * config.input_norms
    raise FileError(f"no GGUF architecture has {config.activation} with {' and '.join(norms) or 'no others'}")


def _has_norms_of(architecture: Architecture, config: ModelConfig) -> bool:
    return all(
        getattr(architecture, kind) == getattr(config, kind)
        for kind in ("sub_norms", "qk_norm", "input_norms")
    )


def matrices_of(config: ModelConfig) -> Mapping[str, Tensor]:
    """The matrices of a layer, in the order of a file."""
    named = ARCHITECTURES.get(config.architecture)
    return _MATRICES if named is None else named.matrices


def norms_of(config: ModelConfig) -> Mapping[str, Tensor]:
    """The norms of a layer, whatever its activation."""
    named = ARCHITECTURES.get(config.architecture)
    if named is not None and _has_norms_of(named, config):
        return named.norms
    return {
        **_PRE_NORMS,
        **(_SUB_NORMS if config.sub_norms else {}),
        **(_QK_NORMS if config.qk_norm else {}),
        **(_INPUT_NORMS if config.input_norms else {}),
    }


def interleaved_to_half(heads: int, head_dim: int) -> NDArray[np.int64]:
    """Row order that turns q or k of a `llama` GGUF into the rotate-half convention.

    The file's row h * hd + 2 i + p is row h * hd + p * hd / 2 + i here, p = 0, 1.
    """
    rows = np.arange(heads * head_dim, dtype=np.int64)
    return rows.reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def half_to_interleaved(heads: int, head_dim: int) -> NDArray[np.int64]:
    """The inverse order, for writing a `llama` GGUF."""
    rows = np.arange(heads * head_dim, dtype=np.int64)
    return rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def file_config(where: object, architecture: Architecture, kind: WeightKind, **fields: Any) -> ModelConfig:
    """The config that the file ``where`` holds, of a model of ``architecture``; FileError names the file."""
    try:
        return ModelConfig(
            architecture=architecture.runs_as or architecture.name,
            sub_norms=architecture.sub_norms,
            qk_norm=architecture.qk_norm,
            input_norms=architecture.input_norms,
            group=kind.group,
            weights=kind.weights,
            **fields,
        )
    except BitgenError as error:
        raise FileError(f"{where}: {error.message}") from None
