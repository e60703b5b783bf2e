"""Vectors of texts, on the numpy engine: there the state of a token is its logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import plain_model, small_config, write_folder, write_model, write_safetensors
from reference_model import logits_of
from text_models import small_llm, weights

from bitgen.cli import main
from bitgen.cli.embed import _lines
from bitgen.errors import FileError, UsageError
from bitgen.formats.convert import convert
from bitgen.formats.gguf import U32
from bitgen.formats.open import open_model
from bitgen.formats.pooling import pooling_of
from bitgen.formats.quants import dequantize
from bitgen.formats.safetensors import read_safetensors
from bitgen.llm import LLM

TEXTS = ["the and", "a", "then the hand on the land", "and"]


@pytest.fixture
def llm() -> LLM:
    return small_llm(batch=3)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_what_the_formula_says(llm: LLM, pooling: Any) -> None:
    """Three texts at once, then one; and again from a scheduler that held other texts."""
    for _ in range(2):
        for text, vector in zip(TEXTS, llm.embed(TEXTS, pooling), strict=True):
            states = logits_of(weights(), llm.tokenizer.encode(text)).astype(np.float64)
            state = states[-1] if pooling == "last" else states.mean(axis=0)
            assert vector.dtype == np.float32
            np.testing.assert_allclose(vector, state / np.linalg.norm(state), atol=1e-5)
        assert "".join(llm.generate("the", max_tokens=2, temperature=0)) is not None
    assert np.array_equal(next(llm.embed(TEXTS, pooling)), next(llm.embed(TEXTS[:1], pooling)))


def test_eos_is_appended_where_the_model_wants_it() -> None:
    llm = small_llm(batch=1, add_bos=False, add_eos=True)
    ids = llm.tokenizer.encode("the and")
    assert ids[-1] == llm.tokenizer.eos
    state = logits_of(weights(), ids)[-1].astype(np.float64)
    np.testing.assert_allclose(next(llm.embed(["the and"])), state / np.linalg.norm(state), atol=1e-5)


def test_what_cannot_be_embedded_is_refused(llm: LLM) -> None:
    with pytest.raises(UsageError, match="context"):
        list(llm.embed(["a", "and " * 300]))
    without_bos = small_llm(add_bos=False)
    with pytest.raises(UsageError, match="text 2 is empty"):
        list(without_bos.embed(["a", ""]))


def test_pooling_is_what_the_file_says(tmp_path: Path) -> None:
    model = plain_model(small_config("llama"))
    for number, expected in ((0, None), (1, "mean"), (3, "last")):
        path = write_model(tmp_path / "m.gguf", model, metadata={"llama.pooling_type": U32(number)})
        assert pooling_of(open_model(path)) == expected
    path = write_model(tmp_path / "m.gguf", model, metadata={"llama.pooling_type": U32(2)})
    with pytest.raises(FileError, match=r"pooling_type is 2; 1 \(mean\) and 3 \(last\) are supported"):
        pooling_of(open_model(path))
    folder = write_folder(tmp_path / "hf", model)
    assert pooling_of(open_model(folder)) is None
    (folder / "1_Pooling").mkdir()
    config = folder / "1_Pooling" / "config.json"
    modes = {
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_lasttoken": True,
    }
    config.write_text(json.dumps({"word_embedding_dimension": 24, **modes}))
    assert pooling_of(open_model(folder)) == "last"
    config.write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(FileError, match="pooling_mode_cls_token"):
        pooling_of(open_model(folder))


@pytest.mark.parametrize("number", [0, 1, 3])
def test_bitnet_embedding_is_pooled_at_its_last_token(tmp_path: Path, number: int) -> None:
    """Whatever the file says: bitnet.cpp's converter writes "mean" where it finds nothing."""
    model = plain_model(small_config("bitnet-embedding"))
    opened = open_model(write_model(tmp_path / "m.gguf", model, metadata={"qwen3.pooling_type": U32(number)}))
    assert opened.config.architecture == "bitnet-embedding"
    assert pooling_of(opened) == "last"
    written = open_model(convert(opened.path, tmp_path / "out.gguf", "f16").path)
    assert written.metadata["general.architecture"] == "qwen3"
    assert written.metadata["qwen3.pooling_type"] == 3


def test_a_folder_of_bitnet_embedding(tmp_path: Path) -> None:
    """Names with and without `model.`, a class with a head and one without, and its flag of ties."""
    model = plain_model(small_config("bitnet-embedding"))
    expected = None
    for number, changes in enumerate(
        ({}, {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": None})
    ):
        folder = write_folder(tmp_path / str(number), model, "floats", None, changes)
        if number:
            path = folder / "model.safetensors"
            tensors = {
                name.removeprefix("model."): ("F32", values.astype(np.float32))
                for name, values in read_tensors(path).items()
            }
            write_safetensors(path, tensors)
        opened = open_model(folder)
        assert (opened.config.architecture, opened.config.group) == ("bitnet-embedding", 0)
        assert opened.config.tied_head
        states = logits_of(opened.weights, [1, 5, 7])
        expected = states if expected is None else expected
        np.testing.assert_array_equal(states, expected)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return {
        name: dequantize(one.type, one.data.reshape(1, -1), math.prod(one.shape)).reshape(one.shape)
        for name, one in read_safetensors(path).items()
    }


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"\xe9")
    for arguments, code, message in (
        (["-p", "x", "--pooling", "cls"], 2, "pooling must be last or mean, not 'cls'"),
        (["-f", str(tmp_path / "empty")], 2, "has no lines"),
        (["-f", str(tmp_path / "latin")], 5, "is not UTF-8 text"),
        (["-f", str(tmp_path / "none")], 5, "No such file"),
        (["-p", "x", "-o", str(tmp_path / "no" / "v.npy")], 5, "there is no folder"),
    ):
        assert main(["embed", "-m", "tiny", *arguments]) == code
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    """Others (form feeds, U+2028) are text: there are as many vectors as lines."""
    path = tmp_path / "texts"
    path.write_bytes("one\u2028still one\r\ntwo\x0c\x85\n\nfour".encode())
    assert _lines(path) == ["one\u2028still one", "two\x0c\x85", "", "four"]
    path.write_bytes(b"one\n")
    assert _lines(path) == ["one"]
