"""A GGUF file as a model: its metadata as a ModelConfig, its tensors as Weights.

Names are those of llama.cpp, bitnet.cpp and ik_llama.cpp, which agree. The ternary matrices may be I2_S,
TQ1_0, TQ2_0, or ternary values in F32, F16, BF16, Q8_0; a scalar tensor `NAME.scale` multiplies the output of
the matrix `NAME.weight` (llama.cpp keeps a scale there that its block formats would round to f16).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bitgen.errors import BitgenError, FileError
from bitgen.families.base import TERNARY as TERNARY_WEIGHTS
from bitgen.formats.architectures import (
    ARCHITECTURES,
    EMBEDDING,
    FINAL_NORM,
    GGUF_LAYER,
    LM_HEAD,
    Architecture,
    gguf_names,
    interleaved_to_half,
    stored_in_gguf,
)
from bitgen.formats.coded import CODED, TWO_BIT_KIND, TWO_BITS, coded_matrix, two_bit_matrix
from bitgen.formats.config import Floats, ModelConfig, check_head_dim, file_config, printable
from bitgen.formats.gguf import BY_ID, GgufFile, TensorInfo, read_gguf
from bitgen.formats.matrices import ONE_BIT, ternary_head, ternary_matrix
from bitgen.formats.model_file import TensorSummary
from bitgen.formats.quants import DENSE, OTHER, Bytes, dequantize
from bitgen.formats.rope import Yarn
from bitgen.formats.scalars import Scalars
from bitgen.formats.source import Settings, short
from bitgen.formats.table_types import STACKS, TableLayout
from bitgen.formats.ternary import I2_S_BLOCK, TERNARY
from bitgen.formats.weights import (
    BINARY,
    CodedMatrix,
    DenseMatrix,
    LayerWeights,
    TernaryMatrix,
    Weights,
    common_kind,
)
from bitgen.spec import WeightKind

TERNARY_TYPES = ("i2_s", *TERNARY, "f32", "f16", "bf16", "q8_0")
MATRIX_TYPES = (*TERNARY_TYPES, *CODED)
HEAD_TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0", "q4_1", *TERNARY)
EMBEDDING_TYPES = (*HEAD_TYPES, "q4_k")  # gathered row by row here, so that any type dequantize knows will do
_VECTOR_TYPES = ("f32", "f16", "bf16")


# Tensors that carry no weights: tables of RoPE that old converters stored.
_IGNORED = ("attn_rot_embd.weight", "attention.rotary_emb.inv_freq")


# ---- Metadata ------------------------------------------------------------------


def _architecture(file: GgufFile) -> Architecture:
    """FileError that names the architecture found and those supported."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise FileError(f"{file.path}: general.architecture is missing; this is no model file")
    found = stored_in_gguf(name, file.tensors)
    if found is None:
        raise FileError(
            f"{file.path}: the architecture {short(name)} is not supported; bitgen runs "
            f"{', '.join(gguf_names())}",
        )
    return found


def gguf_config(file: GgufFile, two_bits: bool = False) -> ModelConfig:
    """The hyperparameters. FileError names what is missing or not supported.

    ``two_bits``: Q2_0 holds weights of 2 bits, -1 .. 2, not ternary ones.
    """
    arch = _architecture(file)
    _refuse_transforms(file)
    keys = Settings(file.path, file.metadata, arch.gguf_name + ".")
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
    context = keys.integer("context_length")
    embedding = _tensor(file, f"{EMBEDDING.gguf}.weight")
    if len(embedding.shape) != 2:
        raise FileError(f"{file.path}: token_embd.weight has the shape {embedding.shape}")
    kind = _weight_kind(file, arch, two_bits)
    factors, context = _rope_factors(file, keys, head_dim, context)
    return file_config(
        file.path,
        architecture=arch.runs_as or arch.name,
        hidden=hidden,
        ffn=keys.integer("feed_forward_length"),
        layers=keys.integer("block_count"),
        heads=heads,
        kv_heads=keys.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=embedding.shape[0],
        context=context,
        rope_theta=keys.number("rope.freq_base", 10000.0),
        activation=arch.activation,
        sub_norms=arch.sub_norms,
        qk_norm=arch.qk_norm,
        input_norms=arch.input_norms,
        group=kind.group,
        weights=kind.weights,
        norm_eps=_scalars(keys, arch).eps(keys.number("attention.layer_norm_rms_epsilon")),
        tied_head=f"{LM_HEAD.gguf}.weight" not in file.tensors,
        name=printable(Settings(file.path, file.metadata, "general.").text("name")[:200]),
        rope_factors=factors,
        yarn=_yarn(keys),
        windows=_windows(file, keys, context),
    )


def _windows(file: GgufFile, keys: Settings, context: int) -> tuple[int, ...]:
    """Of each layer, as a ModelConfig has them: one number for all, or for those that a pattern names."""
    layers, window = keys.integer("block_count"), keys.integer("attention.sliding_window", 0)
    if not 0 < window < context or layers > len(file.tensors):  # those that are missing are named later
        return ()
    pattern = keys.raw("attention.sliding_window_pattern")
    if pattern is None:
        return (window,) * layers
    if not isinstance(pattern, np.ndarray) or pattern.dtype != bool or pattern.size != layers:
        raise keys.error(
            "attention.sliding_window_pattern", f"is not {layers} of true and false, one a layer"
        )
    return tuple(window if slides else 0 for slides in pattern.tolist())


def _scalars(keys: Settings, arch: Architecture) -> Scalars:
    """What is folded into the weights; nothing of most architectures."""
    if not arch.runs_as:
        return Scalars()
    return Scalars.of_gguf(keys, keys.integer("embedding_length"), keys.integer("block_count"))


def _group(file: GgufFile, arch: Architecture) -> int:
    """That of the architecture; 0 for I2_S, which stores BitLinear layers: a scale a tensor and a token."""
    first = GGUF_LAYER.format(0) + arch.matrices["q"].gguf + ".weight"
    return 0 if first in file.tensors and file.tensors[first].type == "i2_s" else arch.group


def _two_bit_block(file: GgufFile, arch: Architecture) -> int:
    """Of a file whose matrices are all Q2_0 of one kind the weights of a block, else 0."""
    found = {type_name(file, info) for info in _matrix_tensors(file, arch)}
    kind = found.pop() if len(found) == 1 else ""
    return TERNARY[kind].block if kind in TWO_BITS else 0


def _matrix_tensors(file: GgufFile, arch: Architecture) -> list[TensorInfo]:
    ends = tuple(f".{tensor.gguf}.weight" for tensor in arch.matrices.values())
    return [info for name, info in file.tensors.items() if name.startswith("blk.") and name.endswith(ends)]


def _weight_kind(file: GgufFile, arch: Architecture, two_bits: bool) -> WeightKind:
    """The kind that holds the weights of all matrices, and their groups. FileError: they have none."""
    own = TableLayout.of(file.path, file.metadata)
    if own is not None and arch.input_norms:
        raise FileError(
            f"{file.path}: {own.type} stacks matrices of one input, which {arch.name} norms apart"
        )
    if own is not None:
        return WeightKind(own.kind, own.group)
    coded = _coded_kind(file, arch)
    if coded is None and two_bits and (block := _two_bit_block(file, arch)):
        return WeightKind(TWO_BIT_KIND, block)
    return coded or WeightKind(BINARY if _is_binary(file, arch) else TERNARY_WEIGHTS, _group(file, arch))


def _is_binary(file: GgufFile, arch: Architecture) -> bool:
    """Whether all matrices are bits, of a model whose activations have groups: a scale a token has rows."""
    found = {type_name(file, info) for info in _matrix_tensors(file, arch)}
    return found == {ONE_BIT} and arch.group > 0


def _coded_kind(file: GgufFile, arch: Architecture) -> WeightKind | None:
    """That of matrices of 4 bits; None: there are none of them. FileError: no kind holds all matrices."""
    found = _matrix_tensors(file, arch)
    coded = [info for info in found if type_name(file, info) in CODED]
    if not coded:
        return None
    other = next((info for info in found if type_name(file, info) not in CODED), None)
    if other is not None:
        raise FileError(
            f"{file.path}: {coded[0].name} is stored as {coded[0].type.upper()} and {other.name} as "
            f"{type_name(file, other).upper()}; bitgen runs models whose matrices are all of "
            f"{', '.join(name.upper() for name in CODED)}, or all ternary",
        )
    groups = sorted({CODED[info.type].group for info in coded})
    if len(groups) > 1:
        raise FileError(
            f"{file.path}: some matrices are in groups of {groups[0]} weights (NVFP4), some of {groups[1]}; "
            "bitgen runs models whose matrices share one size"
        )
    try:
        return WeightKind(common_kind(CODED[info.type].kind for info in coded), groups[0])
    except FileError as error:
        raise FileError(f"{file.path}: {error.message}") from None


def _refuse_transforms(file: GgufFile) -> None:
    """Without the transform that its weights are stored under, a model writes fluent nonsense."""
    found = [key for key in file.metadata if "hadamard" in key]
    if found:
        raise FileError(
            f"{file.path}: the weights are stored under a Hadamard transform ({short(found[0])}, as in "
            "Ternary-Bonsai-2), which is not supported",
        )


def _rope_factors(
    file: GgufFile, keys: Settings, head_dim: int, context: int
) -> tuple[tuple[float, ...] | None, int]:
    """The divisors of the RoPE frequencies, and the positions that they are for.

    A tensor (Llama 3.1) times a linear factor, or one of the two tensors of longrope.
    """
    half = head_dim // 2
    factors = np.ones(half, np.float32)
    if "rope_freqs.weight" in file.tensors:
        factors = _vector(file, "rope_freqs.weight", half)
    scaling = keys.text("rope.scaling.type", "none")
    linear = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if scaling == "linear" or (scaling == "none" and keys.get("rope.scale_linear") is not None):
        # GGUF readers treat 0 as "not set".
        factors = factors * np.float32(linear or 1.0)
    elif scaling == "longrope":
        factors, context = _longrope(file, keys, half, context)
    elif scaling not in ("none", "yarn"):
        known = "none, linear, yarn and longrope"
        raise keys.error("rope.scaling.type", f"is {short(scaling)}; {known} are supported")
    return None if (factors == 1).all() else tuple(factors.tolist()), context


def _longrope(file: GgufFile, keys: Settings, half: int, context: int) -> tuple[Floats, int]:
    """Divisors for short texts, which are those of long ones too, or else for the original context alone."""
    if keys.number("rope.scaling.attn_factor", 1.0) != 1:
        raise keys.error("rope.scaling.attn_factor", "is not 1, which is not supported with longrope")
    short_ones, long_ones = (_vector(file, f"rope_factors_{kind}.weight", half) for kind in ("short", "long"))
    if np.array_equal(short_ones, long_ones):
        return short_ones, context
    return short_ones, min(context, keys.integer("rope.scaling.original_context_length", context))


def _yarn(keys: Settings) -> Yarn | None:
    if keys.text("rope.scaling.type") != "yarn":
        return None
    for key, plain in (("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)):
        if keys.number(f"rope.scaling.{key}", plain) != plain:
            raise keys.error(f"rope.scaling.{key}", f"is not {plain:g}, which is not supported")
    factor = keys.number("rope.scaling.factor")
    context = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    betas = keys.number("rope.scaling.yarn_beta_fast", 32.0), keys.number("rope.scaling.yarn_beta_slow", 1.0)
    attention = keys.number("rope.scaling.attn_factor", 1.0)  # on top of what YaRN makes of the factor
    try:
        yarn = Yarn(factor, context, *betas)
        return yarn if attention == 1 else replace(yarn, attention=yarn.scale * attention)
    except BitgenError as error:
        raise keys.error("rope.scaling", f"is not possible: {error.message}") from None


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
    info = _tensor(file, name + ".weight")
    _check_shape(file, info, shape)
    kind = type_name(file, info)
    if kind not in MATRIX_TYPES:
        raise _unsupported(file, info, MATRIX_TYPES)
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
    return _vector(file, f"{name}.scale", 1) if f"{name}.scale" in file.tensors else None


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
        raise _unsupported(file, _tensor(file, embedding.name), HEAD_TYPES)
    own = TableLayout.of(file.path, file.metadata)
    arch = _architecture(file)
    scalars = _scalars(Settings(file.path, file.metadata, arch.gguf_name + "."), arch)
    read = _Reader(file, config, used, own, scalars)
    layers = tuple(_layer(read, i) for i in range(config.layers))
    extra = [name for name in file.tensors if name not in used and not name.endswith(_IGNORED)]
    if extra:
        raise FileError(
            f"{file.path}: the tensor {short(extra[0])} ({len(extra)} such) belongs to no "
            f"{config.architecture} model that bitgen runs (biases and experts are not supported)",
        )
    final = scalars.final(_vector(file, f"{FINAL_NORM.gguf}.weight", config.hidden))
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
        norms[field] = _vector(read.file, name, *tensor.shape(read.config))
        read.used.add(name)
    return norms


def _own_layer(read: _Reader, prefix: str, own: TableLayout) -> LayerWeights:
    """The layer of a file of bitgen's own types: its stacks are tensors."""
    file, config = read.file, read.config
    stacks: dict[str, TernaryMatrix] = {}
    for matmul in config.layer_matmuls:
        name = prefix + STACKS[matmul.role]
        info, tables = _tensor(file, f"{name}.weight"), _tensor(file, f"{name}.tables")
        for each in (info, tables):
            if each.type != "i8":
                raise _unsupported(file, each, ("i8",))
            if len(each.shape) != 2:
                raise FileError(f"{file.path}: {each.name} has the shape {_by(each.shape)}, not two sizes")
        _check_shape(file, info, own.shape(matmul.m, matmul.k))
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


def read_gguf_model(path: Path | str, two_bits: bool = False) -> tuple[GgufFile, ModelConfig, Weights]:
    """Open a file and check that it holds a whole model of a supported architecture; see `gguf_config`."""
    file = read_gguf(path)
    weights = gguf_weights(file, gguf_config(file, two_bits))
    return file, weights.config, weights
