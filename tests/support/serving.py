"""A server without a model or a socket: a fake engine and clock, and clients that speak ASGI."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from reference_model import small_config
from text_models import piece_data
from wanted import answers_wants

from bitgen.inference.kv_memory import Capacity
from bitgen.inference.memory import Memory
from bitgen.inference.scheduler import Scheduler
from bitgen.llm import LLM
from bitgen.serve.app import make_app
from bitgen.serve.service import Service, Settings
from bitgen.serve.worker import Worker

VOCAB = len(piece_data().tokens)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeEngine:
    """Logits are a function of all tokens up to their own: what is wrong in the KV cache changes the text.

    A token takes ``token_s`` of the clock. ``before`` is called at the start of each forward pass. With a
    ``capacity`` no pass may leave more bytes of keys and values than that allows.
    """

    def __init__(
        self, batch: int = 4, context: int = 256, token_s: float = 0.0, capacity: Capacity | None = None
    ) -> None:
        batch = capacity.slots if capacity else batch
        self.config = small_config(vocab=VOCAB, context=context)
        self.context, self.max_batch, self.token_s = context, batch, token_s
        self.clock = FakeClock()
        self.cache: list[list[int]] = [[] for _ in range(batch)]
        self.passes: list[tuple[int, int]] = []  # sequences, tokens
        self.before: Callable[[], None] = lambda: None
        self.capacity = capacity
        self.memory = Memory(0, capacity.bytes_of(self.sequence_bytes(context)) if capacity else 0, 0)
        self.head_bytes, self.head_error = 0, 0.0
        self.written = [0] * batch  # positions whose memory was not given back

    @answers_wants
    def forward(self, tokens: Any, positions: Any, sequences: Any, outputs: Any) -> Any:
        self.before()
        self.passes.append((len(set(sequences.tolist())), len(tokens)))
        self.clock.now += self.token_s * len(tokens)
        rows = []
        for token, position, sequence, wanted in zip(tokens, positions, sequences, outputs, strict=True):
            held = self.cache[sequence]
            assert len(held) == position, "a position that is not the next one"
            held.append(int(token))
            self.written[sequence] = max(self.written[sequence], len(held))
            if wanted:
                rng = np.random.default_rng(zlib.crc32(np.array(held, "<i4").tobytes()))
                logits = np.full(VOCAB, -30.0, np.float32)
                logits[259:] = rng.normal(size=VOCAB - 259) * 2  # letters and words
                logits[2] = 0.0  # the end
                rows.append(logits)
        assert not self.capacity or self.written_bytes <= self.memory.cache
        return np.array(rows, np.float32).reshape(len(rows), VOCAB)

    @property
    def written_bytes(self) -> int:
        return sum(map(self.sequence_bytes, self.written))

    def sequence_bytes(self, positions: int) -> int:
        return 64 * -(-positions // 8)  # in chunks

    def release(self, sequence: int, length: int) -> None:
        self.truncate(sequence, length)
        self.written[sequence] = length

    def truncate(self, sequence: int, length: int) -> None:
        del self.cache[sequence][length:]

    def copy(self, source: int, target: int, length: int) -> None:
        self.cache[target] = self.cache[source][:length]
        self.written[target] = max(self.written[target], length)

    def cached(self, sequence: int) -> bytes:
        return np.array(self.cache[sequence], "<i4").tobytes()

    def restore(self, sequence: int, length: int, data: bytes) -> None:
        self.cache[sequence] = np.frombuffer(data, "<i4").tolist()
        self.written[sequence] = max(self.written[sequence], length)
        assert len(self.cache[sequence]) == length

    def close(self) -> None:
        pass


def fake_llm(engine: FakeEngine, max_stall_s: float | None = 0.25) -> LLM:
    llm = LLM.over(engine, engine.config, piece_data())
    llm.scheduler = Scheduler(
        engine, llm.tokenizer, capacity=engine.capacity, max_stall_s=max_stall_s, clock=engine.clock
    )
    return llm


@dataclass
class Reply:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """What a stream sent; its end is the text [DONE]."""
        lines = [line[6:] for line in self.content.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]


class Client:
    """Asks the application as uvicorn would; it may leave in the middle."""

    def __init__(self, service: Service, app: Any, engine: FakeEngine) -> None:
        self.service, self.app, self.engine = service, app, engine

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        leave: Awaitable[Any] | None = None,
        on_part: Callable[[bytes], Awaitable[None]] | None = None,
        cut: int | None = None,
    ) -> Reply:
        """With ``cut`` only so many bytes of the body are sent, and no more."""
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {"host": "localhost:8080", **(headers or {})}
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in sent.items()],
        }
        asked, reply = False, Reply()

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": raw[:cut], "more_body": cut is not None}
            await (leave or asyncio.get_running_loop().create_future())
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                reply.content += message.get("body", b"")
                if on_part is not None:
                    await on_part(message.get("body", b""))

        await self.app(scope, receive, send)
        return reply

    async def post(self, path: str, body: Any, **options: Any) -> Reply:
        return await self.ask("POST", path, body, **options)

    async def get(self, path: str, **options: Any) -> Reply:
        return await self.ask("GET", path, None, **options)

    async def idle(self) -> None:
        """Wait until nothing runs; fails when something does not end."""
        for _ in range(2000):
            if not self.service.jobs and self.service.worker.idle:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"{len(self.service.jobs)} jobs never ended")


@asynccontextmanager
async def running(
    engine: FakeEngine | None = None, llm: LLM | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """A client of a server whose engine thread runs; nothing may be left when it ends."""
    engine = engine or FakeEngine()
    loop = asyncio.get_running_loop()
    llm = llm or fake_llm(engine)
    worker = Worker(llm.scheduler, loop.call_soon_threadsafe)
    fields: dict[str, Any] = {"names": ("fake",), "fingerprint": "fp_fake", "log": None, **settings}
    service = Service(llm, worker, Settings(**fields))
    client = Client(service, make_app(service), engine)
    worker.thread.start()
    try:
        yield client
        await client.idle()
        assert llm.scheduler.idle
        assert not service.exchanges
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []
        assert client.app.active == 0
    finally:
        service.close()
        worker.stop()
        await asyncio.to_thread(worker.thread.join, 10)
        assert not worker.thread.is_alive()


def once(method: str, path: str, body: Any = None, headers: Any = None, **settings: Any) -> Reply:
    """One request to a server of its own."""

    async def ask() -> Reply:
        async with running(**settings) as client:
            return await client.ask(method, path, body, headers)

    return asyncio.run(ask())
