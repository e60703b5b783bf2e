"""MiniCPM: a llama with factors for embeddings, branches and logits, which reading folds into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import model_files
import numpy as np
import pytest
from model_files import Plain, plain_model, refused, small_config, tensor, write_folder, write_model
from numpy.typing import NDArray
from reference_model import logits_of, rms_norm, rope

from bitgen.formats.convert import convert
from bitgen.formats.gguf import U32, NewTensor
from bitgen.formats.open import open_model
from bitgen.formats.quants import DENSE

IDS = [1, 5, 7, 10, 2]
Doubles = NDArray[np.float64]


def formula(model: Plain, embedding: float, branch: float, logits: float, eps: float = 1e-5) -> Doubles:
    """The model from its definition, every factor where it stands."""
    c, n = model.config, len(IDS)
    positions = np.arange(n, dtype=np.int32)

    def times(i: int, name: str, x: Doubles) -> Doubles:
        key = f"blk.{i}.{name}"
        product: Doubles = x @ (model.w[key].astype(np.float64) * model.scale[key]).T
        return product

    x = model.embedding[IDS].astype(np.float64) * embedding
    for i in range(c.layers):
        normed = rms_norm(x, model.vectors[f"blk.{i}.attn_norm.weight"], eps)
        q, k, v = (times(i, f"attn_{r}", normed).reshape(n, -1, c.head_dim) for r in "qkv")
        q, k = rope(q, positions, c), rope(k, positions, c)
        k, v = k.repeat(c.heads // c.kv_heads, axis=1), v.repeat(c.heads // c.kv_heads, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.exp(scores + np.triu(np.full((n, n), -np.inf), 1))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(axis=2, keepdims=True), v)
        x = x + branch * times(i, "attn_output", mixed.reshape(n, -1))
        normed = rms_norm(x, model.vectors[f"blk.{i}.ffn_norm.weight"], eps)
        gate = times(i, "ffn_gate", normed)
        inner = gate / (1 + np.exp(-gate)) * times(i, "ffn_up", normed)
        x = x + branch * times(i, "ffn_down", inner)
    assert model.head is not None
    made: Doubles = rms_norm(x, model.vectors["output_norm.weight"], eps) @ model.head.T * logits
    return made


def minicpm(path: Path, metadata: Mapping[str, Any], more: tuple[NewTensor, ...] = ()) -> tuple[Path, Plain]:
    """A file whose rows of q and k are as those of a llama, whatever the test writes into its metadata."""
    model = plain_model(small_config("llama"))
    own = {f"minicpm{k.removeprefix('llama')}": v for k, v in model_files.gguf_metadata(model.config).items()}
    known = {k: v for k, v in own.items() if k.startswith("minicpm.")}
    return write_model(
        path, model, metadata={"general.architecture": "minicpm", **known, **metadata}, more=more
    ), model


@pytest.mark.parametrize(
    ("metadata", "factors"),
    [
        ({}, (12.0, 1.4 / np.sqrt(2), 256 / 24)),
        (
            {"minicpm.embedding_scale": 3.0, "minicpm.residual_scale": 0.25, "minicpm.logit_scale": 8.0},
            (3.0, 0.25, 1 / 8),
        ),
    ],
)
def test_a_file_gives_what_the_formula_gives(
    tmp_path: Path, metadata: dict[str, float], factors: tuple[float, float, float]
) -> None:
    path, model = minicpm(tmp_path / "m.gguf", metadata)
    opened = open_model(path)
    assert (opened.config.architecture, opened.config.group) == ("llama", 128)
    got, expected = logits_of(opened.weights, IDS, rounds=False), formula(model, *factors)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_folder_gives_what_the_formula_gives(tmp_path: Path) -> None:
    model = plain_model(small_config("llama"))
    names = {
        "architectures": ["MiniCPMForCausalLM"],
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 8,
    }
    folder = write_folder(tmp_path / "hf", model, "floats", None, names)
    got = logits_of(open_model(folder).weights, IDS, rounds=False)
    expected = formula(model, 12, 1.4 / np.sqrt(2), 8 / 24)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_it_is_written_as_the_llama_that_it_became(tmp_path: Path) -> None:
    """Nothing is folded twice."""
    path, _ = minicpm(tmp_path / "m.gguf", {})
    out = convert(path, tmp_path / "out.gguf", "f16").path
    again = open_model(out)
    assert again.metadata["general.architecture"] == "llama"
    a, b = (logits_of(one.weights, IDS, rounds=False) for one in (open_model(path), again))
    np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


def longrope(short: list[float], long: list[float]) -> tuple[NewTensor, ...]:
    return tuple(
        tensor(f"rope_factors_{name}.weight", np.array(values, np.float32), DENSE["f32"].id)
        for name, values in (("short", short), ("long", long))
    )


def test_longrope(tmp_path: Path) -> None:
    scaling = {"minicpm.rope.scaling.type": "longrope"}
    path, _ = minicpm(tmp_path / "a.gguf", scaling, longrope([1.5, 2, 3], [1.5, 2, 3]))
    config = open_model(path).config
    assert (config.rope_factors, config.context) == ((1.5, 2.0, 3.0), 64)
    original = {**scaling, "minicpm.rope.scaling.original_context_length": U32(32)}
    path, _ = minicpm(tmp_path / "b.gguf", original, longrope([1.5, 2, 3], [4, 5, 6]))
    config = open_model(path).config
    assert (config.rope_factors, config.context) == ((1.5, 2.0, 3.0), 32)
    wide = {**scaling, "minicpm.rope.scaling.attn_factor": 1.2}
    path, _ = minicpm(tmp_path / "c.gguf", wide, longrope([1] * 3, [1] * 3))
    assert "attn_factor is not 1, which is not supported with longrope" in refused(path)
    path, _ = minicpm(tmp_path / "d.gguf", scaling, longrope([1, 1], [1, 1]))
    assert "rope_factors_short.weight has the shape 2" in refused(path)


@pytest.mark.parametrize(
    ("key", "value"), [("embedding_scale", 0.0), ("residual_scale", float("nan")), ("logit_scale", -1.0)]
)
def test_factors_that_are_none_are_refused(tmp_path: Path, key: str, value: float) -> None:
    path, _ = minicpm(tmp_path / "m.gguf", {f"minicpm.{key}": value})
    assert f"minicpm.{key} is {value:g}, which is no factor" in refused(path)
