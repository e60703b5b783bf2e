from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bitgen.errors import BitgenError, UsageError, nearest_names
from bitgen.formats.config import ModelPreset, find_model, load_model, load_models, preset_name
from bitgen.paths import configs_dir

THREE_B = (configs_dir() / "models" / "3B.yaml").read_text(encoding="utf-8")


def test_nearest_names_ignores_case_and_finds_parts() -> None:
    names = ["2B-4T", "3B", "Falcon3-3B", "TriLM-99M"]
    assert nearest_names("2b4t", names) == ["2B-4T"]
    assert nearest_names("3b-instruct", names)[0] == "3B"
    assert nearest_names("xyz", names) == []
    assert nearest_names("", names) == []


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("0.7B", ["4608x1536", "1536x1536", "8192x1536", "1536x4096"]),
        ("1.3B", ["6144x2048", "2048x2048", "10920x2048", "2048x5460"]),
        ("3B", ["9600x3200", "3200x3200", "17280x3200", "3200x8640"]),
        ("2B-4T", ["3840x2560", "2560x2560", "13824x2560", "2560x6912"]),
        ("8B", ["6144x4096", "4096x4096", "28672x4096", "4096x14336"]),
        ("Falcon3-1B", ["4096x2048", "2048x2048", "16384x2048", "2048x8192"]),
        ("Falcon3-3B", ["5120x3072", "3072x3072", "18432x3072", "3072x9216"]),
        ("Falcon3-7B", ["5120x3072", "3072x3072", "46080x3072", "3072x23040"]),
        ("Falcon3-10B", ["5120x3072", "3072x3072", "46080x3072", "3072x23040"]),
        ("Bonsai-1.7B", ["4096x2048", "2048x2048", "12288x2048", "2048x6144"]),
        ("Bonsai-4B", ["6144x2560", "2560x4096", "19456x2560", "2560x9728"]),
        ("Bonsai-8B", ["6144x4096", "4096x4096", "24576x4096", "4096x12288"]),
        ("Bonsai-1.7B-1bit", ["4096x2048", "2048x2048", "12288x2048", "2048x6144"]),
        ("Bonsai-4B-1bit", ["6144x2560", "2560x4096", "19456x2560", "2560x9728"]),
        ("Bonsai-8B-1bit", ["6144x4096", "4096x4096", "24576x4096", "4096x12288"]),
        ("TriLM-99M", ["1536x512", "512x512", "2560x512", "512x1280"]),
        ("100B", ["24576x8192", "8192x8192", "91136x8192", "8192x45568"]),
    ],
)
def test_presets_have_the_stacked_shapes_the_runtime_runs(name: str, shapes: list[str]) -> None:
    preset = find_model(name)
    matmuls = preset.layer_matmuls
    assert [matmul.role for matmul in matmuls] == ["qkv", "o", "gate_up", "down"]
    assert [f"{matmul.m}x{matmul.k}" for matmul in matmuls] == shapes
    assert {matmul.count for matmul in matmuls} == {preset.layers}
    head = [(matmul.role, matmul.m, matmul.k) for matmul in preset.matmuls[4:]]
    assert head == ([("head", preset.vocab, preset.hidden)] if preset.ternary_head else [])
    assert preset.ternary_head == (preset.group == 128)


@pytest.mark.parametrize("size", ["1.7B", "4B", "8B"])
def test_binary_presets_are_their_ternary_sisters_in_bits(size: str) -> None:
    ternary, binary = find_model(f"Bonsai-{size}"), find_model(f"bonsai-{size}-q1_0")
    assert binary == find_model(f"Bonsai-{size}-1bit")
    assert (binary.kind.weights, binary.kind.group) == ("q1", 128)
    assert binary.shapes == ternary.shapes
    assert preset_name(binary) == f"Bonsai-{size}-1bit"
    assert preset_name(ternary) == f"Bonsai-{size}"
    assert preset_name(dataclasses.replace(ternary, group=64)) is None


def test_a_preset_whose_matrices_norm_their_inputs_has_no_stacks() -> None:
    preset = find_model("BitNet-embedding-0.6B")
    assert [f"{one.role} {one.m}x{one.k}" for one in preset.matmuls] == [
        "q 2048x1024",
        "k 1024x1024",
        "v 1024x1024",
        "o 1024x2048",
        "gate 3072x1024",
        "up 3072x1024",
        "down 1024x3072",
    ]
    stacked = dataclasses.replace(preset, input_norms=False)
    assert stacked.ternary_weights == preset.ternary_weights == 28 * 15 * 1024 * 1024


def test_every_preset_is_stored_under_its_alias_and_sorted_by_size() -> None:
    models = load_models()
    files = {file.stem for file in (configs_dir() / "models").glob("*.yaml")}
    assert {model.alias for model in models} == files
    assert len(models) >= 14
    sizes = [model.ternary_weights for model in models]
    assert sizes == sorted(sizes)


def test_sizes_of_presets_match_their_names() -> None:
    assert find_model("2B-4T").ternary_weights == 2_084_044_800
    assert find_model("3B").ternary_weights == 3_221_504_000
    assert 99e9 < find_model("100B").ternary_weights < 101e9


def test_details_of_the_2b_4t_preset() -> None:
    preset = find_model("microsoft/bitnet-B1.58-2b-4t")
    assert (preset.alias, preset.activation, preset.sub_norms, preset.tied_head) == (
        "2B-4T",
        "relu2",
        True,
        True,
    )
    assert (preset.rope_theta, preset.norm_eps, preset.vocab) == (5e5, 1e-5, 128256)


def test_models_are_found_by_name_alias_and_path(tmp_path: Path) -> None:
    assert find_model("3b") is not None
    assert find_model("1bitllm/BITNET_b1_58-3B") == find_model("3B") == find_model("bitnet_b1_58-3b")
    file = tmp_path / "mine.yaml"
    file.write_text(THREE_B.replace("layers: 26", "layers: 2"), encoding="utf-8")
    assert find_model(str(file)).layers == 2


def test_unknown_models_get_the_nearest_names() -> None:
    with pytest.raises(UsageError) as error:
        find_model("3C")
    assert error.value.message.startswith("unknown model '3C': did you mean 3B")
    assert "`bitgen models`" in error.value.message
    with pytest.raises(BitgenError, match=r"unknown model 'qqq': `bitgen models` lists"):
        find_model("qqq")
    with pytest.raises(BitgenError, match=r"cannot read no/such\.yaml"):
        find_model("no/such.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("hidden:", "hiden:", "unknown key 'hiden'; did you mean hidden?"),
        ("layers: 26", "layers: 0", "layers must be greater than 0, found 0"),
        ("layers: 26", "layers: many", "layers must be a whole number, found the str 'many'"),
        ("norm_eps: 1.0e-5", "norm_eps: .nan", "norm_eps must be greater than 0"),
        ("kv_heads: 32", "kv_heads: 5", "kv_heads must divide heads, found 5 and 32"),
        ("vocab: 32002", "vocab: 32002\ngroup: 256", "weights run in groups of 128 at most, found 256"),
        ("head_dim: 100", "head_dim: 99", "head_dim must be even"),
        ("activation: silu", "activation: gelu", "activation must be one of silu, relu2"),
        ('["3B"', '["3/B"', "'3/B' cannot name files"),
        ("ffn: 8640\n", "", "missing key ffn"),
    ],
)
def test_wrong_presets_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in THREE_B
    file = tmp_path / "wrong.yaml"
    file.write_text(THREE_B.replace(old, new), encoding="utf-8")
    with pytest.raises(BitgenError) as error:
        load_model(file)
    assert error.value.message.startswith(f"{file}: ")
    assert message in error.value.message


def test_two_presets_cannot_share_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(THREE_B, encoding="utf-8")
    (tmp_path / "b.yaml").write_text(THREE_B.replace("name: 1bitLLM/", "name: "), encoding="utf-8")
    with pytest.raises(BitgenError, match=r"b.yaml: the name '.*' already belongs to .*a.yaml"):
        load_models(tmp_path)


def test_a_preset_without_aliases_is_called_by_its_name() -> None:
    preset = load_model(configs_dir() / "models" / "3B.yaml")
    assert isinstance(preset, ModelPreset)
    assert dataclasses.replace(preset, aliases=()).alias == "bitnet_b1_58-3B"
