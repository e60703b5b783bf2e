"""Folders whose matrices are NVFP4, as compressed-tensors and modelopt write them, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from model_files import (
    Plain,
    hf_config,
    hf_name,
    plain_model,
    small_config,
    tokenizer_json,
    write_safetensors,
)

from bitgen.formats.config import ModelConfig

WRITERS = ("compressed-tensors", "modelopt")
SIZES = {"hidden": 64, "ffn": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 300, "layers": 2}
# What the two programs write, but for lists of layers.
WEIGHTS = {"num_bits": 4, "type": "float", "group_size": 16}
QUANTIZATION: Mapping[str, dict[str, Any]] = {
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
        "ignore": ["lm_head"],
        "version": "0.20.0",
    },
    "modelopt": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"dynamic": False, **WEIGHTS}}},
        "ignore": ["lm_head"],
        "producer": {"name": "modelopt", "version": "0.47.0"},
    },
}
Tensors = dict[str, tuple[str, np.ndarray]]


def e2m1(code: int) -> float:
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def plain_values(codes: np.ndarray, scales: np.ndarray, factor: np.float32, *, divides: bool) -> np.ndarray:
    """F[q] * (scale / g), or F[q] * (scale * s), each rounded to float32; codes uint8 (m, k)."""
    fp4 = np.array([e2m1(q) for q in range(16)], np.float32)
    of_groups = np.array([e4m3(b) for b in range(256)], np.float32)[scales]
    of_groups = of_groups / factor if divides else of_groups * factor
    values: np.ndarray = fp4[codes] * np.repeat(of_groups, 16, axis=1)
    return values


def write_nvfp4(
    folder: Path, writer: str, config: ModelConfig | None = None
) -> tuple[Path, Plain, Tensors, dict[str, np.ndarray]]:
    """A folder as ``writer`` makes it, what it is made of, its tensors, and the values of its matrices."""
    model = plain_model(config or small_config("llama", **{**SIZES, "context": 128}))
    rng, values = np.random.default_rng(3), {}
    ours = writer == "compressed-tensors"
    tensors: Tensors = {
        "model.embed_tokens.weight": ("F16", model.embedding.astype(np.float16)),
        "model.norm.weight": ("F32", model.vectors["output_norm.weight"]),
    }
    if model.head is not None:
        tensors["lm_head.weight"] = ("F16", model.head.astype(np.float16))
    for key, w in model.w.items():
        (m, k), name = w.shape, hf_name(key)
        codes = rng.integers(0, 16, (m, k), dtype=np.uint8)
        scales = rng.integers(1, 127, (m, k // 16), dtype=np.uint8)  # 448 is 126
        factor = np.float32(rng.uniform(300, 3000) if ours else rng.uniform(1e-4, 1e-3))
        packed = codes[:, 0::2] | codes[:, 1::2] << 4
        one = np.array([factor], np.float32)
        tensors[f"{name}.weight_scale"] = ("F8_E4M3", scales)
        if ours:
            tensors |= {f"{name}.weight_packed": ("U8", packed), f"{name}.weight_global_scale": ("F32", one)}
            tensors[f"{name}.input_global_scale"] = ("F32", one)
        else:
            scalar = one.reshape(())
            tensors |= {f"{name}.weight": ("U8", packed), f"{name}.weight_scale_2": ("F32", scalar)}
            tensors[f"{name}.input_scale"] = ("F32", scalar)
            if name.endswith(("k_proj", "v_proj")):
                tensors[f"{name}.{name[-6]}_scale"] = ("F32", scalar)
        values[key] = plain_values(codes, scales, factor, divides=ours)
    for key, vector in model.vectors.items():
        if key != "output_norm.weight":
            tensors[hf_name(key) + ".weight"] = ("F32", vector)
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(hf_config(model.config, QUANTIZATION[writer])))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(model.config.vocab)))
    return folder, model, tensors, values
