"""llama.cpp's own ``/completion``: one text, in the words of its server."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from bitgen.serve import messages
from bitgen.serve.answers import Head, SingleAnswer, event, timings
from bitgen.serve.errors import ApiError
from bitgen.serve.messages import Body, CompletionBody
from bitgen.serve.openapi import Endpoint
from bitgen.serve.service import Maker, Service
from bitgen.serve.worker import Job, Update

_STOPPED_BY = {"end": "eos", "stop": "word", "length": "limit", "context": "limit"}


class LlamaBody(Body, kw_only=True):
    """Of ``/completion``: a text, or token ids."""

    prompt: str | list[int]
    n_predict: messages.Most | None = None

    def completion_body(self) -> CompletionBody:
        """The same for OpenAI's endpoint, without its 16 tokens."""
        messages.check(self.choices == 1, "n other than 1 is not supported: use /v1/completions", "n")
        fields = {name: getattr(self, name) for name in Body.__struct_fields__}
        most = self.max_tokens if self.n_predict is None else self.n_predict
        messages.check_most(most, "n_predict")
        fields["max_tokens"] = -1 if most is None else most
        prompt = self.prompt if isinstance(self.prompt, str) else list[str | int | list[int]](self.prompt)
        return CompletionBody(prompt=prompt, **fields)


class LlamaAnswer(SingleAnswer):
    """The text, or events with its parts; the last one says how it ended."""

    def __init__(self, jobs: Sequence[Job], head: Head) -> None:
        super().__init__(jobs)
        self._head = head
        self._finish = ""

    def absorb(self, update: Update) -> str:
        self._finish = update.finish or ""
        return super().absorb(update)

    def begin(self) -> bytes:
        return b""

    def feed(self, update: Update) -> bytes:
        text = self.absorb(update)
        return event({**self._part(text), "stop": False}) if text else b""

    def fail(self, error: ApiError) -> bytes:
        return event(error.body())

    def end(self) -> bytes:
        return event(self._whole(""))

    def body(self) -> dict[str, Any]:
        return self._whole(self.choices[0].text)

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"index": 0, "content": text, "tokens": [], "id_slot": -1}

    def _whole(self, text: str) -> dict[str, Any]:
        job = self.choices[0].job
        return {
            **self._part(text),
            "stop": True,
            "model": self._head.model,
            "tokens_predicted": job.sampled,
            "tokens_evaluated": len(job.request.prompt),
            "truncated": False,
            "stop_type": _STOPPED_BY[self._finish],
            "stopping_word": job.stop or "",
            "timings": timings(job),
            "seed": job.seed,
            "system_fingerprint": self._head.fingerprint,
        }


class LlamaEndpoints:
    """One path."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> list[Endpoint]:
        """In the order of the description."""
        return [Endpoint("POST", "/completion", self.completion, "llama.cpp: continue a text", LlamaBody)]

    async def completion(self, http: HttpRequest) -> Response:
        body = await self._service.body(http, LlamaBody)
        head, service = self._service.head(body.model), self._service
        asked = body.completion_body()
        requests = await service.in_thread(messages.completion_requests, asked, service.llm, service.limits)
        made: Maker = partial(LlamaAnswer, head=head)
        return await service.answer(http, requests, made, stream=bool(body.stream))
