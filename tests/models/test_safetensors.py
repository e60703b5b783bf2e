from __future__ import annotations

import contextlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import (
    HF_NAMES,
    Plain,
    hf_config,
    pack_rows,
    plain_model,
    refused,
    small_config,
    write_folder,
    write_safetensors,
)

from bitgen.errors import BitgenError
from bitgen.formats.convert import convert
from bitgen.formats.open import open_model
from bitgen.formats.rope import Yarn
from bitgen.formats.safetensors import read_folder, read_safetensors
from bitgen.formats.sentencepiece_file import read_tokenizer_model

OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
BITLINEAR = {"quant_method": "bitnet"}


# ---- the container ----


def test_files_of_the_safetensors_package_are_read(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy", reason="the safetensors package writes the file")
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(np.float16),
        "c": rng.integers(0, 256, (2, 3, 4), dtype=np.uint8),
        "d": np.array([5], np.int64),
    }
    package.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert set(read) == set(arrays)
    for name, values in arrays.items():
        assert read[name].shape == values.shape
        assert read[name].data.tobytes() == values.tobytes()
    assert [read[name].type for name in "abcd"] == ["f32", "f16", "u8", "i64"]


def test_our_files_are_read_by_the_safetensors_package(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy", reason="the safetensors package reads the file")
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet-b1.58")))
    read = package.load_file(folder / "model.safetensors")
    ours = read_folder(folder)
    assert set(read) == set(ours)
    assert all(read[name].tobytes() == tensor.data.tobytes() for name, tensor in ours.items())


def header(entries: object, body: bytes = bytes(64)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "it ends inside its header"),
        (struct.pack("<Q", 1 << 62) + b"{}", "it ends inside its header"),
        (header(b"{"), "holds no valid JSON"),
        (header(b"[" * 100_000), "holds no valid JSON"),
        (header(b'{"a": ' + b"1" * 5000 + b"}"), "holds no valid JSON"),
        (header(b"\xff\xfe"), "holds no valid JSON"),
        (header([]), "holds no JSON object"),
        (header({"a": 3}), "'a' is no object"),
        (header({"a": entry(dtype="F5")}), "'a' has the type 'F5'"),
        (header({"a": entry(dtype="F8_E8M0")}), "'a' is stored as F8_E8M0, which bitgen does not read"),
        (header({"a": entry(dtype=["F32"])}), "'a' has the type"),
        (header({"a": entry(shape=[-4])}), "'a' has the shape"),
        (header({"a": entry(shape=[True, 4])}), "'a' has the shape"),
        (header({"a": entry(shape=[4] * 9)}), "'a' has the shape"),
        (header({"a": entry(offsets=[0])}), "'a' has the shape"),
        (header({"a": entry(offsets=[16, 0])}), "'a' ends after the file"),
        (header({"a": entry(offsets=[56, 72])}), "'a' ends after the file"),
        (header({"a": entry(shape=[5])}), "'a' of shape [5] has 16 bytes"),
        (header({"a": entry(shape=[1 << 40, 1 << 40])}), "'a' of shape"),
        (header({"a": entry(), "b": entry(offsets=[8, 24])}), "'a' and 'b' overlap"),
    ],
    ids=str,
)
def test_headers_are_compared_with_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BitgenError) as caught:
        read_safetensors(path)
    assert message in caught.value.message


def sharded(folder: Path, weight_map: dict[str, Any]) -> Path:
    folder.mkdir()
    write_safetensors(folder / "m-1.safetensors", {"a": ("F32", np.ones(2, np.float32))})
    write_safetensors(folder / "m-2.safetensors", {"b": ("F32", np.zeros(3, np.float32))})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_sharded_checkpoint_is_one(tmp_path: Path) -> None:
    tensors = read_folder(sharded(tmp_path / "m", {"a": "m-1.safetensors", "b": "m-2.safetensors"}))
    assert {name: t.shape for name, t in tensors.items()} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../m/m-1.safetensors"}, "names the file '../m/m-1.safetensors'"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": ".."}, "names the file '..'"),
        ({"a": "m-3.safetensors"}, "does not exist"),
        ({"b": "m-1.safetensors"}, "lacks the tensor 'b' of the index"),
        ({"a": 5}, "has no weight_map"),
        ([], "has no weight_map"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(BitgenError) as caught:
        read_folder(sharded(tmp_path / "m", weight_map))
    assert message in caught.value.message


# ---- packed weights ----


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 10, 64, 65, 66, 67])
def test_packed_rows_are_those_of_transformers(m: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is the oracle")
    w = np.random.default_rng(m).integers(-1, 2, (m, 6), dtype=np.int8)
    packed = bitnet.pack_weights(torch.from_numpy(w.astype(np.float32)))
    assert np.array_equal(packed.numpy(), pack_rows(w))


def check_layers(folder: Path, model: Plain, factor: float = 1.0) -> None:
    """Every matrix of the opened folder is the model's, its scale times ``factor``."""
    for i, layer in enumerate(open_model(folder).weights.layers):
        expected = {
            "qkv": ["attn_q", "attn_k", "attn_v"],
            "o": ["attn_output"],
            "gate_up": ["ffn_gate", "ffn_up"],
            "down": ["ffn_down"],
        }
        for name, parts in expected.items():
            keys = [f"blk.{i}.{part}" for part in parts]
            matrix = getattr(layer, name)
            w = np.concatenate([model.w[key] for key in keys])
            scale = np.concatenate([np.full(len(model.w[key]), model.scale[key]) for key in keys])
            assert np.array_equal(matrix.rows(0, matrix.shape.m), w)
            assert np.array_equal(matrix.rows(3, 17), w[3:17])
            assert np.allclose(np.broadcast_to(matrix.scale, scale.shape), scale * factor, rtol=2e-7)


@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-b1.58", "llama"])
def test_a_packed_checkpoint_with_ragged_rows(tmp_path: Path, architecture: str) -> None:
    model = plain_model(small_config(architecture, ffn=21, hidden=26, heads=13, kv_heads=13, head_dim=2))
    folder = write_folder(tmp_path / "m", model, "packed", OFFLINE)
    opened = open_model(folder)
    assert opened.config.architecture == architecture
    assert opened.config.activation == model.config.activation
    check_layers(folder, model)
    assert np.array_equal(opened.weights.embedding.row(4), model.embedding[4])


@pytest.mark.parametrize(
    ("quantization", "multiplies"),
    [(OFFLINE, True), (BITLINEAR, False), ({"quant_method": "bitnet", "linear_class": "bitlinear"}, False)],
)
def test_the_direction_of_the_scale(tmp_path: Path, quantization: dict[str, Any], multiplies: bool) -> None:
    model = plain_model(small_config("bitnet-b1.58"))
    folder = write_folder(tmp_path / "m", model, "packed", quantization)
    down = open_model(folder).weights.layers[0].down
    stored = np.float32(model.scale["blk.0.ffn_down"])
    assert down.scale[0] == (stored if multiplies else np.float32(1) / stored)


def test_both_directions_are_those_of_transformers() -> None:
    """y of one row by transformers' own layers against ours, packed weights and all."""
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    bitnet = pytest.importorskip("transformers.integrations.bitnet", reason="transformers is the oracle")
    from bitgen.formats.architectures import ARCHITECTURES
    from bitgen.formats.hf import _Checkpoint, quantization_of
    from bitgen.formats.safetensors import StoredTensor
    from bitgen.formats.scalars import Scalars
    from bitgen.reference import linear

    torch._dynamo.config.disable = True
    rng = np.random.default_rng(0)
    w = rng.integers(-1, 2, (12, 40), dtype=np.int8)
    x = rng.standard_normal((3, 40)).astype(np.float32)
    scale = np.array([0.37], np.float32)
    packed = pack_rows(w)
    layers = {
        "bitlinear": bitnet.BitLinear(40, 12, bias=False, dtype=torch.float32),
        "autobitlinear": bitnet.AutoBitLinear(40, 12, bias=False, dtype=torch.float32),
    }
    for name, layer in layers.items():
        layer.weight_scale.copy_(torch.from_numpy(scale))
        if name == "bitlinear":
            layer.weight.copy_(torch.from_numpy(packed))
        else:
            layer.weight.data = bitnet.unpack_weights(torch.from_numpy(packed), torch.float32)
        with torch.no_grad():
            expected = layer(torch.from_numpy(x)).numpy()
        tensors = {
            "l.weight": StoredTensor("l.weight", "u8", packed.shape, packed.reshape(-1)),
            "l.weight_scale": StoredTensor("l.weight_scale", "f32", (1,), scale.view(np.uint8)),
        }
        settings = {"quantization_config": {"quant_method": "bitnet", "linear_class": name}}
        quantization = quantization_of(settings, ARCHITECTURES["llama"], Path("config.json"))
        matrix = _Checkpoint(Path(), tensors, quantization, set(), Scalars()).ternary("l", 12, 40)
        assert np.allclose(linear(x, matrix.rows(0, 12), matrix.scale), expected, rtol=1e-5, atol=1e-6)


def test_the_fourth_code_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet-b1.58")), "packed", OFFLINE)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    down = read_safetensors(path)["model.layers.0.mlp.down_proj.weight"].data.tobytes()
    content[bytes(content).index(down)] = 0b1100
    path.write_bytes(content)
    matrix = open_model(folder).weights.layers[0].down
    with pytest.raises(BitgenError, match=r"down_proj\.weight holds codes that are not ternary"):
        matrix.rows(0, 24)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_scale_that_cannot_be_is_refused(tmp_path: Path, value: float) -> None:
    model = plain_model(small_config("bitnet-b1.58"))
    model.scale["blk.1.ffn_up"] = value
    message = refused(write_folder(tmp_path / "m", model, "packed", OFFLINE))
    assert "model.layers.1.mlp.up_proj.weight_scale is zero, NaN or infinite" in message


# ---- floats ----


@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-b1.58", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_master_weights_are_quantised_as_bitlinear_does(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle")
    save_file = pytest.importorskip("safetensors.torch", reason="safetensors writes the file").save_file

    config = small_config(architecture)
    model = plain_model(config)
    folder = write_folder(tmp_path / "m", model, "floats", BITLINEAR if architecture == "llama" else None)
    torch.manual_seed(1)
    master = {
        name: torch.randn(t.shape).to(getattr(torch, dtype)) * 0.02 if t.shape[0] > 1 and len(t.shape) == 2
        else torch.ones(t.shape)
        for name, t in read_folder(folder).items()
    }  # fmt: skip
    save_file(master, folder / "model.safetensors")
    weights = open_model(folder).weights
    for i, layer in enumerate(weights.layers):
        weight = master[f"model.layers.{i}.mlp.down_proj.weight"].float()
        s = 1.0 / weight.abs().mean().clamp(min=1e-5)
        expected = (weight * s).round().clamp(-1, 1)
        assert np.array_equal(layer.down.rows(0, config.hidden), expected.numpy())
        assert np.array_equal(layer.down.rows(5, 9), expected.numpy()[5:9])
        assert layer.down.scale[0] == pytest.approx(float(1 / s), rel=2e-7)
    assert weights.embedding.type == {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]


def test_the_mean_of_master_weights_has_a_floor(tmp_path: Path) -> None:
    model = plain_model(small_config("bitnet"))
    model.scale["blk.0.ffn_down"] = 1e-9
    down = open_model(write_folder(tmp_path / "m", model, "floats")).weights.layers[0].down
    assert down.scale[0] == pytest.approx(1e-5)
    assert not down.rows(0, 24).any()


def test_floats_of_a_plain_llama_must_be_ternary(tmp_path: Path) -> None:
    model = plain_model(small_config("llama"))
    folder = write_folder(tmp_path / "m", model, "floats")
    check_layers(folder, model)
    values = {}
    for name, stored in read_folder(folder).items():
        dtype = {"f32": np.float32, "f16": np.float16}[stored.type]
        values[name] = (stored.type.upper(), stored.data.view(dtype).reshape(stored.shape))
    down = values["model.layers.0.mlp.down_proj.weight"][1].copy()
    down[3, 3] = 0.123
    values["model.layers.0.mlp.down_proj.weight"] = ("F32", down)
    write_safetensors(folder / "model.safetensors", values)
    matrix = open_model(folder).weights.layers[0].down
    with pytest.raises(BitgenError, match=r"down_proj\.weight \(f32\) is not ternary"):
        _ = matrix.scale


def test_the_sub_norms_of_1bitllm_have_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(small_config("bitnet"))
    monkeypatch.setitem(HF_NAMES, "attn_sub_norm", "self_attn.inner_attn_ln")
    monkeypatch.setitem(HF_NAMES, "ffn_sub_norm", "mlp.ffn_layernorm")
    folder = write_folder(tmp_path / "m", model, "floats")
    assert any("inner_attn_ln" in name for name in read_folder(folder))
    layer = open_model(folder).weights.layers[1]
    assert layer.attn_sub_norm is not None
    assert layer.ffn_sub_norm is not None
    assert np.array_equal(layer.attn_sub_norm, model.vectors["blk.1.attn_sub_norm.weight"])
    assert np.array_equal(layer.ffn_sub_norm, model.vectors["blk.1.ffn_sub_norm.weight"])


# ---- config.json ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "bitgen runs BitnetForCausalLM, BitNetForCausalLM, LlamaForCausalLM, MistralForCausalLM",
        ),
        (
            {"architectures": ["Qwen3MoeForCausalLM"]},
            "bitgen runs BitnetForCausalLM, BitNetForCausalLM, LlamaForCausalLM",
        ),
        ({"architectures": None}, "architectures is None"),
        ({"hidden_size": "26"}, "hidden_size is '26', not one whole number"),
        ({"hidden_size": 1 << 80}, "hidden must be at most 16777216, found 1208925819614629174706176"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"head_dim": 1 << 40}, "heads of 1099511627776 are not possible"),
        (
            {"use_sliding_window": True, "sliding_window": 32},
            "use_sliding_window is set, and BitNetForCausalLM has no attention to a window",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; silu and relu2 are supported"),
        ({"attention_bias": True}, "attention_bias is set: biases are not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "short_factor is no list of numbers"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "numbers of the yarn RoPE scaling make no"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, "mscale is 1, which is not"),
        ({"rope_scaling": 5}, "rope_scaling is no object"),
        ({"rms_norm_eps": float("nan")}, "norm_eps must be greater than 0 and finite, found nan"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quant_method is 'gptq'; bitnet, compressed-tensors and modelopt (NVFP4) are",
        ),
        ({"quantization_config": {"quant_method": "bitnet", "use_rms_norm": True}}, "use_rms_norm is set"),
        ({"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}, "linear_class is 'x'"),
        (
            {"quantization_config": {"modules_to_not_convert": ["q_proj"]}},
            "modules_to_not_convert names 'q_proj'",
        ),
        ({"vocab_size": 12}, "model.embed_tokens.weight has the shape (11, 24); config.json says (12, 24)"),
        ({"num_hidden_layers": 3}, "the tensor model.layers.2.self_attn.q_proj.weight is missing"),
        ({"num_hidden_layers": 1}, "belongs to no bitnet-b1.58 model"),
        ({"tie_word_embeddings": False}, "the tensor lm_head.weight is missing"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = plain_model(small_config("bitnet-b1.58"))
    assert message in refused(write_folder(tmp_path / "m", model, "packed", OFFLINE, changes))


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet-b1.58")), "packed", OFFLINE)
    (folder / "model.safetensors").unlink()
    assert "holds no weights: neither model.safetensors nor model.safetensors.index.json" in refused(folder)


def test_rope_as_transformers_writes_it_now_and_before(tmp_path: Path) -> None:
    model = plain_model(small_config("llama"))
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    before = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    now = {"rope_theta": None, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **scaling}}
    configs = [
        open_model(write_folder(tmp_path / name, model, "packed", BITLINEAR, changes)).config
        for name, changes in (("before", before), ("now", now))
    ]
    for config in configs:
        assert config.rope_theta == 500000.0
        assert config.rope_factors is not None
    assert configs[0].rope_factors == configs[1].rope_factors


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_llama3_factors_are_those_of_transformers(head_dim: int) -> None:
    pytest.importorskip("torch", reason="torch is the oracle")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from bitgen.formats.rope import llama3_divisors

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=rope
    )
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    factors = llama3_divisors(500000.0, head_dim, 8.0, 1.0, 4.0, 8192.0)
    assert np.allclose(plain / factors, expected.numpy(), rtol=2e-6)


@pytest.mark.parametrize("changes", [{}, {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 0.7}])
@pytest.mark.parametrize("theta", [10000.0, 5000000.0])
def test_yarn_is_that_of_transformers(theta: float, changes: dict[str, float]) -> None:
    pytest.importorskip("torch", reason="torch is the oracle")
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16384, **changes}
    config = transformers.Qwen3Config(head_dim=128, rope_parameters={**rope, "rope_theta": theta})
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    fast, slow = changes.get("beta_fast", 32.0), changes.get("beta_slow", 1.0)
    yarn = Yarn(4.0, 16384, fast, slow, changes.get("attention_factor"))
    plain = theta ** -(np.arange(0, 128, 2) / 128)
    assert np.allclose(plain / yarn.divisors(theta, 128), expected.numpy(), rtol=2e-6)
    assert math.isclose(yarn.scale, scale)
    assert (yarn.divisors(theta, 128) > 1.001).any()


# ---- tokenizer ----


def test_the_tokenizer_of_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet-b1.58")), "packed", OFFLINE,
                          {"eos_token_id": [10, 7], "pad_token_id": 0})  # fmt: skip
    (folder / "generation_config.json").write_text('{"eos_token_id": [10, 8]}')
    data = open_model(folder).tokenizer_data
    assert data.json == (folder / "tokenizer.json").read_text()
    assert (data.bos, data.eos, data.pad, data.end_ids) == (9, 10, 0, (10, 8, 7))
    assert data.chat_template == "{{ messages }}"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}")
    assert open_model(folder).tokenizer_data.chat_template == "{{ bos_token }}"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BitgenError, match=r"tokenizer\.json is missing; bitgen needs it"):
        _ = open_model(folder).tokenizer_data


def varint(value: int) -> bytes:
    value %= 1 << 64
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def sentencepiece_model(kind: int = 2, prefix: bool = True) -> bytes:
    """A tokenizer.model of six pieces, written from the definition of its message."""
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<0x0A>", 0.0, 6),
        ("▁a", -1.5, None),
        ("b", -2.0, 1),
    ]
    out = b""
    for text, score, type_ in pieces:
        piece = message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        out += message(1, piece + (b"" if type_ is None else varint(3 << 3) + varint(type_)))
    ids = {3: kind, 40: 0, 41: 1, 42: 2, 43: -1}
    trainer = message(1, b"ignored.txt") + b"".join(varint(n << 3) + varint(v) for n, v in ids.items())
    return out + message(2, trainer) + message(3, message(1, b"nmt") + varint(3 << 3) + varint(int(prefix)))


def test_a_sentencepiece_file_is_read_where_there_is_no_tokenizer_json(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet")), "floats")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(prefix=False))
    (folder / "added_tokens.json").write_text('{"<pad>": 7}')
    settings = {
        "added_tokens_decoder": {"8": {"content": "<x>", "special": False}, "y": 3},
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    data = open_model(folder).tokenizer_data
    assert data.json is None
    assert data.tokens == ("<unk>", "<s>", "</s>", "<0x0A>", "▁a", "b", "[PAD6]", "<pad>", "<x>")
    assert data.types is not None
    assert data.types.tolist() == [2, 3, 3, 6, 1, 1, 5, 3, 4]
    assert data.scores is not None
    assert data.scores.tolist() == [0, 0, 0, 0, -1.5, -2, 0, 0, 0]
    assert (data.model, data.bos, data.eos, data.unknown, data.pad) == ("llama", 1, 2, 0, None)
    assert (data.add_bos, data.add_space_prefix) == (False, False)
    convert(folder, tmp_path / "m.gguf")
    again = open_model(tmp_path / "m.gguf").tokenizer_data
    assert again.tokens == (*data.tokens, "[PAD9]", "[PAD10]")
    assert (again.bos, again.eos, again.add_bos, again.add_space_prefix) == (1, 2, False, False)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "it has no pieces"),
        (sentencepiece_model(kind=1), "is a unigram model"),
        (sentencepiece_model()[:-3], "a field ends after its message"),
        (b"\x80" * 20, "a number that does not end"),
        (b"\x0a\xff\xff\xff\x7f", "a field ends after its message"),
        (message(1, varint(3 << 3) + varint(9)), "a piece of type 9"),
    ],
)
def test_a_damaged_sentencepiece_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet")), "floats")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(BitgenError) as caught:
        _ = open_model(folder).tokenizer_data
    assert text in caught.value.message


def test_every_damage_to_a_sentencepiece_file_is_refused_or_read() -> None:
    whole = sentencepiece_model()
    for length in range(len(whole)):
        _read_or_refuse(whole[:length])
    for at in range(len(whole)):
        for value in (0, 1, 127, 128, 255, whole[at] ^ 1, whole[at] ^ 8):
            _read_or_refuse(whole[:at] + bytes([value]) + whole[at + 1 :])


def _read_or_refuse(content: bytes) -> None:
    with contextlib.suppress(BitgenError):
        read_tokenizer_model(Path("tokenizer.model"), content, {})


def test_a_file_of_a_folder_stands_for_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("bitnet-b1.58")), "packed", OFFLINE)
    opened = open_model(folder / "model.safetensors")
    assert (opened.path, opened.container) == (folder, "safetensors")
    first = opened.fingerprint
    assert open_model(folder).fingerprint == first
    (folder / "config.json").write_text(json.dumps({**hf_config(opened.config, OFFLINE), "x": 1}))
    assert open_model(folder).fingerprint.header != first.header
