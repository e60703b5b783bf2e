"""Damage model files in every way and read them: each must open, or be refused with a BitgenError.

    python tests/support/mutations.py --count 100000 --seed 1

Runs under a limit of memory and of time a file, and prints how many files opened and how many were refused.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from model_files import plain_model, shape_of, small_config, tensor, write_folder, write_model
from nvfp4_files import WRITERS, write_nvfp4

from bitgen.errors import BitgenError
from bitgen.formats.coded import CODED
from bitgen.formats.inspect import facts, metadata_lines, token_bytes, type_uses
from bitgen.formats.open import open_model
from bitgen.formats.quants import DENSE, OTHER
from bitgen.formats.stored_matrix import CodedMatrix
from bitgen.formats.ternary import TERNARY
from bitgen.tokenizer.data import TokenizerData

SECONDS_A_FILE = 10
MEMORY_BYTES = 1 << 30  # beyond what the process has mapped at the start
OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
# One layer and few tokens: the smaller the file, the more of its bytes steer the reader.
TINY = {"layers": 1, "hidden": 8, "ffn": 8, "heads": 2, "kv_heads": 1, "head_dim": 4}


def read_everything(path: Path) -> TokenizerData:
    """Open a model and touch all of it."""
    model = open_model(path)
    facts(model), list(metadata_lines(model)), type_uses(model), token_bytes(model)
    for layer in model.weights.layers:
        for matrix in layer.matrices:
            if isinstance(matrix, CodedMatrix):
                assert matrix.coded(0, matrix.shape.m).codes.max() < 16
                continue
            assert np.isfinite(matrix.scales(0, matrix.shape.m)).all()
            w = matrix.rows(0, matrix.shape.m)
            assert w.min() >= -1
            assert w.max() <= 1
    model.weights.embedding.rows(0, model.config.vocab)
    model.weights.output.rows(0, model.config.vocab)
    return model.tokenizer_data


def use_tokenizer(data: TokenizerData) -> None:
    from bitgen.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer(data)
    tokenizer.decode(tokenizer.encode("ab<s>w1 x"))


def outcome(path: Path) -> str:
    """ "valid" or "refused"; anything else is a failure of the reader and is raised."""
    signal.alarm(SECONDS_A_FILE)
    try:
        try:
            data = read_everything(path)
        except BitgenError as error:
            if not error.message.isprintable():
                raise ValueError(f"not printable: {error.message!r}") from error
            return "refused"
        try:
            use_tokenizer(data)
        except BitgenError:
            return "refused by the tokenizer"
        return "valid"
    finally:
        signal.alarm(0)


def mutations(path: Path, damaged: Path, places: Iterable[tuple[int, bytes]]) -> Counter[str]:
    """Each of ``places``, new bytes at an offset of ``damaged``, alone; the file is whole afterwards."""
    content = damaged.read_bytes()
    counts: Counter[str] = Counter()
    with damaged.open("r+b", buffering=0) as file:
        for at, new in places:
            os.pwrite(file.fileno(), new, at)
            try:
                counts[outcome(path)] += 1
            except BaseException:
                print(f"{damaged.name}: {new!r} at {at}", file=sys.stderr)
                raise
            finally:
                os.pwrite(file.fileno(), content[at : at + len(new)], at)
    return counts


def one_byte(content: bytes, count: int, rng: random.Random, header: int) -> Iterator[tuple[int, bytes]]:
    """One byte changed, three times of four within the first ``header`` bytes."""
    for _ in range(count):
        at = rng.randrange(min(header, len(content)) if rng.random() < 0.75 else len(content))
        old = content[at]
        changes = (rng.randrange(256), 0, 255, old ^ 1 << rng.randrange(8), old + 1 & 255, old - 1 & 255)
        yield at, bytes([rng.choice(changes)])


def one_character(content: bytes, count: int, rng: random.Random) -> Iterator[tuple[int, bytes]]:
    """One byte of a text as another printable one: what JSON's syntax does not stop by itself."""
    for _ in range(count):
        yield (
            rng.randrange(len(content)),
            rng.choice(b'0123456789-+.eE"[]{}:, \\untrlsabcXYZ<>/~').to_bytes(1, "little"),
        )


def one_number(content: bytes, count: int, rng: random.Random, header: int) -> Iterator[tuple[int, bytes]]:
    """A 32-bit or 64-bit number that is hard to bear, anywhere in the header."""
    for _ in range(count):
        size = rng.choice((4, 8))
        bits = rng.choice((0, 1, 7, 31, 32, 40, 47, 48, 62, 63))
        value = ((1 << bits) + rng.choice((-1, 0, 1))) % (1 << 8 * size)
        yield rng.randrange(min(header, len(content)) - size), value.to_bytes(size, "little")


def json_values(path: Path, damaged: Path, count: int, rng: random.Random) -> Counter[str]:
    """One value of a JSON file (or of a safetensors header) as another one."""
    content = damaged.read_bytes()
    binary = damaged.suffix == ".safetensors"
    length = int.from_bytes(content[:8], "little") if binary else 0
    text = content[8 : 8 + length] if binary else content
    counts: Counter[str] = Counter()
    for _ in range(count):
        data = json.loads(text)
        _replace_one(data, rng)
        new = json.dumps(data).encode()
        damaged.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :] if binary else new)
        try:
            counts[outcome(path)] += 1
        except BaseException:
            print(f"{damaged.name}: {new!r}", file=sys.stderr)
            raise
        finally:
            damaged.write_bytes(content)
    return counts


ODD_NUMBERS = (-1, 0, 1, 2, 7, 1 << 31, 1 << 63, 1 << 200, 1.5, -0.0, 1e308, float("nan"), float("inf"))
ODD_TEXTS = ("", "x", "a b", "\ud800", "\x1b[2J", "y" * 5000, "ByteLevel", "F64", "../x")
ODD_THINGS: tuple[Any, ...] = (None, True, [], [0], [1, 2], {}, {"type": "Sequence"}, {"a": []}, [[]])
ODD = (*ODD_NUMBERS, *ODD_TEXTS, *ODD_THINGS)


def _replace_one(data: Any, rng: random.Random) -> None:
    """Walk down to a random place and put something else there, take it away, or give it another name."""
    while True:
        keys = list(data) if isinstance(data, dict) else list(range(len(data)))
        key = rng.choice(keys)
        inner = data[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            data = inner
            continue
        kind = rng.random()
        if kind < 0.7:
            data[key] = rng.choice(ODD)
        elif kind < 0.85 or isinstance(data, list):
            del data[key]
        else:
            data[rng.choice(("x", "", str(key)[:-1]))] = data.pop(key)
        return


def gguf_file(folder: Path, architecture: str = "llama") -> tuple[Path, int]:
    """A small GGUF file and the size of its header."""
    from bitgen.formats.gguf import read_gguf

    path = write_model(folder / f"{architecture}.gguf", plain_model(small_config(architecture, **TINY)))
    return path, read_gguf(path).header_bytes


def typed_file(folder: Path, kind: str) -> tuple[Path, int]:
    """A small GGUF file with a matrix of ``kind`` ("42 NAME": by that number), and its header's size."""
    from bitgen.formats.gguf import read_gguf

    if kind in CODED:
        return coded_file(folder, kind)
    if kind in OWN:
        return own_file(folder, kind)
    layout = TERNARY[kind.removeprefix("42 ")]
    model = plain_model(small_config("qwen3", **{**TINY, "ffn": 256}))
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (TINY["hidden"], layout.row_bytes(256)), dtype=np.uint8)
    data.reshape(-1, layout.block_bytes)[:, layout.scale_at + 1] &= 0x3F  # no infinity
    if "q2_0" in kind:
        data[data & data >> 1 & 0x55 != 0] = 0  # no code 3
    path = folder / f"{kind}.gguf"
    type_id = 42 if kind.startswith("42 ") else layout.id
    del model.w["blk.0.ffn_down"]
    shape = (TINY["hidden"], 256)
    write_model(path, model, more=[tensor("blk.0.ffn_down.weight", data, type_id, shape)])
    return path, read_gguf(path).header_bytes


def coded_file(folder: Path, kind: str) -> tuple[Path, int]:
    """The same with all matrices of a type of 4-bit weights."""
    from bitgen.formats.gguf import read_gguf

    block = CODED[kind].block
    config = small_config("llama", **{**TINY, "hidden": block, "ffn": block, "head_dim": block // 2})
    model, tensors = plain_model(config), []
    layout = DENSE.get(kind) or OTHER[kind]
    rng = np.random.default_rng(0)
    for key in model.w:
        rows, cols = shape_of(config, key.rpartition(".")[2])
        data = rng.integers(0, 256, (rows, layout.row_bytes(cols)), dtype=np.uint8)
        if kind == "nvfp4":
            data.reshape(-1, layout.block_bytes)[:, :4] &= 0x7F  # no sign
        elif kind != "mxfp4":
            data.reshape(-1, layout.block_bytes)[:, 1:4:2] &= 0x3F  # no infinity
        tensors.append(tensor(f"{key}.weight", data, layout.id, (rows, cols)))
    model.w = {}
    path = write_model(folder / f"{kind}.gguf", model, more=tensors)
    return path, read_gguf(path).header_bytes


def own_file(folder: Path, kind: str) -> tuple[Path, int]:
    """The same as one of bitgen's own types."""
    from bitgen.formats.gguf import read_gguf
    from bitgen.quantize import Recipe, quantize

    source = write_model(folder / "floats.gguf", plain_model(small_config("llama", **TINY)))
    path = quantize(source, folder / f"{kind}.gguf", Recipe(kind, 32)).path
    file = read_gguf(path)
    os.truncate(path, max(t.offset + (t.size or 0) for t in file.tensors.values()))  # no padding at its end
    return path, file.header_bytes


OWN = ("codebook4", "bitmod3")
TYPES = (*TERNARY, "42 pq2_0", "42 stq1_0", *CODED, *OWN)


def hf_folder(folder: Path) -> Path:
    return write_folder(folder / "hf", plain_model(small_config("bitnet-b1.58", **TINY)), "packed", OFFLINE)


def nvfp4_folder(folder: Path, writer: str) -> Path:
    config = small_config("llama", **{**TINY, "hidden": 16, "ffn": 16, "head_dim": 8})
    return write_nvfp4(folder / writer, writer, config)[0]


def run(count: int, seed: int, step: int = 1) -> dict[str, dict[str, int]]:
    """All kinds of damage, ``count`` of each kind where it is random; the counts of each outcome.

    ``step``: between the lengths of GGUF files whose headers differ in one type alone.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, header = gguf_file(folder)
        others = [gguf_file(folder, name) for name in ("bitnet", "bitnet-embedding")]
        hf = hf_folder(folder)
        for each in (path, *(file for file, _ in others), hf):
            use_tokenizer(read_everything(each))  # everything is imported before the limits
        limit_memory()
        results: dict[str, Counter[str]] = {}
        for file, size in ((path, header), *others):
            content = file.read_bytes()
            kind = f"GGUF {file.stem}"
            results[f"{kind}, one byte"] = mutations(file, file, one_byte(content, count, rng, size))
            results[f"{kind}, one number"] = mutations(file, file, one_number(content, count, rng, size))
        weights = hf / "model.safetensors"
        content = weights.read_bytes()
        results["model.safetensors, one byte"] = mutations(hf, weights, one_byte(content, count, rng, 1400))
        for text in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            content = (hf / text).read_bytes()
            results[f"{text}, one character"] = mutations(hf, hf / text, one_character(content, count, rng))
        for text in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
            results[f"{text}, one value"] = json_values(hf, hf / text, count, rng)
        for writer in WRITERS:
            fp4 = nvfp4_folder(folder, writer)
            weights, kind = fp4 / "model.safetensors", f"NVFP4 of {writer}"
            content = weights.read_bytes()
            use_tokenizer(read_everything(fp4))
            results[f"{kind}, one byte"] = mutations(fp4, weights, one_byte(content, count, rng, 1400))
            results[f"{kind}, one value"] = json_values(fp4, weights, count, rng)
            results[f"{kind}, config.json, one value"] = json_values(fp4, fp4 / "config.json", count, rng)
            results[f"{kind}, every prefix"] = prefixes(fp4, weights)
        for kind in TYPES:
            file, size = typed_file(folder, kind)
            use_tokenizer(read_everything(file))
            content = file.read_bytes()
            results[f"GGUF {kind}, one byte"] = mutations(file, file, one_byte(content, count, rng, size))
            results[f"GGUF {kind}, one number"] = mutations(file, file, one_number(content, count, rng, size))
            results[f"GGUF {kind}, every prefix"] = prefixes(file, file, size, step)
        results |= {
            "GGUF llama, every prefix": prefixes(path, path),
            "GGUF bitnet-embedding, every prefix": prefixes(others[1][0], others[1][0]),
            "model.safetensors, every prefix": prefixes(hf, hf / "model.safetensors"),
            "tokenizer.json, every prefix": prefixes(hf_folder(folder), hf / "tokenizer.json"),
        }
    return {kind: dict(counts) for kind, counts in results.items()}


def prefixes(path: Path, damaged: Path, header: int | None = None, step: int = 1) -> Counter[str]:
    """Every length of ``damaged`` from its own down to 0; the file is spent afterwards.

    Where the size of the ``header`` is given, lengths up to it are taken by ``step``, beyond it by 61.
    """
    counts: Counter[str] = Counter()
    size = damaged.stat().st_size
    lengths = range(size) if header is None else [*range(0, header, step), *range(header, size, 61), size - 1]
    for length in sorted(lengths, reverse=True):
        os.truncate(damaged, length)
        counts[outcome(path)] += 1
    return counts


def limit_memory() -> None:
    """Fail, instead of filling the machine, when a file asks for too much."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="mutations of each file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step", type=int, default=1, help="between the lengths of files of each type")
    args = parser.parse_args()
    started = time.perf_counter()
    results = run(args.count, args.seed, args.step)
    print(json.dumps({"seconds": round(time.perf_counter() - started, 1), **results}, indent=2))


if __name__ == "__main__":
    main()
