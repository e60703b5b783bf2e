"""Checkpoints that transformers writes, read here: the same integers in every BitLinear, the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import pack_rows
from reference_model import logits_of

from bitgen.model import open_model
from bitgen.model.convert import convert
from bitgen.model.weights import Weights
from bitgen.reference import quantize_activations, ternary_matmul

torch = pytest.importorskip("torch", reason="torch is the oracle")
transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
save_file = pytest.importorskip("safetensors.torch", reason="safetensors writes the files").save_file

IDS = [1, 17, 3, 80, 80, 5, 41, 0, 63, 22]
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Nothing divides anything that a block format would need: hidden 100, ffn 150, heads of 26 or 10.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 100,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 26,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


@pytest.fixture(autouse=True)
def plain_torch() -> Iterator[None]:
    """BitLinear compiles its functions; here that would only take time."""
    before = torch._dynamo.config.disable
    torch._dynamo.config.disable = True
    yield
    torch._dynamo.config.disable = before


def oracle(kind: str) -> Any:
    """A random model whose linear layers quantise weights and activations on the fly."""
    from transformers.integrations.bitnet import replace_with_bitnet_linear
    from transformers.utils.quantization_config import BitNetQuantConfig

    torch.manual_seed(3)
    if kind == "bitnet":
        sizes = {**SIZES, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 10}
        config = transformers.BitNetConfig(**sizes, tie_word_embeddings=True)
        model = transformers.BitNetForCausalLM(config)
    else:
        config = transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=False)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.5)
    masters = {name: value.clone() for name, value in model.state_dict().items()}
    quantization = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    model = replace_with_bitnet_linear(model, ["lm_head"], quantization)
    model.load_state_dict(masters)
    model.tie_weights()
    return model.eval().float()


def save(model: Any, folder: Path, form: str) -> Path:
    """The model as transformers saves it: its master weights, or packed as `bitlinear` or `autobitlinear`."""
    model.config.save_pretrained(folder)
    tensors = {
        n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight" or not _tied(model)
    }
    quantization: dict[str, Any] = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    quantization["quantization_mode"] = "online" if form == "master" else "offline"
    if form != "master":
        quantization["linear_class"] = form
        for name in [n for n in tensors if n.split(".")[-2] in LINEARS]:
            weight = tensors.pop(name)
            s = 1.0 / weight.abs().mean().clamp(min=1e-5)
            tensors[name] = torch.from_numpy(
                pack_rows((weight * s).round().clamp(-1, 1).to(torch.int8).numpy())
            )
            tensors[name + "_scale"] = (s if form == "bitlinear" else 1 / s).reshape(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = quantization
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return folder


def _tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def parts(weights: Weights) -> dict[str, np.ndarray]:
    """Name of a linear layer in transformers -> w int8, from the stacked matrices."""
    c = weights.config
    found = {}
    for i, layer in enumerate(weights.layers):
        prefix = f"model.layers.{i}."
        qkv = layer.qkv.rows(0, layer.qkv.shape.m)
        gate_up = layer.gate_up.rows(0, 2 * c.ffn)
        found[prefix + "self_attn.q_proj"] = qkv[: c.q_rows]
        found[prefix + "self_attn.k_proj"] = qkv[c.q_rows : c.q_rows + c.kv_rows]
        found[prefix + "self_attn.v_proj"] = qkv[c.q_rows + c.kv_rows :]
        found[prefix + "self_attn.o_proj"] = layer.o.rows(0, c.hidden)
        found[prefix + "mlp.gate_proj"] = gate_up[: c.ffn]
        found[prefix + "mlp.up_proj"] = gate_up[c.ffn :]
        found[prefix + "mlp.down_proj"] = layer.down.rows(0, c.hidden)
    return found


def integers(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every linear layer of a run over IDS: its input, its quantised input and its exact integers."""
    seen: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, args: Any, _out: Any) -> None:
            x = args[0][0]
            scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
            xq = (x * scale).round().clamp(-128, 127)
            s = 1.0 / module.weight.abs().mean().clamp(min=1e-5)
            w = (module.weight * s).round().clamp(-1, 1)
            seen[name] = (x.numpy(), xq.to(torch.int8).numpy(), (xq.double() @ w.double().T).numpy())

        return hook

    handles = [
        m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n.split(".")[-1] in LINEARS
    ]
    with torch.no_grad():
        model(torch.tensor([IDS]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", ["bitnet", "llama"])
@pytest.mark.parametrize("form", ["master", "bitlinear", "autobitlinear"])
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_a_checkpoint_of_transformers(tmp_path: Path, kind: str, form: str, container: str) -> None:
    model = oracle(kind)
    path = save(model, tmp_path, form)
    if container == "gguf":
        (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordLevel"}}')
        convert(tmp_path, tmp_path / "m.gguf")
        path = tmp_path / "m.gguf"
    weights = open_model(path).weights
    w = parts(weights)
    seen = integers(model)
    assert set(seen) == set(w)
    for name, (x, xq, acc) in seen.items():
        assert np.array_equal(quantize_activations(x)[0], xq), name
        assert np.array_equal(ternary_matmul(xq, w[name]), acc), name
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
    got = logits_of(weights, IDS)
    # The reference is float64: an activation that lies between two integers may round the other way.
    assert np.abs(got - expected).max() < 0.02 * expected.std()
    assert np.array_equal(got.argmax(axis=1), expected.argmax(axis=1))
