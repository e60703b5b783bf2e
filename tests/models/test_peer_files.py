"""Other programs read the GGUF files written here, and find the same model in them.

Each runs in a process of its own, as in benchmarks/peers.py. Their logits are near, not equal: ik_llama.cpp
rounds activations in blocks of 32 where it runs Q8_0, llama.cpp in blocks of 256 (TQ1_0, TQ2_0) or 32 (Q4_0,
Q8_0), each block with a scale of its own; the model, and bitgen, have one scale a token. ik_llama.cpp does
not run I2_S as it is stored: its `llama-quantize` turns it into Q8_0 first, with a decoder of its own.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import plain_model, small_config, write_model
from numpy.typing import NDArray
from reference_model import logits_of
from smollm2 import smollm2

from bitgen.cpu import accepted_isas, detect_cpu, load_isas
from bitgen.formats.convert import convert
from bitgen.formats.open import open_model
from bitgen.inference.engine import Engine
from bitgen.inference.perplexity import perplexity
from bitgen.llm import LLM
from bitgen.paths import models_dir
from bitgen.runtime import load
from bitgen.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BEST = accepted_isas(detect_cpu(), load_isas())[0].name
IDS = [1, 260, 261, 262, 270, 280, 286, 265, 299, 1, 2, 3, 4, 263]
VOCAB = 300
WINDOW, WINDOWS = 512, 4  # of held-out text
HELD_OUT = (Path(__file__).parents[1] / "data" / "tiny-heldout.txt").read_text(encoding="utf-8")
PEERS = {
    "ik": ("ik_llama_cpp", "ik-llama-cpp-python 0.1.5"),
    "llama": ("llama_cpp", "llama-cpp-python 0.3.36"),
}


def require(peer: str) -> None:
    """Skip where the peer is not installed, before anything is done for it."""
    module, package = PEERS[peer]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{package} is the peer, and not installed")


def peer_logits(peer: str, path: Path, folder: Path, texts: Sequence[Sequence[int]]) -> list[NDArray[Any]]:
    """Of each text float32 (tokens, vocabulary), one step a token."""
    outs = [folder / f"{number}.logits" for number in range(len(texts))]
    requests = [
        json.dumps({"do": "steps", "tokens": list(text), "out": str(out)})
        for text, out in zip(texts, outs, strict=True)
    ]
    command = [sys.executable, str(BENCHMARKS / f"peer_{peer}.py"), str(path), "--no-flash"]
    done = subprocess.run(
        command, input="\n".join(requests), capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [np.fromfile(out, "<f4").reshape(len(text), -1) for text, out in zip(texts, outs, strict=True)]


def q8_0_of(path: Path, folder: Path) -> Path:
    """What ik_llama.cpp's own tool makes of an I2_S file."""
    quantize = pytest.importorskip("ik_llama_cpp.quantize", reason="ik-llama-cpp-python 0.1.5 is the peer")
    out = folder / "q8_0.gguf"
    command = [str(quantize.find_quantize_bin()), "--allow-requantize", str(path), str(out), "q8_0"]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    return out


def small_model(folder: Path, architecture: str, kind: str) -> Path:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    config = small_config(
        architecture,
        hidden=512,
        ffn=1024,
        heads=8,
        kv_heads=4,
        head_dim=64,
        vocab=VOCAB,
        layers=3,
        context=256,
    )
    model = plain_model(config, seed=3)
    model.scale = {key: float(np.float32(0.05 * value)) for key, value in model.scale.items()}
    tokenizer = {
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": np.zeros(VOCAB, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)], np.int32),
    }
    convert(write_model(folder / "source.gguf", model, metadata=tokenizer), folder / "m.gguf", kind)
    return folder / "m.gguf"


@pytest.mark.parametrize(
    ("peer", "architecture", "kind"),
    [
        ("ik", "bitnet", "i2_s"),
        ("ik", "bitnet-b1.58", "i2_s"),
        ("ik", "bitnet-25", "i2_s"),
        ("ik", "llama", "i2_s"),
        ("ik", "bitnet", "f16"),
        ("llama", "bitnet", "tq2_0"),
        ("llama", "bitnet", "tq1_0"),
        ("llama", "bitnet", "f16"),
    ],
)
def test_the_peer_finds_the_same_model(tmp_path: Path, peer: str, architecture: str, kind: str) -> None:
    require(peer)
    path = small_model(tmp_path, architecture, kind)
    runnable = q8_0_of(path, tmp_path) if kind == "i2_s" else path
    (got,) = peer_logits(peer, runnable, tmp_path, [IDS])
    expected = logits_of(open_model(path).weights, IDS)
    cosine = (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.997
    assert np.array_equal(got.argmax(axis=1), expected.argmax(axis=1))


def windows_nll(found: Sequence[NDArray[Any]], windows: Sequence[Sequence[int]]) -> list[float]:
    """-log p of each window's second half, which is what llama.cpp's perplexity predicts."""
    nll: list[float] = []
    for window, logits in zip(windows, found, strict=True):
        first = len(window) // 2
        rows = logits[first : len(window) - 1].astype(np.float64)
        top = rows.max(axis=1)
        total = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
        nll += [t - row[target] for t, row, target in zip(total, rows, window[first + 1 :], strict=True)]
    return nll


def test_text_and_perplexity_of_the_tiny_model(
    tmp_path: Path, level_library: Callable[[str], Path], bitgen_home: Path
) -> None:
    """The file that ships: its recorded greedy texts, and llama.cpp's windows over held-out text."""
    assert bitgen_home
    require("ik")
    runnable = q8_0_of(models_dir() / "tiny.gguf", tmp_path)
    greedy = json.loads((models_dir() / "tiny.json").read_text())["greedy"]
    with LLM("tiny", library=level_library(BEST), threads=2) as llm:
        ids = llm.tokenizer.encode(HELD_OUT)
        *_, ours = perplexity(llm, HELD_OUT, WINDOW, most=WINDOWS)
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
    found = peer_logits("ik", runnable, tmp_path, [*windows, *(g["ids"] + g["tokens"] for g in greedy)])
    nll = windows_nll(found[:WINDOWS], windows)
    assert len(nll) == ours.tokens
    # Measured: 23.911 and bitgen's 23.927. Finer scales of activations move it by less than a thousandth.
    assert math.isclose(math.exp(np.mean(nll)), ours.value, rel_tol=2e-3)
    equal = [
        logits[len(g["ids"]) - 1 : -1].argmax(axis=1) == g["tokens"]
        for g, logits in zip(greedy, found[WINDOWS:], strict=True)
    ]
    assert np.concatenate(equal).sum() >= 188, "of 192 tokens; 191 were measured"


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "Q4_0"])
def test_text_and_perplexity_in_llama_cpp(
    tmp_path: Path,
    level_library: Callable[[str], Path],
    bitgen_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """llama.cpp knows no relu²: the tiny model's weights as a bitnet model with a silu gate, in one file."""
    assert bitgen_home
    require("llama")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from make_peer_model import write_file

    tiny = open_model("tiny")
    ids = Tokenizer(tiny.tokenizer_data).encode(HELD_OUT)
    windows = [ids[i * WINDOW : (i + 1) * WINDOW] for i in range(WINDOWS)]
    silu = replace(tiny.weights, config=replace(tiny.config, activation="silu", architecture="bitnet"))
    path = tmp_path / "m.gguf"
    write_file(path, silu, kind)
    # bitgen reads TQ types; Q4_0 is no type of ternary matrices here.
    source = open_model(path).weights if kind.startswith("TQ") else silu
    prompts = [ids[at : at + 16] for at in range(600, 5000, 1100)]
    with load(level_library(BEST), 2) as table:
        texts = [greedy(Engine(source, table, context=WINDOW), prompt, 32) for prompt in prompts]
        ours = [feed(Engine(source, table, context=WINDOW), window) for window in windows]
    found = peer_logits("llama", path, tmp_path, [*windows, *texts])
    values = [math.exp(np.mean(windows_nll(each, windows))) for each in (found[:WINDOWS], ours)]
    # Measured: 27.186 (TQ) and 27.163 (Q4_0) against bitgen's 27.174 and 27.177.
    assert math.isclose(*values, rel_tol=2e-3)
    equal = [
        logits[15:-1].argmax(axis=1) == text[16:] for logits, text in zip(found[WINDOWS:], texts, strict=True)
    ]
    assert np.concatenate(equal).sum() >= 124, "of 128 tokens; all were measured"


def feed(engine: Engine, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits (len(ids), vocabulary) of what goes on from where the engine is."""
    n, at = len(ids), engine.lengths[0]
    positions = np.arange(at, at + n, dtype=np.int32)
    return engine.forward(np.array(ids, np.int32), positions, np.zeros(n, np.int32), np.ones(n, bool))


def greedy(engine: Engine, prompt: Sequence[int], count: int) -> list[int]:
    """The prompt and the ``count`` tokens that are likeliest after it."""
    text, new = list(prompt), list(prompt)
    for _ in range(count):
        new = [int(feed(engine, new)[-1].argmax())]
        text += new
    return text


@pytest.mark.parametrize("peer", ["ik", "llama"])
def test_smollm2_in_peers(tmp_path: Path, bitgen_home: Path, peer: str) -> None:
    """An ordinary llama of Q4_1, the same file: perplexity over held-out text, and what is likeliest next."""
    assert bitgen_home
    path = smollm2()
    require(peer)
    with LLM(path, threads=2, context=WINDOW) as llm:
        window = llm.tokenizer.encode(HELD_OUT)[: WINDOW // 2]
        ours = llm.logits(window)
    (found,) = peer_logits(peer, path, tmp_path, [window])
    values = [math.exp(np.mean(windows_nll([each], [window]))) for each in (found, ours)]
    # Measured: ik_llama.cpp 29.57, bitgen 29.85, floats 29.62; the same token is likeliest at 94 %.
    assert math.isclose(*values, rel_tol=2e-2)
    assert (ours.argmax(axis=1) == found.argmax(axis=1)).mean() > 0.9
