"""The process: engine thread, event loop, signals, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bitgen.errors import FileError, InterruptError
from bitgen.formats.model_file import content_digest
from bitgen.inference.prompt_cache import KV_VERSION
from bitgen.inference.sampling import SAMPLING_VERSION
from bitgen.serve.app import make_app
from bitgen.serve.guard import Guard
from bitgen.serve.log import say
from bitgen.serve.service import Service, Settings
from bitgen.serve.worker import Worker

if TYPE_CHECKING:
    from bitgen.energy import Meter
    from bitgen.llm import LLM

_HEADERS_S = 10.0  # until a request has its headers
_LAST_S = 2.0  # for the last words of streams that were cut


class _Protocol(H11Protocol):
    """A connection that is silent at first, or stops in the middle of the headers of a request, is closed."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        first = getattr(self, "scope", None) is None  # no request yet, which uvicorn's annotation leaves out
        if self.conn.their_state is not h11.IDLE or not (first or self.conn.trailing_data[0]):
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_HEADERS_S, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Uvicorn(uvicorn.Server):
    """uvicorn without its own signals, which would cut streams."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    llm: LLM, settings: Settings, listening: socket.socket, drain_s: float, meter: Meter | None = None
) -> int:
    """Serve until a signal; the exit code. The caller closes ``llm`` and ``meter``."""
    return asyncio.run(_serve(llm, settings, listening, drain_s, meter))


async def _serve(
    llm: LLM, settings: Settings, listening: socket.socket, drain_s: float, meter: Meter | None
) -> int:
    loop = asyncio.get_running_loop()
    worker = Worker(llm.scheduler, loop.call_soon_threadsafe, meter=meter)
    service = Service(llm, worker, settings)
    app = make_app(service)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(_LAST_S),
    )
    server = _Uvicorn(config)
    code = 0
    tasks: set[asyncio.Task[None]] = set()

    def leave(signum: int) -> None:
        nonlocal code
        if service.draining:
            os._exit(128 + signum)
        code = InterruptError.exit_code if signum == signal.SIGINT else 0
        service.draining = True
        say(
            f"shutting down: {len(service.jobs)} texts may take {drain_s:g} s more; a second signal "
            "ends at once"
        )
        tasks.add(loop.create_task(drain()))

    async def drain() -> None:
        await _until_idle(app, drain_s)
        service.cut()
        await _until_idle(app, _LAST_S)
        server.should_exit = True

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, leave, signum)
    worker.thread.start()
    try:
        await server.serve(sockets=[listening])
    finally:
        service.close()
        worker.stop()
        worker.thread.join()  # it ends with its step: the engine's memory is in use until then
    return code


async def _until_idle(app: Guard, seconds: float) -> None:
    """Wait until nobody waits for an answer, for so long at most."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while app.active and loop.time() < end:
        await asyncio.sleep(0.02)


def fingerprint_of(path: Path, *details: str) -> str:
    """What answers depend on beside the request: the model's bytes, how it is run, sampling."""
    return f"fp_{content_digest(path, f'sampling {SAMPLING_VERSION}', KV_VERSION, *details)[:16]}"


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys, one a line; # starts a comment. FileError when others could read them."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise FileError(f"{path} holds more than ASCII: keys are sent in a header") from None
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from None
    if mode & 0o077:
        raise FileError(f"{path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}")
    keys = tuple(key for line in lines if (key := line.partition("#")[0].strip()))
    if not keys:
        raise FileError(f"{path} holds no key")
    return keys
