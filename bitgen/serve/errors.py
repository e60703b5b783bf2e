"""What a client is told when something is wrong: OpenAI's shape, everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "unavailable_error",
}
RETRY_AFTER_S = 1
CONTEXT = "context_length_exceeded"


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. ``param`` names the field that is wrong, ``extra`` are more keys."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        kind = self.extra.get("type", _TYPES.get(self.status, "server_error"))
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**error, **{key: value for key, value in self.extra.items() if key != "type"}}}

    def plain_body(self) -> dict[str, Any]:
        """The same as clients of Ollama read it: the error is a text."""
        error = self.body()["error"]
        return {"error": error.pop("message"), **error}

    def typed_body(self) -> dict[str, Any]:
        """The same as clients of Anthropic read it, a prompt that is too long in the words they look for."""
        error = self.body()["error"]
        if self.code == CONTEXT:
            sizes = f"{self.extra['n_prompt_tokens']} tokens > {self.extra['n_ctx']} maximum"
            error |= {"type": "invalid_request_error", "message": f"prompt is too long: {sizes}"}
        return {"type": "error", "error": error}

    def headers(self) -> dict[str, str]:
        """``Retry-After`` where trying again helps; clients of OpenAI try again after every 5xx otherwise."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER_S)}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


def context_error(prompt: int, context: int) -> ApiError:
    """A prompt that does not fit, in the words that clients of OpenAI and of llama.cpp look for."""
    return ApiError(
        400,
        f"request ({prompt} tokens) exceeds the available context size ({context} tokens): this model's "
        f"maximum context length is {context} tokens",
        code=CONTEXT,
        extra={"type": "exceed_context_size_error", "n_prompt_tokens": prompt, "n_ctx": context},
    )


def draining() -> ApiError:
    return ApiError(503, "the server is shutting down", code="draining")


def stopped() -> ApiError:
    return ApiError(503, "the server was shut down before the answer was complete", code="shutdown")


def no_embeddings() -> ApiError:
    return ApiError(501, "this model makes no embeddings", code="not_implemented")
