"""What clients get: the bodies and events of chats and completions, in OpenAI's shapes."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec

from bitgen.inference.sampling import Score
from bitgen.serve.errors import ApiError
from bitgen.serve.tools import Call, CallFilter
from bitgen.serve.worker import Job, Update
from bitgen.tokenizer.tokenizer import Tokenizer, TokenStream

FINISH = {"end": "stop", "stop": "stop", "length": "length", "context": "length"}
DONE = b"data: [DONE]\n\n"


def event(body: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


@dataclass
class Choice:
    """One text as it comes in."""

    job: Job
    parts: list[str] = field(default_factory=list)
    scores: list[Score | None] = field(default_factory=list)
    finish: str | None = None
    stream: TokenStream | None = None  # of the tokens whose log-probabilities were written
    offset: int = 0  # characters of these

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Collected(ABC):
    """Collects updates, and makes a body of them."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.choices = [Choice(job) for job in jobs]

    @property
    def running(self) -> bool:
        """Whether a text has not ended."""
        return any(choice.finish is None for choice in self.choices)

    @abstractmethod
    def take(self, update: Update) -> None:
        """Keep an update."""

    @abstractmethod
    def body(self) -> dict[str, Any]:
        """The whole answer."""


class Answer(Collected):
    """Puts updates into words, whole or as a stream; a subclass for each shape."""

    media_type: ClassVar[str] = "text/event-stream"
    ping: ClassVar[bytes] = b": ping\n\n"  # into a stream that is silent

    @abstractmethod
    def begin(self) -> bytes:
        """What a stream starts with."""

    @abstractmethod
    def feed(self, update: Update) -> bytes:
        """Keep an update; its part of a stream."""

    @abstractmethod
    def fail(self, error: ApiError) -> bytes:
        """What a stream ends with that fails."""

    @abstractmethod
    def end(self) -> bytes:
        """What a stream ends with."""


@dataclass(frozen=True)
class Head:
    """What answers say beside their texts; ``usage`` at the end of a stream too."""

    model: str
    fingerprint: str
    tokenizer: Tokenizer
    usage: bool = False


class SingleAnswer(Answer):
    """Of one text, which may be calls of the functions in ``names``."""

    def __init__(self, jobs: Sequence[Job], names: Sequence[str] = ()) -> None:
        super().__init__(jobs)
        self.calls: list[Call] = []
        self._filter = CallFilter(names) if names else None

    def take(self, update: Update) -> None:
        self.absorb(update)

    def absorb(self, update: Update) -> str:
        """Keep an update; its part of the text that is content."""
        choice, text = self.choices[0], update.text
        if self._filter is not None:
            text = self._filter.feed(text)
        if update.finish is not None:
            choice.finish = FINISH[update.finish]
            if self._filter is not None:
                rest, self.calls = self._filter.close()
                text += rest
        choice.parts.append(text)
        return text


class ChoicesAnswer(Answer):
    """Of chats and completions: choices with their texts."""

    prefix: ClassVar[str]
    whole: ClassVar[str]  # the object of a body
    part: ClassVar[str]  # and of an event

    def __init__(self, jobs: Sequence[Job], head: Head) -> None:
        super().__init__(jobs)
        self._tokenizer = head.tokenizer
        self._usage = head.usage
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }

    # ---- What the subclasses say ----

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """What a streamed choice starts with."""

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def message(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def logprobs(self, choice: Choice, scores: Sequence[Score | None]) -> dict[str, Any] | None:
        """Of the tokens of ``scores``, which come after what was written of ``choice`` before."""

    # ---- Updates in, bodies out ----

    def sift(self, update: Update) -> Update:
        """The update with the part of its text that is content."""
        return update

    def take(self, update: Update) -> None:
        self._keep(self.sift(update))

    def begin(self) -> bytes:
        opening = [self.opening(index) for index in range(len(self.choices))]
        return b"".join(event(self.chunk(choice)) for choice in opening if choice)

    def feed(self, update: Update) -> bytes:
        return b"".join(event(self.chunk(choice)) for choice in self.events(update))

    def fail(self, error: ApiError) -> bytes:
        return event(error.body()) + DONE

    def end(self) -> bytes:
        return (event(self.chunk(None)) if self._usage else b"") + DONE

    def _keep(self, update: Update) -> list[Score | None]:
        """The scores of the tokens."""
        choice = self.choices[update.job.index]
        scores: list[Score | None] = list(update.scores)
        if update.finish == "end":
            scores = scores[:-1]  # the token that ends a text is no part of it
        if scores and not choice.scores and update.job.request.score_prompt:
            scores.insert(0, None)  # the first token follows nothing
        choice.parts.append(update.text)
        choice.scores += scores
        if update.finish is not None:
            choice.finish = self.finish_reason(update)
        return scores

    def finish_reason(self, update: Update) -> str:
        """Why a text that is whole ended."""
        return FINISH[update.finish or ""]

    def events(self, update: Update) -> list[dict[str, Any]]:
        """Keep an update; the choices of the events that it is streamed as."""
        update = self.sift(update)
        scores, index = self._keep(update), update.job.index
        choice = self.choices[index]
        events = []
        if update.text or scores:
            logprobs = self.logprobs(choice, scores)
            events.append(_choice(index, self.delta(update.text), logprobs))
        if choice.finish is not None:
            end = _choice(index, self.delta(""), None, choice.finish)
            events.append({**end, "seed": choice.job.seed})
        return events

    def chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        """The event of a part of a choice, or with None the one of the usage."""
        choices = [] if choice is None else [choice]
        body: dict[str, Any] = {**self._head, "object": self.part, "choices": choices}
        if self._usage:
            body["usage"] = None if choice else self.usage()
        if choice is not None and choice["finish_reason"]:
            body["timings"] = timings(self.choices[choice["index"]].job)
        return body

    def body(self) -> dict[str, Any]:
        choices = []
        for index, choice in enumerate(self.choices):
            logprobs = self.logprobs(choice, choice.scores)
            found = _choice(index, self.message(choice), logprobs, choice.finish)
            choices.append({**found, "seed": choice.job.seed})
        return {
            **self._head,
            "object": self.whole,
            "choices": choices,
            "usage": self.usage(),
            "timings": timings(self.choices[0].job),
        }

    def usage(self) -> dict[str, Any]:
        """Tokens of each prompt once, as its first text had them, and of all texts."""
        jobs = [choice.job for choice in self.choices]
        firsts = {id(job.request.prompt): job for job in reversed(jobs)}.values()
        prompt = sum(len(job.request.prompt) for job in firsts)
        cached = sum(min(job.reused, len(job.request.prompt)) for job in firsts)
        sampled = sum(job.sampled for job in jobs)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": sampled,
            "total_tokens": prompt + sampled,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _written(self, token: int) -> str:
        return self._tokenizer.piece(token, special=True).decode("utf-8", "replace")


class ChatAnswer(ChoicesAnswer):
    """Of a chat."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        return _choice(index, {"delta": {"role": "assistant", "content": ""}})

    def delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def message(self, choice: Choice) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": choice.text, "refusal": None}}

    def logprobs(self, choice: Choice, scores: Sequence[Score | None]) -> dict[str, Any] | None:
        if choice.job.request.logprobs is None:
            return None
        entries = []
        for score in scores:
            if score is not None:
                best = [self._entry(token, logprob) for token, logprob in score.best]
                entries.append({**self._entry(score.token, score.logprob), "top_logprobs": best})
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        written = list(self._tokenizer.piece(token, special=True))
        return {"token": self._written(token), "logprob": logprob, "bytes": written}


class ToolAnswer(ChatAnswer):
    """Of a chat whose model may call functions: a text that is made of calls becomes these."""

    def __init__(self, jobs: Sequence[Job], head: Head, names: Sequence[str]) -> None:
        super().__init__(jobs, head)
        self._filters = [CallFilter(names) for _ in jobs]
        self._calls: list[list[dict[str, Any]]] = [[] for _ in jobs]

    def events(self, update: Update) -> list[dict[str, Any]]:
        """The calls come before the end, whole: each with its place among them."""
        index = update.job.index
        events = super().events(update)
        calls = self._calls[index] if update.finish is not None else []
        parts = [{"index": i, **call} for i, call in enumerate(calls)]
        return [*(_choice(index, {"delta": {"tool_calls": [part]}}) for part in parts), *events]

    def sift(self, update: Update) -> Update:
        index = update.job.index
        text = self._filters[index].feed(update.text)
        if update.finish is not None:
            rest, calls = self._filters[index].close()
            self._calls[index] = [call.body() for call in calls]
            text += rest
        return update._replace(text=text)

    def finish_reason(self, update: Update) -> str:
        return "tool_calls" if self._calls[update.job.index] else super().finish_reason(update)

    def message(self, choice: Choice) -> dict[str, Any]:
        found = super().message(choice)
        if calls := self._calls[choice.job.index]:
            found["message"] |= {"content": choice.text or None, "tool_calls": calls}
        return found


class CompletionAnswer(ChoicesAnswer):
    """Of a completion; ``echoes`` are the texts of the prompts, by choice, or None."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, jobs: Sequence[Job], head: Head, echoes: Sequence[str] | None = None) -> None:
        super().__init__(jobs, head)
        self._echoes = echoes
        if echoes is not None:
            for choice, echo in zip(self.choices, echoes, strict=True):
                choice.parts.append(echo)

    def opening(self, index: int) -> dict[str, Any] | None:
        if self._echoes is None:
            return None
        return _choice(index, {"text": self._echoes[index]})

    def delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def message(self, choice: Choice) -> dict[str, Any]:
        return self.delta(choice.text)

    def logprobs(self, choice: Choice, scores: Sequence[Score | None]) -> dict[str, Any] | None:
        """``text_offset`` counts the characters before a token."""
        request = choice.job.request
        if request.logprobs is None:
            return None
        tokens = [score.token if score else request.prompt[0] for score in scores]
        choice.stream = choice.stream or self._tokenizer.stream()
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(choice.stream.feed(token))
        best: list[dict[str, float] | None] = []
        for score in scores:
            if score is None:
                best.append(None)
                continue
            table: dict[str, float] = {}
            for token, logprob in (*score.best, (score.token, score.logprob)):
                name = self._written(token)  # tokens that are written alike: the likelier one counts
                table[name] = max(logprob, table.get(name, logprob))
            best.append(table)
        return {
            "tokens": [self._written(token) for token in tokens],
            "token_logprobs": [score.logprob if score else None for score in scores],
            "top_logprobs": best,
            "text_offset": offsets,
        }


def _choice(
    index: int, text: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
) -> dict[str, Any]:
    return {"index": index, **text, "logprobs": logprobs, "finish_reason": finish}


def timings(job: Job) -> dict[str, Any]:
    """What llama.cpp says of an answer, in its words; ``queue_ms`` is how long it waited for its turn."""
    first, ended = job.first or job.ended or 0.0, job.ended or 0.0
    started, submitted = job.started or ended, job.submitted or 0.0
    prompt_s, later_s = first - started, ended - first
    return {
        "queue_ms": 1e3 * (started - submitted),
        "cache_n": job.reused,
        "prompt_n": job.computed,
        "prompt_ms": 1e3 * prompt_s,
        "prompt_per_second": job.computed / prompt_s if prompt_s > 0 else 0.0,
        "predicted_n": job.sampled,
        "predicted_ms": 1e3 * later_s,
        "predicted_per_second": (job.sampled - 1) / later_s if later_s > 0 else 0.0,
    }
