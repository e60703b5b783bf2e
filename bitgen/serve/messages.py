"""What clients send: bodies with strict types, and the requests to the engine that they become.

Fields that are not known are ignored, as clients send many; a field that is known, asks for something and
cannot be honoured is an error that names it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from bitgen.errors import BitgenError, UsageError
from bitgen.inference.chat_template import BUILT_IN, PLAIN_STOP, knows_tools
from bitgen.inference.sampling import Sampling
from bitgen.inference.sequence import Request
from bitgen.serve.errors import ApiError, context_error
from bitgen.serve.tools import NAME, TOOLS_MAX, NamedTool, Tool, ToolCall, plain_messages, tell

if TYPE_CHECKING:
    from bitgen.inference.grammar import Grammar
    from bitgen.llm import LLM

STOPS_MAX, STOP_CHARACTERS_MAX = 16, 256
STOP_IDS_MAX = 64
LOGPROBS_MAX = 20
PROMPTS_MAX = 64  # of one request
COMPLETION_TOKENS = 16  # what OpenAI's completions make where nobody says how many
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SEEDS = 1 << 64
_EXACT = 1 << 53  # up to here floating point holds every whole number

Role: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": list(_ROLES)})]
Temperature: TypeAlias = Annotated[float, Meta(ge=0)]
TopK: TypeAlias = Annotated[int, Meta(ge=-1)]
LastN: TypeAlias = Annotated[int, Meta(ge=-1)]
Positive: TypeAlias = Annotated[int, Meta(ge=1)]
Most: TypeAlias = Annotated[int, Meta(ge=-1)]  # -1, as llama.cpp and LM Studio write it: as many as fit
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Penalty: TypeAlias = Annotated[float, Meta(ge=-2, le=2)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)]
T = TypeVar("T")


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class JsonSchema(msgspec.Struct):
    """A schema with its name."""

    name: str | None = None
    schema: Any = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """OpenAI's ``response_format``: text, json_object, json_schema."""

    type: str
    json_schema: JsonSchema | None = None


class Body(msgspec.Struct, kw_only=True):
    """The fields that chats and completions have in common."""

    model: str | None = None
    max_tokens: Most | None = None
    n: Positive | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: LastN | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    stop_token_ids: list[int] | None = None
    lookup: bool | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    json_schema: Any = None  # as llama.cpp's server takes it
    grammar: Any = None  # what would hold the text to something else, in the words of other servers
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    structured_outputs: Any = None

    @property
    def choices(self) -> int:
        """How many texts each prompt gets."""
        return 1 if self.n is None else self.n


class CompletionBody(Body, kw_only=True):
    """Of ``/v1/completions``: texts, or token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: Count | None = None
    suffix: str | None = None
    best_of: int | None = None


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """A message, its content a text or parts."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class TemplateOptions(msgspec.Struct):
    """What a request tells the chat template: whether the model thinks first, where the template asks."""

    enable_thinking: bool | None = None


class ChatBody(Body, kw_only=True):
    """Of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: Most | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None  # a model that is made to call makes one call
    chat_template_kwargs: TemplateOptions | None = None  # in the words of llama.cpp and vLLM
    continue_final_message: bool | None = None  # which is the assistant's; in the words of vLLM

    @property
    def callable_tools(self) -> Sequence[Tool]:
        """The tools that the model may call."""
        return () if self.tool_choice == "none" else self.tools or ()

    @property
    def ends_begun(self) -> bool:
        """Whether the last message is a text of the assistant, which may go on."""
        last = self.messages[-1] if len(self.messages) > 1 else None
        return last is not None and last.role == "assistant" and not last.tool_calls

    @property
    def thinking(self) -> bool | None:
        """Whether the model is to think before it answers; None: as the server says."""
        return self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None


class TokenizeBody(msgspec.Struct, kw_only=True):
    """llama.cpp's ``content`` or vLLM's ``prompt`` and ``messages``."""

    content: str | None = None
    add_special: bool | None = None
    parse_special: bool = True
    with_pieces: bool = False
    prompt: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    messages: list[ChatMessage] | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True):
    """Of ``/detokenize``, in both dialects."""

    tokens: list[int]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    choices: int  # n
    vocab: int  # tokens
    max_tokens: int | None = None  # of an answer


def read(raw: bytes, kind: type[T]) -> T:
    """A body. ApiError 400 names the field that is wrong."""
    try:
        raw.decode()
        try:
            return msgspec.json.decode(raw, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
            return msgspec.convert(_whole(msgspec.json.decode(raw)), kind)
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"the body is not UTF-8 at byte {error.start}", _field(raw, error.start)
        ) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        missing = re.search(r"missing required field `(\w+)`", message)
        raise ApiError(400, str(error), path.rstrip("`") or (missing[1] if missing else None)) from None
    except msgspec.DecodeError as error:
        at = re.search(r"\(byte (\d+)\)", str(error))
        raise ApiError(400, str(error), _field(raw, int(at[1]) if at else len(raw))) from None


def _whole(value: Any) -> Any:
    """The same with 3 for 3.0, which clients write whose numbers are all floating point."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= _EXACT:
        return int(value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return {name: _whole(each) for name, each in value.items()} if isinstance(value, dict) else value


def unknown_fields(raw: bytes, kind: type[Any]) -> set[str]:
    """The names in a body, which `read` took, that ``kind`` does not have."""
    return set(msgspec.json.decode(raw, type=dict[str, msgspec.Raw])) - set(kind.__struct_fields__)


def _field(raw: bytes, at: int) -> str | None:
    """The last name of a field before a byte."""
    names = re.findall(rb'"(\w+)"\s*:', raw[:at])
    return names[-1].decode() if names else None


def check(holds: bool, message: str, param: str) -> None:
    if not holds:
        raise ApiError(400, message, param)


def completion_requests(body: CompletionBody, llm: LLM, limits: Limits) -> list[Request]:
    """A request for each choice, those of one prompt side by side. Takes long for long prompts."""
    check(not body.suffix, "suffix is not supported", "suffix")
    check(body.best_of in (None, body.choices), "best_of other than n is not supported", "best_of")
    k = body.logprobs
    wanted = replace(
        _wanted(body, limits, COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens),
        logprobs=k,
        score_prompt=bool(body.echo) and k is not None,
        **_grammar(body, llm),
    )
    prompts = []
    for prompt in split_prompts(body.prompt, "prompt"):
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        prompts.append(checked(ids, llm, "prompt"))
    return _choices(body, wanted, prompts)


def chat_requests(body: ChatBody, llm: LLM, limits: Limits) -> list[Request]:
    """A request for each choice."""
    k = body.top_logprobs or 0
    check(not k or bool(body.logprobs), "top_logprobs needs logprobs", "top_logprobs")
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted = _wanted(body, limits, getattr(body, name), name)
    wanted = replace(wanted, logprobs=k if body.logprobs else None)
    wanted = replace(wanted, **(_forced_call(body, llm) or _grammar(body, llm)))
    if llm.template_text == BUILT_IN["plain"]:
        wanted = replace(wanted, stop=(*wanted.stop, *PLAIN_STOP))
    return _choices(body, wanted, [checked(chat_ids(body, llm), llm, "messages")])


def _grammar(body: Body, llm: LLM) -> dict[str, Any]:
    """The fields of a request whose text follows a schema."""
    schema, param = body.json_schema, "json_schema"
    if body.response_format is not None and body.response_format.type != "text":
        kind, param = body.response_format.type, "response_format"
        check(kind in ("json_object", "json_schema"), f"response_format {kind!r} is not known", param)
        given = body.response_format.json_schema
        schema = {"type": "object"} if kind == "json_object" else given and given.schema
        check(schema is not None, "response_format needs json_schema.schema", param)
    if schema is None:
        return {}
    return {"grammar": _made(param, lambda: llm.grammars.json_schema(schema)), "ignore_end": False}


def _forced_call(body: ChatBody, llm: LLM) -> dict[str, Any]:
    """The fields of a request whose text has to be a call; none where it need not be."""
    tools, choice = body.callable_tools, body.tool_choice
    check(len(tools) <= TOOLS_MAX, f"a request has {TOOLS_MAX} tools at most", "tools")
    for i, tool in enumerate(tools):
        at = f"tools[{i}]"
        check(tool.type == "function", f"{at} is of the type {tool.type!r}; known is function", at)
        named = NAME.fullmatch(tool.function.name)
        check(bool(named), f"{at} needs a name of 1 to 64 letters, digits, _ or -", f"{at}.function.name")
    if choice is None or choice in ("auto", "none"):
        return {}
    check(bool(tools), "tool_choice needs tools", "tool_choice")
    if isinstance(choice, NamedTool):
        name = choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        check(bool(tools), f"tool_choice names {name[:64]!r}, which is no tool", "tool_choice")
    else:
        check(choice == "required", f"tool_choice {choice[:64]!r} is not known", "tool_choice")
    pairs = [(tool.function.name, tool.function.parameters or {"type": "object"}) for tool in tools]
    return {"grammar": _made("tools", lambda: llm.grammars.calls(pairs)), "ignore_end": False}


def _made(param: str, make: Callable[[], Grammar]) -> Grammar:
    try:
        return make()
    except UsageError as error:
        raise ApiError(400, error.message, param) from None
    except BitgenError as error:  # llguidance is missing
        raise ApiError(501, error.message, param) from None


def chat_ids(body: ChatBody, llm: LLM) -> list[int]:
    """The prompt of a conversation."""
    check(bool(body.messages), "a chat needs at least one message", "messages")
    given = [_message(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    begun, tools = "", body.callable_tools
    if body.continue_final_message:
        check(body.ends_begun, "the last message is none of the assistant's texts", "continue_final_message")
        begun = given.pop()["content"]
    native = knows_tools(llm.template_text)
    if not native:
        given = plain_messages(given)
        given = tell(given, tools) if tools else given
    try:
        shown = msgspec.to_builtins(tools) if native else ()
        return llm.chat_prompt(given, shown, body.thinking, begun=begun)
    except BitgenError as error:
        raise ApiError(400, error.message, "messages") from None


def _message(message: ChatMessage, at: str) -> dict[str, Any]:
    """A message as templates take it."""
    role, content = message.role, message.content
    check(role in _ROLES, f"{at} has the role {role[:40]!r}; known are {', '.join(_ROLES)}", f"{at}.role")
    if content is None and message.tool_calls:
        content = ""
    for part in [Part("text", content)] if not isinstance(content, list) else content:
        kind = part.type[:40]
        check(kind == "text", f"{at}: content of type {kind!r} is not supported", f"{at}.content")
        check(part.text is not None, f"{at} has no text", f"{at}.content")
    text = content if isinstance(content, str) else "".join(part.text or "" for part in content or ())
    found: dict[str, Any] = {"role": _ROLES[role], "content": text}
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [_call(call) for call in message.tool_calls]
    return found


def _call(call: ToolCall) -> dict[str, Any]:
    """A call whose arguments are an object where they can be read, as templates expect."""
    arguments: Any = call.function.arguments
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        arguments = msgspec.json.decode(arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": call.type, "function": function}


def split_prompts(prompt: str | list[str | int | list[int]], param: str) -> Sequence[str | list[int]]:
    """A text, texts, token ids, or lists of these, each of which is a prompt."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [each for each in prompt if isinstance(each, str)]
    ids = [each for each in prompt if isinstance(each, int)]
    lists = [each for each in prompt if isinstance(each, list)]
    check(bool(prompt), "the prompt is empty", param)
    check(len(prompt) in (len(texts), len(ids), len(lists)), "a prompt is of one kind", param)
    if ids:
        return [ids]
    check(len(prompt) <= PROMPTS_MAX, f"a request has {PROMPTS_MAX} prompts at most", param)
    return texts or lists


def checked(ids: Sequence[int], llm: LLM, param: str) -> tuple[int, ...]:
    """A prompt that fits; an empty one is a start token."""
    if len(ids) > llm.context:
        raise context_error(len(ids), llm.context)
    try:
        return llm.request(list(ids) if ids else "").prompt
    except BitgenError as error:
        raise ApiError(400, error.message, param) from None


def check_most(tokens: int | None, name: str) -> None:
    """ApiError where the field ``name`` asks for no token."""
    check(tokens != 0, f"{name} must be 1 or more (-1: as many as fit)", name)


def _wanted(body: Body, limits: Limits, max_tokens: int | None, name: str = "max_tokens") -> Request:
    """All of a request but its prompt; ``name`` is the field that says how many tokens."""
    n = body.choices
    check_most(max_tokens, name)
    max_tokens = None if max_tokens == -1 else max_tokens
    check(n <= limits.choices, f"n must be 1 to {limits.choices}, not {n}", "n")
    if limits.max_tokens is not None:
        max_tokens = min(limits.max_tokens, limits.max_tokens if max_tokens is None else max_tokens)
    for name in ("grammar", "guided_json", "guided_regex", "guided_choice", "structured_outputs"):
        check(not getattr(body, name), f"{name} is not supported: use response_format", name)
    least, ends = body.min_tokens or 0, body.stop_token_ids or []
    check(max_tokens is None or least <= max_tokens, "min_tokens is more than max_tokens", "min_tokens")
    check(len(ends) <= STOP_IDS_MAX, f"stop_token_ids has {STOP_IDS_MAX} tokens at most", "stop_token_ids")
    wrong = next((token for token in ends if not 0 <= token < limits.vocab), None)
    check(wrong is None, f"stop_token_ids: {wrong} is no token of this model", "stop_token_ids")
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    check(len(stops) <= STOPS_MAX, f"stop has {STOPS_MAX} texts at most", "stop")
    longest = max(map(len, stops), default=0)
    check(longest <= STOP_CHARACTERS_MAX, f"a stop text has {STOP_CHARACTERS_MAX} characters at most", "stop")
    return Request(
        prompt=(),
        max_tokens=max_tokens,
        sampling=_sampling(body, limits.vocab),
        stop=stops,
        ignore_end=bool(body.ignore_eos),
        lookup=bool(body.lookup),
        min_tokens=least,
        stop_ids=frozenset(ends),
    )


def _sampling(body: Body, vocab: int) -> Sampling:
    given: dict[str, Any] = {
        name: getattr(body, name) for name in Sampling.__dataclass_fields__ if hasattr(body, name)
    }
    if body.repetition_penalty is not None:
        given["repeat_penalty"] = body.repetition_penalty
    for name in ("top_k", "seed"):  # -1 is what llama.cpp and vLLM call all, and any
        if given[name] == -1:
            given[name] = 0 if name == "top_k" else None
    given["logit_bias"] = _biases(body.logit_bias or {}, vocab)
    try:
        return Sampling(**{name: value for name, value in given.items() if value is not None})
    except BitgenError as error:
        raise ApiError(400, error.message, error.message.partition(" ")[0]) from None


def _biases(given: Mapping[str, float], vocab: int) -> tuple[tuple[int, float], ...]:
    """OpenAI writes the ids of tokens as texts."""
    for name in given:
        known = name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab
        check(known, f"logit_bias: {name[:20]!r} is no token of this model (0 to {vocab - 1})", "logit_bias")
    return tuple((int(name), bias) for name, bias in given.items())


def _choices(body: Body, wanted: Request, prompts: Sequence[tuple[int, ...]]) -> list[Request]:
    """Choice i of a prompt has the seed + i, so that a seed makes n texts that differ."""
    requests = []
    for prompt in prompts:
        for i in range(body.choices):
            seed = wanted.sampling.seed
            sampling = wanted.sampling if seed is None else replace(wanted.sampling, seed=(seed + i) % _SEEDS)
            requests.append(replace(wanted, prompt=prompt, sampling=sampling))
    return requests
