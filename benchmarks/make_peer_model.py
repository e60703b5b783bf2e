"""Write a preset's random weights as GGUF files of ik_llama.cpp and llama.cpp, for benchmarks/peers.py.

    python benchmarks/make_peer_model.py --model 3B --work FOLDER --ik PYTHON --type IQ2_BN_R4 --type Q4_0

The weights are those of `bitgen bench --model 3B`, so all sides run the same model and their logits can be
compared. llama.cpp's types (TQ1_0, TQ2_0, Q4_0) are written as they are, with the scale of a matrix in every
block, rounded to f16; the types of Ternary Bonsai files (Q2_0, PQ2_0, PTQ1_0; a preset with groups) with one
for each block, embedding and head too. ik_llama.cpp's are quantised by the llama-quantize of the package
ik-llama-cpp-python that PYTHON has installed, from an F16 file (6.7 GB for 3B) that is deleted at the end.
Embedding and head otherwise stay F16. The vocabulary is a dummy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.cli.progress import ProgressBar
from bitgen.errors import BitgenError
from bitgen.formats.architectures import architecture_of
from bitgen.formats.config import Floats, ModelConfig, find_model
from bitgen.formats.convert import file_matrices, gguf_metadata, model_tensors
from bitgen.formats.gguf import U32, NewTensor, write_gguf
from bitgen.formats.stored_matrix import TernaryMatrix
from bitgen.formats.ternary import encode_blocks
from bitgen.formats.weights import Weights
from bitgen.inference.synthetic import random_weights

_F32, _F16 = 0, 1  # GGUF's numbers
LLAMA_TYPES = {"Q4_0": (2, 2), "TQ1_0": (34, 36), "TQ2_0": (35, 37)}  # numbers of the tensor and the file
GROUP_TYPES = {"Q2_0": None, "PQ2_0": 141, "PTQ1_0": 143}  # the number of the file
_BLOCKS = {"Q4_0": (32, 18), "TQ1_0": (256, 54), "TQ2_0": (256, 66)}  # values and bytes of a block
_ROWS = 256  # of a matrix that are in memory at once
_FIND_QUANTIZE = "from ik_llama_cpp.quantize import find_quantize_bin as f; print(f() or '')"
_SPECIAL = ("<unk>", "<s>", "</s>")
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of tokens


def peer_config(model: str, silu: bool = False) -> ModelConfig:
    """The model of a preset; ``silu``: of its shape with the gate of llama.cpp's only bitnet architecture."""
    config = find_model(model)
    return replace(config, activation="silu", architecture="bitnet") if silu else config


def model_path(work: Path, config: ModelConfig, kind: str) -> Path:
    return work / f"{config.name.rpartition('/')[2]}-{config.activation}-{kind}.gguf"


def make_models(work: Path, config: ModelConfig, kinds: Sequence[str], ik: Path | None) -> dict[str, Path]:
    """The model in each of ``kinds``; files that are there already are kept. BitgenError when one fails."""
    paths = {kind: model_path(work, config, kind) for kind in kinds}
    missing = [kind for kind, path in paths.items() if not path.exists()]
    work.mkdir(parents=True, exist_ok=True)
    for kind in [kind for kind in missing if kind in LLAMA_TYPES]:
        write_file(paths[kind], random_weights(config), kind)
    for kind in [kind for kind in missing if kind in GROUP_TYPES]:
        write_groups(paths[kind], random_weights(config), kind)
    of_ik = [kind for kind in missing if kind not in (*LLAMA_TYPES, *GROUP_TYPES)]
    if of_ik:
        if ik is None:
            raise BitgenError(f"{of_ik[0]} is made by ik-llama-cpp-python: name its Python with --ik")
        quantize, source = quantizer(ik), model_path(work, config, "F16")
        try:
            write_file(source, random_weights(config), "F16")
            for kind in of_ik:
                quantize_model(quantize, source, paths[kind], kind)
        finally:
            source.unlink(missing_ok=True)
    return paths


def read_bytes_a_token(path: Path, config: ModelConfig) -> int:
    """The size of the file, less the embedding where the head is another tensor."""
    return path.stat().st_size - (0 if config.tied_head else 2 * config.vocab * config.hidden)


def quantizer(ik: Path) -> Path:
    answer = subprocess.run([ik, "-c", _FIND_QUANTIZE], capture_output=True, text=True, check=False)
    path = Path(answer.stdout.strip())
    if answer.returncode or not path.is_file():
        raise BitgenError(f"{ik} has no llama-quantize: install ik-llama-cpp-python==0.1.5 there")
    return path


def quantize_model(quantize: Path, source: Path, target: Path, kind: str) -> None:
    partial = target.with_name(target.name + ".partial")
    types = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    command = [str(quantize), *types, str(source), str(partial), kind]
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if answer.returncode:
        partial.unlink(missing_ok=True)
        raise BitgenError(f"llama-quantize cannot make {kind}: {answer.stdout.strip().splitlines()[-1]}")
    partial.replace(target)


# ---- A file ----


def write_file(path: Path, weights: Weights, kind: str) -> None:
    """The model with matrices of ``kind``: F16 or one of LLAMA_TYPES."""
    metadata = {**_metadata(weights.config, kind), **_vocabulary(weights.config.vocab)}
    with ProgressBar() as bar:
        write_gguf(path, metadata, list(_tensors(weights, kind)), bar.show)


def write_groups(path: Path, weights: Weights, kind: str) -> None:
    """The model with all its matrices of ``kind``, one of GROUP_TYPES, and scales of groups."""
    architecture = architecture_of(weights.config)
    metadata = gguf_metadata(weights.config, architecture.name, GROUP_TYPES[kind])
    tensors = list(model_tensors(weights, architecture, kind.lower()))
    with ProgressBar() as bar:
        write_gguf(path, {**metadata, **_vocabulary(weights.config.vocab)}, tensors, bar.show)


def _metadata(config: ModelConfig, kind: str) -> dict[str, Any]:
    file_type = 1 if kind == "F16" else LLAMA_TYPES[kind][1]
    return gguf_metadata(config, architecture_of(config).name, file_type)


def _vocabulary(size: int) -> dict[str, Any]:
    """A SentencePiece vocabulary of ``size`` tokens: the special ones, all bytes, then t0, t1, ..."""
    tokens = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    tokens += [f"t{i}" for i in range(size - len(tokens))]
    types += [_NORMAL] * (size - len(types))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(size, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.unknown_token_id": U32(0),
        "tokenizer.ggml.bos_token_id": U32(1),
        "tokenizer.ggml.eos_token_id": U32(2),
    }


def _tensors(weights: Weights, kind: str) -> Iterator[NewTensor]:
    embedding = weights.embedding.data
    shape = weights.embedding.shape
    architecture = architecture_of(weights.config)
    apart = kind == "F16" and architecture.name == "bitnet"  # the only one with tensors of scales
    yield NewTensor("token_embd.weight", shape, _F16, embedding.nbytes, lambda: [embedding])
    if weights.lm_head is not None:
        head = weights.lm_head.data
        yield NewTensor("output.weight", weights.lm_head.shape, _F16, head.nbytes, lambda: [head])
    yield _vector("output_norm.weight", weights.final_norm)
    for index, layer in enumerate(weights.layers):
        prefix = f"blk.{index}."
        for field, tensor in architecture.norms.items():
            yield _vector(f"{prefix}{tensor.gguf}.weight", getattr(layer, field))
        for role, matrix in file_matrices(weights.config, layer, architecture).items():
            name = prefix + architecture.matrices[role].gguf
            yield _matrix(f"{name}.weight", matrix, kind, None if apart else matrix.scale)
            if apart:
                yield _vector(f"{name}.scale", matrix.scale)


def _vector(name: str, values: Floats) -> NewTensor:
    data = np.ascontiguousarray(values, "<f4")
    return NewTensor(name, data.shape, _F32, data.nbytes, lambda: [data.view(np.uint8)])


def _matrix(name: str, matrix: TernaryMatrix, kind: str, scale: Floats | None) -> NewTensor:
    """A matrix as ``kind``; ``scale`` (1,): its values are -scale, 0, scale."""
    m, k = matrix.shape.m, matrix.shape.k
    block, size = _BLOCKS.get(kind, (1, 2))
    if k % block:
        raise BitgenError(f"{name} has {k} columns, which are no blocks of {block}: {kind} cannot hold it")

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for begin in range(0, m, _ROWS):
            w = matrix.rows(begin, min(begin + _ROWS, m))
            if kind == "F16" or scale is None:
                values = w if scale is None else w * scale
                yield values.astype("<f2").view(np.uint8)
            elif kind == "Q4_0":
                yield _q4_0(w, scale)
            else:
                yield encode_blocks(kind.lower(), w, scale)

    number = _F16 if kind == "F16" else LLAMA_TYPES[kind][0]
    return NewTensor(name, (m, k), number, m * (k // block) * size, chunks)


def _q4_0(w: NDArray[np.int8], scale: Floats) -> NDArray[np.uint8]:
    """Blocks of 32: scale in f16, then w + 8 in 4 bits, value i below value i + 16."""
    codes = (w.reshape(len(w), -1, 32) + 8).astype(np.uint8)
    d = np.broadcast_to(scale.astype("<f2"), (*codes.shape[:2], 1)).copy().view(np.uint8)
    return np.concatenate([d, codes[..., :16] | codes[..., 16:] << 4], axis=2).reshape(len(w), -1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="3B", help="a preset (3B)")
    parser.add_argument("--work", type=Path, required=True, help="folder of the files")
    parser.add_argument("--ik", type=Path, help="a Python with ik-llama-cpp-python, for its types")
    parser.add_argument("--silu", action="store_true", help="a relu² model's shape with a silu gate")
    parser.add_argument("--type", action="append", help="IQ2_BN_R4, Q4_0, ... (IQ2_BN and IQ2_BN_R4)")
    args = parser.parse_args()
    try:
        kinds = args.type or ["IQ2_BN", "IQ2_BN_R4"]
        for path in make_models(args.work, peer_config(args.model, args.silu), kinds, args.ik).values():
            print(f"{path}  {path.stat().st_size / 1e6:,.0f} MB")
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
