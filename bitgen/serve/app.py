"""The endpoints: OpenAI's, those of llama.cpp and vLLM that clients look for, and what operators ask for.

The event loop only reads, writes and waits: texts become tokens in a thread of their own, tokens become texts
in the worker's.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from bitgen import __version__
from bitgen.inference.sampling import Sampling
from bitgen.inference.sequence import Request
from bitgen.serve import messages
from bitgen.serve.answers import DONE, PING, Answer, ChatAnswer, CompletionAnswer, event
from bitgen.serve.errors import ApiError, draining, stopped
from bitgen.serve.guard import Access, Guard
from bitgen.serve.messages import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from bitgen.serve.metrics import Metrics
from bitgen.serve.worker import Job, Update, Worker

if TYPE_CHECKING:
    from bitgen.llm import LLM
    from bitgen.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")
Write: TypeAlias = Callable[[bytes], Awaitable[None]]
_IGNORED_MAX, _NAME_MAX = 100, 40  # names of fields that the log mentions, and their characters
_NOBODY = 499  # the client left: the log and the metrics see it, nobody else does


@dataclass(frozen=True)
class Settings:
    """How a server treats its clients."""

    names: tuple[str, ...]  # of the model; the first one is what answers say where a client gives none
    fingerprint: str  # same fingerprint, same request with a seed: same bytes
    access: Access = field(default_factory=Access)
    max_queue: int = 64  # texts that may wait
    max_body: int = 2 << 20  # bytes
    max_tokens: int | None = None  # of an answer
    strict_model: bool = False  # refuse other names
    body_s: float = 10.0  # until the whole body is there
    ping_s: float = 15.0  # of silence in a stream, before a comment is sent
    log: str | None = "text"  # or json, or nothing


class Exchange:
    """The jobs of one HTTP request, and what comes of them."""

    def __init__(self) -> None:
        self.updates: asyncio.Queue[Update | ApiError] = asyncio.Queue()
        self.open: set[Job] = set()  # neither ended nor cancelled


class Service:
    """One model and all who talk with it. Everything here runs in the event loop's thread."""

    def __init__(self, llm: LLM, worker: Worker, settings: Settings) -> None:
        self.llm = llm
        self.worker = worker
        self.settings = settings
        self.parallel = llm.engine.max_batch
        self.metrics = Metrics(__version__, settings.names[0], settings.fingerprint)
        self.draining = False
        self.jobs: set[Job] = set()  # that the worker has not ended
        self.exchanges: set[Exchange] = set()
        self.limits = messages.Limits(
            choices=self.parallel, vocab=llm.config.vocab, max_tokens=settings.max_tokens
        )
        self.started = int(time.time())
        self._text = ThreadPoolExecutor(1, thread_name_prefix="bitgen-text")

    async def in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        """Run what takes long for long texts."""
        return await asyncio.get_running_loop().run_in_executor(self._text, call, *arguments)

    def close(self) -> None:
        """End the thread for texts; the worker is its owner's."""
        self._text.shutdown(wait=False, cancel_futures=True)

    # ---- Jobs ----

    def submit(self, requests: Sequence[Request], owner: str) -> tuple[Exchange, list[Job]]:
        """ApiError 429 when not all of them find a place."""
        if self.draining:
            raise draining()
        most = self.parallel + self.settings.max_queue
        if len(requests) > most:
            raise ApiError(400, f"{len(requests)} texts are more than this server takes at once, {most}", "n")
        if len(self.jobs) + len(requests) > most:
            raise ApiError(429, f"the queue is full: {len(self.jobs)} texts run or wait", code="queue_full")
        exchange = Exchange()

        def deliver(update: Update) -> None:
            self.metrics.saw(update)
            if update.finish is not None:
                self.jobs.discard(update.job)
                exchange.open.discard(update.job)
            exchange.updates.put_nowait(update)

        jobs = [Job(replace(each, owner=owner), deliver, index) for index, each in enumerate(requests)]
        self.exchanges.add(exchange)
        exchange.open.update(jobs)
        self.jobs.update(jobs)
        for job in jobs:
            self.worker.submit(job)
        return exchange, jobs

    def leave(self, exchange: Exchange) -> None:
        """Cancel what is left of an exchange."""
        self.exchanges.discard(exchange)
        for job in exchange.open:
            self.worker.cancel(job)
        exchange.open.clear()

    def cut(self) -> None:
        """End all answers with an error: the server goes down."""
        for exchange in list(self.exchanges):
            exchange.updates.put_nowait(stopped())
            self.leave(exchange)

    def model(self, asked: str | None) -> str:
        """The name that an answer says; one that is not ours is accepted unless the server is strict."""
        names = self.settings.names
        if self.settings.strict_model and asked is not None and asked not in names:
            message = f"there is no model {asked[:100]!r}; there is {', '.join(names)}"
            raise ApiError(404, message, "model", "model_not_found")
        return asked or names[0]

    # ---- Answers ----

    async def answer(
        self, http: HttpRequest, requests: Sequence[Request], made: _Maker, body: Any
    ) -> Response:
        """Submit and answer, as a stream or whole; the client's leaving takes everything back."""
        exchange, jobs = self.submit(requests, http.state.owner)
        answer = made(jobs, self.model(body.model), self.settings.fingerprint, self.llm.tokenizer)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)

            def work(write: Write) -> Coroutine[Any, Any, None]:
                return self._stream(exchange, answer, write, usage)

            return _Stream(work, lambda: self.leave(exchange))
        try:
            stayed = await _unless_gone(http.receive, self._collect(exchange, answer))
        finally:
            self.leave(exchange)
        return json_response(answer.body()) if stayed else Response(status_code=_NOBODY)

    async def _collect(self, exchange: Exchange, answer: Answer) -> None:
        while any(choice.finish is None for choice in answer.choices):
            answer.take(_checked(await exchange.updates.get()))

    async def _stream(self, exchange: Exchange, answer: Answer, write: Write, usage: bool) -> None:
        opening = [answer.opening(index) for index in range(len(answer.choices))]
        await write(b"".join(event(answer.chunk(choice, usage)) for choice in opening if choice))
        try:
            while any(choice.finish is None for choice in answer.choices):
                try:
                    update = await asyncio.wait_for(exchange.updates.get(), self.settings.ping_s)
                except asyncio.TimeoutError:
                    await write(PING)
                    continue
                choices = answer.events(_checked(update))
                await write(b"".join(event(answer.chunk(choice, usage)) for choice in choices))
        except ApiError as error:
            await write(event(error.body()))
        else:
            if usage:
                await write(event(answer.chunk(None, usage)))
        await write(DONE)


_Maker: TypeAlias = "Callable[[Sequence[Job], str, str, Tokenizer], Answer]"


class _Stream(Response):
    """Server-sent events that ``work`` writes, until it ends or the client leaves."""

    def __init__(self, work: Callable[[Write], Coroutine[Any, Any, None]], close: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._work = work
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope

        async def write(data: bytes) -> None:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
            if await _unless_gone(receive, self._work(write)):
                await send({"type": "http.response.body", "body": b""})
        finally:
            self._close()


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Run ``work``; False when the client leaves before it is done."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            try:
                tasks[0].result()
            except OSError:  # the connection broke while it was written to
                return False
            return True
        return False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _checked(update: Update | ApiError) -> Update:
    if isinstance(update, ApiError):
        raise update
    if update.finish == "error":
        raise ApiError(500, update.error, code="engine")
    return update


class Endpoints:
    """One method for each path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._llm = service.llm
        self._settings = service.settings
        self._page = _read_page()
        self._ignored: set[str] = set()

    def routes(self) -> list[Route]:
        get = {
            "/": self.page,
            "/health": self.health,
            "/v1/health": self.health,
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.one_model,
            "/metrics": self.metrics,
            "/props": self.props,
            "/slots": self.slots,
            "/tokenizer_info": self.tokenizer_info,
            "/version": self.version,
        }
        post = {
            "/v1/completions": self.completions,
            "/v1/chat/completions": self.chat,
            "/v1/embeddings": self.embeddings,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        found = [Route(path, call, methods=["GET"]) for path, call in get.items()]
        return found + [Route(path, call, methods=["POST"]) for path, call in post.items()]

    # ---- Texts ----

    async def completions(self, http: HttpRequest) -> Response:
        body = await self._body(http, CompletionBody)
        self._service.model(body.model)
        limits = self._service.limits
        requests = await self._service.in_thread(messages.completion_requests, body, self._llm, limits)
        echoes = None
        if body.echo:
            texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
            given = [text for text in texts if isinstance(text, str) for _ in range(body.choices)]
            echoes = given or [self._llm.tokenizer.decode(each.prompt) for each in requests]

        def made(jobs: Sequence[Job], model: str, fingerprint: str, tokenizer: Tokenizer) -> Answer:
            return CompletionAnswer(jobs, model, fingerprint, tokenizer, echoes)

        return await self._service.answer(http, requests, made, body)

    async def chat(self, http: HttpRequest) -> Response:
        body = await self._body(http, ChatBody)
        self._service.model(body.model)
        limits = self._service.limits
        requests = await self._service.in_thread(messages.chat_requests, body, self._llm, limits)
        return await self._service.answer(http, requests, ChatAnswer, body)

    async def embeddings(self, http: HttpRequest) -> Response:
        del http
        raise ApiError(501, "this model makes no embeddings", code="not_implemented")

    async def tokenize(self, http: HttpRequest) -> Response:
        body = await self._body(http, TokenizeBody)
        ids = await self._service.in_thread(self._tokens, body)
        written = [self._llm.tokenizer.piece(i, special=True).decode("utf-8", "replace") for i in ids]
        tokens: list[Any] = list(ids)
        if body.with_pieces:
            tokens = [{"id": i, "piece": piece} for i, piece in zip(ids, written, strict=True)]
        strings = written if body.return_token_strs else None
        found = {"tokens": tokens, "count": len(ids), "max_model_len": self._llm.context}
        return json_response({**found, "token_strs": strings})

    def _tokens(self, body: TokenizeBody) -> list[int]:
        if body.messages is not None:
            return messages.chat_ids(body.messages, self._llm)
        text = body.content if body.prompt is None else body.prompt
        messages.check(text is not None, "give content, prompt or messages", "content")
        special = body.add_special if body.prompt is None else body.add_special_tokens is not False
        return self._llm.tokenizer.encode(text or "", special=bool(special), parse=body.parse_special)

    async def detokenize(self, http: HttpRequest) -> Response:
        body = await self._body(http, DetokenizeBody)
        vocab = self._llm.config.vocab
        wrong = next((i for i in body.tokens if not 0 <= i < vocab), None)
        messages.check(wrong is None, f"token {wrong} is outside the vocabulary of {vocab}", "tokens")
        text = self._llm.tokenizer.decode(body.tokens, special=True)
        return json_response({"content": text, "prompt": text})

    async def _body(self, http: HttpRequest, kind: type[T]) -> T:
        """ApiError for a body that is too long, too slow, or wrong."""
        most = self._settings.max_body

        async def read() -> bytes:
            parts, size = [], 0
            async for part in http.stream():
                size += len(part)
                if size > most:
                    raise ApiError(413, f"a body has {most} bytes at most (--max-body)")
                parts.append(part)
            return b"".join(parts)

        if self._service.draining:
            raise draining()
        try:
            raw = await asyncio.wait_for(read(), self._settings.body_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {self._settings.body_s:g} s") from None
        except ClientDisconnect:
            raise ApiError(_NOBODY, "the client left") from None
        body = messages.read(raw, kind)
        self._note_ignored(messages.unknown_fields(raw, kind))
        return body

    def _note_ignored(self, names: set[str]) -> None:
        """Name each field that is ignored once in the log; a client that makes up names cannot fill it."""
        fresh = sorted(name for name in names - self._ignored if len(name) <= _NAME_MAX)
        fresh = fresh[: _IGNORED_MAX - len(self._ignored)]
        self._ignored.update(fresh)
        if fresh and self._settings.log is not None:
            shown = ", ".join(fresh).encode("unicode_escape").decode()
            print(f"bitgen: fields of requests that are ignored: {shown}", file=sys.stderr, flush=True)

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


def json_response(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")


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


def make_app(service: Service) -> Guard:
    """The ASGI application."""
    router = Router(Endpoints(service).routes(), redirect_slashes=False)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = router  # an unknown path is then an exception, which the guard puts into our shape
        await router(scope, receive, send)

    settings = service.settings
    return Guard(app, settings.access, service.metrics.responded, settings.log)
