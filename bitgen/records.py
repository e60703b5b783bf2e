"""The one codec: frozen dataclasses to plain data (of JSON and YAML) and back, strictly.

A record is its own schema: `dump` writes its fields, `load` reads them and names whatever is wrong in one
line, with the file and the path to the field. msgspec converts values; what it does not do is here: unknown
keys with the nearest legal one, all missing keys at once, and messages that show what was found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from bitgen.errors import BitgenError, FileError, suggestion
from bitgen.paths import configs_dir

PARSED = "parsed.json"  # in configs/: sha256 of a YAML text -> what it holds

T = TypeVar("T")


def dump(record: Any) -> Any:
    """``record`` as plain data: its fields in their order, sets sorted, enums as their values.

    A class with a shorter form for people has ``to_plain()`` and ``from_plain(data)``.
    """
    if hasattr(record, "to_plain"):
        return record.to_plain()
    if dataclasses.is_dataclass(record):
        return {field.name: dump(getattr(record, field.name)) for field in dataclasses.fields(record)}
    if isinstance(record, enum.Enum):
        return record.value
    if isinstance(record, Mapping):
        return {name: dump(value) for name, value in record.items()}
    if isinstance(record, Set):
        return sorted(map(dump, record))
    return [dump(item) for item in record] if isinstance(record, (list, tuple)) else record


def load(cls: type[T], data: object, where: str) -> T:
    """Build the dataclass ``cls`` from ``data``; ``where`` (a file, or file and entry) opens every error.

    Fields may be int, float, str, bool, None, enums, Literal, tuples, sequences, frozensets, mappings with
    str keys, unions of these, or another dataclass (in a union beside None only). An int is accepted for a
    float, never a bool for an int. Fields with ``init=False`` are for readers of the data and are ignored.
    A BitgenError of ``__post_init__`` gets its place in front, so classes check ranges without knowing it.
    FileError names an unknown key (with the nearest legal one), missing keys, a wrong type.
    """
    hint: Any = cls
    try:
        made: T = _reader(hint)(data)
    except _MismatchError as error:
        raise FileError(f"{where}{error}") from error
    return made


class _MismatchError(Exception):
    """What is wrong with a value; each level of nesting puts its part of the path in front."""


@functools.cache
def _reader(hint: Any) -> Callable[[Any], Any]:
    """What turns plain data into a value of the type ``hint``, or raises `_MismatchError`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hasattr(hint, "from_plain"):
        return functools.partial(_read_short, hint)
    if dataclasses.is_dataclass(hint):
        return functools.partial(_read_record, hint)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments and len(arguments) == 2:
        inner = next(_reader(argument) for argument in arguments if argument is not type(None))
        return lambda value: None if value is None else inner(value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return functools.partial(_read_mapping, hint, arguments[1])
    if origin is tuple and Ellipsis not in arguments:
        return functools.partial(_read_leaf, hint)
    if isinstance(origin, type) and issubclass(origin, (Sequence, Set)):
        return functools.partial(_read_list, hint, origin, arguments[0])
    return functools.partial(_read_leaf, hint)


@functools.cache
def _has_record(hint: Any) -> bool:
    """Whether a dataclass is anywhere in ``hint``; what has none msgspec converts in one go."""
    own = dataclasses.is_dataclass(hint) or hasattr(hint, "from_plain")
    return own or any(map(_has_record, typing.get_args(hint)))


def _read_short(cls: Any, value: Any) -> Any:
    try:
        return cls.from_plain(value)
    except BitgenError as error:
        raise _MismatchError(f": {error.message}") from error


def _read_record(cls: Any, value: Any) -> Any:
    if not isinstance(value, (dict, Mapping)):  # the first is told at once
        raise _MismatchError(f": expected `key: value` lines, found {kind(value)}")
    readers, plain, required = _fields(cls)
    values = {}
    for key, item in value.items():
        if key not in readers:
            raise _MismatchError(f": unknown key {key!r}; {suggestion(str(key), readers)}")
        if type(item) is plain.get(key):
            values[key] = item
        elif reader := readers[key]:
            values[key] = _inside(f": {key}", reader, item)
    if missing := [name for name in required if name not in values]:
        raise _MismatchError(f": missing key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    try:
        return cls(**values)
    except BitgenError as error:
        raise _MismatchError(f": {error.message}") from error


@functools.cache
def _fields(cls: Any) -> tuple[dict[str, Callable[[Any], Any] | None], dict[str, Any], list[str]]:
    """The reader of each field (None: it is not read), the type of those without need of one, required ones.

    A text in the place of a text is right as it is: a manifest has thousands.
    """
    hints, fields, none = typing.get_type_hints(cls), dataclasses.fields(cls), dataclasses.MISSING
    required = [f.name for f in fields if f.init and f.default is none and f.default_factory is none]
    plain = {f.name: hints[f.name] for f in fields if f.init and hints[f.name] in (str, int, bool)}
    return {f.name: _reader(hints[f.name]) if f.init else None for f in fields}, plain, required


def _read_list(hint: Any, origin: type[Any], item: Any, value: Any) -> Any:
    if not isinstance(value, list):
        raise _MismatchError(f" must be a list, found {kind(value)}")
    if not _has_record(hint):
        with contextlib.suppress(msgspec.ValidationError):  # item by item to find which one it is
            return msgspec.convert(value, hint)
    read = _reader(item)
    items = (_inside(f"[{i}]", read, entry) for i, entry in enumerate(value))
    return frozenset(items) if issubclass(origin, Set) else tuple(items)


def _read_mapping(hint: Any, item: Any, value: Any) -> Any:
    if not isinstance(value, (dict, Mapping)) or not all(isinstance(name, str) for name in value):
        raise _MismatchError(f" must be `name: value` lines, found {kind(value)}")
    if not _has_record(hint):
        with contextlib.suppress(msgspec.ValidationError):
            return msgspec.convert(value, hint)
    read = _reader(item)
    return {name: _inside(f".{name}", read, entry) for name, entry in value.items()}


def _inside(place: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except _MismatchError as error:
        raise _MismatchError(f"{place}{error}") from error


def _read_leaf(hint: Any, value: Any) -> Any:
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        raise _MismatchError(f" must be {_wanted(hint)}, found {kind(value)}") from error


def _wanted(hint: Any) -> str:
    """What a person calls a type."""
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(map(_wanted, typing.get_args(hint)))
    return names.get(hint, "a list" if typing.get_origin(hint) is tuple else "nothing")


def kind(value: object) -> str:
    """How a person calls what a file holds, with the value where it is short."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (Mapping, list)):
        return "a list" if isinstance(value, list) else "`key: value` lines"
    text = repr(value)
    return f"the {type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


# ---- Text ----------------------------------------------------------------------


def load_json(path: str | Path) -> Mapping[str, Any]:
    """The object a JSON file holds. FileError when it cannot be read, is not JSON, or holds no object."""
    file = Path(path)
    try:
        data = msgspec.json.decode(_text(file))
    except (msgspec.DecodeError, RecursionError) as error:
        raise FileError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise FileError(f"{file}: expected a JSON object, found {kind(data)}")
    return data


def load_yaml(path: str | Path) -> Mapping[str, Any]:
    """The mapping a YAML file holds. A key that appears twice is an error, and 1e-5 is a number.

    FileError when the file cannot be read, is not YAML, or holds something else.
    """
    file = Path(path)
    text = _text(file)
    known = _parsed().get(_sha256(text))
    return known if known is not None else parse_yaml(text, file)


def parse_yaml(text: str, file: Path) -> Mapping[str, Any]:
    """The mapping of a YAML text; errors name ``file``."""
    import yaml  # 15 ms, and those of configs/ are parsed already

    try:
        data = yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: PyYAML lets int() and date() speak for themselves. RecursionError: nested too deeply.
        raise FileError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise FileError(f"{file}: expected `key: value` lines, found {kind(data)}")
    return data


@functools.cache
def _parsed() -> Mapping[str, Any]:
    """What configs/parsed.json keeps; nothing where it is missing, as in a tree that somebody edits."""
    try:
        data = msgspec.json.decode((configs_dir() / PARSED).read_bytes())
    except (BitgenError, OSError, msgspec.DecodeError):
        return {}
    return data if isinstance(data, dict) else {}


def parsed_configs(folder: Path) -> str:
    """The text of configs/parsed.json: every YAML file below ``folder``, by the sha256 of its text."""
    lines = []
    for file in sorted(folder.rglob("*.yaml")):
        text = _text(file)
        lines.append(f'"{_sha256(text)}":{msgspec.json.encode(parse_yaml(text, file)).decode()}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FileError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error


@functools.cache
def _loader() -> type[Any]:
    """PyYAML's SafeLoader with two repairs: duplicate keys are errors, 1e-5 is a float (YAML 1.2).

    The one on libyaml, where PyYAML has it: 4 ms for what is read to open a library, instead of 30.
    """
    import yaml

    try:
        from yaml import CSafeLoader as Base
    except ImportError:  # PyYAML without libyaml
        from yaml import SafeLoader as Base  # type: ignore[assignment]

    class StrictLoader(Base):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is duplicated", key_node.start_mark
                    )
                if isinstance(key_node.value, str):
                    seen.add(key_node.value)
            return super().construct_mapping(node, deep=deep)

    exponent = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+\Z")
    StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    return StrictLoader


if __name__ == "__main__":
    (configs_dir() / PARSED).write_text(parsed_configs(configs_dir()), encoding="utf-8")
