"""Ollama's API: the same texts, in lines of JSON instead of events, with its names and units.

Options that are the server's own (``num_ctx``, ``keep_alive``) are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitgen import __version__
from bitgen.serve import messages
from bitgen.serve.answers import Head, SingleAnswer
from bitgen.serve.errors import ApiError
from bitgen.serve.messages import (
    ChatBody,
    ChatMessage,
    CompletionBody,
    JsonSchema,
    ResponseFormat,
    TemplateOptions,
)
from bitgen.serve.openapi import Endpoint
from bitgen.serve.service import LATEST, Maker, Service, json_response
from bitgen.serve.tools import CalledFunction, Tool, ToolCall
from bitgen.serve.worker import Job, Update

if TYPE_CHECKING:
    from bitgen.inference.sequence import Request

_VERSION = "0.40.0"  # of the dialect: clients ask whether it is new enough


class Options(msgspec.Struct, kw_only=True):
    """How a text is made."""

    num_predict: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: messages.Temperature | None = None
    top_k: messages.TopK | None = None
    top_p: messages.Share | None = None
    min_p: messages.Share | None = None
    repeat_penalty: float | None = None
    repeat_last_n: messages.LastN | None = None
    presence_penalty: messages.Penalty | None = None
    frequency_penalty: messages.Penalty | None = None

    def fields(self) -> dict[str, Any]:
        """Of a body of ours."""
        given = {name: getattr(self, name) for name in self.__struct_fields__ if name != "num_predict"}
        if self.num_predict is not None and self.num_predict >= 0:
            messages.check(self.num_predict > 0, "num_predict must not be 0", "options.num_predict")
            given["max_tokens"] = self.num_predict
        return given


class OllamaFunction(msgspec.Struct):
    """A function with its arguments as an object."""

    name: str
    arguments: dict[str, Any] | None = None

    def call(self) -> ToolCall:
        """The same in OpenAI's shape."""
        return ToolCall(CalledFunction(self.name, msgspec.json.encode(self.arguments or {}).decode()))


class OllamaCall(msgspec.Struct):
    """A call in a message."""

    function: OllamaFunction


class OllamaMessage(msgspec.Struct):
    """A message of a chat."""

    role: messages.Role
    content: str | None = None
    images: list[str] | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None

    def chat_message(self) -> ChatMessage:
        """The same in OpenAI's shape."""
        calls = [each.function.call() for each in self.tool_calls or ()]
        return ChatMessage(self.role, self.content or "", self.tool_name, calls or None)


class Common(msgspec.Struct, kw_only=True):
    """The fields that chat and generate have in common."""

    model: str
    stream: bool | None = None  # yes, where nobody says
    format: str | dict[str, Any] | None = None
    options: Options | None = None

    def fields(self) -> dict[str, Any]:
        """Of a body of ours."""
        found = self.options.fields() if self.options else {}
        if isinstance(self.format, dict):
            found["response_format"] = ResponseFormat("json_schema", JsonSchema(schema=self.format))
        elif self.format:
            messages.check(self.format == "json", "format must be json or a schema", "format")
            found["response_format"] = ResponseFormat("json_object")
        return {**found, "model": self.model}


class OllamaChat(Common, kw_only=True):
    """Of ``/api/chat``."""

    messages: list[OllamaMessage] = []
    tools: list[Tool] | None = None
    think: bool | str | None = None  # or how much, which is yes


class Generate(Common, kw_only=True):
    """Of ``/api/generate``."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False
    suffix: str | None = None
    images: list[str] | None = None


class Named(msgspec.Struct, kw_only=True):
    """A model by its name."""

    model: str | None = None
    name: str | None = None


class OllamaAnswer(SingleAnswer):
    """Lines of JSON; ``chat`` puts texts into messages."""

    media_type = "application/x-ndjson"
    ping: ClassVar[bytes] = b""

    def __init__(self, jobs: Sequence[Job], head: Head, *, chat: bool, names: Sequence[str] = ()) -> None:
        super().__init__(jobs, names)
        self._model = head.model
        self._chat = chat

    def begin(self) -> bytes:
        return b""

    def feed(self, update: Update) -> bytes:
        text = self.absorb(update)
        return self._line(self._part(text, False)) if text else b""

    def fail(self, error: ApiError) -> bytes:
        return self._line({"error": error.message})

    def end(self) -> bytes:
        return self._line(self._part("", True))

    def body(self) -> dict[str, Any]:
        return self._part(self.choices[0].text, True)

    def _part(self, text: str, last: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self._model, "created_at": _now()}
        if self._chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if last and self.calls:
                calls = [{"name": call.name, "arguments": call.given} for call in self.calls]
                message["tool_calls"] = [{"function": call} for call in calls]
            found["message"] = message
        else:
            found["response"] = text
        return {**found, "done": last, **(self._facts() if last else {})}

    def _facts(self) -> dict[str, Any]:
        """Durations in nanoseconds."""
        job = self.choices[0].job
        submitted, ended = job.submitted or 0.0, job.ended or 0.0
        started, first = job.started or ended, job.first or ended
        return {
            "done_reason": self.choices[0].finish,
            "total_duration": _ns(ended - submitted),
            "load_duration": 0,
            "prompt_eval_count": len(job.request.prompt),
            "prompt_eval_duration": _ns(first - started),
            "eval_count": job.sampled,
            "eval_duration": _ns(ended - first),
            "seed": job.seed,
        }

    @staticmethod
    def _line(body: Any) -> bytes:
        return msgspec.json.encode(body) + b"\n"


class OllamaEndpoints:
    """One method for each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._llm = service.llm

    def all(self) -> list[Endpoint]:
        """In the order of the description."""
        return [
            Endpoint("POST", "/api/chat", self.chat, "Ollama: answer a conversation", OllamaChat),
            Endpoint("POST", "/api/generate", self.generate, "Ollama: continue a text", Generate),
            Endpoint("POST", "/api/show", self.show, "Ollama: what is known of the model", Named),
            Endpoint("GET", "/api/tags", self.tags, "Ollama: the names of the model"),
            Endpoint("GET", "/api/ps", self.ps, "Ollama: what is loaded"),
            Endpoint("GET", "/api/version", self.version, "Ollama: the version of this dialect"),
        ]

    async def chat(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, OllamaChat)
        messages.check(not any(each.images for each in body.messages), "images are not supported", "messages")
        if not body.messages:
            return self._loaded(body.model, chat=True)
        talk = [each.chat_message() for each in body.messages]
        thinking = None if body.think is None else TemplateOptions(bool(body.think))
        asked = ChatBody(messages=talk, tools=body.tools, chat_template_kwargs=thinking, **body.fields())
        asked.continue_final_message = asked.ends_begun
        names = [tool.function.name for tool in body.tools or ()]
        return await self._answer(http, body, messages.chat_requests, asked, chat=True, names=names)

    async def generate(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, Generate)
        messages.check(not body.images, "images are not supported", "images")
        messages.check(not body.suffix, "suffix is not supported", "suffix")
        if not body.prompt:
            return self._loaded(body.model, chat=False)
        fields = body.fields()
        if body.raw:
            fields.setdefault("max_tokens", self._llm.context)
            raw = CompletionBody(prompt=body.prompt, **fields)
            return await self._answer(http, body, messages.completion_requests, raw, chat=False)
        talk = [ChatMessage("system", body.system)] if body.system else []
        asked = ChatBody(messages=[*talk, ChatMessage("user", body.prompt)], **fields)
        return await self._answer(http, body, messages.chat_requests, asked, chat=False)

    async def _answer(
        self,
        http: HttpRequest,
        body: Common,
        make: Any,
        asked: ChatBody | CompletionBody,
        *,
        chat: bool,
        names: Sequence[str] = (),
    ) -> Response:
        head = self._service.head(asked.model)
        service = self._service
        requests: list[Request] = await service.in_thread(make, asked, self._llm, service.limits)
        made: Maker = partial(OllamaAnswer, head=head, chat=chat, names=names)
        return await service.answer(http, requests, made, stream=body.stream is not False)

    def _loaded(self, model: str, *, chat: bool) -> Response:
        """An empty request loads a model, which this one is."""
        empty = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
        found = {"model": self._service.model(model), "created_at": _now(), **empty}
        return json_response({**found, "done": True, "done_reason": "load"})

    async def show(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, Named)
        name = self._service.model(body.model or body.name)
        config = self._llm.config
        architecture = config.architecture
        info = {
            "general.architecture": architecture,
            "general.basename": name.removesuffix(LATEST),
            f"{architecture}.context_length": self._llm.context,  # what fits here; clients cut texts by it
            f"{architecture}.embedding_length": config.hidden,
            f"{architecture}.block_count": config.layers,
        }
        return json_response(
            {
                "modelfile": "",
                "parameters": "",
                "template": self._llm.template_text,
                "details": self._details(),
                "model_info": info,
                "capabilities": ["completion", "tools", *(["embedding"] if self._llm.pooling else [])],
            }
        )

    async def tags(self, http: HttpRequest) -> Response:
        del http
        return json_response({"models": self._listed()})

    async def ps(self, http: HttpRequest) -> Response:
        del http
        more = {"size_vram": 0, "expires_at": "9999-12-31T23:59:59Z", "context_length": self._llm.context}
        return json_response({"models": [{**model, **more} for model in self._listed()]})

    async def version(self, http: HttpRequest) -> Response:
        del http
        return json_response({"version": _VERSION, "bitgen": __version__})

    def _listed(self) -> list[dict[str, Any]]:
        digest = self._service.settings.fingerprint.removeprefix("fp_")
        loaded = datetime.fromtimestamp(self._service.started, timezone.utc).isoformat()
        rest = {"modified_at": loaded, "size": self._llm.memory[0], "digest": digest}
        # A name has a tag here: Open WebUI adds one to what it asks for, and looks that up in this list.
        tagged = [name if ":" in name else name + LATEST for name in self._service.settings.names]
        return [{"name": name, "model": name, **rest, "details": self._details()} for name in tagged]

    def _details(self) -> Mapping[str, Any]:
        family = self._llm.config.architecture
        named = {"format": "gguf", "family": family, "families": [family]}
        return {"parent_model": "", **named, "parameter_size": "", "quantization_level": ""}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def _ns(seconds: float) -> int:
    return round(1e9 * max(0.0, seconds))
