"""NVFP4 in safetensors, as compressed-tensors and modelopt write it, against a plain decoding in numpy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_model import exact_logits
from model_files import hf_config, refused, small_config, write_safetensors
from nvfp4_files import QUANTIZATION, SIZES, WRITERS, e4m3, write_nvfp4

from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.errors import FileError
from bitgen.formats.hf_nvfp4 import E4M3_HALVES
from bitgen.formats.inspect import facts
from bitgen.formats.open import open_model
from bitgen.inference.engine import Engine
from bitgen.runtime import load

BEST = accepted_isas(detect_cpu(), load_isas())[0].name


def test_every_byte_of_e4m3() -> None:
    np.testing.assert_array_equal(2 * E4M3_HALVES, np.array([e4m3(b) for b in range(256)], np.float32))


def test_every_byte_of_e4m3_is_that_of_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(2 * E4M3_HALVES, expected)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_values_are_those_of_a_plain_decoding(tmp_path: Path, writer: str, architecture: str) -> None:
    config = small_config(architecture, **{**SIZES, "context": 128})
    folder, model, _, values = write_nvfp4(tmp_path / "m", writer, config)
    opened = open_model(folder)
    assert (opened.config.weights, opened.config.group) == ("t4", 16)
    assert facts(opened)["groups"].startswith("16 weights")
    roles = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate"}
    roles |= {"up": "ffn_up", "down": "ffn_down"}
    for i, layer in enumerate(opened.weights.layers):
        for role, matrix in layer.split(opened.config).items():
            np.testing.assert_array_equal(matrix.values(0, matrix.shape.m), values[f"blk.{i}.{roles[role]}"])
    np.testing.assert_array_equal(opened.weights.embedding.rows(0, config.vocab), model.embedding)


@pytest.mark.slow
@pytest.mark.parametrize("writer", WRITERS)
def test_logits_are_the_formulas(tmp_path: Path, level_library: Callable[[str], Path], writer: str) -> None:
    folder, *_ = write_nvfp4(tmp_path / "m", writer)
    weights, ids = open_model(folder).weights, [1, 260, 13, 99, 4, 4, 270]
    with load(level_library(BEST), 1) as table:
        engine = Engine(weights, table, context=64, kv="f32")
        where, none = np.arange(len(ids), dtype=np.int32), np.zeros(len(ids), np.int32)
        got = engine.forward(np.array(ids, np.int32), where, none, np.ones(len(ids), bool))
    np.testing.assert_array_equal(got, exact_logits(weights, ids, "f32"))


def test_a_folder_of_modelopt_that_says_so_beside_config_json(tmp_path: Path) -> None:
    folder, model, _, values = write_nvfp4(tmp_path / "m", "modelopt")
    (folder / "config.json").write_text(json.dumps(hf_config(model.config)))
    assert "model.layers.0" in refused(folder)
    beside = {"producer": {"name": "modelopt", "version": "0.23.0"}, "quantization": {"quant_algo": "NVFP4"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    down = open_model(folder).weights.layers[1].down
    np.testing.assert_array_equal(down.values(0, down.shape.m), values["blk.1.ffn_down"])
    beside["quantization"] = {"quant_algo": "FP8"}
    (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    assert "hf_quant_config.json: quantization: quant_algo is 'FP8'; of modelopt NVFP4" in refused(folder)


@pytest.mark.parametrize(
    ("writer", "changes", "message"),
    [
        ("compressed-tensors", {"format": "float-quantized"}, "format is 'float-quantized'; of compressed-"),
        ("compressed-tensors", {"format": None}, "format is None; of compressed-tensors nvfp4-pack-quant"),
        ("modelopt", {"quant_algo": "NVFP4_AWQ"}, "quant_algo is 'NVFP4_AWQ'; of modelopt NVFP4 and W4A16_"),
        ("modelopt", {"quant_method": {}}, "quant_method is {}; bitnet, compressed-tensors and"),
        ("modelopt", {"quant_method": "gptq"}, "quant_method is 'gptq'; bitnet, compressed-tensors and mod"),
    ],
)
def test_other_types_are_refused_by_name(
    tmp_path: Path, writer: str, changes: dict[str, Any], message: str
) -> None:
    folder, model, *_ = write_nvfp4(tmp_path / "m", writer)
    config = hf_config(model.config, {**QUANTIZATION[writer], **changes})
    (folder / "config.json").write_text(json.dumps(config))
    assert message in refused(folder)


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("writer", "changes", "message"),
    [
        ("compressed-tensors", {"weight_scale": None}, f"the tensor {NAME}.weight_scale is missing"),
        ("modelopt", {"weight_scale_2": None}, f"the tensor {NAME}.weight_scale_2 is missing"),
        (
            "compressed-tensors",
            {"weight_packed": None, "weight": ("F16", np.zeros((48, 64), np.float16))},
            f"{NAME}.weight is f16; bitgen runs models whose matrices are all NVFP4, or none",
        ),
        (
            "modelopt",
            {"weight": ("F16", np.zeros((48, 64), np.float16))},
            f"{NAME}.weight is f16 (48, 64); of NVFP4, 48x64, bitgen reads u8 (48, 32)",
        ),
        (
            "compressed-tensors",
            {"weight_scale": ("F8_E4M3", np.zeros((48, 2), np.uint8))},
            "weight_scale is f8_e4m3 (48, 2); of NVFP4, 48x64, bitgen reads f8_e4m3 (48, 4)",
        ),
        (
            "compressed-tensors",
            {"weight_scale": ("F8_E5M2", np.zeros((48, 4), np.uint8))},
            "weight_scale is f8_e5m2 (48, 4)",
        ),
        (
            "modelopt",
            {"weight_scale_2": ("F32", np.ones(48, np.float32))},
            "weight_scale_2 is f32 (48,), not one number of f32",
        ),
        (
            "compressed-tensors",
            {"weight_global_scale": ("F32", np.zeros(1, np.float32))},
            "weight_global_scale is zero, negative, NaN or infinite",
        ),
        (
            "modelopt",
            {"pre_quant_scale": ("F16", np.ones(64, np.float16))},
            f"'{NAME}.pre_quant_scale' (1 such) belongs to no llama model",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, writer: str, changes: dict[str, Any], message: str) -> None:
    folder, _, tensors, _ = write_nvfp4(tmp_path / "m", writer)
    for end, stored in changes.items():
        if stored is None:
            del tensors[f"{NAME}.{end}"]
        else:
            tensors[f"{NAME}.{end}"] = stored
    write_safetensors(folder / "model.safetensors", tensors)
    assert message in refused(folder)


def test_a_scale_that_is_no_number_is_damage(tmp_path: Path) -> None:
    folder, _, tensors, _ = write_nvfp4(tmp_path / "m", "modelopt")
    _, scales = tensors[f"{NAME}.weight_scale"]
    scales[5, 1] = 0xFF
    write_safetensors(folder / "model.safetensors", tensors)
    gate_up = open_model(folder).weights.layers[1].gate_up
    with pytest.raises(FileError, match=r"up_proj.*: a scale is NaN or infinite"):
        gate_up.values(0, gate_up.shape.m)
