"""OpenAI's ``/v1/responses``, without memory: what was said before comes with each request."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitgen.serve import messages
from bitgen.serve.answers import Head, SingleAnswer
from bitgen.serve.errors import ApiError
from bitgen.serve.messages import ChatBody, ChatMessage, JsonSchema, Part, ResponseFormat
from bitgen.serve.openapi import Endpoint
from bitgen.serve.service import Maker, Service
from bitgen.serve.tools import CalledFunction, Function, NamedFunction, NamedTool, Tool, ToolCall
from bitgen.serve.worker import Job, Update

_TEXTS = ("input_text", "output_text", "text")
ItemType: TypeAlias = Annotated[
    str, Meta(extra_json_schema={"enum": ["message", "function_call", "function_call_output"]})
]
PartType: TypeAlias = Annotated[str, Meta(extra_json_schema={"enum": list(_TEXTS)})]


class InputPart(msgspec.Struct):
    """A part of a message."""

    type: PartType
    text: str | None = None


class Item(msgspec.Struct, kw_only=True):
    """A message, a call that the model made, or what came of one."""

    type: ItemType = "message"
    role: messages.Role | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None


class TextFormat(msgspec.Struct, kw_only=True):
    """``response_format``, with the schema beside its type."""

    type: str = "text"
    name: str | None = None
    schema: Any = None


class TextOptions(msgspec.Struct, kw_only=True):
    """Of the field ``text``."""

    format: TextFormat | None = None


class FlatTool(msgspec.Struct, kw_only=True):
    """A function without its wrapper."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FlatChoice(msgspec.Struct, kw_only=True):
    """The function that is to be called."""

    name: str
    type: str = "function"


class ResponsesBody(msgspec.Struct, kw_only=True):
    """Of ``/v1/responses``."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: messages.Positive | None = None
    temperature: messages.Temperature | None = None
    top_p: messages.Share | None = None
    seed: int | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | FlatChoice | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None

    def chat_body(self) -> ChatBody:
        """The same as a chat. ApiError names what cannot be honoured."""
        for name in ("previous_response_id", "conversation", "background"):
            messages.check(not getattr(self, name), f"{name} is not supported: nothing is stored", name)
        for i, tool in enumerate(self.tools or ()):
            kind = tool.type[:40]
            messages.check(kind == "function", f"tools[{i}] of type {kind!r} is not supported", f"tools[{i}]")
        choice = self.tool_choice
        return ChatBody(
            messages=self._messages(),
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            response_format=self._format(),
            tools=[Tool(Function(t.name, t.description, t.parameters)) for t in self.tools or ()] or None,
            tool_choice=NamedTool(NamedFunction(choice.name)) if isinstance(choice, FlatChoice) else choice,
        )

    def _format(self) -> ResponseFormat | None:
        given = self.text and self.text.format
        if not given:
            return None
        return ResponseFormat(given.type, JsonSchema(given.name, given.schema))

    def _messages(self) -> list[ChatMessage]:
        found = [ChatMessage("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*found, ChatMessage("user", self.input)]
        for i, item in enumerate(self.input):
            at = f"input[{i}]"
            if item.type == "function_call":
                call = ToolCall(CalledFunction(item.name or "", item.arguments or "{}"), item.call_id)
                found.append(ChatMessage("assistant", "", tool_calls=[call]))
            elif item.type == "function_call_output":
                content = _parts(item.output, f"{at}.output")
                found.append(ChatMessage("tool", content, tool_call_id=item.call_id))
            else:
                kind = item.type[:40]
                messages.check(kind == "message", f"{at} of type {kind!r} is not supported", f"{at}.type")
                messages.check(item.role is not None, f"{at} has no role", f"{at}.role")
                found.append(ChatMessage(item.role or "", _parts(item.content, f"{at}.content")))
        return found


def _parts(content: str | list[InputPart] | None, at: str) -> str | list[Part]:
    messages.check(content is not None, f"{at} is missing", at)
    if isinstance(content, str):
        return content
    parts = []
    for part in content or ():
        kind = part.type[:40]
        messages.check(kind in _TEXTS, f"{at}: content of type {kind!r} is not supported", at)
        parts.append(Part("text", part.text))
    return parts


class ResponsesAnswer(SingleAnswer):
    """A response with its items, or the events that build it."""

    def __init__(
        self, jobs: Sequence[Job], head: Head, asked: ResponsesBody, names: Sequence[str] = ()
    ) -> None:
        super().__init__(jobs, names)
        self._asked = asked
        self._number = 0
        self._item = f"msg_{secrets.token_hex(12)}"
        self._opened = False
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    # ---- Whole ----

    def body(self) -> dict[str, Any]:
        return self._response(self._status, self._items(), self._usage())

    @property
    def _status(self) -> str:
        """Of the whole, and of its text."""
        return "incomplete" if self.choices[0].finish == "length" else "completed"

    def _response(self, status: str, output: Sequence[Any], usage: Any = None) -> dict[str, Any]:
        asked = self._asked
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "output": output,
            "parallel_tool_calls": False,
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "tool_choice": asked.tool_choice or "auto",
            "tools": [msgspec.to_builtins(tool) for tool in asked.tools or ()],
            "store": False,
            "usage": usage,
            "metadata": {},
            "seed": self.choices[0].job.seed,
        }

    def _items(self) -> list[dict[str, Any]]:
        items = [self._message(self._status)] if self.choices[0].text or not self.calls else []
        return items + self._call_items()

    def _message(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._text(self.choices[0].text)]
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _call_items(self) -> list[dict[str, Any]]:
        return [
            {
                "id": f"fc_{self._item[4:]}_{i}",
                "type": "function_call",
                "call_id": f"call_{self._item[4:]}_{i}",
                "name": call.name,
                "arguments": call.arguments,
                "status": "completed",
            }
            for i, call in enumerate(self.calls)
        ]

    @staticmethod
    def _text(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _usage(self) -> dict[str, Any]:
        job = self.choices[0].job
        prompt = len(job.request.prompt)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": job.reused},
            "output_tokens": job.sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + job.sampled,
        }

    # ---- As a stream ----

    def begin(self) -> bytes:
        response = self._response("in_progress", [])
        return self._event("created", response=response) + self._event("in_progress", response=response)

    def feed(self, update: Update) -> bytes:
        text = self.absorb(update)
        return self._open() + self._of_text("output_text.delta", delta=text, logprobs=[]) if text else b""

    def fail(self, error: ApiError) -> bytes:
        failed = {**self._response("failed", []), "error": {"code": error.code, "message": error.message}}
        return self._event("failed", response=failed)

    def end(self) -> bytes:
        events, at = [], 0
        if self._opened or not self.calls:
            text = self.choices[0].text
            events = [
                self._open(),
                self._of_text("output_text.done", text=text, logprobs=[]),
                self._of_text("content_part.done", part=self._text(text)),
                self._event("output_item.done", output_index=0, item=self._message(self._status)),
            ]
            at = 1
        for i, item in enumerate(self._call_items(), at):
            where = {"output_index": i, "item_id": item["id"]}
            arguments = item["arguments"]
            started = {**item, "arguments": "", "status": "in_progress"}
            events += [
                self._event("output_item.added", output_index=i, item=started),
                self._event("function_call_arguments.delta", **where, delta=arguments),
                self._event("function_call_arguments.done", **where, name=item["name"], arguments=arguments),
                self._event("output_item.done", output_index=i, item=item),
            ]
        whole = self.body()
        return b"".join((*events, self._event(whole["status"], response=whole)))

    def _open(self) -> bytes:
        """The item of the text, before its first part."""
        if self._opened:
            return b""
        self._opened = True
        added = self._event("output_item.added", output_index=0, item=self._message("in_progress"))
        return added + self._of_text("content_part.added", part=self._text(""))

    def _of_text(self, what: str, /, **fields: Any) -> bytes:
        return self._event(what, item_id=self._item, output_index=0, content_index=0, **fields)

    def _event(self, what: str, /, **fields: Any) -> bytes:
        kind = f"response.{what}"
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"


class ResponsesEndpoints:
    """One path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Endpoint]:
        """In the order of the description."""
        return [Endpoint("POST", "/v1/responses", self.responses, "answer, stateless", ResponsesBody)]

    async def responses(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, ResponsesBody)
        head = self._service.head(body.model)
        chat, service = body.chat_body(), self._service
        requests = await service.in_thread(messages.chat_requests, chat, service.llm, service.limits)
        names = [tool.function.name for tool in chat.callable_tools]
        made: Maker = partial(ResponsesAnswer, head=head, asked=body, names=names)
        return await service.answer(http, requests, made, stream=bool(body.stream))
