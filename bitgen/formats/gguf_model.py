"""The tensors of a GGUF file as Weights.

The ternary matrices may be I2_S, TQ1_0, TQ2_0, or ternary values in F32, F16, BF16, Q8_0; a scalar tensor
`NAME.scale` multiplies the output of the matrix `NAME.weight` (llama.cpp keeps a scale there that its block
formats would round to f16).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitgen.errors import FileError
from bitgen.families.base import TERNARY as TERNARY_WEIGHTS
from bitgen.formats.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    FINAL_NORM,
    GGUF_LAYER,
    LM_HEAD,
    interleaved_to_half,
)
from bitgen.formats.coded import CODED, TWO_BITS, coded_matrix, two_bit_matrix
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.gguf import GgufFile, TensorInfo, read_gguf
from bitgen.formats.gguf_config import architecture_of, gguf_config, scalars_of
from bitgen.formats.gguf_tensors import check_shape, shape_text, tensor_of, type_name, unsupported, vector
from bitgen.formats.matrices import ternary_head, ternary_matrix
from bitgen.formats.model_file import TensorSummary
from bitgen.formats.quants import DENSE, OTHER, Bytes
from bitgen.formats.scalars import Scalars
from bitgen.formats.source import Settings, short
from bitgen.formats.stored_matrix import BINARY, CodedMatrix, TernaryMatrix
from bitgen.formats.table_types import STACKS, TableLayout
from bitgen.formats.ternary import I2_S_BLOCK, TERNARY
from bitgen.formats.weights import DenseMatrix, LayerWeights, Weights

TERNARY_TYPES = ("i2_s", *TERNARY, "f32", "f16", "bf16", "q8_0")
MATRIX_TYPES = (*TERNARY_TYPES, *CODED)
HEAD_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0", "q4_1", *TERNARY)
# Gathered row by row here, so that any type dequantize knows will do.
EMBEDDING_TYPES = (*HEAD_TYPES, "q4_k", "iq4_nl")

# Tensors that carry no weights: tables of RoPE that old converters stored.
_IGNORED = ("attn_rot_embd.weight", "attention.rotary_emb.inv_freq")


def _dense(file: GgufFile, name: str, shape: tuple[int, int], types: tuple[str, ...]) -> DenseMatrix:
    info = tensor_of(file, name)
    check_shape(file, info, shape)
    if info.type not in types:
        raise unsupported(file, info, types)
    kind = DENSE.get(info.type) or TERNARY[info.type]
    data = file.bytes_of(info).reshape(shape[0], kind.row_bytes(shape[1]))
    return DenseMatrix(name, info.type, shape, data)


def _coded_bytes(file: GgufFile, info: TensorInfo, kind: str) -> Bytes:
    """The bytes of a matrix of 4-bit weights; of id 39 the reader of the file knows no size (`type_name`)."""
    if info.size is not None:
        return file.bytes_of(info)
    t = OTHER[kind]
    size = info.shape[0] * t.row_bytes(info.shape[1])
    later = (other.offset for other in file.tensors.values() if other.offset > info.offset)
    if info.offset + size > min(later, default=len(file.data)):
        raise FileError(f"{file.path} is damaged: {info.name} takes {size} bytes and there are fewer")
    return file.data[info.offset : info.offset + size]


def _ternary(file: GgufFile, name: str, shape: tuple[int, ...], as_codes: bool) -> TernaryMatrix:
    """`NAME.weight`, times the scalar `NAME.scale` where there is one; Q2_0 may be read ``as_codes``."""
    info = tensor_of(file, name + ".weight")
    check_shape(file, info, shape)
    kind = type_name(file, info)
    if kind not in MATRIX_TYPES:
        raise unsupported(file, info, MATRIX_TYPES)
    if kind in CODED:
        coded = coded_matrix(info.name, kind, shape, _coded_bytes(file, info, kind))
        return coded.scaled(factor) if (factor := _factor(file, name)) is not None else coded
    if info.type == "i2_s" and info.values % I2_S_BLOCK:
        raise FileError(
            f"{file.path}: {info.name} has {shape[0]}x{shape[1]} weights, no whole blocks of {I2_S_BLOCK}: "
            "I2_S has lost the last ones; convert the model to F16 instead",
        )
    if kind in TWO_BITS and as_codes:
        return two_bit_matrix(info.name, kind, shape, file.bytes_of(info))
    matrix = ternary_matrix(info.name, info.type, shape, file.bytes_of(info), binary=as_codes)
    return matrix if (factor := _factor(file, name)) is None else matrix.scaled(factor)


def _factor(file: GgufFile, name: str) -> Floats | None:
    """What multiplies the output of a matrix, float32 (1,): the scale of all of it, NVFP4's second level."""
    return vector(file, f"{name}.scale", 1) if f"{name}.scale" in file.tensors else None


def gguf_weights(file: GgufFile, config: ModelConfig) -> Weights:
    """All tensors of the model. FileError names the first that is missing, extra or wrong."""
    used = {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
    used |= {f"{t.gguf}.weight" for t in (EMBEDDING, LM_HEAD, FINAL_NORM)}
    size = (config.vocab, config.hidden)
    embedding = _dense(file, f"{EMBEDDING.gguf}.weight", size, EMBEDDING_TYPES)
    lm_head = None
    if not config.tied_head:
        lm_head = _dense(file, f"{LM_HEAD.gguf}.weight", size, HEAD_TYPES)
    elif embedding.type not in HEAD_TYPES:
        raise unsupported(file, tensor_of(file, embedding.name), HEAD_TYPES)
    own = TableLayout.of(file.path, file.metadata)
    arch = architecture_of(file)
    scalars = scalars_of(Settings(file.path, file.metadata, arch.gguf_name + "."), arch)
    read = _Reader(file, config, used, own, scalars)
    layers = tuple(_layer(read, i) for i in range(config.layers))
    extra = [name for name in file.tensors if name not in used and not name.endswith(_IGNORED)]
    if extra:
        raise FileError(
            f"{file.path}: the tensor {short(extra[0])} ({len(extra)} such) belongs to no "
            f"{config.architecture} model that bitgen runs (biases and experts are not supported)",
        )
    final = scalars.final(vector(file, f"{FINAL_NORM.gguf}.weight", config.hidden))
    head = embedding if lm_head is None else lm_head
    binary = config.weights == BINARY
    groups = config.group if binary or config.weights == TERNARY_WEIGHTS else 0
    return Weights(config, embedding, lm_head, final, layers, ternary_head(head, groups, binary=binary))


@dataclass(frozen=True)
class _Reader:
    """What reading a layer needs; ``used`` grows by the names of its tensors."""

    file: GgufFile
    config: ModelConfig
    used: set[str]
    own: TableLayout | None
    scalars: Scalars


def _layer(read: _Reader, index: int) -> LayerWeights:
    file, config, used = read.file, read.config, read.used
    prefix = GGUF_LAYER.format(index)
    architecture = ARCHITECTURES[config.architecture]
    if read.own is not None:
        return _own_layer(read, prefix, read.own)
    matrices: dict[str, TernaryMatrix] = {}
    for role, tensor in architecture.matrices.items():
        name = prefix + tensor.gguf
        matrices[role] = _ternary(file, name, tensor.shape(config), config.weights != TERNARY_WEIGHTS)
        used |= {f"{name}.weight", f"{name}.scale"}
        if file.tensors[f"{name}.weight"].type == "nvfp4":
            used.add(f"{name}.input_scale")  # for activations of 4 bits, which nothing here rounds to
    if architecture.interleaved:
        for role, heads in (("q", config.heads), ("k", config.kv_heads)):
            matrices[role] = matrices[role].reordered(interleaved_to_half(heads, config.head_dim))
    norms = _norms(read, prefix)
    for role, matrix in matrices.items():
        if isinstance(matrix, CodedMatrix):
            matrices[role] = matrix.as_kind(config.weights)
    return LayerWeights.of(read.scalars.matrices(matrices), norms)


def _norms(read: _Reader, prefix: str) -> dict[str, Floats]:
    norms = {}
    for field, tensor in ARCHITECTURES[read.config.architecture].norms.items():
        name = f"{prefix}{tensor.gguf}.weight"
        norms[field] = vector(read.file, name, *tensor.shape(read.config))
        read.used.add(name)
    return norms


def _own_layer(read: _Reader, prefix: str, own: TableLayout) -> LayerWeights:
    """The layer of a file of bitgen's own types: its stacks are tensors."""
    file, config = read.file, read.config
    stacks: dict[str, TernaryMatrix] = {}
    for matmul in config.layer_matmuls:
        name = prefix + STACKS[matmul.role]
        info, tables = tensor_of(file, f"{name}.weight"), tensor_of(file, f"{name}.tables")
        for each in (info, tables):
            if each.type != "i8":
                raise unsupported(file, each, ("i8",))
            if len(each.shape) != 2:
                raise FileError(
                    f"{file.path}: {each.name} has the shape {shape_text(each.shape)}, not two sizes"
                )
        check_shape(file, info, own.shape(matmul.m, matmul.k))
        values = file.bytes_of(tables).reshape(tables.shape).view(np.int8)
        try:
            stacks[matmul.role] = own.matrix(info.name, matmul.shape, file.bytes_of(info), values)
        except FileError as error:
            raise FileError(f"{file.path}: {error.message}") from None
        read.used.update((info.name, tables.name))
    return LayerWeights(**{**read.scalars.matrices(stacks), **_norms(read, prefix)})  # type: ignore[arg-type]


def tensor_summaries(file: GgufFile, config: ModelConfig) -> tuple[TensorSummary, ...]:
    """The tensors as `bitgen inspect` lists them: those of bitgen's own types as the matrices they are."""
    own = TableLayout.of(file.path, file.metadata)
    matrices = {} if own is None else {STACKS[one.role]: (one.m, one.k) for one in config.layer_matmuls}

    def summary(info: TensorInfo) -> TensorSummary:
        shape = matrices.get(info.name.removesuffix(".weight").rpartition(".")[2])
        if own is None or shape is None or not info.name.endswith(".weight"):
            return TensorSummary(info.name, type_name(file, info), info.shape, info.size)
        return TensorSummary(info.name, own.type, shape, info.size)

    return tuple(summary(info) for info in file.tensors.values())


def _refuse_part(file: GgufFile) -> None:
    """Of a model that `llama-gguf-split` cut only the first part has metadata, and none has all tensors."""
    keys = Settings(file.path, file.metadata, "split.")
    count = keys.integer("count", 1)
    if count > 1:
        raise FileError(
            f"{file.path} is part {keys.integer('no', 0) + 1} of {count} of a model; bitgen reads whole "
            "files: `llama-gguf-split --merge FIRST-PART model.gguf` makes one of the parts"
        )


def read_gguf_model(path: Path | str, two_bits: bool = False) -> tuple[GgufFile, ModelConfig, Weights]:
    """Open a file and check that it holds a whole model of a supported architecture; see `gguf_config`."""
    file = read_gguf(path)
    _refuse_part(file)
    weights = gguf_weights(file, gguf_config(file, two_bits))
    return file, weights.config, weights
