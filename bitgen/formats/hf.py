"""A Hugging Face folder as a model: config.json, safetensors, tokenizer.json.

Two kinds of matrices: packed (uint8, four rows in a byte, `weight_scale`) and floats. Floats of a BitNet
checkpoint are master weights, quantised by absmean here as its layers do; floats of any other checkpoint must
be ternary values already.

packed  byte[r, c] = sum over i of (w[i R + r, c] + 1) << 2 i, R = ceil(m / 4)
scale   y is divided by weight_scale for `bitlinear` (the default), multiplied for `autobitlinear`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.formats.config import Activation, Floats, ModelConfig, check_head_dim, printable
from bitgen.formats.gguf_model import float_matrix
from bitgen.formats.hf_tokenizer import hf_tokenizer
from bitgen.formats.model_file import ModelFile, TensorSummary, fingerprint_of
from bitgen.formats.quants import DENSE, Bytes, absmean, dequantize
from bitgen.formats.safetensors import INDEX, SINGLE, StoredTensor, read_folder, read_json
from bitgen.formats.weights import DenseMatrix, LayerWeights, Ternary, TernaryMatrix, Weights
from bitgen.spec import Shape
from bitgen.tokenizer.data import TokenizerData

# transformers' class -> the GGUF architecture of the same forward pass. 1bitLLM's BitnetForCausalLM (small n)
# gates with silu, Microsoft's BitNetForCausalLM with relu^2; both say so in hidden_act.
CLASSES = {"BitnetForCausalLM": "bitnet", "BitNetForCausalLM": "bitnet-b1.58", "LlamaForCausalLM": "llama"}
_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_FLOATS = ("f32", "f16", "bf16")
_IGNORED = ("rotary_emb.inv_freq",)
_ABSMEAN_FLOOR = 1e-5
_CHUNK_VALUES = 1 << 20

# Names of sub-norms: Microsoft's, 1bitLLM's.
_ATTN_SUB_NORM = ("self_attn.attn_sub_norm", "self_attn.inner_attn_ln")
_FFN_SUB_NORM = ("mlp.ffn_sub_norm", "mlp.ffn_layernorm")


# ---- config.json ---------------------------------------------------------------


class _Settings:
    """Typed look-ups in config.json; every error names file and key."""

    def __init__(self, where: str, data: Mapping[str, Any]) -> None:
        self.where = where
        self._data = data

    def error(self, key: str, what: str) -> BitgenError:
        return FileError(f"{self.where}: {key} {what}")

    def get(self, key: str) -> Any:
        return self._data.get(key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(
                key, "is missing" if value is None else f"is {str(value)[:40]!r}, not a whole number"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool) or abs(value) > 1e300:
            raise self.error(key, "is missing" if value is None else f"is {str(value)[:40]!r}, not a number")
        return float(value)

    def section(self, key: str) -> _Settings:
        value = self.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, "is no object")
        return _Settings(f"{self.where}: {key}", value)


def hf_config(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> ModelConfig:
    """config.json as a ModelConfig. FileError names what is missing or not supported."""
    settings = _Settings(str(folder / "config.json"), data)
    architecture = _architecture(settings)
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    if heads < 1:
        raise settings.error("num_attention_heads", f"is {heads}")
    head_dim = check_head_dim(settings.integer("head_dim", hidden // heads), settings.where)
    act = settings.get("hidden_act") or ("relu2" if architecture == "bitnet-b1.58" else "silu")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise settings.error("hidden_act", f"is {str(act)[:40]!r}; silu and relu2 are supported")
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            raise settings.error(key, "is set: biases are not supported")
    tied = settings.get("tie_word_embeddings")
    theta, factors = _rope(settings, head_dim)
    return ModelConfig(
        architecture=architecture,
        hidden=hidden,
        ffn=settings.integer("intermediate_size"),
        layers=settings.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=settings.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab=settings.integer("vocab_size"),
        context=settings.integer("max_position_embeddings"),
        rope_theta=theta,
        activation=_ACTIVATIONS[act],
        sub_norms=architecture != "llama",
        norm_eps=settings.number("rms_norm_eps"),
        tied_head="lm_head.weight" not in tensors if tied is None else bool(tied),
        name=printable(str(data.get("_name_or_path") or folder.resolve().name)[:200]),
        rope_factors=factors,
    )


def _architecture(settings: _Settings) -> str:
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in CLASSES:
        raise settings.error(
            "architectures", f"is {names!r:.60}; bitgen runs {', '.join(CLASSES)} with ternary matrices"
        )
    return CLASSES[name]


def _rope(settings: _Settings, head_dim: int) -> tuple[float, Floats | None]:
    """(theta, factors that divide the frequencies or None): rope_parameters, or the older rope_scaling."""
    rope = settings.section("rope_parameters" if settings.get("rope_parameters") else "rope_scaling")
    default = 500000.0 if settings.get("model_type") == "bitnet" else 10000.0
    theta = rope.number("rope_theta", settings.number("rope_theta", default))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, np.full(head_dim // 2, rope.number("factor"), np.float32)
    if kind == "llama3":
        old = rope.number(
            "original_max_position_embeddings", float(settings.integer("max_position_embeddings"))
        )
        return theta, llama3_factors(
            theta,
            head_dim,
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            old,
        )
    raise rope.error("rope_type", f"is {str(kind)[:40]!r}; default, linear and llama3 are supported")


def llama3_factors(
    theta: float, head_dim: int, factor: float, low: float, high: float, old_context: float
) -> Floats:
    """Llama 3.1's divisors of the RoPE frequencies, float32 (head_dim / 2).

    Wavelengths above old_context / low are stretched by ``factor``, those below old_context / high stay, and
    between them 1 / f falls linearly.
    """
    if min(theta, factor, low, high, old_context) <= 0 or head_dim < 2 or low == high:
        raise FileError("the numbers of the llama3 RoPE scaling make no sense")
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((old_context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's BitLinear layers are stored, from quantization_config."""

    bitnet: bool  # it is a BitNet checkpoint: floats in it are master weights
    multiplies: bool  # y * weight_scale; else y / weight_scale


def quantization_of(settings_data: Mapping[str, Any], architecture: str, where: str) -> Quantization:
    settings = _Settings(where, settings_data).section("quantization_config")
    method = settings.get("quant_method")
    if method not in (None, "bitnet"):
        raise settings.error("quant_method", f"is {str(method)[:40]!r}; bitnet is supported")
    if settings.get("use_rms_norm"):
        raise settings.error("use_rms_norm", "is set: a norm inside each linear layer is not supported")
    linear = settings.get("linear_class") or "bitlinear"
    if linear not in ("bitlinear", "autobitlinear"):
        raise settings.error(
            "linear_class", f"is {str(linear)[:40]!r}; bitlinear and autobitlinear are known"
        )
    kept = settings.get("modules_to_not_convert")
    odd = [str(name) for name in kept if "lm_head" not in str(name)] if isinstance(kept, list) else []
    if odd:
        raise settings.error(
            "modules_to_not_convert", f"names {odd[0][:40]!r}; only lm_head may be no BitLinear"
        )
    return Quantization(method == "bitnet" or architecture != "llama", linear == "autobitlinear")


# ---- Tensors -------------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    """The tensors of a folder and what is needed to read them."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    quantization: Quantization
    used: set[str]

    def error(self, what: str) -> BitgenError:
        return FileError(f"{self.folder}: {what}")

    def tensor(self, name: str) -> StoredTensor:
        if name not in self.tensors:
            raise self.error(f"the tensor {name} is missing; the checkpoint is not whole")
        self.used.add(name)
        return self.tensors[name]

    def floats(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        tensor = self.tensor(name)
        if tensor.type not in _FLOATS:
            raise self.error(f"{name} is stored as {tensor.type}; bitgen reads {', '.join(_FLOATS)} there")
        if tensor.shape != shape:
            raise self.error(f"{name} has the shape {tensor.shape}; config.json says {shape}")
        return tensor

    def vector(self, name: str, size: int) -> Floats:
        tensor = self.floats(name, (size,))
        values: Floats = dequantize(tensor.type, tensor.data.reshape(1, -1), size)[0]
        if not np.isfinite(values).all():
            raise self.error(f"{name} holds NaN or infinity; the file is damaged")
        return values

    def dense(self, name: str, rows: int, cols: int) -> DenseMatrix:
        tensor = self.floats(name, (rows, cols))
        return DenseMatrix(name, tensor.type, (rows, cols), tensor.data.reshape(rows, -1))

    def ternary(self, name: str, m: int, k: int) -> TernaryMatrix:
        tensor = self.tensor(name + ".weight")
        quarter = -(-m // 4)
        if tensor.type == "u8" and tensor.shape == (quarter, k):
            return _packed(tensor, m, self._weight_scale(name, m))
        if tensor.type not in _FLOATS or tensor.shape != (m, k):
            raise self.error(
                f"{tensor.name} is {tensor.type} {tensor.shape}; bitgen reads uint8 {(quarter, k)} (packed) "
                f"or {', '.join(_FLOATS)} {(m, k)} there"
            )
        data = tensor.data.reshape(m, -1)
        if name + ".weight_scale" in self.tensors:  # unpacked, but quantised offline
            matrix = float_matrix(tensor.name, tensor.type, data, k)
            return matrix.scaled(self._weight_scale(name, m))
        if not self.quantization.bitnet:
            return float_matrix(tensor.name, tensor.type, data, k)
        return _master(tensor, m, k)

    def _weight_scale(self, name: str, m: int) -> Floats:
        """What y is multiplied by, float32 (1) or (m)."""
        tensor = self.tensor(name + ".weight_scale")
        size = math.prod(tensor.shape)
        if tensor.type not in _FLOATS or size not in (1, m):
            raise self.error(f"{tensor.name} is {tensor.type} {tensor.shape}, not one number")
        values = dequantize(tensor.type, tensor.data.reshape(1, -1), size)[0]
        if not (np.isfinite(values).all() and (values != 0).all()):
            raise self.error(f"{tensor.name} is zero, NaN or infinite; the file is damaged")
        with np.errstate(over="ignore"):  # an infinite reciprocal is refused when the scale is used
            factor: Floats = values if self.quantization.multiplies else np.float32(1) / values
            return factor


def _packed(tensor: StoredTensor, m: int, scale: Floats) -> TernaryMatrix:
    quarter, k = tensor.shape
    data = tensor.data.reshape(quarter, k)

    def decode(begin: int, end: int) -> Ternary:
        out = np.empty((end - begin, k), np.uint8)
        for i in range(4):
            low, high = max(begin, i * quarter), min(end, (i + 1) * quarter)
            if low < high:
                out[low - begin : high - begin] = data[low - i * quarter : high - i * quarter] >> 2 * i & 3
        if (out == 3).any():
            raise FileError(f"{tensor.name} holds codes that are not ternary; the file is damaged")
        out -= 1
        return out.view(np.int8)

    return TernaryMatrix(tensor.name, Shape(m, k), decode, lambda: scale)


def _master(tensor: StoredTensor, m: int, k: int) -> TernaryMatrix:
    """Latent weights: w = round(clamp(W / mean|W|, -1, 1)), scale mean|W|, the mean at least 1e-5."""
    data = tensor.data.reshape(m, k * DENSE[tensor.type].block_bytes)
    mean: list[float] = []  # found once, by whoever asks first

    def find_mean() -> float:
        if not mean:
            mean.append(_mean_of(tensor.name, tensor.type, data, k))
        return mean[0]

    def decode(begin: int, end: int) -> Ternary:
        return absmean(dequantize(tensor.type, data[begin:end], k), find_mean())

    def find_scale() -> Floats:
        # As BitLinear computes it: one over the inverse it multiplied the weights with.
        return np.float32(1) / (np.float32(1) / np.array([find_mean()], np.float32))

    return TernaryMatrix(tensor.name, Shape(m, k), decode, find_scale)


def _mean_of(name: str, kind: str, data: Bytes, k: int) -> float:
    """mean|W|, summed in double, at least 1e-5."""
    step = max(1, _CHUNK_VALUES // k)
    total = 0.0
    for begin in range(0, len(data), step):
        values = dequantize(kind, data[begin : begin + step], k)
        total += float(np.abs(values).sum(dtype=np.float64))
    mean = total / (len(data) * k)
    if not math.isfinite(mean):
        raise FileError(f"{name} holds NaN or infinity; the file is damaged")
    return max(mean, _ABSMEAN_FLOOR)


def hf_weights(checkpoint: _Checkpoint, config: ModelConfig) -> Weights:
    embedding = checkpoint.dense("model.embed_tokens.weight", config.vocab, config.hidden)
    head = None
    if not config.tied_head:
        head = checkpoint.dense("lm_head.weight", config.vocab, config.hidden)
    checkpoint.used.add("lm_head.weight")  # stored again by some checkpoints that tie it
    final = checkpoint.vector("model.norm.weight", config.hidden)
    layers = tuple(_layer(checkpoint, config, i) for i in range(config.layers))
    extra = [n for n in checkpoint.tensors if n not in checkpoint.used and not n.endswith(_IGNORED)]
    if extra:
        raise checkpoint.error(
            f"the tensor {extra[0][:100]!r} ({len(extra)} such) belongs to no {config.architecture} model "
            "that bitgen runs (biases and experts are not supported)"
        )
    return Weights(config, embedding, head, final, layers)


def _layer(checkpoint: _Checkpoint, config: ModelConfig, index: int) -> LayerWeights:
    prefix = f"model.layers.{index}."

    def matrix(name: str, m: int, k: int) -> TernaryMatrix:
        return checkpoint.ternary(prefix + name, m, k)

    def sub_norm(names: tuple[str, ...], size: int) -> Floats | None:
        if not config.sub_norms:
            return None
        name = next((n for n in names if f"{prefix}{n}.weight" in checkpoint.tensors), names[0])
        return checkpoint.vector(f"{prefix}{name}.weight", size)

    hidden, ffn, q_rows, kv_rows = config.hidden, config.ffn, config.q_rows, config.kv_rows
    attention = [
        matrix(f"self_attn.{x}_proj", m, hidden) for x, m in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
    ]
    return LayerWeights(
        qkv=TernaryMatrix.stack(attention),
        o=matrix("self_attn.o_proj", hidden, q_rows),
        gate_up=TernaryMatrix.stack(
            [matrix("mlp.gate_proj", ffn, hidden), matrix("mlp.up_proj", ffn, hidden)]
        ),
        down=matrix("mlp.down_proj", hidden, ffn),
        attn_norm=checkpoint.vector(prefix + "input_layernorm.weight", hidden),
        ffn_norm=checkpoint.vector(prefix + "post_attention_layernorm.weight", hidden),
        attn_sub_norm=sub_norm(_ATTN_SUB_NORM, q_rows),
        ffn_sub_norm=sub_norm(_FFN_SUB_NORM, ffn),
    )


def open_folder(folder: Path) -> ModelFile:
    """FileError when the folder holds no whole model of a supported kind."""
    data = read_json(folder / "config.json")
    tensors = read_folder(folder)
    config = hf_config(folder, data, tensors)
    quantization = quantization_of(data, config.architecture, str(folder / "config.json"))
    weights = hf_weights(_Checkpoint(folder, tensors, quantization, set()), config)
    files = (
        [folder / SINGLE]
        if (folder / SINGLE).is_file()
        else [folder / INDEX, *sorted(folder.glob("*.safetensors"))]
    )
    listing = "\n".join(f"{t.name} {t.type} {t.shape}" for t in tensors.values())
    read_tokenizer: Callable[[], TokenizerData] = partial(hf_tokenizer, folder, data)
    return ModelFile(
        path=folder,
        container="safetensors",
        config=config,
        weights=weights,
        metadata=data,
        tensors=tuple(TensorSummary(t.name, t.type, t.shape, t.data.size) for t in tensors.values()),
        fingerprint=fingerprint_of(
            [folder / "config.json", *files], [(folder / "config.json").read_bytes(), listing.encode()]
        ),
        read_tokenizer=read_tokenizer,
    )
