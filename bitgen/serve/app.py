"""The endpoints: OpenAI's, those of llama.cpp and vLLM that clients look for, and what operators ask for."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Set
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from bitgen import __version__
from bitgen.inference.sampling import Sampling
from bitgen.serve import messages, openapi
from bitgen.serve.answers import ChatAnswer, CompletionAnswer, Head, ToolAnswer
from bitgen.serve.anthropic import MessagesEndpoints
from bitgen.serve.embeddings import EmbeddingsEndpoints
from bitgen.serve.errors import ApiError, draining
from bitgen.serve.guard import Guard
from bitgen.serve.llama_cpp import LlamaEndpoints
from bitgen.serve.messages import Body, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from bitgen.serve.ollama import OllamaEndpoints
from bitgen.serve.openapi import Endpoint
from bitgen.serve.responses import ResponsesEndpoints
from bitgen.serve.service import Maker, Service, json_response


class Endpoints:
    """One method for each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._llm = service.llm
        self._settings = service.settings
        self._page = _read_page()

    def all(self) -> list[Endpoint]:
        """In the order of the description."""
        return [
            Endpoint("GET", "/", self.page, "a page to chat with"),
            Endpoint("GET", "/health", self.health, "whether the server takes requests"),
            Endpoint("GET", "/v1/health", self.health, "the same"),
            Endpoint("GET", "/v1/models", self.models, "the names of the model"),
            Endpoint("GET", "/v1/models/{name:path}", self.one_model, "one of them"),
            Endpoint("GET", "/metrics", self.metrics, "counts and times for Prometheus"),
            Endpoint("GET", "/props", self.props, "defaults and chat template"),
            Endpoint("GET", "/slots", self.slots, "what runs, without its text"),
            Endpoint("GET", "/tokenizer_info", self.tokenizer_info, "special tokens"),
            Endpoint("GET", "/version", self.version, "the version of bitgen"),
            Endpoint("POST", "/v1/completions", self.completions, "continue texts", CompletionBody),
            Endpoint("POST", "/v1/chat/completions", self.chat, "answer a conversation", ChatBody),
            Endpoint("POST", "/tokenize", self.tokenize, "tokens of a text", TokenizeBody),
            Endpoint("POST", "/detokenize", self.detokenize, "text of tokens", DetokenizeBody),
        ]

    # ---- Texts ----

    async def completions(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, CompletionBody)
        head = self._head(body)
        limits = self._service.limits
        requests = await self._service.in_thread(messages.completion_requests, body, self._llm, limits)
        echoes = None
        if body.echo:
            texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
            given = [text for text in texts if isinstance(text, str) for _ in range(body.choices)]
            echoes = given or [self._llm.tokenizer.decode(each.prompt) for each in requests]

        made = partial(CompletionAnswer, head=head, echoes=echoes)
        return await self._service.answer(http, requests, made, stream=bool(body.stream))

    async def chat(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, ChatBody)
        head = self._head(body)
        limits = self._service.limits
        requests = await self._service.in_thread(messages.chat_requests, body, self._llm, limits)
        made: Maker = partial(ChatAnswer, head=head)
        if body.callable_tools:
            names = [tool.function.name for tool in body.callable_tools]
            made = partial(ToolAnswer, head=head, names=names)
        return await self._service.answer(http, requests, made, stream=bool(body.stream))

    def _head(self, body: Body) -> Head:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return self._service.head(body.model, usage)

    async def tokenize(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, TokenizeBody)
        return await self._service.in_thread(self._tokenized, body)

    def _tokenized(self, body: TokenizeBody) -> Response:
        ids = self._tokens(body)
        written: list[str] = []
        if body.with_pieces or body.return_token_strs:
            written = [self._llm.tokenizer.piece(i, special=True).decode("utf-8", "replace") for i in ids]
        tokens: list[Any] = list(ids)
        if body.with_pieces:
            tokens = [{"id": i, "piece": piece} for i, piece in zip(ids, written, strict=True)]
        strings = written if body.return_token_strs else None
        found = {"tokens": tokens, "count": len(ids), "max_model_len": self._llm.context}
        return json_response({**found, "token_strs": strings})

    def _tokens(self, body: TokenizeBody) -> list[int]:
        if body.messages is not None:
            return messages.chat_ids(ChatBody(messages=body.messages), self._llm)
        text = body.content if body.prompt is None else body.prompt
        messages.check(text is not None, "give content, prompt or messages", "content")
        special = body.add_special if body.prompt is None else body.add_special_tokens is not False
        return self._llm.tokenizer.encode(text or "", special=bool(special), parse=body.parse_special)

    async def detokenize(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, DetokenizeBody)
        return await self._service.in_thread(self._detokenized, body)

    def _detokenized(self, body: DetokenizeBody) -> Response:
        vocab = self._llm.config.vocab
        wrong = next((i for i in body.tokens if not 0 <= i < vocab), None)
        messages.check(wrong is None, f"token {wrong} is outside the vocabulary of {vocab}", "tokens")
        text = self._llm.tokenizer.decode(body.tokens, special=True)
        return json_response({"content": text, "prompt": text})

    # ---- The server ----

    async def page(self, http: HttpRequest) -> Response:
        del http
        text, policy = self._page
        return Response(text, media_type="text/html", headers={"content-security-policy": policy})

    async def health(self, http: HttpRequest) -> Response:
        del http
        if self._service.draining:
            raise draining()
        if not self._service.worker.thread.is_alive():
            raise ApiError(503, "the engine's thread has ended", code="engine")
        return json_response({"status": "ok"})

    async def models(self, http: HttpRequest) -> Response:
        del http
        listed = [self._model(name) for name in self._settings.names]
        return json_response({"object": "list", "data": listed})

    async def one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in self._settings.names:
            raise ApiError(404, f"there is no model {name[:100]!r}", "model", "model_not_found")
        return json_response(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        config = self._llm.config
        meta = {"n_vocab": config.vocab, "n_ctx_train": config.context, "n_embd": config.hidden}
        found = {"id": name, "object": "model", "created": self._service.started, "owned_by": "bitgen"}
        return {**found, "max_model_len": self._llm.context, "meta": meta}

    async def metrics(self, http: HttpRequest) -> Response:
        del http
        text = self._service.metrics.text(self._service.worker.snapshot)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def props(self, http: HttpRequest) -> Response:
        del http
        defaults = {**asdict(Sampling()), "seed": -1}
        return json_response(
            {
                "default_generation_settings": {"n_ctx": self._llm.context, "params": defaults},
                "total_slots": self._service.parallel,
                "model_alias": self._settings.names[0],
                "system_fingerprint": self._settings.fingerprint,
                "chat_template": self._llm.template_text,
                "build_info": f"bitgen {__version__}",
                **self._special_tokens(),
            }
        )

    async def slots(self, http: HttpRequest) -> Response:
        """No texts: how long each is is all that it tells."""
        del http
        running = self._service.worker.snapshot.running
        listed: list[Mapping[str, Any]] = [
            {"id": i, "id_task": job, "is_processing": True, "n_past": positions, "n_decoded": sampled}
            for i, (job, positions, sampled) in enumerate(running)
        ]
        listed += [{"id": i, "is_processing": False} for i in range(len(running), self._service.parallel)]
        return json_response([{**slot, "n_ctx": self._llm.context} for slot in listed])

    async def tokenizer_info(self, http: HttpRequest) -> Response:
        del http
        return json_response({**self._special_tokens(), "vocab_size": self._llm.config.vocab})

    def _special_tokens(self) -> dict[str, str]:
        tokenizer = self._llm.tokenizer
        return {"bos_token": tokenizer.token(tokenizer.bos), "eos_token": tokenizer.token(tokenizer.eos)}

    async def version(self, http: HttpRequest) -> Response:
        del http
        return json_response({"version": __version__})


def _read_page() -> tuple[str, str]:
    """The page, and a policy that lets a browser run its own script and style and ask this server only."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def source(tag: str) -> str:
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        inside = found[1] if found else ""
        return base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()

    return text, (
        f"default-src 'none'; script-src 'sha256-{source('script')}'; style-src 'sha256-{source('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _base_url_hint(path: str, paths: Set[str]) -> str | None:
    """What to tell a client whose base URL lacks its end, or has too much of one."""
    for wanted, end in ((f"/v1{path}", "with /v1"), (path.removeprefix("/v1"), "before /v1")):
        if wanted in paths and wanted != "/":
            return f"there is no {path[:100]}, but {wanted[:100]}: the base URL should end {end}"
    return None


def make_app(service: Service) -> Guard:
    """The ASGI application."""
    parts = (
        Endpoints(service),
        ResponsesEndpoints(service),
        MessagesEndpoints(service),
        EmbeddingsEndpoints(service),
        OllamaEndpoints(service),
        LlamaEndpoints(service),
    )
    endpoints = [endpoint for part in parts for endpoint in part.all()]
    described = openapi.document(endpoints)

    async def describe(http: HttpRequest) -> Response:
        del http
        return json_response(described)

    endpoints.append(Endpoint("GET", "/openapi.json", describe, "this description"))
    routes = [Route(each.path, each.call, methods=[each.method]) for each in endpoints]
    router = Router(routes, redirect_slashes=False)

    paths = {each.path for each in endpoints}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # an unknown path is then an exception, which the guard puts into our shape
        try:
            await router(scope, receive, send)
        except HTTPException as error:
            if error.status_code == 404 and (hint := _base_url_hint(scope["path"], paths)):
                raise ApiError(404, hint) from None
            raise

    settings = service.settings
    return Guard(app, settings.access, service.metrics.responded, settings.log)
