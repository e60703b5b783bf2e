"""The architectures that bitgen runs, one record each, for readers, writer, random models and engine.

To add one, add a record to ARCHITECTURES. Only new mathematics needs C as well (templates/step).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.formats.config import Activation, ModelConfig


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


@dataclass(frozen=True)
class Architecture:
    """What an architecture's name implies and its files do not say."""

    name: str  # GGUF's general.architecture
    activation: Activation  # of the gate; config.json may say otherwise
    norms: Mapping[str, Tensor]  # of a layer
    matrices: Mapping[str, Tensor] = field(default_factory=lambda: _MATRICES)  # of a layer
    hf_class: str | None = None  # the class of transformers with this forward pass
    hf_rope_theta: float = 10000.0  # where config.json does not say it
    interleaved: bool = False  # a GGUF file stores the rows of q and k for RoPE over (x[2i], x[2i + 1])
    group: int = 0  # activations were not quantised in training: each so many get a scale of their own
    master_weights: bool = True  # floats of a Hugging Face checkpoint are what training updates
    runs_as: str = ""  # another architecture, once MiniCPM's scalars are folded into the weights

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
    Architecture("bitnet", "silu", {**_PRE_NORMS, **_SUB_NORMS}, hf_class="BitnetForCausalLM"),
    Architecture("bitnet-25", "relu2", {**_PRE_NORMS, **_SUB_NORMS}),
    Architecture(
        "bitnet-b1.58",
        "relu2",
        {**_PRE_NORMS, **_SUB_NORMS},
        hf_class="BitNetForCausalLM",
        hf_rope_theta=500000.0,
    ),
    Architecture(
        "llama", "silu", _PRE_NORMS, hf_class="LlamaForCausalLM", interleaved=True, master_weights=False
    ),
    Architecture(
        "qwen3",
        "silu",
        {**_PRE_NORMS, **_QK_NORMS},
        hf_class="Qwen3ForCausalLM",
        hf_rope_theta=1000000.0,
        group=128,
        master_weights=False,
    ),
    Architecture(
        "minicpm",
        "silu",
        _PRE_NORMS,
        hf_class="MiniCPMForCausalLM",
        interleaved=True,
        group=128,
        master_weights=False,
        runs_as="llama",
    ),
)
ARCHITECTURES = {record.name: record for record in _RECORDS}
HF_CLASSES = {record.hf_class: record for record in _RECORDS if record.hf_class is not None}


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture with the forward pass of ``config``, if possible the one it names. FileError: none."""
    # bitnet-25 and bitnet-b1.58 are one forward pass; the one that current programs write comes first.
    for name in (config.architecture, "bitnet", "bitnet-b1.58", *ARCHITECTURES):
        known = ARCHITECTURES.get(name)
        if known and known.activation == config.activation and _has_norms_of(known, config):
            return known
    norms = ["sub-norms"] * config.sub_norms + ["norms of q and k"] * config.qk_norm
    raise FileError(f"no GGUF architecture has {config.activation} with {' and '.join(norms) or 'no others'}")


def _has_norms_of(architecture: Architecture, config: ModelConfig) -> bool:
    return (architecture.sub_norms, architecture.qk_norm) == (config.sub_norms, config.qk_norm)


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
