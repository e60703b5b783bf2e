"""A GGUF file as a model: its metadata as a ModelConfig, its tensors as Weights.

Names are those of llama.cpp, bitnet.cpp and ik_llama.cpp, which agree. The ternary matrices may be I2_S,
TQ1_0, TQ2_0, or ternary values in F32, F16, BF16, Q8_0; a scalar tensor `NAME.scale` multiplies the output of
the matrix `NAME.weight` (llama.cpp keeps a scale there that its block formats would round to f16).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.errors import BitgenError, FileError
from bitgen.formats.config import Activation, Floats, ModelConfig, check_head_dim, printable
from bitgen.formats.gguf import GgufFile, TensorInfo
from bitgen.formats.quants import (
    BY_ID,
    DENSE,
    I2_S_BLOCK,
    TERNARY,
    Bytes,
    block_scales,
    decode_i2_s,
    decode_tq,
    dequantize,
    ternary_of_floats,
)
from bitgen.formats.weights import DenseMatrix, LayerWeights, Ternary, TernaryMatrix, Weights
from bitgen.spec import Shape
from bitgen.tokenizer.data import TokenizerData

# Values decoded at once while a whole matrix is read for its scales: 4 MB of float32.
_CHUNK_VALUES = 1 << 20

FLOATS_OF_TERNARY = ("f32", "f16", "bf16", "q8_0")
TERNARY_TYPES = ("i2_s", "tq1_0", "tq2_0", *FLOATS_OF_TERNARY)
HEAD_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0", "q4_1")
EMBEDDING_TYPES = (*HEAD_TYPES, "q4_k")  # gathered row by row here, so that any type dequantize knows will do
_VECTOR_TYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture's name implies and its metadata does not say."""

    name: str
    activation: Activation
    sub_norms: bool
    interleaved: bool  # rows of q and k are stored for RoPE over (x[2i], x[2i + 1])


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("bitnet", "silu", sub_norms=True, interleaved=False),
        Architecture("bitnet-25", "relu2", sub_norms=True, interleaved=False),
        Architecture("bitnet-b1.58", "relu2", sub_norms=True, interleaved=False),
        Architecture("llama", "silu", sub_norms=False, interleaved=True),
    )
}

# Matrices of a block: name in the file, rows and columns.
_MATRICES: Mapping[str, Callable[[ModelConfig], tuple[int, int]]] = {
    "attn_q": lambda c: (c.q_rows, c.hidden),
    "attn_k": lambda c: (c.kv_rows, c.hidden),
    "attn_v": lambda c: (c.kv_rows, c.hidden),
    "attn_output": lambda c: (c.hidden, c.q_rows),
    "ffn_gate": lambda c: (c.ffn, c.hidden),
    "ffn_up": lambda c: (c.ffn, c.hidden),
    "ffn_down": lambda c: (c.hidden, c.ffn),
}
# Tensors that carry no weights: tables of RoPE that old converters stored.
_IGNORED = ("attn_rot_embd.weight", "attention.rotary_emb.inv_freq")


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


# ---- Metadata ------------------------------------------------------------------


class _Keys:
    """Typed look-ups of metadata; every error names file and key."""

    def __init__(self, file: GgufFile, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    def error(self, key: str, what: str) -> BitgenError:
        return FileError(f"{self._file.path}: {self._prefix}{key} {what}")

    def get(self, key: str) -> Any:
        """The value, None where there is none. An array of equal numbers (one a layer) counts as one."""
        value = self._file.metadata.get(self._prefix + key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            return value[0].item()
        return value

    def array(self, key: str) -> Any:
        """The value as it is, arrays too."""
        return self._file.metadata.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(
                key, "is missing" if value is None else f"is {_short(value)}, not one whole number"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(key, "is missing" if value is None else f"is {_short(value)}, not a number")
        return float(value)

    def text(self, key: str, default: str = "") -> str:
        value = self.get(key)
        return value if isinstance(value, str) else default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def architecture_of(file: GgufFile) -> Architecture:
    """FileError that names the architecture found and those supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FileError(f"{file.path}: general.architecture is missing; this is no model file")
    if name not in ARCHITECTURES:
        raise FileError(
            f"{file.path}: the architecture {_short(name)} is not supported; bitgen runs "
            f"{', '.join(ARCHITECTURES)} with ternary matrices",
        )
    return ARCHITECTURES[name]


def gguf_config(file: GgufFile) -> ModelConfig:
    """The hyperparameters. FileError names what is missing or not supported."""
    arch = architecture_of(file)
    keys = _Keys(file, arch.name + ".")
    if keys.integer("expert_count", 0):
        raise keys.error("expert_count", "is not 0: mixtures of experts are not supported")
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    if heads < 1:
        raise keys.error("attention.head_count", f"is {heads}")
    head_dim = check_head_dim(keys.integer("attention.key_length", hidden // heads), str(file.path))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(key, f"is {keys.get(key)} with heads of {head_dim}, which is not supported")
    embedding = _tensor(file, "token_embd.weight")
    if len(embedding.shape) != 2:
        raise FileError(f"{file.path}: token_embd.weight has the shape {embedding.shape}")
    return ModelConfig(
        architecture=arch.name,
        hidden=hidden,
        ffn=keys.integer("feed_forward_length"),
        layers=keys.integer("block_count"),
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=embedding.shape[0],
        context=keys.integer("context_length"),
        rope_theta=keys.number("rope.freq_base", 10000.0),
        activation=arch.activation,
        sub_norms=arch.sub_norms,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in file.tensors,
        name=printable(_Keys(file, "general.").text("name")[:200]),
        rope_factors=_rope_factors(file, keys, head_dim),
    )


def _rope_factors(file: GgufFile, keys: _Keys, head_dim: int) -> Floats | None:
    """The divisors of the RoPE frequencies: a tensor (Llama 3.1), times a linear factor."""
    half = head_dim // 2
    factors = np.ones(half, np.float32)
    if "rope_freqs.weight" in file.tensors:
        factors = _vector(file, "rope_freqs.weight", half)
    scaling = keys.text("rope.scaling.type", "none")
    linear = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if scaling == "linear" or (scaling == "none" and keys.get("rope.scale_linear") is not None):
        # GGUF readers treat 0 as "not set".
        factors = factors * np.float32(linear or 1.0)
    elif scaling != "none":
        raise keys.error("rope.scaling.type", f"is {_short(scaling)}; none and linear are supported")
    return None if (factors == 1).all() else factors


# ---- Tensors -------------------------------------------------------------------


def _tensor(file: GgufFile, name: str) -> TensorInfo:
    if name not in file.tensors:
        raise FileError(f"{file.path}: the tensor {name} is missing; the file is not whole")
    return file.tensors[name]


def _check_shape(file: GgufFile, info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise FileError(
            f"{file.path}: the tensor {info.name} has the shape {_by(info.shape)}; "
            f"the metadata says {_by(shape)}",
        )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _vector(file: GgufFile, name: str, size: int) -> Floats:
    """A short tensor of floats, decoded: float32 (size), finite."""
    info = _tensor(file, name)
    _check_shape(file, info, (size,))
    if info.type not in _VECTOR_TYPES:
        raise _unsupported(file, info, _VECTOR_TYPES)
    values: Floats = dequantize(info.type, file.bytes_of(info).reshape(1, -1), size)[0]
    if not np.isfinite(values).all():
        raise FileError(f"{file.path}: {name} holds NaN or infinity; the file is damaged")
    return values


def _unsupported(file: GgufFile, info: TensorInfo, supported: tuple[str, ...]) -> BitgenError:
    found = type_name(file, info)
    why = _WHY.get(found, "")
    return FileError(
        f"{file.path}: {info.name} is stored as {found.upper()}{why}; bitgen reads "
        f"{', '.join(t.upper() for t in supported)} there",
    )


_WHY = {
    "tl1": " (a packing for one kernel of bitnet.cpp; use the file's I2_S sister)",
    "tl2": " (a packing for one kernel of bitnet.cpp; use the file's I2_S sister)",
    "q2_0": " (a scale for each group of 128 weights, which is not supported yet)",
    "iq1_bn": " (ik_llama.cpp's own packing; use an I2_S or TQ file of the model)",
    "iq2_bn": " (ik_llama.cpp's own packing; use an I2_S or TQ file of the model)",
    "iq2_bn_r4": " (ik_llama.cpp's own packing; use an I2_S or TQ file of the model)",
}


def type_name(file: GgufFile, info: TensorInfo) -> str:
    """The type of a tensor; id 39 is TL2 in files of bitnet.cpp and MXFP4 everywhere else.

    bitnet.cpp calls its file type 39 or writes one of its own architectures; llama.cpp's MXFP4 is file type
    38 and never holds these models.
    """
    if info.type_id == BY_ID[39].id:
        file_type = file.metadata.get("general.file_type")
        architecture = file.metadata.get("general.architecture")
        if file_type == 39 or (file_type != 38 and str(architecture).startswith("bitnet")):
            return "tl2"
    return info.type


def _dense(file: GgufFile, name: str, shape: tuple[int, int], types: tuple[str, ...]) -> DenseMatrix:
    info = _tensor(file, name)
    _check_shape(file, info, shape)
    if info.type not in types:
        raise _unsupported(file, info, types)
    data = file.bytes_of(info).reshape(shape[0], DENSE[info.type].row_bytes(shape[1]))
    return DenseMatrix(name, info.type, shape, data)


def _ternary(file: GgufFile, name: str, shape: tuple[int, int]) -> TernaryMatrix:
    """`NAME.weight`, times the scalar `NAME.scale` where there is one."""
    info = _tensor(file, name + ".weight")
    _check_shape(file, info, shape)
    if info.type == "i2_s":
        matrix = _i2_s(file, info)
    elif info.type in TERNARY:
        matrix = _tq(file, info)
    elif info.type in FLOATS_OF_TERNARY:
        data = file.bytes_of(info).reshape(shape[0], DENSE[info.type].row_bytes(shape[1]))
        matrix = float_matrix(info.name, info.type, data, shape[1])
    else:
        raise _unsupported(file, info, TERNARY_TYPES)
    if name + ".scale" in file.tensors:
        return matrix.scaled(_vector(file, name + ".scale", 1))
    return matrix


def _i2_s(file: GgufFile, info: TensorInfo) -> TernaryMatrix:
    shape = Shape(info.shape[0], info.shape[1])
    if info.values % I2_S_BLOCK:
        raise FileError(
            f"{file.path}: {info.name} has {shape.name} weights, no whole blocks of {I2_S_BLOCK}: I2_S has "
            "lost the last ones; convert the model to F16 instead",
        )
    data = file.bytes_of(info)
    codes = data[: info.values // 4]
    scale = data[codes.size : codes.size + 4].copy().view("<f4").astype(np.float32)

    def decode(begin: int, end: int) -> Ternary:
        return decode_i2_s(codes, begin * shape.k, end * shape.k, info.name).reshape(-1, shape.k)

    return TernaryMatrix(info.name, shape, decode, lambda: scale)


def _tq(file: GgufFile, info: TensorInfo) -> TernaryMatrix:
    shape = Shape(info.shape[0], info.shape[1])
    data = file.bytes_of(info).reshape(shape.m, -1)

    def decode(begin: int, end: int) -> Ternary:
        return decode_tq(info.type, data[begin:end], shape.k, info.name)

    def find_scale() -> Floats:
        scales = by_chunks(shape, lambda b, e: _row_scales(file, info, data[b:e]))
        return common_scale(scales)

    return TernaryMatrix(info.name, shape, decode, find_scale)


def _row_scales(file: GgufFile, info: TensorInfo, data: Bytes) -> Floats:
    """The one non-zero scale of each row's blocks, 0 where there is none: float32 (rows)."""
    scales = block_scales(info.type, data, info.shape[1])
    first = np.take_along_axis(scales, (scales != 0).argmax(axis=1)[:, None], axis=1)
    if not ((scales == 0) | (scales == first)).all():
        raise FileError(
            f"{file.path}: the scales of {info.name} ({info.type.upper()}) differ within a row: one scale "
            "for each group of 256 weights is not supported; bitgen needs one a tensor or one a row",
        )
    return first[:, 0]


def float_matrix(name: str, kind: str, data: Bytes, cols: int) -> TernaryMatrix:
    """Ternary values stored as floats, data uint8 (rows, row_bytes)."""
    shape = Shape(len(data), cols)

    def decode(begin: int, end: int) -> Ternary:
        return ternary_of_floats(kind, data[begin:end], cols, name)[0]

    def find_scale() -> Floats:
        return common_scale(by_chunks(shape, lambda b, e: ternary_of_floats(kind, data[b:e], cols, name)[1]))

    return TernaryMatrix(name, shape, decode, find_scale)


def by_chunks(shape: Shape, scales_of: Callable[[int, int], Floats]) -> Floats:
    """``scales_of`` blocks of rows of bounded size, concatenated: float32 (m)."""
    step = max(1, _CHUNK_VALUES // shape.k)
    return np.concatenate([scales_of(b, min(b + step, shape.m)) for b in range(0, shape.m, step)])


def common_scale(scales: Floats) -> Floats:
    """(1,) where all rows that are not zero share their scale, else (m,)."""
    live = scales[scales != 0]
    if live.size == 0:
        return np.zeros(1, np.float32)
    return live[:1] if (live == live[0]).all() else scales


def gguf_weights(file: GgufFile, config: ModelConfig) -> Weights:
    """All tensors of the model. FileError names the first that is missing, extra or wrong."""
    used = {"rope_freqs.weight"}
    embedding = _dense(file, "token_embd.weight", (config.vocab, config.hidden), EMBEDDING_TYPES)
    head = None
    if not config.tied_head:
        head = _dense(file, "output.weight", (config.vocab, config.hidden), HEAD_TYPES)
    elif embedding.type not in HEAD_TYPES:
        raise _unsupported(file, _tensor(file, "token_embd.weight"), HEAD_TYPES)
    used |= {"token_embd.weight", "output.weight", "output_norm.weight"}
    layers = tuple(_layer(file, config, i, used) for i in range(config.layers))
    extra = [name for name in file.tensors if name not in used and not name.endswith(_IGNORED)]
    if extra:
        raise FileError(
            f"{file.path}: the tensor {_short(extra[0])} ({len(extra)} such) belongs to no "
            f"{config.architecture} model that bitgen runs (biases and experts are not supported)",
        )
    return Weights(config, embedding, head, _vector(file, "output_norm.weight", config.hidden), layers)


def _layer(file: GgufFile, config: ModelConfig, index: int, used: set[str]) -> LayerWeights:
    prefix = f"blk.{index}."
    m: dict[str, TernaryMatrix] = {}
    for name, shape in _MATRICES.items():
        m[name] = _ternary(file, prefix + name, shape(config))
        used |= {f"{prefix}{name}.weight", f"{prefix}{name}.scale"}
    if ARCHITECTURES[config.architecture].interleaved:
        m["attn_q"] = m["attn_q"].reordered(interleaved_to_half(config.heads, config.head_dim))
        m["attn_k"] = m["attn_k"].reordered(interleaved_to_half(config.kv_heads, config.head_dim))

    def norm(name: str, size: int) -> Floats:
        used.add(f"{prefix}{name}.weight")
        return _vector(file, f"{prefix}{name}.weight", size)

    return LayerWeights(
        qkv=TernaryMatrix.stack([m["attn_q"], m["attn_k"], m["attn_v"]]),
        o=m["attn_output"],
        gate_up=TernaryMatrix.stack([m["ffn_gate"], m["ffn_up"]]),
        down=m["ffn_down"],
        attn_norm=norm("attn_norm", config.hidden),
        ffn_norm=norm("ffn_norm", config.hidden),
        attn_sub_norm=norm("attn_sub_norm", config.q_rows) if config.sub_norms else None,
        ffn_sub_norm=norm("ffn_sub_norm", config.ffn) if config.sub_norms else None,
    )


# ---- Tokenizer -----------------------------------------------------------------


def gguf_tokenizer(file: GgufFile) -> TokenizerData:
    """The tokenizer's metadata. FileError when a field is of the wrong type or length."""
    keys = _Keys(file, "tokenizer.")
    tokens = _array(keys, "ggml.tokens", tuple)
    types = _array(keys, "ggml.token_type", np.ndarray)
    scores = _array(keys, "ggml.scores", np.ndarray)
    for key, array in (("ggml.token_type", types), ("ggml.scores", scores)):
        if array is not None and len(array) != len(tokens or ()):
            raise keys.error(key, f"has {len(array)} elements for {len(tokens or ())} tokens")
    ids = {name: _token_id(keys, f"ggml.{name}_token_id", len(tokens or ())) for name in _TOKEN_IDS}
    return TokenizerData(
        json=keys.text("huggingface.json") or None,
        model=keys.text("ggml.model"),
        pre=keys.text("ggml.pre"),
        tokens=tokens or (),
        scores=None if scores is None else scores.astype(np.float32),
        types=None if types is None else types.astype(np.int32),
        merges=_array(keys, "ggml.merges", tuple) or (),
        bos=ids["bos"],
        eos=ids["eos"],
        eot=ids["eot"],
        unknown=ids["unknown"],
        pad=ids["padding"],
        end_ids=tuple(dict.fromkeys(i for i in (ids["eos"], ids["eot"], ids["eom"]) if i is not None)),
        add_bos=_flag(keys, "ggml.add_bos_token"),
        add_eos=_flag(keys, "ggml.add_eos_token"),
        add_space_prefix=_flag(keys, "ggml.add_space_prefix"),
        chat_template=keys.text("chat_template") or None,
    )


_TOKEN_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding")


def _array(keys: _Keys, key: str, kind: type) -> Any:
    value = keys.array(key)
    if value is not None and not isinstance(value, kind):
        raise keys.error(key, f"is {_short(value)}, not the array it should be")
    return value


def _token_id(keys: _Keys, key: str, vocab: int) -> int | None:
    value = keys.get(key)
    if value is None or value in (-1, 0xFFFFFFFF):  # both are written for "none"
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < max(vocab, 1):
        raise keys.error(key, f"is {_short(value)}; there are {vocab} tokens")
    return value


def _flag(keys: _Keys, key: str) -> bool | None:
    value = keys.get(key)
    return value if isinstance(value, bool) else None


def read_gguf_model(path: Path | str) -> tuple[GgufFile, ModelConfig, Weights]:
    """Open a file and check that it holds a whole model of a supported architecture."""
    from bitgen.formats.gguf import read_gguf

    file = read_gguf(path)
    config = gguf_config(file)
    return file, config, gguf_weights(file, config)
