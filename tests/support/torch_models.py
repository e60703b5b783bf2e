"""Models of transformers whose BitLinears quantise as they run: the oracle for files, integers and logits.

Of the three oracles this one answers "does the world agree?": names and forms of tensors in files, which
int8 and ternary values a BitLinear multiplies, and the logits of each architecture, none of it our code.
It needs PyTorch; `reference_model` (formulas) and `exact_model` (bits) need numpy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from late import Late
from model_files import pack_rows
from numpy.typing import NDArray

from bitgen.formats.open import open_model
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.weights import Weights
from bitgen.inference.chat_template import BUILT_IN, template_for
from bitgen.reference import quantize_groups
from bitgen.tokenizer.data import TokenizerData
from bitgen.tokenizer.tokenizer import Tokenizer

torch: Any = Late("torch", "torch is the oracle")
transformers: Any = Late("transformers", "transformers is the oracle")
bitnet: Any = Late("transformers.integrations.bitnet", "transformers is the oracle")
safetensors: Any = Late("safetensors.torch", "safetensors writes the files")

# The matrix of bitgen that holds each linear layer: those of one input are stacked.
STACKED = {
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}
_SIZES = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _sizes(hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {**_SIZES, **dict(zip(names, (hidden, ffn, heads, kv_heads, head_dim), strict=True)), **more}


# The architecture of every preset that runs, small: heads and ffn of the preset where they are odd.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "0.7B": ("BitNet", _sizes(192, 410, 2, 2, 96, hidden_act="silu", tie_word_embeddings=True)),
    "1.3B": ("BitNet", _sizes(128, 5460, 2, 2, 64, hidden_act="silu", tie_word_embeddings=True)),
    "3B": ("BitNet", _sizes(300, 810, 3, 3, 100, hidden_act="silu", tie_word_embeddings=True)),
    "2B-4T": ("BitNet", _sizes(100, 150, 10, 5, 10, tie_word_embeddings=True)),
    "8B": ("Llama", _sizes(100, 150, 4, 2, 26, rope_parameters=_LLAMA3)),
    "Falcon3": ("Llama", _sizes(102, 230, 3, 1, 256, rms_norm_eps=1e-6,
                                rope_parameters={"rope_type": "default", "rope_theta": 1000042.0})),
    "Bonsai": ("Qwen3", _sizes(100, 150, 4, 2, 128, rms_norm_eps=1e-6, tie_word_embeddings=True,
                               rope_parameters=YARN)),
    "TriLM": ("Llama", _sizes(100, 128, 5, 5, 20)),
}  # fmt: skip


def _randomize(model: Any) -> None:
    """Norms of 0.5 to 1.5, everything else normal with a deviation of 0.5."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5)


def random_model(preset: str, seed: int = 3) -> Any:
    """A random model of the architecture of ``preset`` with master weights that it quantises as it runs."""
    architecture, sizes = ARCHITECTURES[preset]
    torch.manual_seed(seed)
    model = _empty(architecture, sizes)
    _randomize(model)
    return _with_bitlinears(model, "online", model.state_dict())


def _common(weights: Weights) -> dict[str, Any]:
    """Embedding, head and the norms that all architectures have, by transformers' names."""
    vocab = weights.config.vocab
    values: dict[str, Any] = {
        "model.embed_tokens.weight": weights.embedding.rows(0, vocab),
        "lm_head.weight": weights.output.rows(0, vocab),
        "model.norm.weight": weights.final_norm,
    }
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}."
        values[prefix + "input_layernorm.weight"] = layer.attn_norm
        values[prefix + "post_attention_layernorm.weight"] = layer.ffn_norm
    return values


def model_of(weights: Weights) -> Any:
    """The BitNetForCausalLM that has these weights, packed as `autobitlinear` keeps them."""
    c = weights.config
    model = _empty(
        "BitNet",
        {
            **_sizes(c.hidden, c.ffn, c.heads, c.kv_heads, c.head_dim),
            "vocab_size": c.vocab,
            "num_hidden_layers": c.layers,
            "max_position_embeddings": c.context,
            "rms_norm_eps": c.norm_eps,
            "hidden_act": c.activation,
            "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
            "tie_word_embeddings": c.tied_head,
        },
    )
    values = _common(weights)
    for number, layer in enumerate(weights.layers):
        prefix = f"model.layers.{number}."
        values[prefix + "self_attn.attn_sub_norm.weight"] = layer.attn_sub_norm
        values[prefix + "mlp.ffn_sub_norm.weight"] = layer.ffn_sub_norm
    for name, matrix in linears(weights).items():
        values[name + ".weight"] = matrix.rows(0, matrix.shape.m)
        values[name + ".weight_scale"] = matrix.scale
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in values.items()}
    return _with_bitlinears(model, "offline", state)


def tokenizer_of(data: TokenizerData) -> Any:
    """The tokenizer of a model whose file holds a tokenizer.json, as transformers has it."""
    assert data.json is not None
    end = Tokenizer(data).token(data.eos)
    made = tokenizers.Tokenizer.from_str(data.json)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end)


def floats_of(weights: Weights) -> Any:
    """The Qwen3ForCausalLM, Llama or Mistral one of these weights as floats: ternary ones times scales."""
    c = weights.config
    sizes = _sizes(c.hidden, c.ffn, c.heads, c.kv_heads, c.head_dim)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": c.rope_theta}
    changes = {
        "vocab_size": c.vocab,
        "num_hidden_layers": c.layers,
        "max_position_embeddings": c.context,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": c.tied_head,
    }
    if c.windows:
        changes["sliding_window"] = max(c.windows)
        if c.qk_norm:
            kinds = ["sliding_attention" if window else "full_attention" for window in c.windows]
            changes |= {"use_sliding_window": True, "layer_types": kinds}
    kind = "Qwen3" if c.qk_norm else "Mistral" if c.windows else "Llama"
    model = _empty(kind, {**sizes, **changes})
    values = _common(weights)
    for number, layer in enumerate(weights.layers if c.qk_norm else ()):
        prefix = f"model.layers.{number}."
        values[prefix + "self_attn.q_norm.weight"] = layer.q_norm
        values[prefix + "self_attn.k_norm.weight"] = layer.k_norm
    for name, matrix in linears(weights).items():
        values[name + ".weight"] = matrix.values(0, matrix.shape.m)
    model.load_state_dict({n: torch.from_numpy(np.array(v, np.float32)) for n, v in values.items()})
    return model.eval()


def run_in_groups(
    model: Any, ids: Sequence[int], groups: Mapping[str, int], given: Mapping[str, NDArray[np.int8]]
) -> tuple[NDArray[np.float32], float]:
    """Logits where each linear layer's input is int8 in groups, ``given`` by `step_name`, times its scale.

    ``groups``: of each of them the weights that share a scale, 0: all of a token. Also the farthest that any
    of the given is from what the input would round to, in int8 steps.
    """
    farthest = 0.0

    def hook_of(name: str) -> Any:
        def hook(_module: Any, args: Any) -> Any:
            nonlocal farthest
            x = args[0][0].numpy()
            group = groups[name] or x.shape[1]
            scale = np.repeat(quantize_groups(x, group)[1], group, axis=1)[:, : x.shape[1]]
            xq = given[name]
            farthest = max(farthest, float(np.abs(x / scale - xq).max()) - 0.5)
            return (torch.from_numpy(xq * scale)[None],)

        return hook

    modules = [(step_name(n), m) for n, m in model.named_modules() if n.split(".")[-1] in STACKED]
    modules += [("head", model.lm_head)] * ("head" in groups)
    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in modules]
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([list(ids)])).logits[0].numpy()
    for handle in handles:
        handle.remove()
    return logits, farthest


def _empty(architecture: str, sizes: Mapping[str, Any]) -> Any:
    sizes = {"tie_word_embeddings": False, **sizes}
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    return getattr(transformers, f"{architecture}ForCausalLM")(config).float()


def _with_bitlinears(model: Any, mode: str, state: Mapping[str, Any]) -> Any:
    state = {name: value.clone() for name, value in state.items()}
    quantization = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode=mode)
    model = bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    model = model.to_empty(device="cpu") if any(p.is_meta for p in model.parameters()) else model
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval().float()


def linears(weights: Weights) -> dict[str, TernaryMatrix]:
    """Name of a linear layer in transformers -> its matrix, cut from the stacked ones."""
    c = weights.config
    found = {}
    for number, layer in enumerate(weights.layers):
        attention, mlp = f"model.layers.{number}.self_attn.", f"model.layers.{number}.mlp."
        found[attention + "q_proj"] = layer.qkv.slice(0, c.q_rows)
        found[attention + "k_proj"] = layer.qkv.slice(c.q_rows, c.q_rows + c.kv_rows)
        found[attention + "v_proj"] = layer.qkv.slice(c.q_rows + c.kv_rows, layer.qkv.shape.m)
        found[attention + "o_proj"] = layer.o
        found[mlp + "gate_proj"] = layer.gate_up.slice(0, c.ffn)
        found[mlp + "up_proj"] = layer.gate_up.slice(c.ffn, 2 * c.ffn)
        found[mlp + "down_proj"] = layer.down
    return found


def step_name(linear: str) -> str:
    """model.layers.3.self_attn.q_proj -> 3.qkv, as `exact_model` names what is multiplied there."""
    _, _, number, _, name = linear.split(".")
    return f"{number}.{STACKED[name]}"


@dataclass
class Run:
    """What a model computed over a text: logits (n, vocab), and by linear layer its input float32 (n, k)."""

    logits: NDArray[np.float32]
    inputs: dict[str, NDArray[np.float32]]


def run(model: Any, ids: Sequence[int], given: Mapping[str, NDArray[np.int8]] | None = None) -> Run:
    """One forward pass. ``given``: by `step_name` the int8 that take the place of the rounded activations."""
    inputs: dict[str, NDArray[np.float32]] = {}
    now = ""

    def watch(name: str) -> Any:
        def hook(_module: Any, args: Any) -> None:
            nonlocal now
            now = name
            inputs[name] = args[0][0].numpy()

        return hook

    class Given:
        @staticmethod
        def apply(x: Any) -> Any:
            assert given is not None
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            return torch.from_numpy(given[step_name(now)]).float() / scale

    modules = [(name, m) for name, m in model.named_modules() if name.split(".")[-1] in STACKED]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in modules]
    uncompiled = torch._dynamo.config.patch(disable=True)  # it compiles what is too small to gain by it
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), uncompiled:
        if given is not None:
            patch.setattr("transformers.integrations.bitnet.ActQuant", Given)
        logits = model(torch.tensor([list(ids)])).logits[0].numpy()
    for handle in handles:
        handle.remove()
    return Run(logits, inputs)


def scaled(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Activations (n, k) as they are before they are rounded to int8: the largest of a token is 127."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    wide: NDArray[np.float32] = x * (np.float32(127) / np.maximum(largest, np.float32(1e-5)))
    return wide


def save(model: Any, folder: Path, form: str) -> Path:
    """The model as transformers saves it: its master weights, or packed as `bitlinear` or `autobitlinear`."""
    model.config.save_pretrained(folder)
    tied = bool(model.config.tie_word_embeddings)
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight" or not tied}
    quantization: dict[str, Any] = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    quantization["quantization_mode"] = "online" if form == "master" else "offline"
    if form != "master":
        quantization["linear_class"] = form
        for name in [n for n in tensors if n.split(".")[-2] in STACKED]:
            weight = tensors.pop(name)
            s = 1.0 / weight.abs().mean().clamp(min=1e-5)
            tensors[name] = torch.from_numpy(
                pack_rows((weight * s).round().clamp(-1, 1).to(torch.int8).numpy())
            )
            tensors[name + "_scale"] = (s if form == "bitlinear" else 1 / s).reshape(1)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = quantization
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return folder


def save_tiny(folder: Path) -> Path:
    """The tiny model that ships, as a checkpoint of transformers with its tokenizer: weights of two bits."""
    opened = open_model("tiny")
    model = model_of(opened.weights)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in [each for each in tensors if each.split(".")[-2] in STACKED and each.endswith(".weight")]:
        tensors[name] = torch.from_numpy(pack_rows(tensors[name].to(torch.int8).numpy()))
    model.config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    }
    model.config.architectures = [type(model).__name__]
    data = opened.tokenizer_data
    model.config.bos_token_id, model.config.eos_token_id = data.bos, data.eos
    model.config.save_pretrained(folder)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tokenizer_of(data)
    tokenizer.chat_template = BUILT_IN[template_for(Tokenizer(data).ids)]
    tokenizer.save_pretrained(folder)
    return folder


# ---- BitNet-embedding ----


@cache
def normed_bitlinear() -> Any:
    class NormedBitLinear(torch.nn.Linear):  # type: ignore[misc]
        """BitNet-embedding's: norms its input, rounds it to int8 a token and its weights to -1, 0, 1."""

        def __init__(self, rows: int, columns: int, eps: float) -> None:
            super().__init__(columns, rows, bias=False)
            self.norm = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm(columns, eps)
            self.given: Any = None  # int8 that take the place of the rounded activations
            self.seen: Any = None

        def forward(self, x: Any) -> Any:
            x = self.norm(x)
            self.seen = x[0].detach().numpy()
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            rounded = (x * scale).round().clamp(-128, 127)
            if self.given is not None:
                rounded = torch.from_numpy(self.given).float()[None]
            mean = 1 / self.weight.abs().mean().clamp(min=1e-5)
            return torch.nn.functional.linear(
                rounded / scale, (self.weight * mean).round().clamp(-1, 1) / mean
            )

    return NormedBitLinear


# BitNet-embedding 0.6B, small: two heads a key head, hidden not heads * head_dim; whole blocks of I2_S.
EMBEDDING_SIZES = _sizes(128, 384, 4, 2, 64, rms_norm_eps=1e-6, tie_word_embeddings=True,
                         rope_parameters={"rope_type": "default", "rope_theta": 1000000.0})  # fmt: skip


def embedding_model(seed: int = 3, **changes: Any) -> Any:
    """A random Qwen3Model whose linear layers are those of `normed_bitlinear`."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(**{**EMBEDDING_SIZES, **changes})
    model = transformers.Qwen3Model(config).float()
    for name, linear in list(model.named_modules()):
        if name.split(".")[-1] in STACKED:
            own = normed_bitlinear()(linear.out_features, linear.in_features, config.rms_norm_eps)
            model.get_submodule(name.rpartition(".")[0]).__setattr__(name.split(".")[-1], own)
    _randomize(model)
    return model.eval()


def own_step_name(linear: str) -> str:
    """layers.3.self_attn.q_proj -> 3.q: matrices that norm their input are not stacked."""
    parts = linear.split(".")
    return f"{parts[-3]}.{parts[-1].removesuffix('_proj')}"


def run_embedding(model: Any, ids: Sequence[int], given: Mapping[str, NDArray[np.int8]] | None = None) -> Run:
    """As `run`, by `own_step_name`; logits are those of the embedding as a head."""
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, normed_bitlinear())
    }
    for name, module in linears.items():
        module.given = None if given is None else given[own_step_name(name)]
    with torch.no_grad():
        states = model(torch.tensor([list(ids)])).last_hidden_state[0]
        logits = (states @ model.embed_tokens.weight.T).numpy()
    return Run(logits, {name: module.seen for name, module in linears.items()})


def states_of(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    """Behind the last norm, float32 (len(ids), hidden); activations are rounded as the model rounds them."""
    for module in model.modules():
        if isinstance(module, normed_bitlinear()):
            module.given = None
    with torch.no_grad():
        states: NDArray[np.float32] = model(torch.tensor([list(ids)])).last_hidden_state[0].numpy()
    return states


def save_embedding(model: Any, folder: Path) -> Path:
    """As BitNet-embedding is published: master weights, by the names of a model without a head."""
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.architectures = ["Qwen3Model"]
    config.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
