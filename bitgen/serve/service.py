"""One model and all who talk with it: jobs in, answers out, for every dialect.

The event loop only reads, writes and waits: texts become tokens in a thread of their own, tokens become texts
in the worker's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from bitgen import __version__
from bitgen.inference.sequence import Request
from bitgen.serve import messages
from bitgen.serve.answers import Answer, Collected, Head
from bitgen.serve.errors import ApiError, draining, stopped
from bitgen.serve.guard import Access
from bitgen.serve.log import say
from bitgen.serve.metrics import Metrics
from bitgen.serve.worker import Job, Update, Worker

if TYPE_CHECKING:
    from bitgen.llm import LLM

T = TypeVar("T")
Write: TypeAlias = Callable[[bytes], Awaitable[None]]
_IGNORED_MAX, _NAME_MAX = 100, 40  # names of fields that the log mentions, and their characters
LATEST = ":latest"  # the tag that clients of Ollama give a name that has none
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
        self.parallel = llm.scheduler.parallel
        self.metrics = Metrics(__version__, settings.names[0], settings.fingerprint)
        self.draining = False
        self.jobs: set[Job] = set()  # that the worker has not ended
        self.exchanges: set[Exchange] = set()
        self.limits = messages.Limits(
            choices=self.parallel, vocab=llm.config.vocab, max_tokens=settings.max_tokens
        )
        self.started = int(time.time())
        self._ignored: set[str] = set()  # fields that were named in the log
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
        known = asked is None or asked in names or asked.removesuffix(LATEST) in names
        if self.settings.strict_model and asked is not None and not known:
            message = f"there is no model {asked[:100]!r}; there is {', '.join(names)}"
            raise ApiError(404, message, "model", "model_not_found")
        return asked or names[0]

    def head(self, asked: str | None, usage: bool = False) -> Head:
        """What answers say beside their texts."""
        return Head(self.model(asked), self.settings.fingerprint, self.llm.tokenizer, usage)

    # ---- Bodies ----

    async def body(self, http: HttpRequest, kind: type[T]) -> T:
        """ApiError for a body that is too long, too slow, or wrong."""
        most = self.settings.max_body

        async def read() -> bytes:
            parts, size = [], 0
            async for part in http.stream():
                size += len(part)
                if size > most:
                    raise ApiError(413, f"a body has {most} bytes at most (--max-body)")
                parts.append(part)
            return b"".join(parts)

        if self.draining:
            raise draining()
        try:
            raw = await asyncio.wait_for(read(), self.settings.body_s)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {self.settings.body_s:g} s") from None
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
        if fresh and self.settings.log is not None:
            shown = ", ".join(fresh).encode("unicode_escape").decode()
            say(f"fields of requests that are ignored: {shown}")

    # ---- Answers ----

    async def answer(
        self, http: HttpRequest, requests: Sequence[Request], made: Maker, *, stream: bool
    ) -> Response:
        """Submit and answer, as a stream or whole; the client's leaving takes everything back."""
        exchange, jobs = self.submit(requests, http.state.owner)
        answer = made(jobs)
        if stream:

            def work(write: Write) -> Coroutine[Any, Any, None]:
                return self._stream(exchange, answer, write)

            return _Stream(answer.media_type, work, lambda: self.leave(exchange))
        return await self._whole(http, exchange, answer)

    async def whole(
        self, http: HttpRequest, requests: Sequence[Request], made: Callable[[Sequence[Job]], Collected]
    ) -> Response:
        """The same for what is never streamed."""
        exchange, jobs = self.submit(requests, http.state.owner)
        return await self._whole(http, exchange, made(jobs))

    async def _whole(self, http: HttpRequest, exchange: Exchange, answer: Collected) -> Response:
        try:
            stayed = await _unless_gone(http.receive, self._collect(exchange, answer))
        finally:
            self.leave(exchange)
        return json_response(answer.body()) if stayed else Response(status_code=_NOBODY)

    async def _collect(self, exchange: Exchange, answer: Collected) -> None:
        while answer.running:
            answer.take(_checked(await exchange.updates.get()))

    async def _stream(self, exchange: Exchange, answer: Answer, write: Write) -> None:
        await write(answer.begin())
        try:
            while answer.running:
                try:
                    update = await asyncio.wait_for(exchange.updates.get(), self.settings.ping_s)
                except asyncio.TimeoutError:
                    await write(answer.ping)
                    continue
                await write(answer.feed(_checked(update)))
        except ApiError as error:
            await write(answer.fail(error))
        else:
            await write(answer.end())


Maker: TypeAlias = Callable[[Sequence[Job]], Answer]


class _Stream(Response):
    """What ``work`` writes, until it ends or the client leaves."""

    def __init__(
        self, media_type: str, work: Callable[[Write], Coroutine[Any, Any, None]], close: Callable[[], None]
    ) -> None:
        super().__init__(media_type=media_type)
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


def json_response(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
