"""Another program reads the GGUF files written here, and finds the same model in them.

ik_llama.cpp does not run I2_S as it is stored: its `llama-quantize` turns it into Q8_0 first, with a decoder
of its own. Its activations are rounded in blocks of 32, so logits are near, not equal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from model_files import plain_model, small_config, write_model
from reference_model import logits_of

from bitgen.model import open_model
from bitgen.model.convert import convert

peer = pytest.importorskip("ik_llama_cpp", reason="ik-llama-cpp-python 0.1.5 is the peer")

IDS = [1, 260, 261, 262, 270, 280, 286, 265, 299, 1, 2, 3, 4, 263]
VOCAB = 300
RUN = """
import sys
import numpy as np
from ik_llama_cpp import IkLlama, _ctypes_api as api
from ik_llama_cpp._internals import make_batch_single
llm = IkLlama(sys.argv[1], n_ctx=256, n_threads=1, flash_attn=False, verbose=False)
context = llm._context
rows = []
for position, token in enumerate(map(int, sys.argv[3].split(","))):
    context.decode(make_batch_single(token, position))
    rows.append(np.ctypeslib.as_array(api.llama_get_logits_ith(context.ctx, -1), (int(sys.argv[4]),)).copy())
np.save(sys.argv[2], np.stack(rows))
"""


def peer_logits(path: Path, folder: Path) -> np.ndarray:
    """float32 (len(IDS), VOCAB), computed by the peer in a process of its own."""
    command = [
        sys.executable,
        "-c",
        RUN,
        str(path),
        str(folder / "logits.npy"),
        ",".join(map(str, IDS)),
        str(VOCAB),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logits: np.ndarray = np.load(folder / "logits.npy")
    return logits


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("bitnet", "i2_s"),
        ("bitnet-b1.58", "i2_s"),
        ("bitnet-25", "i2_s"),
        ("llama", "i2_s"),
        ("bitnet", "f16"),
    ],
)
def test_the_peer_finds_the_same_model(tmp_path: Path, architecture: str, kind: str) -> None:
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
    convert(write_model(tmp_path / "source.gguf", model, metadata=tokenizer), tmp_path / "m.gguf", kind)
    runnable = tmp_path / "m.gguf"
    if kind == "i2_s":
        runnable = tmp_path / "q8_0.gguf"
        command = [
            str(peer.find_quantize_bin()),
            "--allow-requantize",
            str(tmp_path / "m.gguf"),
            str(runnable),
            "q8_0",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    expected = logits_of(open_model(tmp_path / "m.gguf").weights, IDS)
    got = peer_logits(runnable, tmp_path)
    cosine = (got * expected).sum(axis=1) / np.linalg.norm(got, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.997
    assert np.array_equal(got.argmax(axis=1), expected.argmax(axis=1))
