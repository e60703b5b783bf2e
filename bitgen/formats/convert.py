"""Write a model as one GGUF file: `bitgen convert`.

Every weight keeps its value exactly. A matrix with a scale a row is stored in the type asked for where that
type can hold it, else as F16; a scale that F16 cannot hold goes into a scalar tensor `NAME.scale` beside a
matrix of -1, 0, 1, as llama.cpp does it. Rows with scales of their own become F16, or F32 where F16 would
round them. A matrix with scales of groups keeps its codes and scales, or is refused with the reason.
Embedding and head are copied in the format they have, unless they are ternary in groups: then they are as the
matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.errors import FileError, UsageError, unknown
from bitgen.formats.architectures import (
    EMBEDDING,
    FINAL_NORM,
    GGUF_LAYER,
    LM_HEAD,
    Architecture,
    architecture_of,
    half_to_interleaved,
)
from bitgen.formats.coded import CODED
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.convert_codes import CODE_TYPES, OWN, coded_tensor, table_tensors
from bitgen.formats.gguf import BY_ID, U32, NewTensor, write_gguf
from bitgen.formats.gguf_tokenizer import tokenizer_metadata
from bitgen.formats.matrices import ternary_matrix
from bitgen.formats.model_file import ModelFile
from bitgen.formats.open import open_model
from bitgen.formats.pooling import pooling_metadata
from bitgen.formats.quants import DENSE, OTHER
from bitgen.formats.source import Bytes
from bitgen.formats.stored_matrix import CodedMatrix, TernaryMatrix
from bitgen.formats.table_types import STACKS, TableLayout
from bitgen.formats.ternary import (
    I2_S_BLOCK,
    I2_S_ID,
    TERNARY,
    Ternary,
    encode_blocks,
    encode_i2_s,
    i2_s_bytes,
)
from bitgen.formats.weights import DenseMatrix, LayerWeights, Weights
from bitgen.progress import Report
from bitgen.reference import are_halves

TYPES = ("i2_s", *TERNARY, "f16", *CODE_TYPES)
# general.file_type: 40 is bitnet.cpp's I2_S, 141 and 143 are those of Bonsai's fork, the others
# llama.cpp's. A file of another type goes without.
_FILE_TYPES = {
    "i2_s": 40,
    "tq1_0": 36,
    "tq2_0": 37,
    "f16": 1,
    "q1_0": 41,
    "pq2_0": 141,
    "ptq1_0": 143,
    "q4_0": 2,
    "q4_1": 3,
    "iq4_nl": 25,
    "mxfp4": 38,
    "nvfp4": 39,
}
_CHUNK_VALUES = 1 << 20  # weights encoded at once


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: the tensors of each type, and what the user should know."""

    path: Path
    size: int  # bytes
    counts: Mapping[str, int]
    notes: tuple[str, ...]


def convert(
    source: Path | str, out: Path | str, kind: str = "i2_s", progress: Report | None = None
) -> Converted:
    """Write the model at ``source`` (a folder or a GGUF file) to the GGUF file ``out``.

    ``kind`` is one of TYPES; ``progress`` counts bytes. BitgenError when the source is no model,
    when it is not ternary, or when ``out`` cannot be written.
    """
    if kind not in TYPES:
        raise unknown("type", kind, TYPES)
    model, target = open_for(source, out, two_bits=kind == OWN)
    architecture = architecture_of(model.config)
    tokenizer, notes = copied_tokenizer(model)
    metadata = gguf_metadata(model.config, architecture.gguf_name, _FILE_TYPES.get(kind))
    metadata |= {**pooling_metadata(model, architecture.gguf_name), **tokenizer}
    if kind == OWN:
        metadata |= TableLayout(OWN, 4, model.config.group).metadata
    tensors = list(model_tensors(model.weights, architecture, kind))
    fallback = sum(t.type_id not in (_type_id(kind), DENSE["f32"].id) for t in tensors if "blk." in t.name)
    if fallback:
        notes.append(
            f"{fallback} matrices cannot be {kind.upper()} and are stored as F16 or F32, as large as that is"
        )
    if architecture.name != "bitnet" and any(t.name.endswith(".scale") for t in tensors):
        notes.append(
            "scales that F16 would round are tensors of their own, which older llama.cpp does not load"
        )
    write_gguf(target, metadata, tensors, progress)
    return Converted(target, target.stat().st_size, _counts(tensors), tuple(notes))


def open_for(source: Path | str, out: Path | str, two_bits: bool = False) -> tuple[ModelFile, Path]:
    """The model that becomes the file ``out``, and its path. BitgenError: either cannot be."""
    target = Path(out).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        problem = (
            "is a folder" if target.is_dir() else f"cannot be written: there is no folder {target.parent}"
        )
        raise FileError(f"{target} {problem}")
    model = open_model(source, two_bits)
    if target.exists() and target.resolve() == model.path.resolve():
        raise UsageError(f"{target} is the source itself; write to another file")
    return model, target


def gguf_metadata(config: ModelConfig, architecture: str, file_type: int | None) -> dict[str, Any]:
    """What a GGUF file says about a model, apart from its tokenizer."""
    a = architecture
    return {
        "general.architecture": a,
        "general.type": "model",
        "general.name": config.name or a,
        "general.quantization_version": U32(2),
        **({} if file_type is None else {"general.file_type": U32(file_type)}),
        f"{a}.context_length": U32(config.context),
        f"{a}.embedding_length": U32(config.hidden),
        f"{a}.feed_forward_length": U32(config.ffn),
        f"{a}.block_count": U32(config.layers),
        f"{a}.attention.head_count": U32(config.heads),
        f"{a}.attention.head_count_kv": U32(config.kv_heads),
        f"{a}.attention.key_length": U32(config.head_dim),
        f"{a}.attention.value_length": U32(config.head_dim),
        f"{a}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{a}.rope.dimension_count": U32(config.head_dim),
        f"{a}.rope.freq_base": float(config.rope_theta),
        **_rope_scaling(f"{a}.rope.scaling.", config),
        **_windows(f"{a}.attention.sliding_window", config),
        f"{a}.vocab_size": U32(config.vocab),
    }


def _is_linear(config: ModelConfig) -> bool:
    """Whether RoPE is scaled by one factor and nothing else."""
    return config.yarn is None and len(set(config.rope_factors or ())) == 1


def _rope_scaling(prefix: str, config: ModelConfig) -> dict[str, Any]:
    """Metadata of what scales RoPE; divisors of their own are the tensor rope_freqs."""
    if _is_linear(config) and config.rope_factors:
        return {f"{prefix}type": "linear", f"{prefix}factor": float(config.rope_factors[0])}
    if (yarn := config.yarn) is None:
        return {f"{prefix}type": "none"}
    plain = replace(yarn, attention=None)
    return {
        f"{prefix}type": "yarn",
        f"{prefix}factor": float(yarn.factor),
        f"{prefix}original_context_length": U32(yarn.original_context),
        f"{prefix}attn_factor": yarn.scale / plain.scale,
        f"{prefix}yarn_beta_fast": float(yarn.beta_fast),
        f"{prefix}yarn_beta_slow": float(yarn.beta_slow),
    }


def _windows(key: str, config: ModelConfig) -> dict[str, Any]:
    """Metadata of windows of attention, all as long; the pattern says which layers have one, if not all."""
    found = set(config.windows) - {0}
    if not found:
        return {}
    if len(found) > 1:
        raise FileError(f"a GGUF file holds one length of windows, not {', '.join(map(str, sorted(found)))}")
    slides = [window > 0 for window in config.windows]
    return {key: U32(found.pop()), **({} if all(slides) else {f"{key}_pattern": np.array(slides)})}


def copied_tokenizer(model: ModelFile) -> tuple[dict[str, Any], list[str]]:
    """The tokenizer's metadata: built from tokenizer.json, or copied from a GGUF file."""
    if model.container == "safetensors":
        return tokenizer_metadata(model.tokenizer_data, model.config.vocab)
    _ = model.tokenizer_data  # raises where it is damaged
    values = {k: v for k, v in model.metadata.items() if k.startswith("tokenizer.")}
    ids = {
        k: U32(v) for k, v in values.items() if k.endswith("_id") and isinstance(v, int) and 0 <= v < 1 << 32
    }
    return {**values, **ids}, []


# ---- Tensors -------------------------------------------------------------------


def model_tensors(weights: Weights, architecture: Architecture, kind: str) -> Iterator[NewTensor]:
    """All tensors of a model in ``kind``, one of TYPES. FileError where that would lose something."""
    config = weights.config
    yield from dense_tensor(EMBEDDING.gguf, weights.embedding, kind)
    if weights.lm_head is not None:
        yield from dense_tensor(LM_HEAD.gguf, weights.lm_head, kind)
    yield from final_tensors(weights)
    for index, layer in enumerate(weights.layers):
        prefix = GGUF_LAYER.format(index)
        for field, tensor in architecture.norms.items():
            yield vector_tensor(f"{prefix}{tensor.gguf}.weight", getattr(layer, field))
        if kind == OWN:
            yield from _own_stacks(prefix, layer)
            continue
        for role, matrix in file_matrices(config, layer, architecture).items():
            yield from _matrix(prefix + architecture.matrices[role].gguf, matrix, kind)


def final_tensors(weights: Weights) -> Iterator[NewTensor]:
    """The last norm, and the divisors of RoPE's frequencies where there are any."""
    config = weights.config
    yield vector_tensor(f"{FINAL_NORM.gguf}.weight", weights.final_norm)
    if config.rope_factors is not None and not _is_linear(config):
        yield vector_tensor("rope_freqs.weight", np.array(config.rope_factors, np.float32))


def file_matrices(
    config: ModelConfig, layer: LayerWeights, architecture: Architecture
) -> dict[str, TernaryMatrix]:
    """The matrices of a layer with their rows in the order of a GGUF file."""
    matrices = layer.split(config)
    if architecture.interleaved:
        for role, heads in (("q", config.heads), ("k", config.kv_heads)):
            matrices[role] = matrices[role].reordered(half_to_interleaved(heads, config.head_dim))
    return {role: matrices[role] for role in architecture.matrices}


def vector_tensor(name: str, values: Floats) -> NewTensor:
    data = np.ascontiguousarray(values, "<f4")
    return NewTensor(name, values.shape, DENSE["f32"].id, data.nbytes, lambda: [data.view(np.uint8)])


def dense_tensor(name: str, matrix: DenseMatrix, kind: str) -> Iterator[NewTensor]:
    """An embedding or a head as it is, or as the other matrices where it is ternary in groups too."""
    if kind not in (matrix.type, *CODE_TYPES) and (kind in TERNARY or matrix.is_ternary):
        ternary = ternary_matrix(matrix.name, matrix.type, matrix.shape, matrix.data)
        if matrix.is_ternary or _has_groups(ternary):
            yield from _ternary(name, ternary, kind)
            return
    step = max(1, _CHUNK_VALUES // matrix.shape[1])

    def chunks() -> Iterator[Bytes]:
        for begin in range(0, matrix.shape[0], step):
            yield np.ascontiguousarray(matrix.data[begin : begin + step])

    type_id = (DENSE.get(matrix.type) or TERNARY[matrix.type]).id
    yield NewTensor(f"{name}.weight", matrix.shape, type_id, matrix.data.size, chunks)


def _has_groups(matrix: TernaryMatrix) -> bool:
    """Whether all of it is ternary, with scales of groups. Most embeddings show at once that they are not."""
    try:
        return matrix.group > 0 and all(w is not None for w, _, _ in _rows(matrix))
    except FileError:
        return False


def _matrix(name: str, matrix: TernaryMatrix, kind: str) -> Iterator[NewTensor]:
    """NAME.weight in ``kind``, and NAME.scale where it needs one."""
    if isinstance(matrix, CodedMatrix):
        if kind not in CODED:
            raise FileError(f"{matrix.name} has weights of 4 bits: {kind.upper()} holds ternary ones")
        yield coded_tensor(name, matrix, kind)
        return
    if kind in CODED:
        raise _needs_quantize(matrix, kind)
    yield from _ternary(name, matrix, kind)


def _own_stacks(prefix: str, layer: LayerWeights) -> Iterator[NewTensor]:
    for matrix, name in zip(layer.matrices, STACKS.values(), strict=True):
        if not isinstance(matrix, CodedMatrix):
            raise _needs_quantize(matrix, OWN)
        yield from table_tensors(prefix + name, matrix)


def _needs_quantize(matrix: TernaryMatrix, kind: str) -> FileError:
    return FileError(
        f"{matrix.name} has no weights of 4 bits, of which {kind.upper()} keeps codes and scales; `bitgen "
        "quantize` makes such weights"
    )


def _ternary(name: str, matrix: TernaryMatrix, kind: str) -> Iterator[NewTensor]:
    """NAME.weight in ``kind``, or in a type that holds it exactly, and NAME.scale where it needs one."""
    if matrix.group:
        yield _in_groups(name, matrix, kind)
        return
    live = matrix.scale[matrix.scale != 0]
    single = live.size == 0 or bool((live == live[0]).all())
    scale = live[:1] if live.size else np.ones(1, np.float32)
    if kind == "i2_s" and single and matrix.shape.k % I2_S_BLOCK == 0:
        yield _i2_s(name, matrix, scale)
        return
    fits = are_halves(live)
    rows = np.broadcast_to(matrix.scale, (matrix.shape.m,))
    if single and not fits:
        yield vector_tensor(name + ".scale", scale)
        rows = np.ones(matrix.shape.m, np.float32)
        fits = True
    if kind in TERNARY and fits and matrix.shape.k % TERNARY[kind].block == 0:
        block = TERNARY[kind].block

        def encode(w: Ternary, begin: int, end: int) -> Bytes:
            live = w.reshape(len(w), -1, block).any(axis=2)  # blocks of zeros get the scale 0, as from others
            return encode_blocks(kind, w, np.where(live, rows[begin:end, None], 0), name)

        yield _encoded(name, matrix, kind, encode)
        return
    stored = "f16" if fits else "f32"
    dtype = {"f16": "<f2", "f32": "<f4"}[stored]
    yield _encoded(name, matrix, stored, lambda w, b, e: (w * rows[b:e, None]).astype(dtype).view(np.uint8))


def _in_groups(name: str, matrix: TernaryMatrix, kind: str) -> NewTensor:
    """NAME.weight of a matrix with scales of groups. FileError: ``kind`` cannot hold its codes and scales."""
    k, group = matrix.shape.k, matrix.group

    def refused(what: str) -> FileError:
        return FileError(f"{name}.weight cannot be {kind.upper()} without loss: {what}")

    if kind == "i2_s":
        raise refused(
            f"it has a scale for each {group} weights, and that type one a tensor; pq2_0 and ptq1_0 have them"
        )
    block = DENSE["f16"].block if kind == "f16" else TERNARY[kind].block
    if k % block:
        raise refused(f"its rows of {k} weights are no whole blocks of {block}")

    def scales(begin: int, end: int) -> Floats:
        finer = math.gcd(block, group) if kind != "f16" else group
        found = matrix.scales(begin, end, finer)
        if not are_halves(found):
            raise refused("a scale of it is no f16")
        if finer == group and kind != "f16":
            found = found.reshape(len(found), -1, block // group)
            if not (found == found[..., :1]).all():
                raise refused(f"scales differ within a block of {block} weights")
            found = found[..., 0]
        return found

    def encode(w: Ternary, begin: int, end: int) -> Bytes:
        if kind == "f16":
            each = np.repeat(scales(begin, end), group, axis=1)[:, :k]
            return (w * each).astype("<f2").view(np.uint8)
        return encode_blocks(kind, w, scales(begin, end), f"{name}.weight")

    return _encoded(name, matrix, kind, encode)


def _i2_s(name: str, matrix: TernaryMatrix, scale: Floats) -> NewTensor:
    size = i2_s_bytes(matrix.shape.m * matrix.shape.k)

    def chunks() -> Iterator[Bytes]:
        for w, _, _ in _rows(matrix):
            yield encode_i2_s(w)
        tail = np.zeros(32, np.uint8)
        tail[:4] = scale.astype("<f4").view(np.uint8)
        yield tail

    return NewTensor(f"{name}.weight", (matrix.shape.m, matrix.shape.k), I2_S_ID, size, chunks)


def _encoded(
    name: str, matrix: TernaryMatrix, kind: str, encode: Callable[[Ternary, int, int], Bytes]
) -> NewTensor:
    shape = matrix.shape
    stored = DENSE.get(kind) or TERNARY[kind]

    def chunks() -> Iterator[Bytes]:
        for w, begin, end in _rows(matrix):
            yield encode(w, begin, end)

    size = shape.m * stored.row_bytes(shape.k)
    return NewTensor(name + ".weight", (shape.m, shape.k), stored.id, size, chunks)


def _rows(matrix: TernaryMatrix) -> Iterator[tuple[Ternary, int, int]]:
    """All rows in bounded blocks, with where they begin and end."""
    step = max(1, _CHUNK_VALUES // matrix.shape.k)
    for begin in range(0, matrix.shape.m, step):
        end = min(begin + step, matrix.shape.m)
        w = matrix.rows(begin, end)
        if not matrix.group:  # a row with scale 0 is zero whatever its codes are
            scale = np.broadcast_to(matrix.scale, (matrix.shape.m,))[begin:end, None]
            w = w if scale.all() else np.where(scale == 0, np.int8(0), w)
        yield w, begin, end


def _type_id(kind: str) -> int:
    if kind in ("i2_s", OWN):
        return I2_S_ID if kind == "i2_s" else OTHER["i8"].id
    return (DENSE.get(kind) or TERNARY.get(kind) or OTHER[kind]).id


def _counts(tensors: list[NewTensor]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in tensors:
        name = "i2_s" if tensor.type_id == I2_S_ID else BY_ID[tensor.type_id].name
        counts[name] = counts.get(name, 0) + 1
    return counts
