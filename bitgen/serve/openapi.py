"""What `/openapi.json` says: the endpoints, and the bodies that they take, made from their structs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

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


def document(gets: Mapping[str, str], posts: Mapping[str, tuple[str, type[Any] | None]]) -> dict[str, Any]:
    """OpenAPI 3.1: path -> what it is for, and for POST the struct of its body."""
    kinds = [kind for _, kind in posts.values() if kind is not None]
    schemas, components = msgspec.json.schema_components([Error, *kinds], ref_template=_REF)
    of_kind = dict(zip(kinds, schemas[1:], strict=True))
    paths: dict[str, Any] = {}
    for path, summary in gets.items():
        paths.setdefault(path, {})["get"] = _operation(path, summary, schemas[0])
    for path, (summary, kind) in posts.items():
        operation = _operation(path, summary, schemas[0])
        if kind is not None:
            content = {"application/json": {"schema": of_kind[kind]}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})["post"] = operation
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


def _operation(path: str, summary: str, error: Any) -> dict[str, Any]:
    wrong = {"application/json": {"schema": error}}
    responses: dict[str, Any] = {"200": {"description": "as asked"}}
    responses |= {status: {"description": text, "content": wrong} for status, text in _STATUSES.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if "{" in path:
        name = path[path.index("{") + 1 : path.index("}")]
        parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [parameter]
    return operation
