from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from bitgen import spec
from bitgen.errors import BitgenError, FileError
from bitgen.paths import configs_dir
from bitgen.records import PARSED, dump, load, load_json, load_yaml, parsed_configs
from bitgen.spec import KernelSpec, Layout, Schedule, Shape


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


def test_load_converts_every_supported_type() -> None:
    data = GOOD | {
        "ratio": 2,
        "tags": ["x", "y"],
        "needs": ["p", "p"],
        "limits": {"a": 1},
        "inner": {"size": 3},
        "inners": [{"size": 1}, {"size": 2}],
    }
    made = load(Everything, data, "f.yaml")
    expected = Everything(1, 2.0, "a", True, "fast", ("x", "y"), frozenset("p"), {"a": 1}, Inner(3))
    assert made == dataclasses.replace(expected, inners=(Inner(1), Inner(2)))
    assert isinstance(made.ratio, float)
    assert load(Everything, GOOD | {"inner": None}, "f.yaml").inner is None


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
def test_load_names_what_is_wrong(change: dict[Any, Any], message: str) -> None:
    with pytest.raises(FileError) as error:
        load(Everything, GOOD | change, "f.yaml")
    assert message in error.value.message


def test_load_names_all_missing_keys() -> None:
    with pytest.raises(BitgenError, match=r"f\.yaml: missing keys ratio, flag$"):
        load(Everything, {"count": 1, "name": "a", "mode": "fast"}, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is duplicated"),
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


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True)
class Size:
    """A record with a shorter form for people."""

    m: int
    k: int

    def to_plain(self) -> str:
        return f"{self.m}x{self.k}"

    @classmethod
    def from_plain(cls, data: object) -> Size:
        m, found, k = str(data).partition("x")
        if not found:
            raise BitgenError(f"write it as MxK, not {data!r}")
        return cls(int(m), int(k))


@dataclasses.dataclass(frozen=True)
class Nested:
    color: Color
    size: Size | None
    times: tuple[float, ...]
    order: tuple[tuple[int, ...], ...] = ()
    baselines: tuple[int | None, ...] = ()
    by_name: Mapping[str, Everything] = dataclasses.field(default_factory=dict)
    either: int | str = 0
    anything: Any = None
    label: str = dataclasses.field(init=False, default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.color.value.upper())
        if not self.times:
            raise BitgenError("times must not be empty")


NESTED = Nested(
    color=Color.RED,
    size=Size(2, 3),
    times=(1.5, 2.0),
    order=((0, 1), (1,)),
    baselines=(None, 0),
    by_name={"b": load(Everything, GOOD, ""), "a": load(Everything, GOOD | {"needs": ["q", "p"]}, "")},
    either="x",
    anything={"free": [1, None]},
)


def test_what_is_dumped_is_plain_and_loads_again() -> None:
    data = dump(NESTED)
    assert load(Nested, json.loads(json.dumps(data)), "f.json") == NESTED
    assert list(data) == [field.name for field in dataclasses.fields(Nested)]
    assert (data["color"], data["size"], data["label"]) == ("red", "2x3", "RED")
    assert data["by_name"]["a"]["needs"] == ["p", "q"]
    assert list(data["by_name"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color": "green"}, "f.json: color must be one of red, blue, found the str 'green'"),
        ({"size": "2"}, "f.json: size: write it as MxK, not '2'"),
        ({"times": []}, "f.json: times must not be empty"),
        ({"times": [1.0, True]}, "f.json: times[1] must be a number, found true"),
        ({"order": [[0], [1, 2.0]]}, "f.json: order[1][1] must be a whole number, found the float 2.0"),
        ({"baselines": [0, "x"]}, "f.json: baselines[1] must be a whole number, found the str 'x'"),
        ({"either": 1.5}, "f.json: either must be a whole number or a text, found the float 1.5"),
        (
            {"by_name": {"a": GOOD | {"inner": {"size": "3"}}}},
            "f.json: by_name.a: inner: size must be a whole",
        ),
        ({"by_name": {"a": {}}}, "f.json: by_name.a: missing keys count, ratio, name, flag, mode"),
        ({"lable": "x"}, "f.json: unknown key 'lable'; did you mean label?"),
    ],
)
def test_the_path_to_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError) as error:
        load(Nested, dump(NESTED) | change, "f.json")
    assert message in error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b'{"a": NaN}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "expected a JSON object, found a list"),
        (b'{"a": "\xe9"}', "is not UTF-8 text"),
    ],
)
def test_load_json_rejects(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(content)
    with pytest.raises(FileError) as error:
        load_json(file)
    assert str(file) in error.value.message
    assert message in error.value.message
    file.write_text('{"a": [1, 2.5, null]}', encoding="utf-8")
    assert load_json(file) == {"a": [1, 2.5, None]}


SPEC = KernelSpec(
    "i2s",
    "avx2",
    "n1",
    Layout("i2s", 16),
    Schedule("direct", (("streams", 2), ("prefetch_hint", 1))),
    Shape(32, 64),
)


def test_a_spec_is_written_for_people_and_reads_back() -> None:
    data = dump(SPEC)
    assert data["schedule"] == {"algorithm": "direct", "streams": 2, "prefetch_hint": 1}
    assert data["shape"] == "32x64"
    assert load(KernelSpec, data, "") == SPEC
    assert load(KernelSpec, data | {"shape": [32, 64]}, "") == SPEC  # as older records have it


def test_a_renamed_knob_is_read_under_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(spec.RENAMED_KNOBS, "lanes", "streams")
    old = {"algorithm": "direct", "lanes": 2, "hint": 1}
    assert load(KernelSpec, dump(SPEC) | {"schedule": old}, "") == SPEC


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": {"streams": 2}}, "schedule: algorithm must be a text, found nothing"),
        ({"schedule": {"algorithm": "direct", "streams": "2"}}, "schedule: direct.streams must be a whole"),
        ({"schedule": []}, "schedule: it must be `name: value` lines, found a list"),
        ({"shape": "32"}, "shape: shape '32': write it as MxK"),
        ({"shape": [1]}, "shape: it must be a list"),
        ({"layout": {"family": "i2s", "row_block": 17}}, "layout: row_block 17: it must be"),
    ],
)
def test_a_wrong_spec_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError) as error:
        load(KernelSpec, dump(SPEC) | change, "f.json")
    assert f"f.json: {message}" in error.value.message


def test_configs_are_kept_parsed() -> None:
    kept = (configs_dir() / PARSED).read_text(encoding="utf-8")
    assert kept == parsed_configs(configs_dir()), "`python -m bitgen.records` writes configs/parsed.json anew"
