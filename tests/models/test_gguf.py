from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import (
    gguf_metadata,
    plain_model,
    refused,
    small_config,
    stored_rows,
    tensor,
    ternary_tensors,
    write_model,
)

from bitgen.errors import BitgenError
from bitgen.formats.architectures import half_to_interleaved, interleaved_to_half
from bitgen.formats.gguf import U32, NewTensor, read_gguf, write_gguf
from bitgen.formats.open import open_model
from bitgen.formats.ternary import TERNARY, encode_blocks

WIDE = {"hidden": 256, "ffn": 512, "heads": 4, "head_dim": 64, "layers": 1}  # sizes that every type can hold


# ---- the container ----


def test_metadata_of_every_type_comes_back(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the file")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "bitnet")
    for kind, value in {
        "uint8": 200,
        "int8": -5,
        "uint16": 60000,
        "int16": -300,
        "uint32": 1 << 31,
        "int32": -70000,
        "uint64": 1 << 40,
        "int64": -(1 << 40),
    }.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_float32("x.float32", 0.1)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "Grüße 你好")
    writer.add_array("x.ints", [1, -2, 3])
    writer.add_array("x.floats", [0.5, 1.5])
    writer.add_array("x.bools", [True, False])
    writer.add_array("x.strings", ["a", "", "ü"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    m = read_gguf(path).metadata
    assert (m["x.uint8"], m["x.int8"], m["x.uint16"], m["x.int16"]) == (200, -5, 60000, -300)
    assert (m["x.uint32"], m["x.int32"], m["x.uint64"], m["x.int64"]) == (
        1 << 31,
        -70000,
        1 << 40,
        -(1 << 40),
    )
    assert (m["x.float32"], m["x.float64"]) == (float(np.float32(0.1)), 0.1)
    assert m["x.bool"] is True
    assert m["x.string"] == "Grüße 你好"
    assert m["x.ints"].tolist() == [1, -2, 3]
    assert m["x.floats"].tolist() == [0.5, 1.5]
    assert m["x.bools"].tolist() == [True, False]
    assert m["x.strings"] == ("a", "", "ü")
    assert m.array_length("x.strings") == 3
    assert m.array_length("x.bool") is None


def test_our_files_are_read_by_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package reads the file")
    model = plain_model(small_config("bitnet", **WIDE))
    reader = gguf.GGUFReader(write_model(tmp_path / "m.gguf", model, "tq2_0"))
    assert reader.get_field("bitnet.embedding_length").contents() == 256
    assert reader.get_field("tokenizer.ggml.tokens").contents()[:2] == ["w0", "w1"]
    tensors = {t.name: t for t in reader.tensors}
    ours = read_gguf(tmp_path / "m.gguf")
    assert set(tensors) == set(ours.tensors)
    for name, info in ours.tensors.items():
        assert tensors[name].shape.tolist() == list(info.shape[::-1])
        assert np.array_equal(tensors[name].data.reshape(-1).view(np.uint8), ours.bytes_of(info))


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    token = b"\xe4\xbd".decode("utf-8", "surrogateescape")
    write_gguf(tmp_path / "m.gguf", {"x.tokens": ["a", token]}, [])
    assert read_gguf(tmp_path / "m.gguf").metadata["x.tokens"] == ("a", token)


def test_version_2_is_read_and_others_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", plain_model(small_config()))
    content = path.read_bytes()
    for version, text in ((1, "GGUF version 1"), (4, "GGUF version 4"), (3 << 24, "big-endian GGUF")):
        path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        assert f"is {text}; bitgen reads little-endian versions 2 and 3" in refused(path)
    path.write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    assert open_model(path).config.hidden == 24


def array(kind: int, count: int) -> bytes:
    """A header whose one metadata value claims to be an array."""
    return b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, kind, count) + bytes(40)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip file", "does not start with the letters GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "1152921504606846976 tensors do not fit into it"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 62), "metadata values do not fit into it"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 50) + bytes(40),
            "a metadata key of 1125899906842624 bytes",
        ),
        (array(9, 1), "k is an array of arrays"),
        (array(8, 1 << 40), "has 1099511627776 strings"),
        (array(5, 1 << 40), "elements of k do not fit"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 13) + bytes(40), "k has the unknown type 13"),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\x1b") + bytes(40), "is no printable text"),
        (
            b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 8) + struct.pack("<Q", 100),
            "ends inside its header",
        ),
    ],
)
def test_counts_and_lengths_are_compared_with_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert message in refused(path)


def test_a_file_of_a_hugging_face_model_asks_for_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"PK\x03\x04")
    assert refused(path).endswith(
        "does not start with the letters GGUF: of a Hugging Face model give the folder"
    )


def info(name: str, shape: tuple[int, ...], type_id: int = 0, size: int = 64) -> NewTensor:
    return NewTensor(name, shape, type_id, size, lambda: [np.zeros(size, np.uint8)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([info("a", (16,)), info("a", (16,))], "the tensor a is duplicated"),
        ([info("a", (32,)), info("b", (16,))], "the tensors a and b overlap"),
        ([info("a", (1 << 20,))], "the tensor a ends after the file"),
        ([info("a", (1 << 40, 1 << 40))], "the tensor a has the sizes"),
        ([info("a", (0, 4))], "the tensor a has the sizes"),
        ([info("a", (1, 1, 1, 1, 16))], "the tensor a has 5 dimensions"),
        ([info("a", (4, 100), 14)], "rows of 100 in a are no whole blocks of q6_k"),
    ],
)
def test_tensors_lie_inside_the_file_and_apart(
    tmp_path: Path, tensors: list[NewTensor], message: str
) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, tensors)
    assert message in refused(path)


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.gguf")
    assert "neither config.json nor a .gguf file" in refused(tmp_path)
    model = plain_model(small_config())
    write_model(tmp_path / "a.gguf", model)
    assert open_model(tmp_path).path == tmp_path / "a.gguf"
    write_model(tmp_path / "b.gguf", model)
    assert "2 .gguf files: name one" in refused(tmp_path)


def test_the_fingerprint_changes_with_header_time_and_size(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", plain_model(small_config()))
    first = open_model(path).fingerprint
    assert open_model(path).fingerprint == first
    write_model(path, plain_model(small_config()), metadata={"general.name": "other"})
    assert open_model(path).fingerprint.header != first.header
    assert open_model(path).fingerprint.key != first.key


# ---- weights ----


@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-25", "bitnet-b1.58", "llama"])
@pytest.mark.parametrize("kind", ["i2_s", "tq1_0", "tq2_0", "f16+scale", "f32", "f16", "bf16", "q8_0"])
def test_every_matrix_comes_back(tmp_path: Path, architecture: str, kind: str) -> None:
    model = plain_model(small_config(architecture, **WIDE))
    if kind in ("bf16", "f16", "q8_0"):  # scales that these types can hold
        model.scale = dict.fromkeys(model.scale, 127 / 256)
    weights = open_model(write_model(tmp_path / "m.gguf", model, kind)).weights
    c = model.config
    layer = weights.layers[0]
    parts = {
        "qkv": (layer.qkv, ["attn_q", "attn_k", "attn_v"]),
        "o": (layer.o, ["attn_output"]),
        "gate_up": (layer.gate_up, ["ffn_gate", "ffn_up"]),
        "down": (layer.down, ["ffn_down"]),
    }
    for matrix, names in parts.values():
        keys = [f"blk.0.{name}" for name in names]
        expected = np.concatenate([model.w[key] for key in keys])
        scales = np.concatenate([np.full(len(model.w[key]), model.scale[key], np.float32) for key in keys])
        assert (matrix.shape.m, matrix.shape.k) == expected.shape
        assert np.array_equal(matrix.rows(0, matrix.shape.m), expected)
        assert np.array_equal(matrix.rows(5, 77), expected[5:77])
        assert np.array_equal(np.broadcast_to(matrix.scale, scales.shape), scales)
    assert layer.down.scale.shape == (1,)
    assert layer.qkv.scale.shape == (layer.qkv.shape.m,)
    assert np.array_equal(layer.attn_norm, model.vectors["blk.0.attn_norm.weight"])
    assert (layer.attn_sub_norm is not None) == c.sub_norms
    assert np.array_equal(weights.embedding.row(3), model.embedding[3])
    assert np.array_equal(
        weights.output.rows(0, c.vocab), model.embedding if model.head is None else model.head
    )


def test_sizes_that_fit_no_block(tmp_path: Path) -> None:
    model = plain_model(small_config())
    layers = open_model(write_model(tmp_path / "m.gguf", model)).weights.layers
    for i, layer in enumerate(layers):
        assert np.array_equal(layer.down.rows(0, 24), model.w[f"blk.{i}.ffn_down"])


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    weights = open_model(write_model(tmp_path / "m.gguf", plain_model(small_config()))).weights
    assert weights.layers[0].down.rows(3, 3).shape == (0, 20)
    with pytest.raises(BitgenError, match=r"there are no rows 20\.\.25 in 24x20"):
        weights.layers[0].down.rows(20, 25)
    with pytest.raises(BitgenError, match="there are no rows"):
        weights.embedding.row(11)
    with pytest.raises(BitgenError, match=r"token ids must be 0\.\.10"):
        weights.embedding.gather(np.array([3, 11]))
    assert np.array_equal(weights.embedding.gather(np.array([3, 3, 0]))[1], weights.embedding.row(3))


def test_the_interleaved_order_is_llama_cpps_permutation() -> None:
    heads, head_dim = 3, 10
    w = np.arange(heads * head_dim)
    # permute() of llama.cpp's converter
    permuted = w.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(permuted[interleaved_to_half(heads, head_dim)], w)
    assert np.array_equal(w[half_to_interleaved(heads, head_dim)], permuted)


def test_i2_s_rows_that_end_inside_a_block(tmp_path: Path) -> None:
    """k = 192 is no multiple of 128, but the flattened tensor is."""
    model = plain_model(small_config(hidden=192, ffn=128, heads=4, head_dim=48))
    layer = open_model(write_model(tmp_path / "m.gguf", model, "i2_s")).weights.layers[1]
    assert np.array_equal(layer.gate_up.rows(1, 200)[:127], model.w["blk.1.ffn_gate"][1:])


def test_i2_s_that_lost_weights_is_refused(tmp_path: Path) -> None:
    model = plain_model(small_config())
    tensors = [tensor("token_embd.weight", model.embedding)]
    name = "blk.0.attn_q.weight"
    tensors.append(info(name, (24, 24), 36, 24 * 24 // 4 + 32))
    write_gguf(tmp_path / "m.gguf", gguf_metadata(model.config), tensors)
    assert "blk.0.attn_q.weight has 24x24 weights, no whole blocks of 128" in refused(tmp_path / "m.gguf")


def rewritten(
    path: Path, config_changes: dict[str, Any], change: Callable[[list[NewTensor]], list[NewTensor]]
) -> Path:
    """A llama file with F16 matrices whose list of tensors went through ``change``."""
    model = plain_model(small_config("llama", **config_changes))
    tensors = [tensor("token_embd.weight", model.embedding), tensor("output.weight", model.embedding)]
    for key in model.w:
        tensors += ternary_tensors(key, stored_rows(model, key), model.scale[key], "f16+scale")
    tensors += [tensor(name, values) for name, values in model.vectors.items()]
    write_gguf(path, gguf_metadata(model.config), change(tensors))
    return path


def replaced(name: str, new: NewTensor) -> Callable[[list[NewTensor]], list[NewTensor]]:
    return lambda tensors: [new if t.name == name else t for t in tensors]


def tq_rows(kind: str, scales: np.ndarray, seed: int = 0) -> NewTensor:
    """blk.0.ffn_down of (256, 512) with a scale for each block of 256: scales (256, 2)."""
    w = np.random.default_rng(seed).integers(-1, 2, (256, 512), dtype=np.int8)
    w[:, ::256] = 1  # no block of zeros
    data = encode_blocks(kind, w, np.float32(1)).reshape(256, 2, -1)
    data[..., -2:] = scales.astype("<f2")[..., None].view(np.uint8)
    return tensor("blk.0.ffn_down.weight", data, TERNARY[kind].id, (256, 512))


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_scales_that_differ_within_a_row_are_those_of_groups(tmp_path: Path, kind: str) -> None:
    scales = np.ones((256, 2), np.float32)
    scales[200, 1] = 0.5
    path = rewritten(tmp_path / "m.gguf", WIDE, replaced("blk.0.ffn_down.weight", tq_rows(kind, scales)))
    down = open_model(path).weights.layers[0].down
    factor = np.float32(plain_model(small_config("llama", **WIDE)).scale["blk.0.ffn_down"])
    assert down.group == 256
    assert np.array_equal(down.scales(190, 210), (scales * factor)[190:210])


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_row_scales_and_blocks_of_zeros_are_read(tmp_path: Path, kind: str) -> None:
    scales = np.repeat(np.arange(1, 257, dtype=np.float32)[:, None] / 64, 2, axis=1)
    scales[7] = 0  # a row of zeros
    scales[8, 0] = 0  # a block of zeros
    scales[9] *= -1  # legal: w = (q - 1) * d
    path = rewritten(tmp_path / "m.gguf", WIDE, replaced("blk.0.ffn_down.weight", tq_rows(kind, scales)))
    file = open_model(path)
    down = file.weights.layers[0].down
    factor = plain_model(small_config("llama", **WIDE)).scale["blk.0.ffn_down"]
    assert np.array_equal(
        down.scale,
        scales.max(axis=1, where=scales > 0, initial=0) * np.float32(factor)
        + scales.min(axis=1, where=scales < 0, initial=0) * np.float32(factor),
    )
    w = down.rows(0, 256)
    assert not w[7].any()
    assert not w[8, :256].any()
    assert w[8, 256:].any()


def test_a_scale_that_is_no_number_is_refused(tmp_path: Path) -> None:
    scales = np.full((256, 2), np.inf, np.float32)
    path = rewritten(tmp_path / "m.gguf", WIDE, replaced("blk.0.ffn_down.weight", tq_rows("tq2_0", scales)))
    down = open_model(path).weights.layers[0].down
    with pytest.raises(BitgenError, match="a scale is NaN or infinite"):
        _ = down.scale


def test_a_model_that_is_not_ternary_is_refused_when_it_is_read(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((24, 20)).astype(np.float16)
    path = rewritten(
        tmp_path / "m.gguf", {}, replaced("blk.0.ffn_down.weight", tensor("blk.0.ffn_down.weight", values))
    )
    down = open_model(path).weights.layers[0].down
    for read in (lambda: down.scale, lambda: down.rows(0, 4)):
        with pytest.raises(BitgenError, match=r"blk\.0\.ffn_down\.weight \(f16\) is not ternary"):
            read()


@pytest.mark.parametrize(
    ("type_id", "name"),
    [(37, "I8_S"), (38, "TL1"), (135, "IQ2_BN"), (12, "Q4_K"), (99, "TYPE 99")],
)
def test_types_that_are_not_supported_are_named(tmp_path: Path, type_id: int, name: str) -> None:
    change = replaced("blk.0.ffn_down.weight", info("blk.0.ffn_down.weight", (256, 512), type_id, 144 * 512))
    message = refused(rewritten(tmp_path / "m.gguf", WIDE, change))
    assert f"blk.0.ffn_down.weight is stored as {name}" in message
    assert "bitgen reads I2_S, TQ1_0, TQ2_0, Q1_0, Q2_0, STQ1_0, PQ2_0, PTQ1_0, F32," in message


@pytest.mark.parametrize(
    ("architecture", "file_type", "says"),
    [
        ("bitnet-b1.58", None, "blk.0.attn_q.weight is stored as TL2"),
        ("llama", 39, "blk.0.attn_q.weight is stored as TL2"),
        # read as MXFP4: 17 bytes for each 32 of 256 x 256 weights, of which the file has fewer
        ("llama", 38, "blk.0.attn_q.weight takes 34816 bytes"),
        ("llama", None, "blk.0.attn_q.weight takes 34816 bytes"),
        ("bitnet", 38, "blk.0.attn_q.weight takes 34816 bytes"),
    ],
)
def test_id_39_is_named_by_architecture_and_file_type(
    tmp_path: Path, architecture: str, file_type: int | None, says: str
) -> None:
    model = plain_model(small_config(architecture, **WIDE))
    tensors = [
        tensor("token_embd.weight", model.embedding),
        info("blk.0.attn_q.weight", (256, 256), 39, 4096),
    ]
    if architecture == "llama":
        tensors.append(tensor("output.weight", model.embedding))
    extra = {} if file_type is None else {"general.file_type": U32(file_type)}
    write_gguf(tmp_path / "m.gguf", {**gguf_metadata(model.config), **extra}, tensors)
    assert says in refused(tmp_path / "m.gguf")


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rewritten(path, {}, lambda ts: [t for t in ts if t.name != "blk.1.ffn_up.weight"])
    assert "the tensor blk.1.ffn_up.weight is missing" in refused(path)
    rewritten(path, {}, lambda ts: [*ts, tensor("blk.0.attn_q.bias", np.zeros(24, np.float32))])
    assert "'blk.0.attn_q.bias' (1 such) belongs to no llama model" in refused(path)
    rewritten(
        path,
        {},
        replaced("blk.0.attn_norm.weight", tensor("blk.0.attn_norm.weight", np.ones(23, np.float32))),
    )
    assert "blk.0.attn_norm.weight has the shape 23; the metadata says 24" in refused(path)
    nan = np.full(24, np.nan, np.float32)
    rewritten(path, {}, replaced("blk.0.attn_norm.weight", tensor("blk.0.attn_norm.weight", nan)))
    assert "blk.0.attn_norm.weight holds NaN or infinity" in refused(path)
    rewritten(path, {}, lambda ts: [*ts, tensor("blk.0.attn_rot_embd.weight", np.zeros(3, np.float32))])
    assert open_model(path).config.layers == 2


@pytest.mark.parametrize("kind", ["q8_0", "q6_k", "q4_0", "q4_1", "q4_k", "iq4_nl"])
def test_quantised_heads_and_embeddings_stay_in_their_format(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package is the oracle")
    from gguf.quants import dequantize

    from bitgen.formats.quants import DENSE

    rows = DENSE[kind].row_bytes(256)
    data = np.random.default_rng(2).integers(0, 60, (11, rows), dtype=np.uint8)  # f16 below 1: no NaN
    change = replaced("token_embd.weight", tensor("token_embd.weight", data, DENSE[kind].id, (11, 256)))
    embedding = open_model(rewritten(tmp_path / "m.gguf", WIDE, change)).weights.embedding
    assert (embedding.type, embedding.data.shape) == (kind, (11, rows))
    assert not embedding.data.flags.writeable
    assert np.array_equal(
        embedding.rows(2, 9), dequantize(data, gguf.GGMLQuantizationType[kind.upper()])[2:9]
    )
    head = replaced("output.weight", tensor("output.weight", data, DENSE[kind].id, (11, 256)))
    path = rewritten(tmp_path / "m.gguf", WIDE, head)
    if kind in ("q4_k", "iq4_nl"):  # gathered, but no kernel streams it
        assert (
            f"output.weight is stored as {kind.upper()}; bitgen reads F32, F16, BF16, Q8_0, Q6_K, Q4_0, Q4_1"
            in refused(path)
        )
    else:
        assert open_model(path).weights.output.type == kind


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_of_a_split_model_says_how_to_join_them(tmp_path: Path, part: int) -> None:
    path = tmp_path / f"m-0000{part + 1}-of-00002.gguf"
    model = plain_model(small_config("llama"))
    metadata = {**gguf_metadata(model.config), "split.no": U32(part), "split.count": U32(2)}
    # Only the first part says what the model is.
    write_gguf(path, {k: v for k, v in metadata.items() if part == 0 or k.startswith("split.")}, [])
    message = refused(path)
    assert f"is part {part + 1} of 2 of a model" in message
    assert "llama-gguf-split --merge" in message


# ---- configuration ----


def test_the_metadata_of_llama_cpp_makes_the_config(tmp_path: Path) -> None:
    config = small_config("bitnet-b1.58", rope_theta=500000.0)
    opened = open_model(write_model(tmp_path / "m.gguf", plain_model(config))).config
    assert opened.norm_eps == pytest.approx(1e-5)
    for name in (
        "hidden",
        "ffn",
        "layers",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab",
        "context",
        "rope_theta",
        "activation",
        "sub_norms",
        "tied_head",
        "name",
        "architecture",
    ):
        assert getattr(opened, name) == getattr(config, name), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "the architecture 'mamba' is not supported; bitgen runs bitnet, bitnet-25, bitnet-b1.58, llama",
        ),
        (
            {"general.architecture": "gemma3"},
            "the architecture 'gemma3' is not supported; bitgen runs bitnet,",
        ),
        (
            {
                "bitnet.attention.sliding_window": U32(32),
                "bitnet.attention.sliding_window_pattern": np.array([True]),
            },
            "bitnet.attention.sliding_window_pattern is not 2 of true and false, one a layer",
        ),
        (
            {
                "bitnet.attention.sliding_window": U32(32),
                "bitnet.attention.sliding_window_pattern": U32(2),
            },
            "bitnet.attention.sliding_window_pattern is not 2 of true and false, one a layer",
        ),
        ({"prism.hadamard.version": 1}, "under a Hadamard transform ('prism.hadamard.version', as in"),
        ({"general.architecture": "bad\x1b[31m"}, "the architecture 'bad\\x1b[31m' is not supported"),
        (
            {"bitnet.attention.head_count": "four"},
            "bitnet.attention.head_count is 'four', not one whole number",
        ),
        ({"bitnet.attention.head_count_kv": U32(3)}, "kv_heads must divide heads, found 3 and 4"),
        ({"bitnet.attention.head_count": U32(0)}, "bitnet.attention.head_count is 0"),
        ({"bitnet.attention.key_length": U32(1 << 31)}, "heads of 2147483648 are not possible"),
        ({"bitnet.rope.dimension_count": U32(4)}, "bitnet.rope.dimension_count is 4 with heads of 6"),
        (
            {"bitnet.rope.scaling.type": "longrope"},
            "the tensor rope_factors_short.weight is missing",
        ),
        ({"bitnet.rope.freq_base": float("nan")}, "rope_theta must be greater than 0 and finite, found nan"),
        ({"bitnet.expert_count": U32(8)}, "mixtures of experts are not supported"),
        ({"bitnet.context_length": U32(0)}, "context must be greater than 0, found 0"),
        ({"bitnet.block_count": U32(1 << 31)}, "layers must be at most 16777216, found 2147483648"),
        ({"general.alignment": U32(24)}, "general.alignment is 24"),
        ({"bitnet.attention.head_count_kv": np.array([2, 4], np.int32)}, "not one whole number"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    assert message in refused(write_model(tmp_path / "m.gguf", plain_model(small_config()), metadata=changes))


def test_a_value_for_each_layer_counts_when_all_are_equal(tmp_path: Path) -> None:
    changes = {"bitnet.attention.head_count_kv": np.array([2, 2], np.int32)}
    opened = open_model(write_model(tmp_path / "m.gguf", plain_model(small_config()), metadata=changes))
    assert opened.config.kv_heads == 2


def test_rope_factors_and_linear_scaling(tmp_path: Path) -> None:
    factors = np.array([1, 2, 8], np.float32)
    path = tmp_path / "m.gguf"
    rewritten(path, {}, lambda ts: [*ts, tensor("rope_freqs.weight", factors)])
    opened = open_model(path).config.rope_factors
    assert opened is not None
    assert np.array_equal(opened, factors)
    changes = {"bitnet.rope.scaling.type": "linear", "bitnet.rope.scaling.factor": 4.0}
    write_model(path, plain_model(small_config()), metadata=changes)
    assert open_model(path).config.rope_factors == (4, 4, 4)
    changes["bitnet.rope.scaling.factor"] = 1.0  # as the converter of `bitnet` writes it
    write_model(path, plain_model(small_config()), metadata=changes)
    assert open_model(path).config.rope_factors is None
    # llama.cpp takes a factor without a type as linear, and none where the type says so.
    for key in ("scaling.factor", "scale_linear"):
        write_model(path, plain_model(small_config()), metadata={f"bitnet.rope.{key}": 4.0})
        assert open_model(path).config.rope_factors == (4, 4, 4)
        changes = {"bitnet.rope.scaling.type": "none", f"bitnet.rope.{key}": 4.0}
        write_model(path, plain_model(small_config()), metadata=changes)
        assert open_model(path).config.rope_factors is None


# ---- tokenizer ----


def test_tokenizer_metadata(tmp_path: Path) -> None:
    changes = {
        "tokenizer.ggml.eot_token_id": U32(3),
        "tokenizer.ggml.padding_token_id": U32(0xFFFFFFFF),
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.chat_template": "{{ x }}",
        "tokenizer.huggingface.json": "{}",
    }
    data = open_model(
        write_model(tmp_path / "m.gguf", plain_model(small_config()), metadata=changes)
    ).tokenizer_data
    assert data.tokens == tuple(f"w{i}" for i in range(11))
    assert data.scores is not None
    assert data.scores.tolist() == list(range(11))
    assert data.types is not None
    assert data.types.dtype == np.int32
    assert (data.bos, data.eos, data.eot, data.pad, data.end_ids) == (1, 2, 3, None, (2, 3))
    assert (data.model, data.pre, data.merges) == ("llama", "llama-bpe", ("a b", "ab c"))
    assert (data.add_bos, data.add_eos, data.chat_template, data.json) == (True, None, "{{ x }}", "{}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.scores": np.zeros(3, np.float32)},
            "tokenizer.ggml.scores has 3 elements for 11 tokens",
        ),
        ({"tokenizer.ggml.tokens": U32(5)}, "tokenizer.ggml.tokens is 5, not the array it should be"),
        ({"tokenizer.ggml.eos_token_id": U32(11)}, "tokenizer.ggml.eos_token_id is 11; there are 11 tokens"),
        ({"tokenizer.ggml.bos_token_id": "x"}, "tokenizer.ggml.bos_token_id is 'x'"),
    ],
)
def test_a_damaged_tokenizer_is_refused_when_it_is_asked_for(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model = open_model(write_model(tmp_path / "m.gguf", plain_model(small_config()), metadata=changes))
    with pytest.raises(BitgenError) as caught:
        _ = model.tokenizer_data
    assert message in caught.value.message
