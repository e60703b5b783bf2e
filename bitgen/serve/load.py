"""Ask a server as several clients at once, and time its answers: bitgen's, llama.cpp's, vLLM's.

Each client streams one completion after the other: prompts of random token ids, so that none starts like
another one unless it is to, and answers of a fixed length (``ignore_eos``). The time to the first token is
from the request to the first event with text; the gaps between events are the inter-token times, which leave
the first token out.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from bitgen.errors import BitgenError, UsageError

_IDS = (300, 1000)  # token ids that every vocabulary has, behind those for single bytes


@dataclass(frozen=True)
class Load:
    """What to ask, and how often; ``sampling`` are fields of each request."""

    url: str
    clients: int
    requests: int  # of each client
    prompt: int  # tokens
    tokens: int  # of each answer
    model: str | None = None  # None: the first one that the server lists
    key: str | None = None
    timeout_s: float = 600.0  # of each answer
    shared: int = 0  # tokens with which all prompts start
    seed: int = 0  # of the prompts
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})

    def prompts(self, client: int) -> Iterator[list[int]]:
        """The prompts of a client, the same each time."""
        start, rest = random.Random(self.seed), random.Random(f"{self.seed} {client}")  # noqa: S311 - no secret
        common = [start.randrange(*_IDS) for _ in range(self.shared)]
        for _ in range(self.requests):
            yield common + [rest.randrange(*_IDS) for _ in range(self.prompt - self.shared)]


@dataclass
class Timed:
    """Seconds of all answers: until their first tokens, between tokens, and of the whole run."""

    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that ``share`` of the values do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


def run_load(load: Load) -> Timed:
    """BitgenError when the server cannot be reached, or refuses."""
    return asyncio.run(_run(load))


async def _run(load: Load) -> Timed:
    model = load.model or await _first_model(load)
    timed = Timed()
    started = time.perf_counter()

    async def client(number: int) -> None:
        for prompt in load.prompts(number):
            await asyncio.wait_for(_complete(load, model, prompt, timed), load.timeout_s)

    tasks = [asyncio.ensure_future(client(number)) for number in range(load.clients)]
    try:
        await asyncio.gather(*tasks)
    except asyncio.TimeoutError:
        raise BitgenError(f"{load.url}: an answer took longer than {load.timeout_s:g} s") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    timed.seconds = time.perf_counter() - started
    return timed


async def _first_model(load: Load) -> str:
    text = "".join([line async for line in _ask(load, "GET", "/v1/models", None)])
    try:
        return str(json.loads(text)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise BitgenError(f"{load.url}/v1/models lists no model: is this an OpenAI API?") from None


async def _complete(load: Load, model: str, prompt: Sequence[int], timed: Timed) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": load.tokens,
        **load.sampling,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last, first, events, usage = time.perf_counter(), True, 0, None
    async for line in _ask(load, "POST", "/v1/completions", body):
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise BitgenError(f"{load.url}: {event['error']}")
        usage = event.get("usage") or usage
        if not event.get("choices") or not event["choices"][0].get("text"):
            continue
        now = time.perf_counter()
        (timed.firsts if first else timed.gaps).append(now - last)
        last, first, events = now, False, events + 1
    timed.tokens += usage["completion_tokens"] if usage else events
    timed.prompt_tokens += usage["prompt_tokens"] if usage else len(prompt)


async def _ask(load: Load, method: str, path: str, body: Any) -> AsyncIterator[str]:
    """The lines of an answer. BitgenError for one that is not 200."""
    url = urlsplit(load.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(f"--url is http://HOST:PORT, not {load.url!r}")
    secure = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if secure else 80)
    try:
        reader, writer = await asyncio.open_connection(url.hostname, port, ssl=secure)
    except OSError as error:
        raise BitgenError(f"cannot reach {load.url}: {error.strerror or error}") from None
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{method} {url.path.rstrip('/')}{path} HTTP/1.1",
            f"Host: {url.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        if load.key:
            head.append(f"Authorization: Bearer {load.key}")
        writer.write("\r\n".join((*head, "", "")).encode() + data)
        await writer.drain()
        status = (await reader.readline()).split()
        headers = await _headers(reader)
        lines = _lines(_parts(reader, headers))
        if status[1:2] != [b"200"]:
            said = " ".join([line async for line in lines])[:300]
            code = status[1].decode() if len(status) > 1 else "no status"
            raise BitgenError(f"{load.url}{path} answers {code}: {said}")
        async for line in lines:
            yield line
    except (OSError, asyncio.IncompleteReadError) as error:
        raise BitgenError(f"{load.url} broke off: {error}") from None
    finally:
        writer.close()


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    found = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        found[name.lower()] = value.strip()
    return found


async def _parts(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int((await reader.readline()).partition(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    rest = b""
    async for part in parts:
        *whole, rest = (rest + part).split(b"\n")
        for line in whole:
            yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")
