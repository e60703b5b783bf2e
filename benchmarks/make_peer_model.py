"""Write a preset's random weights as GGUF files of ik_llama.cpp, for benchmarks/peers.py.

    python benchmarks/make_peer_model.py --model 3B --work FOLDER --peer-python PATH --type IQ2_BN_R4

The weights are those of `bitgen bench --model 3B`, so both sides run the same model and their logits can be
compared. They are written as F16 (-1, 0, 1, with the scale of a matrix in a tensor of its own), a block of
rows at a time, then quantised by the llama-quantize of the package ik-llama-cpp-python that PATH has
installed. Embedding and head stay F16. The F16 file (6.7 GB for 3B) is deleted at the end. The vocabulary is
a dummy.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitgen.cli.progress import ProgressLine
from bitgen.config import find_model
from bitgen.errors import BitgenError
from bitgen.model.config import Floats, ModelConfig
from bitgen.model.convert import gguf_architecture
from bitgen.model.gguf import U32, NewTensor, write_gguf
from bitgen.model.synthetic import config_of, random_weights
from bitgen.model.weights import LayerWeights, TernaryMatrix, Weights

_F32, _F16 = 0, 1  # GGUF's numbers
_ROWS = 256  # of a matrix that are in memory at once
_FIND_QUANTIZE = "from ik_llama_cpp.quantize import find_quantize_bin as f; print(f() or '')"
_SPECIAL = ("<unk>", "<s>", "</s>")
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of tokens


def model_path(work: Path, model: str, kind: str) -> Path:
    return work / f"{find_model(model).name.rpartition('/')[2]}-{kind}.gguf"


def make_models(work: Path, model: str, kinds: Sequence[str], peer_python: Path) -> dict[str, Path]:
    """The model in each of ``kinds``; files that are there already are kept. BitgenError when one fails."""
    paths = {kind: model_path(work, model, kind) for kind in kinds}
    missing = [kind for kind, path in paths.items() if not path.exists()]
    if missing:
        quantize = quantizer(peer_python)
        work.mkdir(parents=True, exist_ok=True)
        source = model_path(work, model, "F16")
        try:
            write_f16(source, random_weights(config_of(find_model(model))))
            for kind in missing:
                quantize_model(quantize, source, paths[kind], kind)
        finally:
            source.unlink(missing_ok=True)
    return paths


def quantizer(peer_python: Path) -> Path:
    answer = subprocess.run([peer_python, "-c", _FIND_QUANTIZE], capture_output=True, text=True, check=False)
    path = Path(answer.stdout.strip())
    if answer.returncode or not path.is_file():
        raise BitgenError(f"{peer_python} has no llama-quantize: install ik-llama-cpp-python==0.1.5 there")
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


# ---- The F16 file ----


def write_f16(path: Path, weights: Weights) -> None:
    metadata = {**_metadata(weights.config), **_vocabulary(weights.config.vocab)}
    with ProgressLine() as line:
        write_gguf(
            path,
            metadata,
            list(_tensors(weights)),
            lambda done, total: line.show(f"writing {path.name}: {done / total:.0%}"),
        )


def _metadata(config: ModelConfig) -> dict[str, Any]:
    a = gguf_architecture(config)
    return {
        "general.architecture": a,
        "general.name": config.name,
        "general.quantization_version": U32(2),
        "general.file_type": U32(1),
        f"{a}.context_length": U32(config.context),
        f"{a}.embedding_length": U32(config.hidden),
        f"{a}.feed_forward_length": U32(config.ffn),
        f"{a}.block_count": U32(config.layers),
        f"{a}.attention.head_count": U32(config.heads),
        f"{a}.attention.head_count_kv": U32(config.kv_heads),
        f"{a}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{a}.rope.dimension_count": U32(config.head_dim),
        f"{a}.rope.freq_base": float(config.rope_theta),
        f"{a}.vocab_size": U32(config.vocab),
    }


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


def _tensors(weights: Weights) -> Iterator[NewTensor]:
    embedding = weights.embedding.data
    shape = weights.embedding.shape
    yield NewTensor("token_embd.weight", shape, _F16, embedding.nbytes, lambda: [embedding])
    if weights.head is not None:
        head = weights.head.data
        yield NewTensor("output.weight", weights.head.shape, _F16, head.nbytes, lambda: [head])
    yield _vector("output_norm.weight", weights.final_norm)
    for index, layer in enumerate(weights.layers):
        prefix = f"blk.{index}."
        for name in ("attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm"):
            norm = getattr(layer, name)
            if norm is not None:
                yield _vector(f"{prefix}{name}.weight", norm)
        for name, matrix in _matrices(weights.config, layer):
            yield _matrix(f"{prefix}{name}.weight", matrix)
            yield _vector(f"{prefix}{name}.scale", matrix.scale)


def _matrices(config: ModelConfig, layer: LayerWeights) -> Iterator[tuple[str, TernaryMatrix]]:
    q, kv = config.q_rows, config.kv_rows
    yield "attn_q", layer.qkv.slice(0, q)
    yield "attn_k", layer.qkv.slice(q, q + kv)
    yield "attn_v", layer.qkv.slice(q + kv, q + 2 * kv)
    yield "attn_output", layer.o
    yield "ffn_gate", layer.gate_up.slice(0, config.ffn)
    yield "ffn_up", layer.gate_up.slice(config.ffn, 2 * config.ffn)
    yield "ffn_down", layer.down


def _vector(name: str, values: Floats) -> NewTensor:
    data = np.ascontiguousarray(values, "<f4")
    return NewTensor(name, data.shape, _F32, data.nbytes, lambda: [data.view(np.uint8)])


def _matrix(name: str, matrix: TernaryMatrix) -> NewTensor:
    m, k = matrix.shape.m, matrix.shape.k

    def chunks() -> Iterator[NDArray[np.uint8]]:
        for begin in range(0, m, _ROWS):
            yield matrix.rows(begin, min(begin + _ROWS, m)).astype("<f2").view(np.uint8)

    return NewTensor(name, (m, k), _F16, m * k * 2, chunks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="3B", help="a preset of the bitnet architecture (3B)")
    parser.add_argument("--work", type=Path, required=True, help="folder of the files")
    parser.add_argument("--peer-python", type=Path, required=True, help="a Python with ik-llama-cpp-python")
    parser.add_argument("--type", action="append", help="of llama-quantize (IQ2_BN and IQ2_BN_R4)")
    args = parser.parse_args()
    try:
        kinds = args.type or ["IQ2_BN", "IQ2_BN_R4"]
        for path in make_models(args.work, args.model, kinds, args.peer_python).values():
            print(f"{path}  {path.stat().st_size / 1e6:,.0f} MB")
    except BitgenError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
