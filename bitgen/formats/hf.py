"""A Hugging Face folder as a model: config.json, safetensors, tokenizer.json.

Three kinds of matrices: packed (uint8, four rows in a byte, `weight_scale`), NVFP4 (hf_nvfp4.py) and floats.
Floats of a BitNet checkpoint are master weights, quantised by absmean here as its layers do; floats of any
other checkpoint must be ternary values already.

packed  byte[r, c] = sum over i of (w[i R + r, c] + 1) << 2 i, R = ceil(m / 4)
scale   y is divided by weight_scale for `bitlinear` (the default), multiplied for `autobitlinear`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.families.base import TERNARY
from bitgen.formats.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    FINAL_NORM,
    HF_LAYER,
    LM_HEAD,
    Architecture,
    Tensor,
    file_config,
    hf_classes,
    stored_in_hf,
)
from bitgen.formats.config import Activation, Floats, ModelConfig, check_head_dim, printable
from bitgen.formats.hf_nvfp4 import KIND, METHODS, Nvfp4, check_factor, nvfp4_matrix, nvfp4_of
from bitgen.formats.hf_tokenizer import hf_tokenizer
from bitgen.formats.matrices import master_matrix, packed_matrix, ternary_head, ternary_matrix
from bitgen.formats.model_file import ModelFile, TensorSummary, fingerprint_of
from bitgen.formats.quants import dequantize
from bitgen.formats.rope import Yarn, llama3_divisors
from bitgen.formats.safetensors import INDEX, SINGLE, StoredTensor, read_folder
from bitgen.formats.scalars import Scalars
from bitgen.formats.source import Settings, read_json, short
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.weights import DenseMatrix, LayerWeights, Weights
from bitgen.spec import Shape, WeightKind
from bitgen.tokenizer.data import TokenizerData

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_FLOATS = ("f32", "f16", "bf16")
_IGNORED = ("rotary_emb.inv_freq",)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_HF_WINDOW = 4096  # where config.json does not say it, as in transformers


# ---- config.json ---------------------------------------------------------------


def hf_config(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> ModelConfig:
    """config.json as a ModelConfig. FileError names what is missing or not supported."""
    settings = Settings(folder / "config.json", data)
    architecture = _architecture(settings, tensors)
    hidden, heads = settings.integer("hidden_size"), settings.integer("num_attention_heads")
    if heads < 1:
        raise settings.error("num_attention_heads", f"is {heads}")
    head_dim = check_head_dim(settings.integer("head_dim", hidden // heads), str(settings.where))
    act = settings.get("hidden_act") or architecture.activation
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise settings.error("hidden_act", f"is {short(act)}; silu and relu2 are supported")
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            raise settings.error(key, "is set: biases are not supported")
    context = settings.integer("max_position_embeddings")
    tied = settings.get("tie_word_embeddings")
    no_head = f"{LM_HEAD.hf[0]}.weight" not in tensors
    quantization = settings.section("quantization_config")
    # BitLinear layers round the activations of a token with one scale.
    kind = WeightKind(TERNARY, 0 if quantization.get("quant_method") else architecture.group)
    if nvfp4_of(quantization, folder):
        kind = KIND
    return file_config(
        settings.where,
        architecture,
        kind,
        hidden=hidden,
        ffn=settings.integer("intermediate_size"),
        layers=settings.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=settings.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab=settings.integer("vocab_size"),
        context=context,
        activation=_ACTIVATIONS[act],
        norm_eps=_scalars(settings, architecture).eps(settings.number("rms_norm_eps")),
        # A model of vectors is mostly stored without a head, whatever its config.json says.
        tied_head=no_head if tied is None else bool(tied) or (no_head and architecture.last_token),
        name=printable(str(data.get("_name_or_path") or folder.resolve().name)[:200]),
        windows=_windows(settings, data, architecture, len(tensors)),
        **_rope(settings, head_dim, architecture.hf_rope_theta),
    )


def _windows(
    settings: Settings, data: Mapping[str, Any], architecture: Architecture, tensors: int
) -> tuple[int, ...]:
    """The window of each layer, as a ModelConfig has them; () where none ends before the context.

    ``tensors``: how many there are, which bounds the layers; what is missing is named later.
    """
    sliding, names = architecture.hf_sliding, data.get("architectures") or ("",)
    full = sliding.get(names[0])
    if data.get("sliding_window", _HF_WINDOW) is None or not (
        full == 0 or settings.get("use_sliding_window")
    ):
        return ()
    window = settings.integer("sliding_window", _HF_WINDOW)
    if not 0 < window < settings.integer("max_position_embeddings"):
        return ()
    if full is None:
        raise settings.error("use_sliding_window", f"is set, and {names[0]} has no attention to a window")
    layers, kinds = settings.integer("num_hidden_layers"), settings.get("layer_types")
    if layers > tensors:
        return ()
    if kinds is None:
        full = settings.integer("max_window_layers", full) if full else 0
        kinds = [_LAYER_TYPES[i >= full] for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise settings.error("layer_types", f"is not {layers} of {' and '.join(_LAYER_TYPES)}")
    found = tuple(window * _LAYER_TYPES.index(kind) for kind in kinds)
    return found if any(found) else ()


def _scalars(settings: Settings, architecture: Architecture) -> Scalars:
    """What is folded into the weights; nothing of most architectures."""
    if not architecture.runs_as:
        return Scalars()
    return Scalars.of_hf(settings, settings.integer("hidden_size"), settings.integer("num_hidden_layers"))


def _architecture(settings: Settings, tensors: Container[str]) -> Architecture:
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = stored_in_hf(name, tensors) if isinstance(name, str) else None
    if found is None:
        raise settings.error("architectures", f"is {names!r:.60}; bitgen runs {', '.join(hf_classes())}")
    return found


def _rope(settings: Settings, head_dim: int, default: float) -> dict[str, Any]:
    """rope_theta and what scales RoPE, of a ModelConfig: from rope_parameters, or the older rope_scaling."""
    rope = settings.section("rope_parameters" if settings.get("rope_parameters") else "rope_scaling")
    theta = rope.number("rope_theta", settings.number("rope_theta", default))
    kind = rope.get("rope_type") or rope.get("type") or "default"

    def original() -> int:
        context = settings.integer("max_position_embeddings")
        return int(rope.number("original_max_position_embeddings", float(context)))

    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        factors = (float(np.float32(rope.number("factor"))),) * (head_dim // 2)
        return {"rope_theta": theta, "rope_factors": factors}
    if kind == "llama3":
        scale, low, high = (rope.number(f) for f in ("factor", "low_freq_factor", "high_freq_factor"))
        divisors = llama3_divisors(theta, head_dim, scale, low, high, original())
        return {"rope_theta": theta, "rope_factors": tuple(divisors.tolist())}
    if kind == "yarn":
        odd = [key for key in ("mscale", "mscale_all_dim") if rope.get(key)]
        odd += ["truncate"] if rope.get("truncate") is False else []
        if odd:
            raise rope.error(odd[0], f"is {rope.get(odd[0])}, which is not supported")
        attention = rope.number("attention_factor", 0.0) or None
        fast, slow = rope.number("beta_fast", 32.0), rope.number("beta_slow", 1.0)
        try:
            yarn = Yarn(rope.number("factor"), original(), fast, slow, attention)
        except BitgenError as error:
            raise FileError(f"{rope.where}: {error.message}") from None
        return {"rope_theta": theta, "yarn": yarn}
    if kind == "longrope" and rope.raw("short_factor") == rope.raw("long_factor"):
        return {"rope_theta": theta, "rope_factors": _longrope(rope, head_dim, original())}
    known = "default, linear, llama3, yarn, and longrope with equal factors"
    raise rope.error("rope_type", f"is {str(kind)[:40]!r}; {known} are supported")


def _longrope(rope: Settings, head_dim: int, original: int) -> tuple[float, ...]:
    """The factors of short texts, where those of long ones are the same. FileError: they scale more."""
    values = rope.raw("short_factor")
    if not (isinstance(values, list) and all(isinstance(v, (int, float)) for v in values)):
        raise rope.error("short_factor", "is no list of numbers")
    if len(values) != head_dim // 2:
        raise rope.error("short_factor", f"has {len(values)} numbers, not {head_dim // 2}")
    factor = rope.number("factor", 1.0)
    if rope.number("attention_factor", 1.0) != 1 or factor != 1:
        raise rope.error("factor", f"is {factor:g} over {original} positions, which is not supported")
    return tuple(float(np.float32(value)) for value in values)


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's matrices are stored, from quantization_config."""

    master_weights: bool  # floats of matrices are what training updates
    multiplies: bool  # y * weight_scale; else y / weight_scale
    nvfp4: Nvfp4 | None = None  # none of BitLinear, then


def quantization_of(data: Mapping[str, Any], architecture: Architecture, where: Path) -> Quantization:
    settings = Settings(where, data).section("quantization_config")
    method = settings.get("quant_method")
    if found := nvfp4_of(settings, where.parent):
        return Quantization(False, False, found)
    if method not in (None, "bitnet"):
        raise settings.error(
            "quant_method", f"is {short(method)}; bitnet, {' and '.join(METHODS)} (NVFP4) are supported"
        )
    if settings.get("use_rms_norm"):
        raise settings.error("use_rms_norm", "is set: a norm inside each linear layer is not supported")
    linear = settings.get("linear_class") or "bitlinear"
    if linear not in ("bitlinear", "autobitlinear"):
        raise settings.error("linear_class", f"is {short(linear)}; bitlinear and autobitlinear are known")
    kept = settings.get("modules_to_not_convert")
    odd = [str(name) for name in kept if "lm_head" not in str(name)] if isinstance(kept, list) else []
    if odd:
        raise settings.error(
            "modules_to_not_convert", f"names {short(odd[0])}; only lm_head may be no BitLinear"
        )
    return Quantization(method == "bitnet" or architecture.master_weights, linear == "autobitlinear")


# ---- Tensors -------------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    """The tensors of a folder and what is needed to read them."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    quantization: Quantization
    used: set[str]
    scalars: Scalars

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

    def nvfp4(self, name: str, m: int, k: int, names: Nvfp4) -> TernaryMatrix:
        if f"{name}.{names.codes}" not in self.tensors and f"{name}.weight" in self.tensors:
            raise self.error(
                f"{name}.weight is {self.tensors[name + '.weight'].type}; bitgen runs models whose matrices "
                "are all NVFP4, or none"
            )
        codes, scales, factor = (
            self.tensor(f"{name}.{one}") for one in (names.codes, "weight_scale", names.factor)
        )
        for tensor, kind, shape in ((codes, "u8", (m, k // 2)), (scales, "f8_e4m3", (m, k // KIND.group))):
            if (tensor.type, tensor.shape) != (kind, shape) or k % KIND.group:
                raise self.error(
                    f"{tensor.name} is {tensor.type} {tensor.shape}; of NVFP4, {m}x{k}, bitgen reads {kind} "
                    f"{shape}"
                )
        self.used.update(f"{name}.{one}" for one in names.unread)
        if factor.type != "f32" or math.prod(factor.shape) != 1:
            raise self.error(f"{factor.name} is {factor.type} {factor.shape}, not one number of f32")
        return nvfp4_matrix(
            codes.name,
            Shape(m, k),
            codes.data.reshape(codes.shape),
            scales.data.reshape(scales.shape),
            check_factor(factor.name, dequantize("f32", factor.data.reshape(1, -1), 1)[0]),
            divides=names.divides,
        )

    def matrix(self, name: str, m: int, k: int) -> TernaryMatrix:
        names = self.quantization.nvfp4
        return self.ternary(name, m, k) if names is None else self.nvfp4(name, m, k, names)

    def ternary(self, name: str, m: int, k: int) -> TernaryMatrix:
        tensor = self.tensor(name + ".weight")
        quarter = -(-m // 4)
        if tensor.type == "u8" and tensor.shape == (quarter, k):
            return packed_matrix(tensor.name, m, tensor.data.reshape(quarter, k), self._weight_scale(name, m))
        if tensor.type not in _FLOATS or tensor.shape != (m, k):
            raise self.error(
                f"{tensor.name} is {tensor.type} {tensor.shape}; bitgen reads uint8 {(quarter, k)} (packed) "
                f"or {', '.join(_FLOATS)} {(m, k)} there"
            )
        if name + ".weight_scale" in self.tensors:  # unpacked, but quantised offline
            matrix = ternary_matrix(tensor.name, tensor.type, (m, k), tensor.data)
            return matrix.scaled(self._weight_scale(name, m))
        if not self.quantization.master_weights:
            return ternary_matrix(tensor.name, tensor.type, (m, k), tensor.data)
        return master_matrix(tensor.name, tensor.type, tensor.data.reshape(m, -1), k)

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


def hf_weights(checkpoint: _Checkpoint, config: ModelConfig) -> Weights:
    embedding, output = (f"{tensor.hf[0]}.weight" for tensor in (EMBEDDING, LM_HEAD))
    size = (config.vocab, config.hidden)
    table = checkpoint.dense(embedding, *size)
    lm_head = None if config.tied_head else checkpoint.dense(output, *size)
    checkpoint.used.add(output)  # stored again by some checkpoints that tie it
    scalars = checkpoint.scalars
    final = scalars.final(checkpoint.vector(f"{FINAL_NORM.hf[0]}.weight", config.hidden))
    layers = tuple(_layer(checkpoint, config, i) for i in range(config.layers))
    extra = [n for n in checkpoint.tensors if n not in checkpoint.used and not n.endswith(_IGNORED)]
    if extra:
        raise checkpoint.error(
            f"the tensor {extra[0][:100]!r} ({len(extra)} such) belongs to no {config.architecture} model "
            "that bitgen runs (biases and experts are not supported)"
        )
    head = table if lm_head is None else lm_head
    groups = config.group if config.weights == TERNARY else 0
    return Weights(config, table, lm_head, final, layers, ternary_head(head, groups))


def _layer(checkpoint: _Checkpoint, config: ModelConfig, index: int) -> LayerWeights:
    prefix = HF_LAYER.format(index)
    architecture = ARCHITECTURES[config.architecture]

    def name(tensor: Tensor) -> str:
        """The first of its names that the checkpoint has."""
        names, codes = [prefix + each for each in tensor.hf], checkpoint.quantization.nvfp4
        ends = ("weight",) if codes is None else ("weight", codes.codes)
        stored = (each for each in names if any(f"{each}.{end}" in checkpoint.tensors for end in ends))
        return next(stored, names[0])

    matrices = {
        role: checkpoint.matrix(name(tensor), *tensor.shape(config))
        for role, tensor in architecture.matrices.items()
    }
    norms = {
        field: checkpoint.vector(f"{name(tensor)}.weight", *tensor.shape(config))
        for field, tensor in architecture.norms.items()
    }
    return LayerWeights.of(checkpoint.scalars.matrices(matrices), norms)


def _as_with_head(tensors: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """By the names of a model with a head: without one (Qwen3Model) they come without `model.`."""
    prefix, _, name = EMBEDDING.hf[0].partition(".")
    if f"{name}.weight" not in tensors:
        return tensors
    head = f"{LM_HEAD.hf[0]}."
    return {key if key.startswith(head) else f"{prefix}.{key}": one for key, one in tensors.items()}


def open_folder(folder: Path) -> ModelFile:
    """FileError when the folder holds no whole model of a supported kind."""
    data = read_json(folder / "config.json")
    tensors = _as_with_head(read_folder(folder))
    config = hf_config(folder, data, tensors)
    settings = Settings(folder / "config.json", data)
    architecture = _architecture(settings, tensors)
    quantization = quantization_of(data, architecture, folder / "config.json")
    scalars = _scalars(settings, architecture)
    weights = hf_weights(_Checkpoint(folder, tensors, quantization, set(), scalars), config)
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
        config=weights.config,
        weights=weights,
        metadata=data,
        tensors=tuple(TensorSummary(t.name, t.type, t.shape, t.data.size) for t in tensors.values()),
        fingerprint=fingerprint_of(
            [folder / "config.json", *files], [(folder / "config.json").read_bytes(), listing.encode()]
        ),
        read_tokenizer=read_tokenizer,
    )
