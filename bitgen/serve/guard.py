"""Who may call: everything that is decided before a request reaches its endpoint, in plain ASGI.

In order: the Host is one of ours (a page cannot rebind its name to this server), the Origin is allowed (a
foreign page cannot make a browser ask us, whatever the content type), then the key. Every response gets a
request id and a line in the log, which never holds a text.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bitgen.serve.errors import ApiError
from bitgen.serve.log import say, write

PUBLIC = ("/", "/health", "/v1/health")  # without a key
_LOCAL = ("localhost", "127.0.0.1", "::1")
_METHODS = "GET, POST, OPTIONS"
_EARLY = (401, 403, 404, 413, 501, 503)  # what is answered before the whole body is there
_DROP_BYTES, _DROP_S = 64 << 20, 2.0  # of a body that nobody wants


@dataclass(frozen=True)
class Access:
    """Who may call. ``hosts`` are names beside localhost and addresses; None: any name.

    ``origins`` are origins beside those of localhost; ``*`` among them: any.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = ()
    origins: tuple[str, ...] = ()

    def host_allowed(self, host: str) -> bool:
        if not host:  # HTTP/1.0 of a health check, as HAProxy's; browsers, whom rebinding needs, name one
            return True
        name = _name_of(f"//{host}")
        if name is None:
            return False
        return self.hosts is None or name in (*_LOCAL, *self.hosts) or _is_address(name)

    def origin_allowed(self, origin: str, host: str) -> bool:
        if "*" in self.origins or origin in self.origins or _name_of(origin) in _LOCAL:
            return True
        return origin in (f"http://{host}", f"https://{host}")  # our own page

    def owner(self, headers: Headers) -> str | None:
        """Whose key it is, None for nobody's. Every key is compared, in a time that does not tell which."""
        if not self.keys:
            return ""
        given = headers.get("x-api-key", "")
        if headers.get("authorization", "").lower().startswith("bearer "):
            given = headers["authorization"][7:].strip()
        digest = hashlib.sha256(given.encode()).hexdigest()
        found = None
        for key in self.keys:
            known = hashlib.sha256(key.encode()).hexdigest()
            if hmac.compare_digest(digest, known):
                found = known[:16]
        return found


class Guard:
    """The outermost application."""

    def __init__(
        self, app: ASGIApp, access: Access, responded: Callable[[int], None], log: str | None = "text"
    ) -> None:
        self._app = app
        self._access = access
        self._responded = responded
        self._log = log
        self.active = 0  # requests that were not answered to the end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given) else secrets.token_hex(8)
        origin, host = headers.get("origin"), headers.get("host", "")
        started, status = time.perf_counter(), 0
        body = _Unread(receive)
        receive = body.receive

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                if message["status"] in _EARLY and "expect" not in headers:
                    await body.drop()
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["x-request-id"] = request_id
                out.setdefault("cache-control", "no-store")
                out["x-content-type-options"] = "nosniff"
                out.add_vary_header("Origin")
                if origin is not None and status != 403:
                    out["access-control-allow-origin"] = origin
                    out["access-control-expose-headers"] = "x-request-id, retry-after"
            await send(message)

        self.active += 1
        try:
            response = self._refusal(scope, headers, origin, host)
            if response is not None:
                await response(scope, receive, answer)
            else:
                await self._app(scope, receive, answer)
        except ApiError as error:
            await error_response(error, scope)(scope, receive, answer)
        except HTTPException as error:
            told = ApiError(error.status_code, f"{scope['path'][:100]}: {error.detail}")
            refused = error_response(told, scope)
            refused.headers.update(error.headers or {})
            await refused(scope, receive, answer)
        except Exception as error:
            say(f"request {request_id}: {type(error).__name__}")
            failed = ApiError(500, "the server failed; its log names this request id", code="internal")
            if not status:  # else it is too late for an answer
                await error_response(failed, scope)(scope, receive, answer)
        finally:
            self.active -= 1
            self._responded(status)
            self._write(scope, request_id, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope, headers: Headers, origin: str | None, host: str) -> Response | None:
        access = self._access
        if not access.host_allowed(host):
            return error_response(ApiError(403, "this Host is not served here (--allowed-host)"), scope)
        if origin is not None and not access.origin_allowed(origin, host):
            return error_response(ApiError(403, "this Origin is not allowed (--cors-origin)"), scope)
        if scope["method"] == "OPTIONS":
            wanted = headers.get("access-control-request-headers", "authorization, content-type")
            allowed = {"access-control-allow-methods": _METHODS, "access-control-max-age": "600"}
            return Response(status_code=204, headers={**allowed, "access-control-allow-headers": wanted})
        owner = access.owner(headers)
        if owner is None and scope["path"] not in PUBLIC:
            needed = ApiError(401, "a valid API key is needed", code="invalid_api_key")
            refused = error_response(needed, scope)
            refused.headers["www-authenticate"] = "Bearer"
            return refused
        scope.setdefault("state", {})["owner"] = owner
        return None

    def _write(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        if self._log is None:
            return
        path = scope["path"][:100]
        if self._log == "json":
            fields = {"time": time.time(), "id": request_id, "method": scope["method"], "path": path}
            line = json.dumps({**fields, "status": status, "ms": round(1e3 * seconds, 2)})
        else:
            shown = path.encode("unicode_escape").decode()
            line = f"bitgen: {request_id} {scope['method']} {shown} {status} {1e3 * seconds:.1f} ms"
        write(line)


class _Unread:
    """The body of a request, what is left of which may be read and dropped.

    The connection is closed behind an answer to a body that is still being sent, and a client that writes all
    of it before it reads, as Python's do, would then see a broken connection in place of the answer.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._more = True

    async def receive(self) -> Message:
        message = await self._receive()
        self._more = message.get("more_body", False)
        return message

    async def drop(self) -> None:
        """Read for a while: who sends more than that is not told."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drop(), _DROP_S)

    async def _drop(self) -> None:
        left = _DROP_BYTES
        while self._more and left > 0:
            left -= len((await self.receive()).get("body", b""))


def error_response(error: ApiError, scope: Scope) -> JSONResponse:
    """In the shape of the path's dialect."""
    path = scope["path"]
    typed = path.startswith("/v1/messages")
    body = error.plain_body() if path.startswith("/api/") else error.typed_body() if typed else error.body()
    return JSONResponse(body, error.status, error.headers())


def _name_of(url: str) -> str | None:
    """The host of a URL, lower case; None where there is none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
