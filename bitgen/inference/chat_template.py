"""Chat templates: messages in, the text the model was trained to continue out.

A template comes with the model, so it is not trusted: it runs in jinja2's immutable sandbox, with bounds on
its steps and its output, and can read nothing but the messages.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, partial
from types import FrameType
from typing import Any, TypeAlias

from bitgen.errors import BitgenError, FileError, UsageError

# {"role": "system" | "user" | "assistant" | "tool", "content": text}; templates that know tools look for more
Message: TypeAlias = Mapping[str, Any]

_ROLES = ("system", "user", "assistant", "tool")
_STEPS_MAX = 400_000  # lines of compiled template; a long conversation takes some ten thousand
_SECONDS_MAX = 10.0
_TEXT_MAX = 1 << 24  # characters; a context of 131072 tokens has half a million
_NUMBER_MAX = 1 << 53
_PADDING = frozenset(
    ("center", "ljust", "rjust", "zfill", "format", "format_map", "expandtabs", "translate", "encode")
)

# For files without a template. The tokens of a vocabulary tell which one it was trained with.
BUILT_IN = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
        "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}
PLAIN_STOP = ("\nUser:",)  # where a model without special tokens starts to speak for the user


def template_for(tokens: Mapping[str, int]) -> str:
    """The name of the built-in template that fits a vocabulary."""
    if "<|start_header_id|>" in tokens and "<|eot_id|>" in tokens:
        return "llama3"
    return "chatml" if "<|im_start|>" in tokens and "<|im_end|>" in tokens else "plain"


def check_messages(messages: Sequence[Message]) -> None:
    """UsageError when a message has no known role or no text."""
    if not messages:
        raise UsageError("a chat needs at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise UsageError("a message is a mapping with the texts role and content")
        if message.get("role") not in _ROLES:
            raise UsageError(f"a message has the role {message.get('role')!r}; known are {', '.join(_ROLES)}")


def render_chat(
    template: str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] = (),
    bos: str = "",
    eos: str = "",
    answer: bool = True,
    thinking: bool | None = None,
) -> str:
    """The prompt for ``messages``; ``answer`` ends it where the assistant is to speak.

    ``tools`` are functions in OpenAI's shape, for a template that knows them (`knows_tools`). ``thinking`` is
    what templates of models that can think before they answer ask for (Qwen3's `enable_thinking`); None:
    their default.

    FileError when the template is wrong, refuses the messages, or runs away.
    """
    import jinja2

    check_messages(messages)
    try:
        compiled = _compile(template)
        stream = compiled.generate(
            messages=[dict(message) for message in messages],
            tools=list(tools) or None,
            add_generation_prompt=answer,
            bos_token=bos,
            eos_token=eos,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )
        parts, length = [], 0
        with _bounded_steps():
            for part in stream:
                parts.append(part)
                length += len(part)
                _allow(length)
        return "".join(parts)
    except BitgenError:
        raise
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise FileError(f"the chat template of the model fails: {error}") from error
    except (RecursionError, MemoryError) as error:
        raise _runs_away("runs away") from error


def knows_tools(template: str) -> bool:
    """Whether a template says anything about tools."""
    return re.search(r"\btools\b", template) is not None


def knows_thinking(template: str) -> bool:
    """Whether a template asks whether the model is to think."""
    return re.search(r"\benable_thinking\b", template) is not None


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = _environment()
    with _bounded_steps():
        return environment.from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    """jinja2's immutable sandbox with the functions that templates of Hugging Face expect.

    The sandbox keeps a template from reaching anything; what is added here keeps its texts and numbers small:
    doubling a text forty times would fill any memory.
    """
    extensions = ("jinja2.ext.loopcontrols", _marks_of_answers())
    environment = _sandbox()(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    for padding in ("center", "format", "indent", "wordwrap", "batch", "slice", "xmlattr", "urlize"):
        environment.filters.pop(padding, None)
    environment.filters["tojson"] = _to_json
    environment.filters["replace"] = _replace
    environment.filters["join"] = lambda parts, separator="": _join_with(str(separator), parts)
    environment.globals.pop("lipsum", None)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    return environment


def _sandbox() -> Any:
    """The class of the environment; jinja2 is imported here and not before."""
    from jinja2.compiler import CodeGenerator
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generator(CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802 - jinja2's name
            """Join texts (a ~ b ~ c), which the sandbox does not see as an operator."""
            self.write("environment.concat((")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write("))")

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        code_generator_class = Generator
        concat = staticmethod(_join)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operands(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def getattr(self, obj: Any, attribute: str) -> Any:
            return _text_method(obj, attribute) or super().getattr(obj, attribute)

        def getitem(self, obj: Any, argument: Any) -> Any:
            return _text_method(obj, argument) or super().getitem(obj, argument)

    return Sandbox


def _marks_of_answers() -> Any:
    """{% generation %} ... {% endgeneration %}: what is inside, no more.

    Training finds by it what the assistant said.
    """
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's own type

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Arithmetic on numbers of a sane size, and on texts and lists of one."""
    sequences = [v for v in (left, right) if isinstance(v, (str, list, tuple))]
    if operator == "+":
        _allow(sum(map(len, sequences)))
    elif operator == "*" and sequences:
        _allow(len(sequences[0]) * next((v for v in (left, right) if isinstance(v, int)), 0))
    elif operator == "%" and isinstance(left, str):
        raise _runs_away("formats with %")
    if any(isinstance(v, int) and abs(v) > _NUMBER_MAX for v in (left, right)) or (
        operator == "**" and isinstance(right, int) and abs(right) > 64
    ):
        raise _runs_away("computes with numbers that are too large")


def _text_method(obj: Any, name: Any) -> Any:
    """Our own methods of texts where Python's make long ones of short ones; None for all others."""
    if not isinstance(obj, str) or not isinstance(name, str):
        return None
    if name in _PADDING:
        raise _runs_away(f"calls {name}, which is not allowed")
    return {"replace": partial(_replace, obj), "join": partial(_join_with, obj)}.get(name)


def _join(parts: Any) -> str:
    return _join_with("", parts)


def _join_with(separator: str, parts: Any) -> str:
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    _allow(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(text: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, old, new = str(text), str(old), str(new)
    _allow(len(text) + text.count(old) * len(new))
    changed: str = text.replace(old, new, -1 if count is None else count)
    return changed


def _allow(length: int) -> None:
    if length > _TEXT_MAX:
        raise _runs_away("makes a text that is too long")


def _runs_away(what: str) -> BitgenError:
    return FileError(f"the chat template of the model {what}")


def _refuse(message: object) -> None:
    raise FileError(f"the chat template of the model refuses: {message}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: not jinja2's own, which escapes for HTML."""
    indent = None if indent is None else min(int(indent), 16)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.now().astimezone().strftime(str(form)[:100])


@contextmanager
def _bounded_steps() -> Iterator[None]:
    """End a template that runs for ever: see its lines through Python's tracing, for this thread only."""
    steps, end = 0, time.monotonic() + _SECONDS_MAX

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:  # noqa: ARG001
        nonlocal steps
        steps += 1
        if steps > _STEPS_MAX or time.monotonic() > end:
            raise _runs_away("runs away")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
