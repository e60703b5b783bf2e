"""Function calling: tools in, a prompt that tells of them, and calls out of the text that comes back.

A model that is made to call (``tool_choice`` required, or a name) is held to a grammar; one that may call is
not.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

TOOLS_MAX = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TAGS = ("<tool_call>", "<|python_tag|>")  # what models put before a call
_MARKS = ("{", *_TAGS)
_HOW = (
    "You may call one of these functions. To call one, answer with nothing but JSON of the form "
    '{"name": NAME, "arguments": {...}}.'
)


class Function(msgspec.Struct):
    """What may be called; ``parameters`` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct):
    """OpenAI's wrapper of a function."""

    function: Function
    type: str = "function"


class NamedFunction(msgspec.Struct):
    """The function of a `NamedTool`."""

    name: str


class NamedTool(msgspec.Struct):
    """A ``tool_choice`` that names one."""

    function: NamedFunction
    type: str = "function"


class CalledFunction(msgspec.Struct):
    """The function of a `ToolCall`; ``arguments`` is JSON."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct):
    """A call in a message of the assistant."""

    function: CalledFunction
    id: str | None = None
    type: str = "function"


@dataclass(frozen=True)
class Call:
    """A call that a model made; ``arguments`` is JSON."""

    name: str
    arguments: str

    def body(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}

    @property
    def given(self) -> Mapping[str, Any]:
        """The object that the arguments are; an empty one where the model wrote something else."""
        try:
            found = msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            return {}
        return found if isinstance(found, Mapping) else {}


def tell(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """For a template that knows no tools: say in the system message what may be called and how."""
    functions = [msgspec.to_builtins(tool.function) for tool in tools]
    lines = [json.dumps({k: v for k, v in each.items() if v is not None}) for each in functions]
    text = "\n".join((_HOW, *lines))
    first = messages[0] if messages and messages[0]["role"] == "system" else None
    if first is None:
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]


def plain_messages(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For such a template: calls and their results as texts."""
    plain = []
    for message in messages:
        if message["role"] == "tool":
            name = message.get("name")
            text = f"Result of {name}: " if name else "Result: "
            plain.append({"role": "user", "content": text + message["content"]})
            continue
        calls = [
            json.dumps({key: call["function"][key] for key in ("name", "arguments")})
            for call in message.get("tool_calls", ())
        ]
        content = "\n".join(filter(None, (message["content"], *calls)))
        plain.append({"role": message["role"], "content": content})
    return plain


class CallFilter:
    """Lets text through that is no call: what starts like one is held back until the end tells."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._held: str | None = ""  # None: this is no call

    def feed(self, text: str) -> str:
        """The part of the text so far that is certain to be content."""
        if self._held is None:
            return text
        self._held += text
        start = self._held.lstrip()
        if not start or any(mark.startswith(start) or start.startswith(mark) for mark in _MARKS):
            return ""
        text, self._held = self._held, None
        return text

    def close(self) -> tuple[str, list[Call]]:
        """The rest: content, or the calls."""
        held, self._held = self._held or "", None
        calls = parse_calls(held, self._names)
        return ("", calls) if calls else (held, [])


def parse_calls(text: str, names: Sequence[str]) -> list[Call]:
    """The calls that a text is made of; none when there is anything else in it, or an unknown name."""
    text = re.sub(r"</?tool_call>|<\|python_tag\|>", "\n", text).strip()
    decoder, at, calls = json.JSONDecoder(), 0, []
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        call = _call_of(value, names)
        if call is None:
            return []
        calls.append(call)
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n;,"))
    return calls


def _call_of(value: Any, names: Sequence[str]) -> Call | None:
    if not isinstance(value, Mapping) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return Call(value["name"], arguments)
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))
