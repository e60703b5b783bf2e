"""Write a model as one GGUF file: `bitgen convert`.

Every weight keeps its value exactly. A matrix is stored in the type asked for where that type can hold it,
else as F16; a scale that F16 cannot hold goes into a scalar tensor `NAME.scale` beside a matrix of -1, 0, 1,
as llama.cpp does it. Rows with scales of their own become F16, or F32 where F16 would round them. Embedding
and head are copied in the format they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from bitgen.formats.config import Floats, ModelConfig
from bitgen.formats.gguf import U32, NewTensor, write_gguf
from bitgen.formats.gguf_tokenizer import tokenizer_metadata
from bitgen.formats.model_file import ModelFile
from bitgen.formats.open import open_model
from bitgen.formats.quants import (
    DENSE,
    I2_S_BLOCK,
    I2_S_ID,
    TERNARY,
    Bytes,
    encode_i2_s,
    encode_tq,
    i2_s_bytes,
)
from bitgen.formats.weights import DenseMatrix, LayerWeights, Ternary, TernaryMatrix
from bitgen.progress import Report

TYPES = ("i2_s", "tq1_0", "tq2_0", "f16")
# general.file_type: 40 is bitnet.cpp's I2_S, the others are llama.cpp's.
_FILE_TYPES = {"i2_s": 40, "tq1_0": 36, "tq2_0": 37, "f16": 1}
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
    target = Path(out).expanduser()
    if target.is_dir() or not target.parent.is_dir():
        problem = (
            "is a folder" if target.is_dir() else f"cannot be written: there is no folder {target.parent}"
        )
        raise FileError(f"{target} {problem}")
    model = open_model(source)
    if target.exists() and target.resolve() == model.path.resolve():
        raise UsageError(f"{target} is the source itself; write to another file")
    architecture = architecture_of(model.config)
    tokenizer, notes = _tokenizer(model)
    metadata = {**gguf_metadata(model.config, architecture.name, _FILE_TYPES[kind]), **tokenizer}
    tensors = list(_tensors(model, architecture, kind))
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


def gguf_metadata(config: ModelConfig, architecture: str, file_type: int) -> dict[str, Any]:
    """What a GGUF file says about a model, apart from its tokenizer."""
    a = architecture
    return {
        "general.architecture": a,
        "general.type": "model",
        "general.name": config.name or a,
        "general.quantization_version": U32(2),
        "general.file_type": U32(file_type),
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
        f"{a}.rope.scaling.type": "none",
        f"{a}.vocab_size": U32(config.vocab),
    }


def _tokenizer(model: ModelFile) -> tuple[dict[str, Any], list[str]]:
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


def _tensors(model: ModelFile, architecture: Architecture, kind: str) -> Iterator[NewTensor]:
    weights, config = model.weights, model.config
    yield _dense(f"{EMBEDDING.gguf}.weight", weights.embedding)
    if weights.lm_head is not None:
        yield _dense(f"{LM_HEAD.gguf}.weight", weights.lm_head)
    yield _vector(f"{FINAL_NORM.gguf}.weight", weights.final_norm)
    if config.rope_factors is not None:
        yield _vector("rope_freqs.weight", np.array(config.rope_factors, np.float32))
    for index, layer in enumerate(weights.layers):
        prefix = GGUF_LAYER.format(index)
        for field, tensor in architecture.norms.items():
            yield _vector(f"{prefix}{tensor.gguf}.weight", getattr(layer, field))
        for role, matrix in file_matrices(config, layer, architecture).items():
            yield from _ternary(prefix + architecture.matrices[role].gguf, matrix, kind)


def file_matrices(
    config: ModelConfig, layer: LayerWeights, architecture: Architecture
) -> dict[str, TernaryMatrix]:
    """The matrices of a layer with their rows in the order of a GGUF file."""
    matrices = layer.split(config)
    if architecture.interleaved:
        for role, heads in (("q", config.heads), ("k", config.kv_heads)):
            matrices[role] = matrices[role].reordered(half_to_interleaved(heads, config.head_dim))
    return {role: matrices[role] for role in architecture.matrices}


def _vector(name: str, values: Floats) -> NewTensor:
    data = np.ascontiguousarray(values, "<f4")
    return NewTensor(name, values.shape, DENSE["f32"].id, data.nbytes, lambda: [data.view(np.uint8)])


def _dense(name: str, matrix: DenseMatrix) -> NewTensor:
    step = max(1, _CHUNK_VALUES // matrix.shape[1])

    def chunks() -> Iterator[Bytes]:
        for begin in range(0, matrix.shape[0], step):
            yield np.ascontiguousarray(matrix.data[begin : begin + step])

    return NewTensor(name, matrix.shape, DENSE[matrix.type].id, matrix.data.size, chunks)


def _ternary(name: str, matrix: TernaryMatrix, kind: str) -> Iterator[NewTensor]:
    """NAME.weight in ``kind``, or in a type that holds it exactly, and NAME.scale where it needs one."""
    live = matrix.scale[matrix.scale != 0]
    single = live.size == 0 or bool((live == live[0]).all())
    scale = live[:1] if live.size else np.ones(1, np.float32)
    if kind == "i2_s" and single and matrix.shape.k % I2_S_BLOCK == 0:
        yield _i2_s(name, matrix, scale)
        return
    with np.errstate(over="ignore"):
        fits = bool((live.astype(np.float16).astype(np.float32) == live).all())
    rows = np.broadcast_to(matrix.scale, (matrix.shape.m,))
    if single and not fits:
        yield _vector(name + ".scale", scale)
        rows = np.ones(matrix.shape.m, np.float32)
        fits = True
    if kind in TERNARY and fits and matrix.shape.k % TERNARY[kind].block == 0:
        size = matrix.shape.m * TERNARY[kind].row_bytes(matrix.shape.k)
        yield _encoded(name, matrix, TERNARY[kind].id, size, lambda w, b, e: encode_tq(kind, w, rows[b:e]))
        return
    stored = "f16" if fits else "f32"
    dtype = {"f16": "<f2", "f32": "<f4"}[stored]
    size = matrix.shape.m * DENSE[stored].row_bytes(matrix.shape.k)
    yield _encoded(
        name,
        matrix,
        DENSE[stored].id,
        size,
        lambda w, b, e: (w * rows[b:e, None]).astype(dtype).view(np.uint8),
    )


def _i2_s(name: str, matrix: TernaryMatrix, scale: Floats) -> NewTensor:
    size = i2_s_bytes(matrix.shape.m * matrix.shape.k)
    codes = _encoded(name, matrix, I2_S_ID, size, lambda w, _b, _e: encode_i2_s(w))

    def chunks() -> Iterator[Bytes]:
        yield from codes.chunks()
        tail = np.zeros(32, np.uint8)
        tail[:4] = scale.astype("<f4").view(np.uint8)
        yield tail

    return NewTensor(codes.name, codes.shape, I2_S_ID, size, chunks)


def _encoded(
    name: str, matrix: TernaryMatrix, type_id: int, size: int, encode: Callable[[Ternary, int, int], Bytes]
) -> NewTensor:
    shape = matrix.shape
    step = max(1, _CHUNK_VALUES // shape.k)

    def chunks() -> Iterator[Bytes]:
        for begin in range(0, shape.m, step):
            end = min(begin + step, shape.m)
            w = matrix.rows(begin, end)
            if matrix.scale.size > 1:  # a row with scale 0 is zero whatever its codes are
                w = np.where(matrix.scale[begin:end, None] == 0, np.int8(0), w)
            yield encode(w, begin, end)

    return NewTensor(name + ".weight", (shape.m, shape.k), type_id, size, chunks)


def _type_id(kind: str) -> int:
    return I2_S_ID if kind == "i2_s" else TERNARY[kind].id if kind in TERNARY else DENSE[kind].id


def _counts(tensors: list[NewTensor]) -> dict[str, int]:
    names = {I2_S_ID: "i2_s", **{t.id: t.name for t in (*TERNARY.values(), *DENSE.values())}}
    counts: dict[str, int] = {}
    for tensor in tensors:
        counts[names[tensor.type_id]] = counts.get(names[tensor.type_id], 0) + 1
    return counts
