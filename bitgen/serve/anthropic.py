"""Anthropic's ``/v1/messages``: chats whose messages are made of blocks, and their events."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitgen.serve import messages
from bitgen.serve.answers import Head, SingleAnswer
from bitgen.serve.errors import ApiError
from bitgen.serve.messages import ChatBody, ChatMessage
from bitgen.serve.openapi import Endpoint
from bitgen.serve.service import Maker, Service, json_response
from bitgen.serve.tools import CalledFunction, Function, NamedFunction, NamedTool, Tool, ToolCall
from bitgen.serve.worker import Job, Update

if TYPE_CHECKING:
    from bitgen.inference.sequence import Request

_BLOCKS = ("text", "tool_use", "tool_result")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PARAMS = {"stop": "stop_sequences"}  # fields of ours that have another name here
_STOP_REASONS = {"end": "end_turn", "stop": "stop_sequence", "length": "max_tokens", "context": "max_tokens"}
BlockType: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": list(_BLOCKS)})]
MessageRole: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": ["user", "assistant"]})]


class TextBlock(msgspec.Struct):
    """A part of a text."""

    text: str
    type: Annotated[str, Meta(extra_json_schema={"enum": ["text"]})] = "text"


class Block(msgspec.Struct, kw_only=True):
    """A part of a message: a text, a call that the model made, or what came of one."""

    type: BlockType
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextBlock] | None = None


class Message(msgspec.Struct, kw_only=True):
    """A message of a chat."""

    role: MessageRole
    content: str | list[Block]


class InputTool(msgspec.Struct, kw_only=True):
    """A function that may be called."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class ToolChoice(msgspec.Struct, kw_only=True):
    """Whether a function has to be called, and which."""

    type: Annotated[str, Meta(extra_json_schema={"enum": [*_CHOICES, "tool"]})]
    name: str | None = None


class CountBody(msgspec.Struct, kw_only=True):
    """Of ``/v1/messages/count_tokens``."""

    model: str
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[InputTool] | None = None
    tool_choice: ToolChoice | None = None

    def chat(self, **fields: Any) -> ChatBody:
        """The same in our words, with more fields. ApiError names what cannot be honoured.

        A text of the assistant that comes last is gone on with.
        """
        found = [ChatMessage("system", _joined(self.system, "system"))] if self.system else []
        for i, message in enumerate(self.messages):
            found += _messages(message, f"messages[{i}]")
        for i, tool in enumerate(self.tools or ()):
            custom = tool.type in (None, "custom")
            messages.check(custom, f"tools[{i}] of type {str(tool.type)[:40]!r} is not supported", "tools")
        tools = [Tool(Function(t.name, t.description, t.input_schema)) for t in self.tools or ()]
        chat = ChatBody(messages=found, tools=tools or None, tool_choice=self._choice(), **fields)
        chat.continue_final_message = chat.ends_begun
        return chat

    def _choice(self) -> str | NamedTool | None:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "tool":
            messages.check(choice.name is not None, "tool_choice names no tool", "tool_choice")
            return NamedTool(NamedFunction(choice.name or ""))
        known = choice.type in _CHOICES
        messages.check(known, f"tool_choice {choice.type[:40]!r} is not known", "tool_choice")
        return _CHOICES[choice.type]


class MessagesBody(CountBody, kw_only=True):
    """Of ``/v1/messages``; ``seed`` is ours."""

    max_tokens: messages.Positive
    temperature: messages.Temperature | None = None
    top_p: messages.Share | None = None
    top_k: messages.TopK | None = None
    stop_sequences: list[str] | None = None
    seed: int | None = None
    stream: bool | None = None

    def chat_body(self) -> ChatBody:
        return self.chat(
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            seed=self.seed,
        )


def _joined(content: str | Sequence[TextBlock], at: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        kind = block.type[:40]
        messages.check(kind == "text", f"{at}: content of type {kind!r} is not supported", at)
    return "\n".join(block.text for block in content)


def _messages(message: Message, at: str) -> list[ChatMessage]:
    """Results of calls are messages of their own, before the text beside them."""
    known = message.role in ("user", "assistant")
    messages.check(known, f"{at} has the role {message.role[:40]!r}; known are user, assistant", f"{at}.role")
    if isinstance(message.content, str):
        return [ChatMessage(message.role, message.content)]
    texts, calls, found = list[str](), list[ToolCall](), list[ChatMessage]()
    for i, block in enumerate(message.content):
        where, kind = f"{at}.content[{i}]", block.type[:40]
        messages.check(kind in _BLOCKS, f"{where} of type {kind!r} is not supported", f"{where}.type")
        if kind == "text":
            messages.check(block.text is not None, f"{where} has no text", f"{where}.text")
            texts.append(block.text or "")
        elif kind == "tool_use":
            arguments = msgspec.json.encode(block.input or {}).decode()
            calls.append(ToolCall(CalledFunction(block.name or "", arguments), block.id))
        else:
            content = _joined(block.content or "", f"{where}.content")
            found.append(ChatMessage("tool", content, tool_call_id=block.tool_use_id))
    if texts or calls or not found:
        found.append(ChatMessage(message.role, "\n".join(texts), tool_calls=calls or None))
    return found


class MessagesAnswer(SingleAnswer):
    """A message with its blocks, or the events that build it."""

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(
        self, jobs: Sequence[Job], head: Head, stops: Sequence[str] = (), names: Sequence[str] = ()
    ) -> None:
        super().__init__(jobs, names)
        self._stops = stops  # that were asked for; a chat template may have more
        self._finish = ""
        self._opened = False
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    def absorb(self, update: Update) -> str:
        self._finish = update.finish or ""
        return super().absorb(update)

    # ---- Whole ----

    def body(self) -> dict[str, Any]:
        text = self.choices[0].text
        blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not self.calls else []
        usage = {**self._input(), "output_tokens": self._job.sampled}
        ended = {**self._ended(), "usage": usage, "seed": self._job.seed}
        return {**self._head, "content": blocks + self._call_blocks(), **ended}

    @property
    def _job(self) -> Job:
        return self.choices[0].job

    def _call_blocks(self) -> list[dict[str, Any]]:
        return [
            {
                "type": "tool_use",
                "id": f"toolu_{self._head['id'][4:]}_{i}",
                "name": call.name,
                "input": call.given,
            }
            for i, call in enumerate(self.calls)
        ]

    def _ended(self) -> dict[str, Any]:
        stop = self._job.stop if self._job.stop in self._stops else None
        reason = "end_turn" if self._finish == "stop" and stop is None else _STOP_REASONS[self._finish]
        return {"stop_reason": "tool_use" if self.calls else reason, "stop_sequence": stop}

    def _input(self) -> dict[str, int]:
        """Tokens of the prompt, those that the KV cache held apart."""
        job = self._job
        fresh = len(job.request.prompt) - job.reused
        return {
            "input_tokens": fresh,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": job.reused,
        }

    # ---- As a stream ----

    def begin(self) -> bytes:
        usage = {"input_tokens": len(self._job.request.prompt), "output_tokens": 0}
        ended = {"stop_reason": None, "stop_sequence": None, "usage": usage}
        message: dict[str, Any] = {**self._head, "content": [], **ended}
        return _event("message_start", message=message)

    def feed(self, update: Update) -> bytes:
        text = self.absorb(update)
        if not text:
            return b""
        delta = {"type": "text_delta", "text": text}
        return self._open() + _event("content_block_delta", index=0, delta=delta)

    def fail(self, error: ApiError) -> bytes:
        return _event("error", error=error.typed_body()["error"])

    def end(self) -> bytes:
        events, at = [], 0
        if self._opened or not self.calls:
            events, at = [self._open(), _event("content_block_stop", index=0)], 1
        for i, block in enumerate(self._call_blocks(), at):
            json = msgspec.json.encode(block["input"]).decode()
            events += [
                _event("content_block_start", index=i, content_block={**block, "input": {}}),
                _event(
                    "content_block_delta", index=i, delta={"type": "input_json_delta", "partial_json": json}
                ),
                _event("content_block_stop", index=i),
            ]
        usage = {**self._input(), "output_tokens": self._job.sampled}
        last = _event("message_delta", delta=self._ended(), usage=usage, seed=self._job.seed)
        return b"".join((*events, last, _event("message_stop")))

    def _open(self) -> bytes:
        """The block of the text, before its first part."""
        if self._opened:
            return b""
        self._opened = True
        return _event("content_block_start", index=0, content_block={"type": "text", "text": ""})


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode({"type": kind, **fields}) + b"\n\n"


class MessagesEndpoints:
    """Two paths."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Endpoint]:
        """In the order of the description."""
        return [
            Endpoint("POST", "/v1/messages", self.messages, "Anthropic: answer a conversation", MessagesBody),
            Endpoint("POST", "/v1/messages/count_tokens", self.count, "Anthropic: tokens of one", CountBody),
        ]

    async def messages(self, http: HttpRequest) -> Response:
        body, service = await self._service.body(http, MessagesBody), self._service
        head, chat = service.head(body.model), body.chat_body()
        try:
            requests: list[Request] = await service.in_thread(
                messages.chat_requests, chat, service.llm, service.limits
            )
        except ApiError as error:
            error.param = _PARAMS.get(error.param or "", error.param)
            raise
        names = [tool.function.name for tool in chat.callable_tools]
        stops = body.stop_sequences or ()
        made: Maker = partial(MessagesAnswer, head=head, stops=stops, names=names)
        return await service.answer(http, requests, made, stream=bool(body.stream))

    async def count(self, http: HttpRequest) -> Response:
        body, service = await self._service.body(http, CountBody), self._service
        service.model(body.model)
        ids = await service.in_thread(messages.chat_ids, body.chat(), service.llm)
        return json_response({"input_tokens": len(ids)})
