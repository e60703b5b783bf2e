"""Strict YAML: every key known, every type right, every mistake named with its file and its remedy.

Also home of the model presets (configs/models/*.yaml): the shapes of a model, without its weights.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from bitgen.errors import BitgenError, FileError, UsageError, nearest_names, suggestion
from bitgen.paths import configs_dir

T = TypeVar("T")

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


# ---- Strict loading ------------------------------------------------------------


def load_yaml(path: str | Path) -> Mapping[str, object]:
    """The mapping a YAML file holds. A key that stands twice is an error, and 1e-5 is a number.

    FileError when the file cannot be read, is not YAML, or holds something else.
    """
    import yaml  # 20 ms that `bitgen --help` need not pay

    file = Path(path)
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_loader())  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: PyYAML lets int() and date() speak for themselves. RecursionError: nested too deeply.
        raise FileError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise FileError(f"{file}: expected `key: value` lines, found {_kind(data)}")
    return data


def load_strict(cls: type[T], mapping: object, where: str) -> T:
    """Build the dataclass ``cls`` from ``mapping``; ``where`` (a file, or file and entry) opens every error.

    Fields may be int, float, str, bool, Literal, ``X | None``, tuple[X, ...], frozenset[X], dict[str, X] or
    another dataclass. An int is accepted for a float, never a bool for an int. A BitgenError raised by
    ``__post_init__`` gets ``where`` in front, so classes check ranges without knowing their file.
    FileError names an unknown key (with the nearest legal one), a missing key, a wrong type.
    """
    if not isinstance(mapping, Mapping):
        raise FileError(f"{where}: expected `key: value` lines, found {_kind(mapping)}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise FileError(f"{where}: unknown key {key!r}; {suggestion(str(key), fields)}")
    missing = [n for n, f in fields.items() if n not in mapping and _is_required(f)]
    if missing:
        raise FileError(f"{where}: missing {_plural('key', missing)} {', '.join(missing)}")
    values = {str(key): _convert(hints[key], value, where, key) for key, value in mapping.items()}
    try:
        return cls(**values)
    except BitgenError as error:
        raise FileError(f"{where}: {error.message}") from error


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plural(noun: str, items: list[str]) -> str:
    return noun if len(items) == 1 else noun + "s"


def _convert(hint: Any, value: object, where: str, key: str) -> Any:
    """``value`` as the type ``hint``; BitgenError when it is of another one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return load_strict(typing.cast("type[Any]", hint), value, f"{where}: {key}")
    if origin in (types.UnionType, typing.Union):  # only X | None is supported
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _convert(inner, value, where, key)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise _wrong(where, key, "one of " + ", ".join(map(str, arguments)), value)
    if origin in (tuple, frozenset):
        if not isinstance(value, list):
            raise _wrong(where, key, "a list", value)
        return origin(_convert(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            raise _wrong(where, key, "`name: value` lines", value)
        return {name: _convert(arguments[1], item, where, f"{key}.{name}") for name, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise _wrong(where, key, _TYPE_NAMES[hint], value)
    return value


_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def _wrong(where: str, key: str, wanted: str, value: object) -> BitgenError:
    return FileError(f"{where}: {key} must be {wanted}, found {_kind(value)}")


def _kind(value: object) -> str:
    """How a person calls what a YAML file holds, with the value where it is short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (Mapping, list)):
        return "a list" if isinstance(value, list) else "`key: value` lines"
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


@functools.cache
def _loader() -> type[Any]:
    """PyYAML's SafeLoader with two repairs: duplicate keys are errors, 1e-5 is a float (YAML 1.2)."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                    )
                if isinstance(key_node.value, str):
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep=deep)

    exponent = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return StrictLoader


# ---- Model presets -------------------------------------------------------------


@dataclass(frozen=True)
class Matmul:
    """One matrix a token is multiplied with: y (m) = W (m, k) x (k), ``count`` times a token."""

    role: str  # qkv, o, gate_up, down
    m: int
    k: int
    count: int


@dataclass(frozen=True)
class ModelPreset:
    """The shape of a model, in elements; ``norm_eps`` and ``rope_theta`` as the architecture defines them.

    BitgenError when a size is not positive, kv_heads does not divide heads, or a name cannot be a file's.
    """

    name: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope_theta: float
    activation: Literal["silu", "relu2"]
    sub_norms: bool  # a norm before o (attn_sub_norm, inner_attn_ln) and before down (ffn_sub_norm)
    tied_head: bool  # the LM head is the embedding
    norm_eps: float
    architecture: str  # as GGUF's general.architecture calls it
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "hidden",
            "ffn",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "vocab",
            "rope_theta",
            "norm_eps",
        )
        for field in sizes:
            if not getattr(self, field) > 0:
                raise BitgenError(f"{field} must be greater than 0, found {getattr(self, field)}")
        if self.heads % self.kv_heads:
            raise BitgenError(f"kv_heads must divide heads, found {self.kv_heads} and {self.heads}")
        if self.head_dim % 2:
            raise BitgenError(f"head_dim must be even (RoPE rotates pairs), found {self.head_dim}")
        for alias in (self.alias, *self.aliases):
            if not _ALIAS.fullmatch(alias):
                raise BitgenError(f"{alias!r} cannot name files; use letters, digits, dot, dash, underscore")

    @property
    def alias(self) -> str:
        """The short name, safe as part of a file name: the first alias, or the name after its last slash."""
        return self.aliases[0] if self.aliases else self.name.rpartition("/")[2]

    @property
    def matmuls(self) -> tuple[Matmul, ...]:
        """The ternary matrices as the runtime runs them: q, k, v stacked, and gate, up stacked.

        The parts of a stack share one input, so they run as one matmul with a weight scale a row.
        The LM head is not ternary and is not listed.
        """
        queries, keys_values = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return (
            Matmul("qkv", queries + keys_values, self.hidden, self.layers),
            Matmul("o", self.hidden, queries, self.layers),
            Matmul("gate_up", 2 * self.ffn, self.hidden, self.layers),
            Matmul("down", self.hidden, self.ffn, self.layers),
        )

    @property
    def ternary_weights(self) -> int:
        """How many ternary weights a token is multiplied with."""
        return sum(matmul.m * matmul.k * matmul.count for matmul in self.matmuls)


def load_models(folder: Path | None = None) -> tuple[ModelPreset, ...]:
    """The presets of ``folder`` (default: configs/models/), smallest model first.

    BitgenError when a file is wrong or two presets answer to the same name.
    """
    files = sorted((folder if folder is not None else configs_dir() / "models").glob("*.yaml"))
    owner: dict[str, Path] = {}
    presets = []
    for file in files:
        preset = load_model(file)
        for name in {preset.name.casefold(), *(alias.casefold() for alias in preset.aliases)}:
            if name in owner:
                raise FileError(f"{file}: the name {name!r} already belongs to {owner[name]}")
            owner[name] = file
        presets.append(preset)
    return tuple(sorted(presets, key=lambda preset: (preset.ternary_weights, preset.name)))


def load_model(file: str | Path) -> ModelPreset:
    """The preset one YAML file holds; FileError when it is wrong."""
    return load_strict(ModelPreset, load_yaml(file), str(file))


def find_model(name_or_path: str, models: tuple[ModelPreset, ...] | None = None) -> ModelPreset:
    """The preset with this name or alias, whatever its case, or the one in the YAML file of this path.

    UsageError for an unknown name, with the nearest known ones.
    """
    presets = load_models() if models is None else models
    wanted = name_or_path.casefold()
    for preset in presets:
        if wanted in (preset.name.casefold(), *(alias.casefold() for alias in preset.aliases)):
            return preset
    if Path(name_or_path).suffix in (".yaml", ".yml"):
        return load_model(name_or_path)
    known = [name for preset in presets for name in (*preset.aliases, preset.name)]
    near = nearest_names(name_or_path, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    message = (
        f"unknown model {name_or_path!r}: {hint}`bitgen models` lists the presets; a .yaml path works too"
    )
    raise UsageError(message)
