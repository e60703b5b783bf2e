from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import (
    Plain,
    gguf_metadata,
    plain_model,
    small_config,
    tokenizer_json,
    write_folder,
    write_model,
)

from bitgen.cli import main
from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats.architectures import architecture_of
from bitgen.formats.convert import TYPES, convert
from bitgen.formats.gguf_tokenizer import tokenizer_metadata
from bitgen.formats.model_file import ModelFile
from bitgen.formats.open import open_model
from bitgen.tokenizer.tokenizer import Tokenizer

OFFLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
WIDE = {"hidden": 256, "ffn": 512, "heads": 4, "head_dim": 64, "layers": 1}


def same(a: ModelFile, b: ModelFile) -> None:
    """Both files hold the same model, bit for bit."""
    for name in ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "context", "rope_theta",
                 "activation", "sub_norms", "tied_head"):  # fmt: skip
        assert getattr(a.config, name) == getattr(b.config, name), name
    assert a.config.norm_eps == pytest.approx(b.config.norm_eps)
    assert a.config.rope_factors == b.config.rope_factors
    assert np.array_equal(a.weights.output.rows(0, a.config.vocab), b.weights.output.rows(0, b.config.vocab))
    assert np.array_equal(a.weights.embedding.data, b.weights.embedding.data)
    assert a.weights.embedding.type == b.weights.embedding.type
    assert np.array_equal(a.weights.final_norm, b.weights.final_norm)
    for x, y in zip(a.weights.layers, b.weights.layers, strict=True):
        for left, right in zip(x.matrices, y.matrices, strict=True):
            assert np.array_equal(left.rows(0, left.shape.m), right.rows(0, right.shape.m))
            rows = (left.shape.m,)
            assert np.array_equal(np.broadcast_to(left.scale, rows), np.broadcast_to(right.scale, rows))
        for norm in ("attn_norm", "ffn_norm", "attn_sub_norm", "ffn_sub_norm"):
            left_norm, right_norm = getattr(x, norm), getattr(y, norm)
            assert (left_norm is None and right_norm is None) or np.array_equal(left_norm, right_norm)


@pytest.mark.parametrize("kind", ["i2_s", "tq1_0", "tq2_0", "f16"])
@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-b1.58", "llama"])
@pytest.mark.parametrize("sizes", [WIDE, {}], ids=["blocks", "ragged"])
@pytest.mark.parametrize("form", ["packed", "floats"])
def test_every_weight_keeps_its_value(
    tmp_path: Path, architecture: str, kind: str, sizes: dict[str, Any], form: str
) -> None:
    model = plain_model(small_config(architecture, **sizes))
    folder = write_folder(tmp_path / "m", model, form, OFFLINE if form == "packed" else None)
    written = convert(folder, tmp_path / "m.gguf", kind)
    same(open_model(folder), open_model(tmp_path / "m.gguf"))
    stored = "f16" if kind == "f16" or not sizes else kind
    assert written.counts[stored] >= 7
    assert written.size == (tmp_path / "m.gguf").stat().st_size
    assert any("cannot be" in note for note in written.notes) == (stored != kind)
    assert open_model(tmp_path / "m.gguf").config.architecture == architecture


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "f16"])
def test_the_gguf_package_reads_the_same_values(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize

    model = plain_model(small_config("llama", **WIDE))
    model.scale["blk.0.ffn_up"] = 0.5  # f16 holds it: no tensor of its own
    convert(write_folder(tmp_path / "m", model, "packed", OFFLINE), tmp_path / "m.gguf", kind)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for key in ("blk.0.ffn_down", "blk.0.ffn_up", "blk.0.attn_v"):
        weight = tensors[key + ".weight"]
        values = dequantize(weight.data, weight.tensor_type)
        if key + ".scale" in tensors:
            values = values * tensors[key + ".scale"].data
        assert np.array_equal(values, model.w[key] * np.float32(model.scale[key]))
    assert "blk.0.ffn_up.scale" not in tensors
    assert "blk.0.ffn_down.scale" in tensors


def test_a_gguf_file_is_converted_to_another_type(tmp_path: Path) -> None:
    model = plain_model(small_config("llama", **WIDE))
    source = write_model(tmp_path / "a.gguf", model, "tq1_0")
    convert(source, tmp_path / "b.gguf", "i2_s")
    convert(tmp_path / "b.gguf", tmp_path / "c.gguf", "tq2_0")
    same(open_model(source), open_model(tmp_path / "c.gguf"))
    a, c = open_model(source).tokenizer_data, open_model(tmp_path / "c.gguf").tokenizer_data
    assert (a.tokens, a.bos, a.eos, a.add_bos) == (c.tokens, c.bos, c.eos, c.add_bos)
    assert a.scores is not None
    assert c.scores is not None
    assert np.array_equal(a.scores, c.scores)
    with pytest.raises(BitgenError, match="is the source itself"):
        convert(source, source)


def test_rope_factors_are_kept(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}  # fmt: skip
    model = plain_model(small_config("llama"))
    folder = write_folder(tmp_path / "m", model, "packed", OFFLINE, {"rope_scaling": scaling})
    convert(folder, tmp_path / "m.gguf")
    assert open_model(tmp_path / "m.gguf").config.rope_factors is not None
    same(open_model(folder), open_model(tmp_path / "m.gguf"))


def test_a_scale_of_zero_is_kept(tmp_path: Path) -> None:
    """I2_S holds it beside codes that are not zero; written with another scale they would come alive."""
    model = plain_model(small_config("llama", **WIDE))
    model.scale["blk.0.ffn_down"] = 0.0
    source = write_model(tmp_path / "a.gguf", model, "i2_s")
    for kind in ("i2_s", "f16", "tq2_0"):
        convert(source, tmp_path / "b.gguf", kind)
        down = open_model(tmp_path / "b.gguf").weights.layers[0].down
        assert not (down.rows(0, down.shape.m) * down.scale).any(), kind


def test_all_tokens_that_end_an_answer_are_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config("llama")))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, 3, 4]}))
    convert(folder, tmp_path / "m.gguf", "f16")
    convert(tmp_path / "m.gguf", tmp_path / "again.gguf", "f16")
    for path in (folder, tmp_path / "m.gguf", tmp_path / "again.gguf"):
        assert Tokenizer(open_model(path).tokenizer_data).end_ids == {10, 3, 4}
    metadata = gguf_metadata(small_config("llama"))
    for wrong in (np.array([99]), np.array([1.5])):
        bad = {**metadata, "tokenizer.bitgen.end_token_ids": wrong}
        path = write_model(tmp_path / "bad.gguf", plain_model(small_config("llama")), metadata=bad)
        with pytest.raises(BitgenError, match=r"tokenizer\.bitgen\.end_token_ids is"):
            _ = open_model(path).tokenizer_data


def test_rows_with_scales_of_their_own_are_kept(tmp_path: Path) -> None:
    """Ternary floats with a scale a row: F32 where F16 would round the scales."""
    model = plain_model(small_config("llama", **WIDE))
    folder = write_folder(tmp_path / "m", model, "floats")
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    from bitgen.formats.safetensors import read_safetensors

    down = read_safetensors(file)["model.layers.0.mlp.down_proj.weight"]
    values = down.data.view(np.float32).reshape(256, 512).copy()
    old = values.tobytes()
    values[100] *= np.float32(1.1)
    at = bytes(content).index(old)
    content[at : at + len(old)] = values.tobytes()
    file.write_bytes(content)
    written = convert(folder, tmp_path / "m.gguf", "i2_s")
    assert written.counts["i2_s"] == 6
    assert open_model(tmp_path / "m.gguf").weights.layers[0].down.scale.shape == (256,)
    same(open_model(folder), open_model(tmp_path / "m.gguf"))


def test_the_architecture_follows_the_forward_pass() -> None:
    assert architecture_of(small_config("bitnet-25")).name == "bitnet-25"
    assert architecture_of(replace(small_config("bitnet-b1.58"), activation="silu")).name == "bitnet"
    with pytest.raises(BitgenError, match="no GGUF architecture has relu2 with no others"):
        architecture_of(replace(small_config("llama"), activation="relu2"))


def test_the_command_names_every_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"\b{kind}\b", text) for kind in TYPES)


@pytest.mark.parametrize(
    ("out", "kind", "message", "code"),
    [
        ("no/such/m.gguf", "i2_s", "there is no folder", FileError.exit_code),
        (".", "i2_s", "is a folder", FileError.exit_code),
        ("m.gguf", "q3_0", "unknown type 'q3_0'; did you mean q4_0 or q2_0 or q1_0", UsageError.exit_code),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, out: str, kind: str, message: str, code: int) -> None:
    folder = write_folder(tmp_path / "m", plain_model(small_config()), "floats")
    with pytest.raises(BitgenError) as caught:
        convert(folder, tmp_path / out, kind)
    assert message in caught.value.message
    assert caught.value.exit_code == code


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    model = plain_model(small_config("bitnet-b1.58"))
    folder = write_folder(tmp_path / "m", model, "packed", OFFLINE)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-2000:-1000] = b"\xff" * 1000
    (folder / "model.safetensors").write_bytes(content)
    (tmp_path / "m.gguf").write_bytes(b"what was there")
    with pytest.raises(BitgenError):
        convert(folder, tmp_path / "m.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == b"what was there"


# ---- tokenizers ----


def converted(tmp_path: Path, tokenizer: dict[str, Any], model: Plain | None = None) -> ModelFile:
    folder = write_folder(tmp_path / "m", model or plain_model(small_config()), "floats")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    convert(folder, tmp_path / "m.gguf")
    return open_model(tmp_path / "m.gguf")


def test_a_byte_level_tokenizer_becomes_gpt2(tmp_path: Path) -> None:
    tokenizer = tokenizer_json(11)
    data = converted(tmp_path, tokenizer).tokenizer_data
    assert json.loads(data.json or "") == tokenizer
    assert (data.model, data.pre, data.merges) == ("gpt2", "gpt-2", ("a b",))
    assert data.tokens == ("a", "b", "c", "d", "e", "f", "g", "h", "ab", "<s>", "</s>")
    assert data.types is not None
    assert data.types.tolist() == [1] * 9 + [3, 3]
    assert (data.bos, data.eos, data.chat_template) == (9, 10, "{{ messages }}")


def test_a_tokenizer_with_byte_fallback_becomes_llama(tmp_path: Path) -> None:
    tokenizer = tokenizer_json(11)
    words = ["<unk>", "<0x0A>", "▁", "a", "b", "▁a", "ab"]
    tokenizer["model"] = {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>",
                          "byte_fallback": True, "merges": [["▁", "a"], ["a", "b"]]}  # fmt: skip
    tokenizer["pre_tokenizer"] = None
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
    data = converted(tmp_path, tokenizer).tokenizer_data
    assert data.model == "llama"
    assert data.tokens[:7] == tuple(words)
    assert data.tokens[7:] == ("[PAD7]", "[PAD8]", "<s>", "</s>")
    assert data.types is not None
    assert data.types.tolist() == [2, 6, 1, 1, 1, 1, 1, 5, 5, 3, 3]
    assert data.scores is not None
    assert data.scores.tolist() == [0, 0, 0, 0, 0, -1, -2, 0, 0, 0, 0]


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (
            [{"type": "Split", "pattern": {"Regex": LLAMA3}}, {"type": "ByteLevel", "use_regex": False}],
            "llama-bpe",
        ),
        ([{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}], "smollm"),
        (
            [{"type": "Split", "pattern": {"Regex": "x"}}, {"type": "ByteLevel", "use_regex": False}],
            "default",
        ),
    ],
)
def test_the_pre_tokenizer_is_named(tmp_path: Path, steps: list[Any], name: str) -> None:
    tokenizer = {**tokenizer_json(11), "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    assert converted(tmp_path, tokenizer).tokenizer_data.pre == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"type": "BPE", "vocab": {"a": 11}}},
            "the token 'a' has the id 11; the model has 11 rows",
        ),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, "the token 'a' has the id -1"),
        ({"model": {"type": "BPE", "vocab": {"a": "x"}}}, "the token 'a' has the id 'x'"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [["a"]]}},
            "a merge is neither a text nor a pair",
        ),
    ],
)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BitgenError) as caught:
        converted(tmp_path, {**tokenizer_json(11), **changes})
    assert message in caught.value.message


def test_another_tokenizer_is_kept_as_it_is(tmp_path: Path) -> None:
    tokenizer = {**tokenizer_json(11), "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    folder = write_folder(tmp_path / "m", plain_model(small_config()), "floats")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    metadata, notes = tokenizer_metadata(open_model(folder).tokenizer_data, 11)
    assert json.loads(metadata["tokenizer.huggingface.json"]) == tokenizer
    assert "tokenizer.ggml.tokens" not in metadata
    assert "WordLevel" in notes[0]


# ---- the command line ----


def test_convert_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(
        tmp_path / "m", plain_model(small_config("bitnet-b1.58", **WIDE)), "packed", OFFLINE
    )
    target = tmp_path / "m.gguf"
    assert main(["convert", str(folder), "-o", str(target)]) == 0
    assert "7 i2_s" in capsys.readouterr().out
    assert main(["inspect", str(target), "-o", "json", "--tensors", "--metadata"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["architecture"] == "bitnet-b1.58"
    i2_s = next(row for row in shown["types"] if row["type"] == "i2_s")
    values = 256 * 256 * 2 + 2 * 128 * 256 + 3 * 256 * 512
    assert (i2_s["tensors"], i2_s["values"], i2_s["bytes"]) == (7, values, values // 4 + 7 * 32)
    packed = {row["family"]: row for row in shown["bytes a token"]}
    assert packed["I2_S"]["ternary"] == values // 4
    assert packed["I2_S"]["head"] == 11 * 256 * 2
    assert packed["I2_S"]["total"] == values // 4 + 11 * 256 * 2
    assert packed["I2_S"]["kv_a_position"] == 2 * 2 * 128
    assert len(shown["tensors"]) == 1 + 1 + 4 + 7
    assert main(["inspect", "-m", str(folder)]) == 0
    assert "relu2" in capsys.readouterr().out


def test_failures_are_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF nonsense")
    assert main(["inspect", str(tmp_path / "x.gguf")]) == FileError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["inspect"]) == UsageError.exit_code
    assert main(["convert", str(tmp_path), "-o", str(tmp_path / "y.gguf")]) == FileError.exit_code


def test_nothing_in_a_file_steers_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"general.name": "evil\x1b]0;x\x07 \udce4", "x": "\x1b[2J", "y": ["\x1b[31m", "\r"]}
    path = write_model(tmp_path / "m.gguf", plain_model(small_config()), metadata=changes)
    assert main(["inspect", str(path), "--metadata"]) == 0
    assert "\x1b" not in capsys.readouterr().out
