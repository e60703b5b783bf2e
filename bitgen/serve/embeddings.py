"""Vectors of texts, of models whose file says how: OpenAI's ``/v1/embeddings``, Ollama's ``/api/embed``."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitgen.inference.sequence import Request
from bitgen.inference.wants import Floats
from bitgen.serve import messages
from bitgen.serve.answers import Collected
from bitgen.serve.errors import no_embeddings
from bitgen.serve.openapi import Endpoint
from bitgen.serve.service import Service
from bitgen.serve.worker import Job, Update

Shape = Callable[[Sequence[Floats], int], dict[str, Any]]  # vectors and tokens of all texts to a body


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """Of ``/v1/embeddings``: texts, or token ids."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None


class EmbedBody(msgspec.Struct, kw_only=True):
    """Of ``/api/embed``."""

    model: str
    input: str | list[str]
    dimensions: int | None = None


class OldEmbedBody(msgspec.Struct, kw_only=True):
    """Of ``/api/embeddings``, which Ollama had before."""

    model: str
    prompt: str


class VectorsAnswer(Collected):
    """The vectors of all texts, in the shape of a dialect."""

    def __init__(self, jobs: Sequence[Job], shape: Shape) -> None:
        super().__init__(jobs)
        self._shape = shape

    def take(self, update: Update) -> None:
        self.choices[update.job.index].finish = update.finish

    def body(self) -> dict[str, Any]:
        jobs = [choice.job for choice in self.choices]
        vectors = [job.vector for job in jobs if job.vector is not None]
        return self._shape(vectors, sum(len(job.request.prompt) for job in jobs))


class EmbeddingsEndpoints:
    """The paths of both dialects."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._llm = service.llm

    def all(self) -> list[Endpoint]:
        """In the order of the description."""
        return [
            Endpoint("POST", "/v1/embeddings", self.embeddings, "vectors of texts", EmbeddingsBody),
            Endpoint("POST", "/api/embed", self.embed, "Ollama: vectors of texts", EmbedBody),
            Endpoint("POST", "/api/embeddings", self.old_embed, "Ollama: the vector of a text", OldEmbedBody),
        ]

    async def embeddings(self, http: HttpRequest) -> Response:
        self._check()
        body = await self._service.body(http, EmbeddingsBody)
        form = body.encoding_format or "float"
        known = form in ("float", "base64")
        messages.check(known, f"encoding_format {form[:40]!r} is not float or base64", "encoding_format")
        model = self._service.model(body.model)
        shape = partial(_openai, model=model, packed=form == "base64")
        return await self._answer(http, body.input, body.dimensions, shape)

    async def embed(self, http: HttpRequest) -> Response:
        self._check()
        body = await self._service.body(http, EmbedBody)
        shape = partial(_ollama, model=self._service.model(body.model))
        return await self._answer(http, body.input, body.dimensions, shape)

    async def old_embed(self, http: HttpRequest) -> Response:
        self._check()
        body = await self._service.body(http, OldEmbedBody)
        self._service.model(body.model)
        return await self._answer(http, body.prompt, None, _old_ollama)

    def _check(self) -> None:
        if self._llm.pooling is None:
            raise no_embeddings()

    async def _answer(self, http: HttpRequest, given: Any, dimensions: int | None, shape: Shape) -> Response:
        hidden = self._llm.config.hidden
        whole = dimensions in (None, hidden)
        messages.check(whole, f"vectors of this model have {hidden} dimensions", "dimensions")
        requests = await self._service.in_thread(self._requests, given)
        return await self._service.whole(http, requests, partial(VectorsAnswer, shape=shape))

    def _requests(self, given: str | list[str | int | list[int]]) -> list[Request]:
        llm, found = self._llm, []
        for text in messages.split_prompts(given, "input"):
            ids = llm.tokenizer.encode(text) if isinstance(text, str) else text
            prompt = messages.checked(ids, llm, "input")
            found.append(Request(prompt, max_tokens=0, pooling=llm.pooling))
        return found


def _openai(vectors: Sequence[Floats], tokens: int, *, model: str, packed: bool) -> dict[str, Any]:
    """``packed``: base64 of little-endian float32, which OpenAI's clients ask for."""

    def shown(vector: Floats) -> Any:
        if packed:
            return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
        return vector.tolist()

    data = [{"object": "embedding", "index": i, "embedding": shown(v)} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _ollama(vectors: Sequence[Floats], tokens: int, *, model: str) -> dict[str, Any]:
    return {"model": model, "embeddings": [v.tolist() for v in vectors], "prompt_eval_count": tokens}


def _old_ollama(vectors: Sequence[Floats], tokens: int) -> dict[str, Any]:
    del tokens
    return {"embedding": vectors[0].tolist()}
