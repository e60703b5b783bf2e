"""One record is an architecture: reader, writer, random models and engine follow it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import model_files
import numpy as np
import pytest
from model_files import plain_model, small_config, write_folder
from reference_model import logits_of

from bitgen.formats.architectures import ARCHITECTURES, Architecture, Tensor, architecture_of
from bitgen.formats.convert import convert
from bitgen.formats.gguf import read_gguf
from bitgen.formats.open import open_model
from bitgen.inference.synthetic import random_weights

NORMS = {
    "attn_norm": Tensor("input_norm", ("norm_of_attention",), ("hidden",)),
    "ffn_norm": Tensor("ffn_norm", ("norm_of_ffn",), ("hidden",)),
}


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """An architecture with a class and names of its own."""
    record = Architecture("toy", "relu2", NORMS, hf_classes=("ToyForCausalLM",), master_weights=False)
    monkeypatch.setitem(ARCHITECTURES, "toy", record)
    for field, tensor in NORMS.items():
        monkeypatch.setitem(model_files.HF_NAMES, field, tensor.hf[0])
    return record


def test_a_new_record_is_read_and_written(toy: Architecture, tmp_path: Path) -> None:
    config = replace(small_config("llama"), activation="relu2")
    changes = {"architectures": list(toy.hf_classes), "hidden_act": "relu2"}
    folder = write_folder(tmp_path / "m", plain_model(config), "floats", None, changes)
    opened = open_model(folder)
    assert (opened.config.architecture, opened.config.sub_norms) == ("toy", False)
    convert(folder, tmp_path / "m.gguf", "f16")
    written = read_gguf(tmp_path / "m.gguf")
    assert written.metadata["general.architecture"] == "toy"
    assert "blk.0.input_norm.weight" in written.tensors
    again = open_model(tmp_path / "m.gguf")
    assert again.config.architecture == "toy"
    assert np.array_equal(logits_of(opened.weights, [1, 5, 7]), logits_of(again.weights, [1, 5, 7]))


def test_random_models_have_the_norms_of_their_architecture() -> None:
    for name in ("llama", "bitnet", "bitnet-25", "bitnet-embedding"):
        config = small_config(name)
        layer, found = random_weights(config).layers[0], architecture_of(config)
        assert (layer.attn_sub_norm is not None) == config.sub_norms == found.sub_norms
        assert (layer.up_norm_in is not None) == config.input_norms == found.input_norms


def test_every_record_names_each_tensor_once() -> None:
    for record in ARCHITECTURES.values():
        tensors = [*record.matrices.values(), *record.norms.values()]
        names = [tensor.gguf for tensor in tensors] + [name for tensor in tensors for name in tensor.hf]
        assert len(set(names) - {t.gguf for t in tensors}) + len(tensors) == len(names)
        for tensor in tensors:
            assert all(size >= 1 for size in tensor.shape(small_config(record.name)))
