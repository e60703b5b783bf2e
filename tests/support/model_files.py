"""Small model files to read: written by hand, by our own writer, or as a Hugging Face folder."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from bitgen.errors import FileError
from bitgen.formats.config import ModelConfig
from bitgen.formats.gguf import U32, NewTensor, write_gguf
from bitgen.formats.open import open_model
from bitgen.formats.quants import DENSE
from bitgen.formats.ternary import I2_S_ID, TERNARY, encode_blocks, encode_i2_s

Ternary = NDArray[np.int8]

MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass
class Plain:
    """A model as plain arrays: what a file was made from. Rows of q and k in the rotate-half convention."""

    config: ModelConfig
    w: dict[str, Ternary] = field(default_factory=dict)  # "blk.0.attn_q" -> int8
    scale: dict[str, Any] = field(default_factory=dict)  # float, or float32 (m, groups of 128)
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # norms, with ".weight"
    embedding: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    head: NDArray[np.float32] | None = None


def small_config(architecture: str = "bitnet", **changes: Any) -> ModelConfig:
    """Two layers, sizes that no two dimensions share, ragged for every block format."""
    values: dict[str, Any] = {
        "architecture": architecture,
        "hidden": 24,
        "ffn": 20,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "vocab": 11,
        "context": 64,
        "rope_theta": 10000.0,
        "activation": "relu2" if architecture in ("bitnet-25", "bitnet-b1.58") else "silu",
        "sub_norms": architecture not in ("llama", "qwen3"),
        "qk_norm": architecture in ("qwen3", "bitnet-embedding"),
        "input_norms": architecture == "bitnet-embedding",
        "norm_eps": 1e-5,
        "tied_head": architecture != "llama",
        "name": "small",
    }
    return ModelConfig(**{**values, **changes})


def preset_yaml(name: str, **sizes: int) -> str:
    """A preset in YAML: a small model of architecture bitnet, its ``sizes`` in the order they are given."""
    values: dict[str, object] = {
        "name": name,
        **sizes,
        "rope_theta": 10000.0,
        "activation": "silu",
        "sub_norms": True,
        "tied_head": True,
        "norm_eps": 1e-5,
        "architecture": "bitnet",
    }
    return yaml.safe_dump(values, sort_keys=False)


def refused(path: Path) -> str:
    """The one line with which a model file is refused."""
    with pytest.raises(FileError) as caught:
        open_model(path)
    return caught.value.message


def shape_of(config: ModelConfig, matrix: str) -> tuple[int, int]:
    return {
        "attn_q": (config.q_rows, config.hidden),
        "attn_k": (config.kv_rows, config.hidden),
        "attn_v": (config.kv_rows, config.hidden),
        "attn_output": (config.hidden, config.q_rows),
        "ffn_gate": (config.ffn, config.hidden),
        "ffn_up": (config.ffn, config.hidden),
        "ffn_down": (config.hidden, config.ffn),
    }[matrix]


GROUP = 128
# What a Ternary Bonsai file is in, small: groups of 128, and of 256 for the types with larger blocks.
GROUPED = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2, "head_dim": 128, "layers": 1, "vocab": 259}


def grouped_model(seed: int = 0, group: int = GROUP, **changes: Any) -> Plain:
    """A qwen3 whose matrices have a scale for each ``group`` weights, f16; its embedding and head too."""
    model = plain_model(small_config("qwen3", **{**GROUPED, **changes}), seed)
    rng = np.random.default_rng(seed + 1)

    def scales(w: NDArray[Any]) -> NDArray[np.float32]:
        runs = rng.uniform(0.01, 0.1, (len(w), w.shape[1] // group)).astype(np.float16).astype(np.float32)
        return np.repeat(runs, group // GROUP, axis=1)

    for key, w in model.w.items():
        model.scale[key] = scales(w)
    names = ["token_embd"] if model.head is None else ["token_embd", "output"]
    for name in names:
        model.w[name] = rng.integers(-1, 2, model.embedding.shape, dtype=np.int8)
        model.scale[name] = scales(model.w[name])
    model.embedding = values_of(model, "token_embd")
    model.head = None if model.head is None else values_of(model, "output")
    return model


def values_of(model: Plain, key: str) -> NDArray[np.float32]:
    """A matrix of `grouped_model`, each weight times its scale."""
    values: NDArray[np.float32] = model.w[key] * np.repeat(model.scale[key], GROUP, axis=1)
    return values


def plain_model(config: ModelConfig, seed: int = 0) -> Plain:
    rng = np.random.default_rng(seed)
    model = Plain(config)
    for i in range(config.layers):
        for name in MATRICES:
            key = f"blk.{i}.{name}"
            model.w[key] = rng.integers(-1, 2, shape_of(config, name), dtype=np.int8)
            model.scale[key] = float(np.float32(rng.uniform(0.5, 2.0)))
        norms = {"attn_norm": config.hidden, "ffn_norm": config.hidden}
        if config.input_norms:
            norms |= {f"{name}_norm_in": shape_of(config, name)[1] for name in MATRICES}
        elif config.sub_norms:
            norms |= {"attn_sub_norm": config.q_rows, "ffn_sub_norm": config.ffn}
        if config.qk_norm:
            norms |= {"attn_q_norm": config.head_dim, "attn_k_norm": config.head_dim}
        for name, size in norms.items():
            model.vectors[f"blk.{i}.{name}.weight"] = rng.uniform(0.5, 1.5, size).astype(np.float32)
    model.vectors["output_norm.weight"] = rng.uniform(0.5, 1.5, config.hidden).astype(np.float32)
    half = np.float16
    model.embedding = rng.standard_normal((config.vocab, config.hidden)).astype(half).astype(np.float32)
    if not config.tied_head:
        model.head = rng.standard_normal((config.vocab, config.hidden)).astype(half).astype(np.float32)
    return model


def interleave(w: Ternary, heads: int) -> Ternary:
    """Rows of q or k as a `llama` GGUF stores them (llama.cpp's permute, written as its formula)."""
    head_dim = len(w) // heads
    out = np.empty_like(w)
    for h in range(heads):
        for i in range(head_dim // 2):
            out[h * head_dim + 2 * i] = w[h * head_dim + i]
            out[h * head_dim + 2 * i + 1] = w[h * head_dim + head_dim // 2 + i]
    return out


def stored_rows(model: Plain, key: str) -> Ternary:
    """The rows of a matrix in the order of the model's GGUF file."""
    c = model.config
    if c.architecture == "llama" and key.endswith("attn_q"):
        return interleave(model.w[key], c.heads)
    if c.architecture == "llama" and key.endswith("attn_k"):
        return interleave(model.w[key], c.kv_heads)
    return model.w[key]


def gguf_metadata(config: ModelConfig, tokens: list[str] | None = None) -> dict[str, Any]:
    a = "qwen3" if config.input_norms else config.architecture
    words = tokens or [f"w{i}" for i in range(config.vocab)]
    return {
        "general.architecture": a,
        "general.name": config.name,
        f"{a}.context_length": U32(config.context),
        f"{a}.embedding_length": U32(config.hidden),
        f"{a}.feed_forward_length": U32(config.ffn),
        f"{a}.block_count": U32(config.layers),
        f"{a}.attention.head_count": U32(config.heads),
        f"{a}.attention.head_count_kv": U32(config.kv_heads),
        f"{a}.attention.key_length": U32(config.head_dim),
        f"{a}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{a}.rope.dimension_count": U32(config.head_dim),
        f"{a}.rope.freq_base": config.rope_theta,
        **_windows(f"{a}.attention.sliding_window", config),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": np.arange(len(words), dtype=np.float32),
        "tokenizer.ggml.token_type": np.ones(len(words), np.int32),
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
        "tokenizer.ggml.add_bos_token": True,
    }


def _windows(key: str, config: ModelConfig) -> dict[str, Any]:
    if not config.windows:
        return {}
    return {key: U32(max(config.windows)), f"{key}_pattern": np.array(config.windows) > 0}


def tensor(
    name: str, values: NDArray[Any], type_id: int | None = None, shape: tuple[int, ...] | None = None
) -> NewTensor:
    """A tensor of floats, or of bytes in the format ``type_id``."""
    ids = {"float32": DENSE["f32"].id, "float16": DENSE["f16"].id}
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return NewTensor(
        name,
        shape or values.shape,
        ids.get(str(values.dtype), 0) if type_id is None else type_id,
        data.size,
        lambda: [data],
    )


def ternary_tensors(name: str, w: Ternary, scale: Any, kind: str) -> list[NewTensor]:
    """A matrix as ``kind``: i2_s, tq1_0, tq2_0, f32, f16, bf16, q8_0, or f16+scale.

    ``scale`` is a number, or an array of those of groups for f32, f16 and the types of blocks, q2_0@128 among
    them: the older layout of that number.
    """
    shape = (w.shape[0], w.shape[1])
    weight = name + ".weight"
    if not isinstance(scale, float):
        layout = TERNARY.get("pq2_0" if kind == "q2_0@128" else kind)
        if layout is None:
            values = w * np.repeat(scale, GROUP, axis=1)
            return [tensor(weight, values.astype({"f32": np.float32, "f16": np.float16}[kind]))]
        step = max(1, layout.block // GROUP)
        each = np.repeat(scale[:, ::step], max(1, GROUP // layout.block), axis=1)
        type_id = TERNARY["q2_0"].id if kind == "q2_0@128" else layout.id
        return [tensor(weight, encode_blocks(layout.name, w, each), type_id, shape)]
    if kind == "i2_s":
        tail = np.zeros(32, np.uint8)
        tail[:4] = np.array([scale], "<f4").view(np.uint8)
        return [tensor(weight, np.concatenate([encode_i2_s(w), tail]), I2_S_ID, shape)]
    if kind in TERNARY:
        data = encode_blocks(kind, w, np.float32(1))
        return [
            tensor(weight, data, TERNARY[kind].id, shape),
            tensor(name + ".scale", np.array([scale], np.float32)),
        ]
    if kind == "f16+scale":
        return [tensor(weight, w.astype(np.float16)), tensor(name + ".scale", np.array([scale], np.float32))]
    values = w.astype(np.float32) * np.float32(scale)
    if kind == "bf16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)  # cuts: scale must be a bf16 to be kept
        return [tensor(weight, bits, DENSE["bf16"].id)]
    if kind == "q8_0":
        return [tensor(weight, q8_0(w, scale), DENSE["q8_0"].id, shape)]
    return [tensor(weight, values.astype({"f32": np.float32, "f16": np.float16}[kind]))]


def q8_0(w: Ternary, scale: float) -> NDArray[np.uint8]:
    """Ternary values as Q8_0: d = scale / 127 rounded to f16, q = 127 w."""
    blocks = w.reshape(-1, 32)
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = np.frombuffer(np.float16(scale / 127).tobytes(), np.uint8)
    out[:, 2:] = (blocks * np.int8(127)).view(np.uint8)
    return out


def write_model(
    path: Path,
    model: Plain,
    kind: str = "f16+scale",
    metadata: Mapping[str, Any] | None = None,
    more: Sequence[NewTensor] = (),
) -> Path:
    """The model as a GGUF file, written by our own writer, ``more`` tensors first."""
    tensors = []
    if "token_embd" not in model.w:
        tensors.append(tensor("token_embd.weight", model.embedding.astype(np.float16)))
    if model.head is not None and "output" not in model.w:
        tensors.append(tensor("output.weight", model.head.astype(np.float16)))
    for key in model.w:
        tensors += ternary_tensors(key, stored_rows(model, key), model.scale[key], kind)
    tensors += [tensor(name, values) for name, values in model.vectors.items()]
    write_gguf(path, {**gguf_metadata(model.config), **(metadata or {})}, [*more, *tensors])
    return path


# ---- Hugging Face folders ------------------------------------------------------

HF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
HF_NAMES |= {f"{name}_norm_in": f"{HF_NAMES[name]}.norm" for name in MATRICES}
HF_CLASSES = {
    "bitnet": "BitnetForCausalLM",
    "bitnet-b1.58": "BitNetForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "bitnet-embedding": "Qwen3Model",
}


def hf_name(key: str) -> str:
    """blk.0.attn_q -> model.layers.0.self_attn.q_proj"""
    _, layer, name = key.removesuffix(".weight").split(".")
    return f"model.layers.{layer}.{HF_NAMES[name]}"


def write_safetensors(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """name -> (dtype of the format, array), as the format's specification says."""
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(np.ascontiguousarray(values).tobytes() for _, values in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def pack_rows(w: Ternary) -> NDArray[np.uint8]:
    """The packed form, element by element: byte[r] = sum over i of (w[i R + r] + 1) << 2 i."""
    quarter = -(-len(w) // 4)
    out = np.zeros((quarter, w.shape[1]), np.uint8)
    for row in range(len(w)):
        out[row % quarter] |= (w[row] + 1).astype(np.uint8) << 2 * (row // quarter)
    return out


def hf_config(config: ModelConfig, quantization: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "architectures": [HF_CLASSES[config.architecture]],
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        **({"quantization_config": dict(quantization)} if quantization else {}),
    }


def tokenizer_json(vocab: int) -> dict[str, Any]:
    """A byte-level BPE of the first letters with one merge and two special tokens."""
    letters = [chr(ord("a") + i) for i in range(vocab - 3)]
    words = [*letters, "ab"]
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab - 2, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False},
            {"id": vocab - 1, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False},
        ],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "model": {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": ["a b"]},
    }  # fmt: skip


def write_folder(
    folder: Path,
    model: Plain,
    form: str = "packed",
    quantization: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """The model as a folder. ``form``: "packed" with weight_scale = scale, "floats", or "groups" (Bonsai)."""
    folder.mkdir(exist_ok=True)
    tensors: dict[str, tuple[str, NDArray[Any]]] = {
        "model.embed_tokens.weight": ("F16", model.embedding.astype(np.float16)),
        "model.norm.weight": ("F32", model.vectors["output_norm.weight"]),
    }
    if model.head is not None:
        tensors["lm_head.weight"] = ("F16", model.head.astype(np.float16))
    for key, w in model.w.items():
        if not key.startswith("blk."):  # the embedding, as floats above
            continue
        name = hf_name(key) + ".weight"
        if form == "groups":
            tensors[name] = ("F16", values_of(model, key).astype(np.float16))
        elif form == "packed":
            tensors[name] = ("U8", pack_rows(w))
            tensors[name + "_scale"] = ("F32", np.array([model.scale[key]], np.float32))
        else:
            tensors[name] = ("F32", w.astype(np.float32) * np.float32(model.scale[key]))
    for key, values in model.vectors.items():
        if key != "output_norm.weight":
            tensors[hf_name(key) + ".weight"] = ("F32", values)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(
        json.dumps({**hf_config(model.config, quantization), **(config or {})})
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(model.config.vocab)))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
