"""What `/openapi.json` says: the endpoints, and the bodies that they take, made from their structs."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from bitgen import __version__

_REF = "#/components/schemas/{name}"
_STATUSES = {
    "400": "the request is wrong; `param` names the field",
    "401": "a key is needed",
    "403": "the Host or the Origin is not allowed",
    "404": "there is no such path or model",
    "405": "the path has other methods",
    "408": "the body did not come in time",
    "413": "the body is too long",
    "429": "the queue is full; see Retry-After",
    "500": "the model cannot be run",
    "501": "this model or installation cannot do that",
    "503": "the server goes down; see Retry-After",
}


class ErrorDetail(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    """Every answer that is not 2xx."""

    error: ErrorDetail


class Endpoint(NamedTuple):
    """A method and a path, what answers, what it is for, and the struct of the body that it takes."""

    method: str
    path: str  # as starlette's routes are written
    call: Callable[[Request], Awaitable[Response]]
    summary: str
    body: type[msgspec.Struct] | None = None


def document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    """OpenAPI 3.1."""
    kinds = [each.body for each in endpoints if each.body is not None]
    (error, *schemas), components = msgspec.json.schema_components([Error, *kinds], ref_template=_REF)
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for each in endpoints:
        operation = _operation(each, error)
        if each.body is not None:
            content = {"application/json": {"schema": schema_of[each.body]}}
            operation["requestBody"] = {"required": True, "content": content}
        path = each.path.replace(":path", "")
        paths.setdefault(path, {})[each.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "bitgen", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(endpoint: Endpoint, error: Any) -> dict[str, Any]:
    wrong = {"application/json": {"schema": error}}
    responses: dict[str, Any] = {"200": {"description": "as asked"}}
    responses |= {status: {"description": text, "content": wrong} for status, text in _STATUSES.items()}
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    names = re.findall(r"{(\w+)", endpoint.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in names
        ]
    return operation
