"""What clients send: bodies with strict types, and the requests to the engine that they become.

Fields that are not known are ignored, as clients send many; a field that is known, asks for something and
cannot be honoured is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from bitgen.errors import BitgenError
from bitgen.inference.chat_template import BUILT_IN, PLAIN_STOP
from bitgen.inference.sampling import Sampling
from bitgen.inference.sequence import Request
from bitgen.serve.errors import ApiError, context_error

if TYPE_CHECKING:
    from bitgen.llm import LLM

STOPS_MAX, STOP_CHARACTERS_MAX = 16, 256
LOGPROBS_MAX = 20
PROMPTS_MAX = 64  # of one request
COMPLETION_TOKENS = 16  # what OpenAI's completions make where nobody says how many
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SEEDS = 1 << 64

T = TypeVar("T")


class StreamOptions(msgspec.Struct):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class Body(msgspec.Struct, kw_only=True):
    """The fields that chats and completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_last_n: int | None = None
    ignore_eos: bool | None = None
    lookup: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @property
    def choices(self) -> int:
        """How many texts each prompt gets."""
        return 1 if self.n is None else self.n


class CompletionBody(Body, kw_only=True):
    """Of ``/v1/completions``: texts, or token ids."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None


class Part(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    """A message, its content a text or parts."""

    role: str
    content: str | list[Part] | None = None


class ChatBody(Body, kw_only=True):
    """Of ``/v1/chat/completions``."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None


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
        return msgspec.json.decode(raw, type=kind)
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
    check(k is None or 0 <= k <= LOGPROBS_MAX, f"logprobs must be 0 to {LOGPROBS_MAX}, not {k}", "logprobs")
    tokens = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    wanted = replace(
        _wanted(body, limits, "max_tokens", tokens),
        logprobs=k,
        score_prompt=bool(body.echo) and k is not None,
    )
    prompts = []
    for prompt in _prompts(body.prompt):
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        prompts.append(_checked(ids, llm, "prompt"))
    return _choices(body, wanted, prompts)


def chat_requests(body: ChatBody, llm: LLM, limits: Limits) -> list[Request]:
    """A request for each choice."""
    format_ = (body.response_format or {}).get("type", "text")
    check(format_ == "text", f"response_format {format_!r} is not supported", "response_format")
    check(not body.tools or body.tool_choice == "none", "tools are not supported", "tools")
    k = body.top_logprobs or 0
    check(0 <= k <= LOGPROBS_MAX, f"top_logprobs must be 0 to {LOGPROBS_MAX}, not {k}", "top_logprobs")
    check(not k or bool(body.logprobs), "top_logprobs needs logprobs", "top_logprobs")
    given = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    wanted = replace(_wanted(body, limits, name, given), logprobs=k if body.logprobs else None)
    if llm.template_text == BUILT_IN["plain"]:
        wanted = replace(wanted, stop=(*wanted.stop, *PLAIN_STOP))
    return _choices(body, wanted, [_checked(chat_ids(body.messages, llm), llm, "messages")])


def chat_ids(messages: Sequence[ChatMessage], llm: LLM) -> list[int]:
    """The prompt of a conversation."""
    check(bool(messages), "a chat needs at least one message", "messages")
    plain = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        check(
            message.role in _ROLES,
            f"{at} has the role {message.role!r}; known are {', '.join(_ROLES)}",
            f"{at}.role",
        )
        parts = [Part("text", message.content)] if not isinstance(message.content, list) else message.content
        for part in parts:
            check(
                part.type == "text", f"{at}: content of type {part.type!r} is not supported", f"{at}.content"
            )
            check(part.text is not None, f"{at} has no text", f"{at}.content")
        plain.append({"role": _ROLES[message.role], "content": "".join(part.text or "" for part in parts)})
    try:
        return llm.chat_prompt(plain)
    except BitgenError as error:
        raise ApiError(400, error.message, "messages") from None


def _prompts(prompt: str | list[str | int | list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    texts = [each for each in prompt if isinstance(each, str)]
    ids = [each for each in prompt if isinstance(each, int)]
    lists = [each for each in prompt if isinstance(each, list)]
    check(bool(prompt), "the prompt is empty", "prompt")
    check(len(prompt) in (len(texts), len(ids), len(lists)), "a prompt is of one kind", "prompt")
    if ids:
        return [ids]
    check(len(prompt) <= PROMPTS_MAX, f"a request has {PROMPTS_MAX} prompts at most", "prompt")
    return texts or lists


def _checked(ids: Sequence[int], llm: LLM, param: str) -> tuple[int, ...]:
    """A prompt that fits; an empty one is a start token."""
    if len(ids) > llm.context:
        raise context_error(len(ids), llm.context)
    try:
        return llm.request(list(ids) if ids else "").prompt
    except BitgenError as error:
        raise ApiError(400, error.message, param) from None


def _wanted(body: Body, limits: Limits, name: str, max_tokens: int | None) -> Request:
    """All of a request but its prompt."""
    n = body.choices
    check(1 <= n <= limits.choices, f"n must be 1 to {limits.choices}, not {n}", "n")
    check(max_tokens is None or max_tokens >= 1, f"{name} must be 1 or more, not {max_tokens}", name)
    if limits.max_tokens is not None:
        max_tokens = min(limits.max_tokens, limits.max_tokens if max_tokens is None else max_tokens)
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
