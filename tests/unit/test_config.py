from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest

from bitgen.config import (
    ModelPreset,
    find_model,
    load_model,
    load_models,
    load_strict,
    load_yaml,
    nearest_names,
)
from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.paths import configs_dir

THREE_B = (configs_dir() / "models" / "3B.yaml").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int


@dataclasses.dataclass(frozen=True)
class Everything:
    count: int
    ratio: float
    name: str
    flag: bool
    mode: Literal["fast", "slow"]
    tags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    inners: tuple[Inner, ...] = ()


GOOD: dict[str, Any] = {"count": 1, "ratio": 0.5, "name": "a", "flag": True, "mode": "fast"}


def test_load_strict_converts_every_supported_type() -> None:
    data = GOOD | {
        "ratio": 2,
        "tags": ["x", "y"],
        "needs": ["p", "p"],
        "limits": {"a": 1},
        "inner": {"size": 3},
        "inners": [{"size": 1}, {"size": 2}],
    }
    made = load_strict(Everything, data, "f.yaml")
    expected = Everything(1, 2.0, "a", True, "fast", ("x", "y"), frozenset("p"), {"a": 1}, Inner(3))
    assert made == dataclasses.replace(expected, inners=(Inner(1), Inner(2)))
    assert isinstance(made.ratio, float)
    assert load_strict(Everything, GOOD | {"inner": None}, "f.yaml").inner is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coutn": 1}, "f.yaml: unknown key 'coutn'; did you mean count?"),
        ({"zzzzzz": 1}, "f.yaml: unknown key 'zzzzzz'; there are count, ratio, name"),
        ({3: 1}, "f.yaml: unknown key 3; there are"),
        ({"count": "1"}, "f.yaml: count must be a whole number, found the str '1'"),
        ({"count": 1.0}, "f.yaml: count must be a whole number, found the float 1.0"),
        ({"count": True}, "f.yaml: count must be a whole number, found true"),
        ({"count": None}, "f.yaml: count must be a whole number, found nothing"),
        ({"ratio": "fast"}, "f.yaml: ratio must be a number, found the str 'fast'"),
        ({"ratio": False}, "f.yaml: ratio must be a number, found false"),
        ({"name": 3}, "f.yaml: name must be a text, found the int 3"),
        ({"name": []}, "f.yaml: name must be a text, found a list"),
        ({"flag": 1}, "f.yaml: flag must be true or false, found the int 1"),
        ({"mode": "quick"}, "f.yaml: mode must be one of fast, slow, found the str 'quick'"),
        ({"mode": []}, "f.yaml: mode must be one of fast, slow, found a list"),
        ({"tags": "x"}, "f.yaml: tags must be a list, found the str 'x'"),
        ({"tags": ["x", 1]}, "f.yaml: tags[1] must be a text, found the int 1"),
        ({"needs": {"a": 1}}, "f.yaml: needs must be a list, found `key: value` lines"),
        ({"limits": {"a": "b"}}, "f.yaml: limits.a must be a whole number, found the str 'b'"),
        ({"limits": {1: 1}}, "f.yaml: limits must be `name: value` lines"),
        ({"inner": {"sise": 3}}, "f.yaml: inner: unknown key 'sise'; did you mean size?"),
        ({"inner": 3}, "f.yaml: inner: expected `key: value` lines, found the int 3"),
        ({"inners": [{}]}, "f.yaml: inners[0]: missing key size"),
    ],
)
def test_load_strict_names_what_is_wrong(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(FileError) as error:
        load_strict(Everything, GOOD | change, "f.yaml")
    assert message in error.value.message


def test_load_strict_names_all_missing_keys() -> None:
    with pytest.raises(BitgenError, match=r"f\.yaml: missing keys ratio, flag$"):
        load_strict(Everything, {"count": 1, "name": "a", "mode": "fast"}, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("a: !!python/object:os.system x\n", "is not valid YAML"),
        ("a: 2023-99-99\n", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("- 1\n", "expected `key: value` lines, found a list"),
        ("", "expected `key: value` lines, found nothing"),
        ("just text", "expected `key: value` lines, found the str 'just text'"),
    ],
)
def test_load_yaml_rejects(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(FileError) as error:
        load_yaml(file)
    assert str(file) in error.value.message
    assert message in error.value.message


def test_load_yaml_rejects_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(BitgenError, match=r"cannot read .*absent\.yaml: No such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(BitgenError, match="cannot read"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(BitgenError, match="is not UTF-8 text"):
        load_yaml(tmp_path / "latin.yaml")


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("a: 1e-5\nb: -2E3\nc: 1.5e3\nd: e5\n", encoding="utf-8")
    assert load_yaml(file) == {"a": 1e-5, "b": -2000.0, "c": 1500.0, "d": "e5"}


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
        ("Bonsai-8B", ["6144x4096", "4096x4096", "24576x4096", "4096x12288"]),
        ("TriLM-99M", ["1536x512", "512x512", "2560x512", "512x1280"]),
        ("100B", ["24576x8192", "8192x8192", "91136x8192", "8192x45568"]),
    ],
)
def test_presets_have_the_stacked_shapes_the_runtime_runs(name: str, shapes: list[str]) -> None:
    preset = find_model(name)
    assert [matmul.role for matmul in preset.matmuls] == ["qkv", "o", "gate_up", "down"]
    assert [f"{matmul.m}x{matmul.k}" for matmul in preset.matmuls] == shapes
    assert {matmul.count for matmul in preset.matmuls} == {preset.layers}


def test_every_preset_is_stored_under_its_alias_and_sorted_by_size() -> None:
    models = load_models()
    files = {file.stem for file in (configs_dir() / "models").glob("*.yaml")}
    assert {model.alias for model in models} == files
    assert len(models) >= 12
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
