"""The endpoints on a fake engine: shapes, errors, who may ask, and clients that leave."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import uvicorn
from serving import VOCAB, Client, FakeEngine, Reply, fake_llm, once, running
from uvicorn.server import ServerState

from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.inference.grammar import GrammarState
from bitgen.serve.guard import Access
from bitgen.serve.messages import ChatBody, ChatMessage, Limits, chat_ids, chat_requests, read
from bitgen.serve.ports import holder, is_loopback, listen
from bitgen.serve.server import _Protocol, fingerprint_of, read_keys
from bitgen.serve.tools import CallFilter, Tool

HAS_LLGUIDANCE = importlib.util.find_spec("llguidance") is not None
with_schemas = pytest.mark.skipif(not HAS_LLGUIDANCE, reason="llguidance is not installed (the extra json)")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK: dict[str, Any] = {"prompt": "the end", "max_tokens": 8, "seed": 5, "ignore_eos": True}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 5}


def error(reply: Reply) -> dict[str, Any]:
    assert set(reply.json) == {"error"}
    assert {"message", "type", "param", "code"} <= set(reply.json["error"])
    found: dict[str, Any] = reply.json["error"]
    return found


# ---- Texts ----


def test_a_completion() -> None:
    reply = once("POST", COMPLETIONS, ASK)
    assert reply.status == 200
    body = reply.json
    assert body["object"] == "text_completion"
    assert body["system_fingerprint"] == "fp_fake"
    assert body["model"] == "fake"
    choice = body["choices"][0]
    assert (choice["index"], choice["finish_reason"], choice["seed"]) == (0, "length", 5)
    usage = body["usage"]
    assert usage["completion_tokens"] == body["timings"]["predicted_n"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert reply.headers["x-request-id"]


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, ASK), (CHAT, TALK)])
def test_a_stream_is_the_whole_answer_in_parts(path: str, body: Any) -> None:
    whole = once("POST", path, body).json
    reply = once("POST", path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *events, usage, done = reply.events
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events)
    assert len({event["id"] for event in events}) == 1
    choices = [event["choices"][0] for event in events]
    if path == CHAT:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        assert text == whole["choices"][0]["message"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["choices"][0]["text"]
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]


def test_several_prompts_and_several_texts_of_each() -> None:
    reply = once("POST", COMPLETIONS, {**ASK, "prompt": ["the end", "a hand"], "n": 2})
    texts = [choice["text"] for choice in reply.json["choices"]]
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2, 3]
    for i, (prompt, seed) in enumerate([("the end", 5), ("the end", 6), ("a hand", 5), ("a hand", 6)]):
        alone = once("POST", COMPLETIONS, {**ASK, "prompt": prompt, "seed": seed})
        assert alone.json["choices"][0]["text"] == texts[i]


def test_token_ids_are_a_prompt() -> None:
    ids = once("POST", "/tokenize", {"prompt": "the end"}).json["tokens"]
    expected = once("POST", COMPLETIONS, ASK).json["choices"][0]["text"]
    for prompt in (ids, [ids]):
        assert once("POST", COMPLETIONS, {**ASK, "prompt": prompt}).json["choices"][0]["text"] == expected


def test_echo_with_log_probabilities_as_lm_eval_asks() -> None:
    body = {**ASK, "echo": True, "logprobs": 2, "temperature": 0, "max_tokens": 1}
    choice = once("POST", COMPLETIONS, body).json["choices"][0]
    scores = choice["logprobs"]
    assert choice["text"].startswith("the end")
    assert scores["token_logprobs"][0] is None
    assert scores["top_logprobs"][0] is None
    assert all(value < 0 for value in scores["token_logprobs"][1:])
    assert scores["token_logprobs"][-1] == max(scores["top_logprobs"][-1].values())  # the same float
    shown = "".join(scores["tokens"]).removeprefix("<s>").lstrip()
    assert shown == choice["text"]
    assert scores["text_offset"] == sorted(scores["text_offset"])
    parts = once("POST", COMPLETIONS, {**body, "stream": True}).events[:-1]
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]
    streamed = [part["choices"][0]["logprobs"] for part in parts if part["choices"][0]["logprobs"]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [each for part in streamed for each in part[name]] == scores[name]


def test_log_probabilities_of_a_chat() -> None:
    choice = once("POST", CHAT, {**TALK, "logprobs": True, "top_logprobs": 3}).json["choices"][0]
    entries = choice["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in entries)
    assert (
        b"".join(bytes(e["bytes"]) for e in entries).decode().strip() == choice["message"]["content"].strip()
    )


def test_a_stop_text_ends_a_text_before_it() -> None:
    text = once("POST", COMPLETIONS, {**ASK, "max_tokens": 30}).json["choices"][0]["text"]
    stop = text[9:12]
    choice = once("POST", COMPLETIONS, {**ASK, "max_tokens": 30, "stop": [stop]}).json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_a_context_that_is_full_is_told_in_the_words_of_both_dialects() -> None:
    found = error(once("POST", COMPLETIONS, {"prompt": "a" * 2000}))
    assert found["code"] == "context_length_exceeded"
    assert found["type"] == "exceed_context_size_error"
    assert "maximum context length is 256 tokens" in found["message"]
    assert "exceeds the available context size (256 tokens)" in found["message"]
    assert (found["n_ctx"], found["n_prompt_tokens"] > 256) == (256, True)
    full = once("POST", COMPLETIONS, {**ASK, "max_tokens": 1000}).json
    unlimited = once("POST", COMPLETIONS, {**ASK, "max_tokens": -1}).json  # as llama.cpp's clients write it
    assert unlimited["choices"] == full["choices"]
    refused = once("POST", CHAT, {**TALK, "max_completion_tokens": 0})
    assert (refused.status, error(refused)["param"]) == (400, "max_completion_tokens")
    assert full["choices"][0]["finish_reason"] == "length"
    assert full["usage"]["total_tokens"] == 257  # the last one is not fed back


def test_tokens_and_back() -> None:
    both = once("POST", "/tokenize", {"content": "the end", "with_pieces": True}).json
    assert "".join(token["piece"] for token in both["tokens"]).strip() == "the end"
    ids = once("POST", "/tokenize", {"prompt": "the end", "return_token_strs": True}).json
    assert ids["count"] == len(ids["tokens"]) == len(ids["token_strs"])
    text = once("POST", "/detokenize", {"tokens": ids["tokens"][1:]}).json
    assert text["content"] == text["prompt"] == "the end"
    chat = once("POST", "/tokenize", {"messages": TALK["messages"]}).json
    assert chat["count"] > 5


def test_what_a_client_may_know() -> None:
    listed = once("GET", "/v1/models").json
    assert [model["id"] for model in listed["data"]] == ["fake"]
    assert listed["data"][0]["max_model_len"] == 256
    assert once("GET", "/v1/models/fake").json["id"] == "fake"
    assert once("GET", "/v1/models/other").status == 404
    assert once("GET", "/props").json["default_generation_settings"]["n_ctx"] == 256
    assert [slot["is_processing"] for slot in once("GET", "/slots").json] == [False] * 4
    assert once("GET", "/tokenizer_info").json["vocab_size"] > 259
    assert once("GET", "/health").json == {"status": "ok"}
    page = once("GET", "/")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert len(page.content) < 40_000


def test_metrics_count() -> None:
    async def ask() -> str:
        async with running() as client:
            for _ in range(2):
                await client.post(COMPLETIONS, {**ASK, "prompt": "the end and the other hand on the end"})
            await client.post(COMPLETIONS, {**ASK, "n": 99})
            return (await client.get("/metrics")).content.decode()

    lines = asyncio.run(ask()).splitlines()
    assert "bitgen_generated_tokens_total 16.0" in lines
    assert 'bitgen_request_seconds_count{finish="length"} 2.0' in lines
    assert 'bitgen_http_responses_total{status="400"} 1.0' in lines
    assert "bitgen_requests_running 0.0" in lines
    hits = next(line for line in lines if line.startswith("bitgen_prefix_tokens_hit_total"))
    assert float(hits.split()[1]) > 10


# ---- What is wrong ----

WRONG: list[tuple[str, Any, str | None]] = []
_FIELDS: dict[str, list[Any]] = {
    "prompt": [
        None,
        5,
        True,
        {},
        [],
        [None],
        [1.5],
        ["a", 1],
        [[1], "a"],
        [[1.5]],
        [99999],
        [-1],
        [10**40],
        "\ud800",
    ],
    "max_tokens": ["5", 1.5, True, [], {}, 0, -2, -(10**30)],
    "n": ["1", 0, -1, 5, 1.5, 10**30, True, []],
    "temperature": ["1", -1, [], {}, True, -1e-9],
    "top_p": ["1", -0.1, 1.1, 10**30, True],
    "top_k": ["1", -2, 1.5, True],
    "min_p": ["1", -0.1, 1.1],
    "seed": ["1", 1.5, -2, 1 << 64, 10**40, True],
    "stop": [5, [5], ["a"] * 17, "a" * 257, {}, [None]],
    "min_tokens": ["1", -1, 9],
    "stop_token_ids": [5, ["a"], [-1], [99999], [1] * 65],
    "grammar": ["root ::= a"],
    "guided_json": ["{}"],
    "repeat_penalty": ["1", 0, -1],
    "repeat_last_n": ["1", -2, 0.5],
    "logprobs": ["1", -1, 21, True, 10**30],
    "stream": ["yes", 1, []],
    "stream_options": [5, [], {"include_usage": 5}],
    "echo": [1, "true"],
    "model": [5, [], {}],
    "logit_bias": [[], {"5": "b"}, {"a": 1}, {"-1": 1}, {"99999": 1}, {"5": 101}, {"5": None}, {"\u0665": 1}],
    "presence_penalty": ["1", 2.5, -3, True],
    "frequency_penalty": ["1", 2.5, 10**30],
    "suffix": ["x", 5],
    "best_of": [2, "1"],
}
for _field, _values in _FIELDS.items():
    WRONG += [(COMPLETIONS, {**ASK, _field: value}, _field) for value in _values]
_MESSAGES: list[Any] = [
    None, 5, "hi", {}, [], [5], [None], [{}], [{"role": "user", "content": 5}], [{"role": 5, "content": "a"}],
    [{"role": "wizard", "content": "a"}], [{"role": "tool"}], [{"content": "a"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{}]}],
    [{"role": "user", "content": [5]}],
]  # fmt: skip
WRONG += [(CHAT, {"messages": each}, "messages") for each in _MESSAGES]
TOOL = {
    "type": "function",
    "function": {
        "name": "hand",
        "description": "Gives a hand",
        "parameters": {
            "type": "object",
            "properties": {"to": {"enum": ["the", "an"]}, "often": {"$ref": "#/$defs/count"}},
            "required": ["to", "often"],
            "additionalProperties": False,
            "$defs": {"count": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
WRONG += [
    (CHAT, {**TALK, "tools": [TOOL], "tool_choice": choice}, "tool_choice")
    for choice in ("wizard", {"type": "function", "function": {"name": "foot"}})
]
WRONG += [
    (CHAT, {**TALK, name: value}, name)
    for name, value in (
        ("tools", [{"type": "function"}]),
        ("tools", 5),
        ("tools", [TOOL] * 129),
        ("tools", [{"type": "retrieval", "function": {"name": "a"}}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tools", [{"type": "function", "function": {"name": "a", "parameters": 5}}]),
        ("tool_choice", "required"),
        ("tool_choice", 5),
        ("response_format", {"type": "json_schema"}),
        ("response_format", "json"),
        ("response_format", {"type": "wizard"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 5}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a/b"}}}),
        ("json_schema", {"$ref": "#"}),
        ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "null"} for i in range(1500)}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"const": "a" * 70_000}}}),
        ("json_schema", []),
        ("top_logprobs", 5),
        ("max_completion_tokens", 0),
        ("logprobs", 5),
    )
]
WRONG += [
    (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (COMPLETIONS, b'{"prompt": "a", "temperature": Infinity}', "temperature"),
    (COMPLETIONS, b'{"prompt": "a", "top_p": 1e999}', "top_p"),
    (COMPLETIONS, b'{"prompt": "\xff\xfe"}', "prompt"),
    (COMPLETIONS, b'{"prompt": "a', "prompt"),
    (COMPLETIONS, b'{"max_tokens": 5}', "prompt"),
    (COMPLETIONS, b"", None),
    (COMPLETIONS, b"[]", None),
    (COMPLETIONS, b"5", None),
    (COMPLETIONS, b"\xff\xfe\x00", None),
    (COMPLETIONS, b'{"x": ' + b"[" * 100_000, None),
    (COMPLETIONS, b"{" * 1000, None),
    ("/tokenize", {}, "content"),
    ("/tokenize", {"content": 5}, "content"),
    ("/detokenize", {"tokens": [99999]}, "tokens"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
]


def test_a_hundred_wrong_bodies_are_told_what_is_wrong() -> None:
    assert len(WRONG) > 100

    async def ask() -> None:
        async with running() as client:
            for path, body, field in WRONG:
                if field in ("response_format", "json_schema", "tools") and not HAS_LLGUIDANCE:
                    continue
                reply = await client.post(path, body)
                assert reply.status == 400, (body, reply.status, reply.content)
                found = error(reply)
                assert found["message"]
                if field is not None and body != {**ASK, "prompt": "\ud800"}:
                    assert (found["param"] or "").startswith(field), (body, found)

    asyncio.run(ask())


def test_what_is_not_known_is_ignored_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    extra = {
        "user": "me",
        "metadata": {"a": [1]},
        "service_tier": "auto",
        "\x1b[31m": 1,
        "logit_bias": {},
        "tools": [],
        "xyz": 1,
    }
    extra |= {"presence_penalty": 0, "response_format": {"type": "text"}, "seed": -1, "top_k": -1, "n": None}

    async def ask() -> None:
        async with running(log="text") as client:
            for _ in range(2):
                assert (await client.post(CHAT, {**TALK, **extra})).status == 200

    asyncio.run(ask())
    said = [line for line in capsys.readouterr().err.splitlines() if "ignored" in line]
    names = r"\x1b[31m, metadata, service_tier, user, xyz"
    assert said == [f"bitgen: fields of requests that are ignored: {names}"]


def test_a_text_ends_at_its_own_tokens_and_not_too_early() -> None:
    likely = {"temperature": 0, "logit_bias": {"2": 4.5}}  # the end
    body = {**ASK, "max_tokens": 60, "ignore_eos": False, **likely}
    early = once("POST", COMPLETIONS, body).json
    assert early["choices"][0]["finish_reason"] == "stop"
    count = early["usage"]["completion_tokens"]
    late = once("POST", COMPLETIONS, {**body, "min_tokens": count + 5}).json
    assert late["usage"]["completion_tokens"] >= count + 5
    assert late["choices"][0]["text"].startswith(early["choices"][0]["text"])
    ids = once("POST", COMPLETIONS, {**ASK, "max_tokens": 60, "logprobs": 0}).json["choices"][0]
    token = ids["logprobs"]["tokens"][7]
    number = once("POST", "/tokenize", {"prompt": token, "add_special_tokens": False}).json["tokens"]
    cut = once("POST", COMPLETIONS, {**ASK, "max_tokens": 60, "stop_token_ids": number[-1:]}).json
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] <= 8


def test_bias_and_penalties_change_a_text() -> None:
    def tokens(**fields: Any) -> list[int]:
        choice = once("POST", COMPLETIONS, {**ASK, "max_tokens": 30, "temperature": 0, **fields})
        text = choice.json["choices"][0]["text"]
        ids: list[int] = once("POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json[
            "tokens"
        ]
        return ids

    plain = tokens()
    assert set(tokens(logit_bias={"270": 100})) <= {270, 259}  # a space is put before a text
    assert 270 not in tokens(logit_bias={"270": -100})
    assert max(map(plain.count, plain)) > 2
    hard = tokens(frequency_penalty=2, presence_penalty=2, repeat_last_n=-1)
    assert max(map(hard.count, hard)) < max(map(plain.count, plain))


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("POST", "/", 405),
        ("GET", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/embeddings", 501),
    ],
)
def test_every_error_has_one_shape(method: str, path: str, status: int) -> None:
    reply = once(method, path, {} if method == "POST" else None)
    assert reply.status == status
    assert error(reply)["message"]


@pytest.mark.parametrize(
    ("path", "meant", "end"),
    [
        ("/chat/completions", CHAT, "with /v1"),
        ("/v1/v1/chat/completions", CHAT, "before /v1"),
        ("/v1/api/chat", "/api/chat", "before /v1"),
    ],
)
def test_a_base_url_that_is_wrong_is_told(path: str, meant: str, end: str) -> None:
    reply = once("POST", path, TALK)
    told = f"there is no {path}, but {meant}: the base URL should end {end}"
    assert (reply.status, error(reply)["message"]) == (404, told)


def test_whole_numbers_may_be_written_as_floating_point() -> None:
    plain = once("POST", COMPLETIONS, {"prompt": "the end", "max_tokens": 4, "seed": 7, "top_k": 9})
    given = b'{"prompt": "the end", "max_tokens": 4.0, "seed": 7.0, "top_k": 9e0, "temperature": 0.8}'
    assert once("POST", COMPLETIONS, given).json["choices"] == plain.json["choices"]
    wrong = once("POST", COMPLETIONS, given.replace(b"4.0", b"4.5"))
    assert (wrong.status, error(wrong)["param"]) == (400, "max_tokens")
    options = b'{"model": "fake", "prompt": "hello", "stream": false, "options": {"num_predict": 3.0}}'
    assert once("POST", "/api/generate", options).json["eval_count"] == 3


@pytest.mark.parametrize(("key", "status"), [("secret", 413), ("wrong", 401)])
def test_who_sends_a_body_that_nobody_wants_is_told_why(key: str, status: int) -> None:
    left, found = 50, list[tuple[int, int]]()

    async def receive() -> dict[str, Any]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"a" * 1000, "more_body": left > 0}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            found.append((message["status"], left))

    async def ask() -> None:
        async with running(access=KEYS, max_body=2000) as client:
            headers = [(b"host", b"localhost"), (b"x-api-key", key.encode())]
            scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers}
            await client.app({**scope, "query_string": b"", "root_path": ""}, receive, send)

    asyncio.run(ask())
    assert found == [(status, 0)]


def test_a_body_has_a_largest_size_and_a_model_its_names() -> None:
    reply = once("POST", COMPLETIONS, {"prompt": "a" * 3000}, max_body=2000)
    assert (reply.status, "2000 bytes" in error(reply)["message"]) == (413, True)
    assert once("POST", COMPLETIONS, {**ASK, "model": "gpt-4o"}).json["model"] == "gpt-4o"
    refused = once("POST", COMPLETIONS, {**ASK, "model": "gpt-4o"}, strict_model=True)
    assert (refused.status, error(refused)["code"]) == (404, "model_not_found")


def test_an_engine_that_fails_is_a_500_that_is_not_tried_again() -> None:
    async def ask() -> tuple[Reply, Reply, Reply]:
        engine = FakeEngine()

        def fail() -> None:
            engine.before = lambda: None
            raise BitgenError("NaN in the logits")

        async with running(engine) as client:
            engine.before = fail
            whole = await client.post(COMPLETIONS, ASK)
            engine.before = fail
            stream = await client.post(COMPLETIONS, {**ASK, "stream": True})
            return whole, stream, await client.post(COMPLETIONS, ASK)

    whole, stream, after = asyncio.run(ask())
    assert (whole.status, whole.headers["x-should-retry"]) == (500, "false")
    assert error(whole)["message"] == "NaN in the logits"
    assert stream.events[-2]["error"]["message"] == "NaN in the logits"
    assert stream.events[-1] == "[DONE]"
    assert after.status == 200


# ---- Schemas and tools ----

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def roomy() -> FakeEngine:
    """For prompts that tell of tools."""
    return FakeEngine(context=1024)


@with_schemas
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("fields", [{"response_format": FORMAT}, {"json_schema": SCHEMA}])
def test_a_text_follows_its_schema(path: str, fields: Any) -> None:
    body = {**(ASK if path == COMPLETIONS else TALK), "max_tokens": 200, "n": 3, **fields}
    reply = once("POST", path, body)
    texts = [choice.get("text") or choice["message"]["content"] for choice in reply.json["choices"]]
    for text in texts:
        found = json.loads(text)
        assert set(found) == {"name", "age"}
        assert len(found["name"]) <= 9
        assert found["age"] <= 99
    assert len(set(texts)) == 3
    assert {choice["finish_reason"] for choice in reply.json["choices"]} == {"stop"}
    alone = once("POST", path, {**body, "n": 1, "logprobs": 2 if path == COMPLETIONS else True})
    choice = alone.json["choices"][0]
    assert (choice.get("text") or choice["message"]["content"]) == texts[0]  # all logits, masked in numpy


@with_schemas
def test_an_object_is_json_and_what_is_cut_is_told() -> None:
    body = {**TALK, "response_format": {"type": "json_object"}, "max_tokens": 200, "top_k": 0}
    assert isinstance(json.loads(once("POST", CHAT, body).json["choices"][0]["message"]["content"]), dict)
    cut = once("POST", CHAT, {**body, "response_format": FORMAT, "max_tokens": 4}).json["choices"][0]
    assert cut["message"]["content"].startswith("{")
    assert cut["finish_reason"] == "length"


@with_schemas
def test_a_text_whose_grammar_fails_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, count = GrammarState.allowed, iter(range(100))

    def fail(self: GrammarState, drafted: Any = ()) -> Any:
        if next(count) == 3:
            raise BitgenError("too complex")
        return allowed(self, drafted)

    monkeypatch.setattr(GrammarState, "allowed", fail)

    async def ask() -> list[Reply]:
        async with running() as client:
            bodies = [{**TALK, "response_format": FORMAT}, TALK]
            return list(await asyncio.gather(*(client.post(CHAT, body) for body in bodies)))

    failed, other = asyncio.run(ask())
    assert (failed.status, error(failed)["message"]) == (500, "too complex")
    assert other.json["choices"] == once("POST", CHAT, TALK).json["choices"]


def test_without_llguidance_a_schema_is_501(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    reply = once("POST", CHAT, {**TALK, "response_format": FORMAT})
    assert (reply.status, error(reply)["param"]) == (501, "response_format")
    assert "pip install 'bitgen[json]'" in error(reply)["message"]
    assert once("POST", CHAT, {**TALK, "tools": [TOOL]}, engine=roomy()).status == 200


@with_schemas
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "hand"}}])
def test_a_model_that_has_to_call_calls(choice: Any) -> None:
    body = {**TALK, "tools": [TOOL], "tool_choice": choice, "max_tokens": 100}
    found = once("POST", CHAT, body, engine=roomy()).json["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
    assert (call["type"], call["function"]["name"], call["id"][:5]) == ("function", "hand", "call_")
    arguments = json.loads(call["function"]["arguments"])
    assert arguments["to"] in ("the", "an")
    assert 1 <= arguments["often"] <= 9
    *events, done = once("POST", CHAT, {**body, "stream": True}, engine=roomy()).events
    assert done == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in events]
    (streamed,) = [each for delta in deltas for each in delta.get("tool_calls", ())]
    assert (streamed["index"], streamed["function"]) == (0, call["function"])
    assert not any(delta.get("content") for delta in deltas)
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_model_that_may_call_and_does_not_just_answers() -> None:
    plain = once("POST", CHAT, {**TALK, "tools": [TOOL], "tool_choice": "none"}, engine=roomy()).json[
        "choices"
    ][0]
    assert plain["message"] == once("POST", CHAT, TALK).json["choices"][0]["message"]
    reply = once("POST", CHAT, {**TALK, "tools": [TOOL]}, engine=roomy())
    whole = reply.json["choices"][0]
    assert whole["message"]["content"]
    assert "tool_calls" not in whole["message"]
    events = once("POST", CHAT, {**TALK, "tools": [TOOL], "stream": True}, engine=roomy()).events[:-1]
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == whole["message"]["content"]


def test_calls_and_results_are_told_to_a_template_that_knows_none() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "hand", "arguments": '{"to": "an"}'}}
    talk = [
        {"role": "system", "content": "be short"},
        *TALK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]

    async def ask() -> str:
        async with running() as client:
            tools = msgspec.convert([TOOL], list[Tool])
            body = ChatBody(messages=msgspec.convert(talk, list[ChatMessage]), tools=tools)
            return client.service.llm.tokenizer.decode(chat_ids(body, client.service.llm))

    text = asyncio.run(ask())
    assert text.startswith("be short\n\nYou may call one of these functions.")
    assert '{"name": "hand", "description": "Gives a hand", "parameters"' in text
    assert 'Assistant: {"name": "hand", "arguments": {"to": "an"}}\nUser: Result: done\nAssistant:' in text


CALL = '{"name": "hand", "arguments": {"to": "the"}}'


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, 1),
        (f"\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", 2),
        (f"<|python_tag|>{CALL.replace('arguments', 'parameters')}; {CALL}", 2),
        (CALL.replace("hand", "foot"), 0),
        (CALL + " and so on", 0),
        ("{ is a brace", 0),
        ("<tool", 0),
        ("plain", 0),
        ("  ", 0),
        ('{"name": ["hand"]}', 0),
        ("[" * 5000, 0),
    ],
)
def test_a_text_is_calls_or_content_however_it_is_cut(text: str, calls: int) -> None:
    for size in (1, 3, 7, len(text)):
        sieve = CallFilter(["hand"])
        shown = [sieve.feed(text[at : at + size]) for at in range(0, len(text), size)]
        rest, found = sieve.close()
        assert len(found) == calls
        assert "".join(shown) + rest == ("" if calls else text)
        assert all((call.name, json.loads(call.arguments)) == ("hand", {"to": "the"}) for call in found)


def test_a_request_says_whether_the_model_thinks() -> None:
    llm = fake_llm(FakeEngine())
    llm.template = "{{ enable_thinking | default('') }} {{ messages[0].content }}"

    def prompt(body: dict[str, Any]) -> str:
        asked = read(json.dumps({**TALK, **body}).encode(), ChatBody)
        (request,) = chat_requests(asked, llm, Limits(1, VOCAB))
        return llm.tokenizer.decode(request.prompt).strip()

    assert prompt({}) == "hello"
    assert prompt({"chat_template_kwargs": {"enable_thinking": False, "other": 1}}) == "False hello"
    llm.thinking = False
    assert prompt({}) == "False hello"
    assert prompt({"chat_template_kwargs": {"enable_thinking": True}}) == "True hello"


# ---- Vectors ----


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_those_of_embed_whatever_runs_beside(pooling: Any) -> None:
    texts = ["the end and the other", "a", "the end and the other end " * 4]

    async def ask() -> tuple[list[Any], Any, Any, Any]:
        engine = FakeEngine(batch=2, token_s=0.02)
        llm = fake_llm(engine)
        llm.pooling = pooling
        async with running(engine, llm=llm) as client:
            bodies = [{"input": texts}, {"input": texts[0]}, {"input": texts[2], "encoding_format": "base64"}]
            asked = [client.post("/v1/embeddings", body) for body in bodies]
            *vectors, _ = await asyncio.gather(*asked, client.post(COMPLETIONS, ASK))
            ollama = await client.post("/api/embed", {"model": "fake", "input": texts[:2]})
            old = await client.post("/api/embeddings", {"model": "fake:latest", "prompt": texts[0]})
            assert old.json == {"embedding": ollama.json["embeddings"][0]}
            wrong = await client.post("/v1/embeddings", {"input": "a", "dimensions": 5})
            return vectors, ollama, wrong, await client.post("/v1/embeddings", {"input": ["a", 5]})

    (several, one, packed), ollama, wrong, mixed = asyncio.run(ask())
    alone = fake_llm(FakeEngine(batch=1), None)
    expected = [vector.tolist() for vector in alone.embed(texts, pooling)]
    assert [each["embedding"] for each in several.json["data"]] == expected
    assert one.json["data"][0] == {"object": "embedding", "index": 0, "embedding": expected[0]}
    raw = base64.b64decode(packed.json["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == expected[2]
    tokens = [len(alone.tokenizer.encode(text)) for text in texts]
    assert several.json["usage"] == {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
    assert ollama.json["embeddings"] == expected[:2]
    assert [(reply.status, error(reply)["param"]) for reply in (wrong, mixed)] == [
        (400, "dimensions"),
        (400, "input"),
    ]


# ---- Load, and clients that leave ----


def blocked(engine: FakeEngine) -> threading.Event:
    """An event that must be set before the engine's next forward pass goes on."""
    go = threading.Event()
    engine.before = lambda: None if go.wait(20) else pytest.fail("nobody let the engine go")
    return go


def test_a_full_queue_is_429_and_health_answers_while_a_prompt_is_computed() -> None:
    async def ask() -> None:
        engine = FakeEngine(batch=1)
        async with running(engine, max_queue=1) as client:
            go = blocked(engine)
            tasks = [asyncio.create_task(client.post(COMPLETIONS, ASK)) for _ in range(2)]
            while len(client.service.jobs) < 2:
                await asyncio.sleep(0.001)
            refused = await client.post(COMPLETIONS, ASK)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert error(refused)["type"] == "rate_limit_error"
            too_many = await client.post(COMPLETIONS, {**ASK, "prompt": ["a"] * 3})
            assert too_many.status == 400
            started = time.perf_counter()
            assert (await client.get("/health")).status == 200
            assert (await client.get("/metrics")).status == 200
            assert (await client.get("/slots")).status == 200
            assert time.perf_counter() - started < 1
            go.set()
            assert {reply.status for reply in await asyncio.gather(*tasks)} == {200}

    asyncio.run(ask())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("queued", [False, True])
def test_a_client_that_leaves_frees_its_place_within_a_step(stream: bool, queued: bool) -> None:
    async def ask() -> None:
        engine = FakeEngine(batch=1)
        async with running(engine) as client:
            go, left = blocked(engine), asyncio.Event()
            long = {**ASK, "max_tokens": 200, "stream": stream}
            other = (
                asyncio.create_task(client.post(COMPLETIONS, {**ASK, "max_tokens": 3})) if queued else None
            )
            await asyncio.sleep(0.05)
            task = asyncio.create_task(client.post(COMPLETIONS, long, leave=left.wait()))
            while len(client.service.jobs) < 1 + queued:
                await asyncio.sleep(0.001)
            left.set()
            reply = await task  # at once: the engine still stands
            assert reply.status == (200 if stream else 499)
            assert b"[DONE]" not in reply.content
            before = len(engine.passes)
            go.set()
            await client.idle()
            assert len(engine.passes) - before <= 1 + 3 * queued
            if other is not None:
                assert (await other).json["choices"][0]["finish_reason"] == "length"

    asyncio.run(ask())


def test_a_slow_reader_holds_nobody_up() -> None:
    async def ask() -> None:
        async with running(FakeEngine(batch=2)) as client:
            wait = asyncio.Event()

            async def slow(_: bytes) -> None:
                await wait.wait()

            stream = client.post(COMPLETIONS, {**ASK, "stream": True}, on_part=slow)
            task = asyncio.create_task(stream)
            assert (await asyncio.wait_for(client.post(COMPLETIONS, ASK), 10)).status == 200
            wait.set()
            assert (await task).events[-1] == "[DONE]"

    asyncio.run(ask())


def test_a_slow_sender_holds_nobody_up_and_is_told() -> None:
    async def ask() -> None:
        async with running(FakeEngine(batch=1), body_s=0.3) as client:
            slow = asyncio.create_task(client.post(COMPLETIONS, ASK, cut=9))
            assert (await asyncio.wait_for(client.post(COMPLETIONS, ASK), 10)).status == 200
            late = await slow
            assert (late.status, error(late)["type"]) == (408, "timeout_error")

    asyncio.run(ask())


class Wire(asyncio.Transport):
    """One end of a connection that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def test_headers_that_do_not_come_end_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first request, and of one after another; a request that is answered slowly is left alone."""
    monkeypatch.setattr("bitgen.serve.server._HEADERS_S", 0.05)
    go = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["path"], receive is not None) == ("/", True)
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def connect() -> None:
        config = uvicorn.Config(app, log_config=None, lifespan="off")
        config.load()
        loop, ends = asyncio.get_running_loop(), []
        for _ in range(3):
            protocol, wire = _Protocol(config, ServerState(), {}, loop), Wire()
            protocol.connection_made(wire)
            ends.append((protocol, wire))
        (_, silent), (slow, slows), (good, goods) = ends
        slow.data_received(b"GET / HTTP/1.1\r\nho")
        good.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await asyncio.sleep(0.1)
        assert (silent.closed, slows.closed, goods.closed) == (True, True, False)
        go.set()
        await asyncio.sleep(0.1)
        assert goods.sent.startswith(b"HTTP/1.1 200")
        assert not goods.closed
        good.data_received(b"GET / HT")
        await asyncio.sleep(0.1)
        assert goods.closed

    asyncio.run(connect())


@pytest.mark.parametrize("seed", range(6))
def test_http_clients_that_come_and_go_get_the_texts_they_get_alone(seed: int) -> None:
    rng = random.Random(seed)
    bodies = [
        {
            "prompt": "the end and the other " * rng.choice([1, 1, 4]) + rng.choice("abc"),
            "max_tokens": rng.randint(1, 20),
            "seed": rng.randint(0, 3),
            "temperature": rng.choice([0, 1]),
            "stream": rng.random() < 0.5,
            "stop": rng.choice([[], ["e"]]),
        }
        for _ in range(25)
    ]

    async def one(client: Client, body: Any, leaves: bool) -> Reply | None:
        await asyncio.sleep(rng.random() * 0.05)
        leave = asyncio.sleep(rng.random() * 0.05) if leaves else None
        reply = await client.post(COMPLETIONS, body, leave=leave)
        return None if leaves else reply

    async def together() -> list[Reply | None]:
        async with running(FakeEngine(batch=3)) as client:
            return await asyncio.gather(*(one(client, body, i % 4 == 0) for i, body in enumerate(bodies)))

    async def each() -> list[Reply]:
        async with running(FakeEngine(batch=1)) as client:
            return [await client.post(COMPLETIONS, body) for body in bodies]

    for mine, alone in zip(asyncio.run(together()), asyncio.run(each()), strict=True):
        if mine is not None:
            assert text_of(mine) == text_of(alone)


def text_of(reply: Reply) -> str:
    if reply.content.startswith(b"data:"):
        return "".join(event["choices"][0]["text"] for event in reply.events[:-1])
    text: str = reply.json["choices"][0]["text"]
    return text


def test_a_server_that_goes_down_ends_its_streams_in_words() -> None:
    async def ask() -> None:
        engine = FakeEngine(batch=1)
        async with running(engine) as client:
            go = blocked(engine)
            stream = asyncio.create_task(client.post(CHAT, {**TALK, "stream": True}))
            whole = asyncio.create_task(client.post(CHAT, TALK))
            while len(client.service.jobs) < 2:
                await asyncio.sleep(0.001)
            client.service.draining = True
            for path, body in ((COMPLETIONS, ASK), ("/tokenize", {"content": "a"})):
                refused = await client.post(path, body)
                assert (refused.status, refused.headers["retry-after"]) == (503, "1")
            assert (await client.get("/health")).status == 503
            client.service.cut()
            *_, last, done = (await stream).events
            assert last["error"]["code"] == "shutdown"
            assert done == "[DONE]"
            assert (await whole).status == 503
            go.set()

    asyncio.run(ask())


def test_a_silent_stream_is_kept_alive() -> None:
    async def ask() -> bytes:
        engine = FakeEngine()
        async with running(engine, ping_s=0.02) as client:
            go = blocked(engine)
            asyncio.get_running_loop().call_later(0.6, go.set)
            return (await client.post(COMPLETIONS, {**ASK, "stream": True})).content

    content = asyncio.run(ask())
    assert content.startswith(b": ping\n\n")
    assert content.endswith(b"data: [DONE]\n\n")


# ---- Who may ask ----

KEYS = Access(keys=("secret", "other"))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer other"}, 200),
        ({"x-api-key": "secret"}, 200),
    ],
)
def test_a_key_is_needed_where_there_are_keys(headers: Any, status: int) -> None:
    for path in ("/v1/models", "/props", "/slots", "/metrics"):
        assert once("GET", path, headers=headers, access=KEYS).status == status
    assert once("POST", COMPLETIONS, ASK, headers, access=KEYS).status == status
    assert once("GET", "/health", headers=headers, access=KEYS).status == 200


def test_one_key_learns_nothing_of_another_from_the_cache() -> None:
    async def ask() -> list[int]:
        async with running(FakeEngine(batch=3), access=KEYS) as client:
            body = {**ASK, "prompt": "the end and the other hand on the end"}
            found = []
            for key in ("secret", "other", "secret"):
                reply = await client.post(COMPLETIONS, body, headers={"x-api-key": key})
                found.append(reply.json["usage"]["prompt_tokens_details"]["cached_tokens"])
            return found

    first, foreign, own = asyncio.run(ask())
    assert (first, foreign) == (0, 0)
    assert own > 0


def test_what_was_cached_is_counted_of_each_prompt_once() -> None:
    async def ask() -> list[dict[str, Any]]:
        async with running(FakeEngine(batch=8)) as client:
            one, two = "the end and the other hand on the end", "a hand is on the other end of it"
            found = []
            for prompt in (one, two, [one, two]):
                reply = await client.post(COMPLETIONS, {**ASK, "prompt": prompt, "n": 2})
                found.append(reply.json["usage"])
            return found

    one, two, both = asyncio.run(ask())
    cached = both["prompt_tokens_details"]["cached_tokens"]
    assert cached == one["prompt_tokens"] + two["prompt_tokens"] - 2, "all but the last token of each"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8080", 200),
        ("127.0.0.1", 200),
        ("[::1]:8080", 200),
        ("192.168.0.5:8080", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8080", 403),
        ("", 200),
        ("[", 403),
        ("box.lan:8080", 200),
    ],
)
def test_a_name_that_was_rebound_is_refused(host: str, status: int) -> None:
    reply = once("GET", "/v1/models", headers={"host": host}, access=Access(hosts=("box.lan",)))
    assert reply.status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://[::1]:99", 200),
        ("https://app.example", 200),
        ("https://evil.example", 403),
        ("https://localhost.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_a_foreign_page_is_refused_before_any_work(origin: str, status: int) -> None:
    async def ask() -> None:
        engine = FakeEngine()
        async with running(engine, access=Access(origins=("https://app.example",))) as client:
            reply = await client.post(
                COMPLETIONS, ASK, headers={"origin": origin, "content-type": "text/plain"}
            )
            assert reply.status == status
            assert (len(engine.passes) > 0) == (status == 200)
            assert reply.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
            asked = {"origin": origin, "access-control-request-headers": "authorization,x-stainless-os"}
            preflight = await client.ask("OPTIONS", COMPLETIONS, headers=asked)
            assert preflight.status == (204 if status == 200 else 403)
            if status == 200:
                assert preflight.headers["access-control-allow-headers"] == "authorization,x-stainless-os"

    asyncio.run(ask())


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_holds_no_texts(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    once("POST", COMPLETIONS, {**ASK, "prompt": "xyzzy"}, {"x-request-id": "mine-1"}, log=form)
    once("POST", COMPLETIONS, b'{"prompt": "xyzzy"', log=form)
    err = capsys.readouterr().err
    assert "mine-1" in err
    assert err.count(COMPLETIONS) == 2
    assert "xyzzy" not in err


# ---- The process ----


def test_a_key_file_is_unreadable_for_others(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nsecret\n\nother # of a friend\n")
    file.chmod(0o644)
    with pytest.raises(FileError, match="can be read by others"):
        read_keys(file)
    file.chmod(0o600)
    assert read_keys(file) == ("secret", "other")
    file.write_text("# nothing\n")
    with pytest.raises(FileError, match="holds no key"):
        read_keys(file)
    with pytest.raises(FileError, match="cannot read"):
        read_keys(tmp_path / "none")


def test_a_busy_port_names_who_has_it() -> None:
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(BitgenError, match=rf"port {port} of 127.0.0.1 is in use by .*\(process \d+\)"):
            listen("127.0.0.1", port)
    assert holder(1) == "another process"
    for host, port in (("no.such.host.invalid", 0), ("127.0.0.1", 70_000)):
        with pytest.raises(UsageError, match="--"):
            listen(host, port)
    assert all(map(is_loopback, ("127.0.0.1", "localhost", "::1")))
    assert not is_loopback("192.0.2.1")


def test_a_fingerprint_is_of_the_bytes_and_not_of_the_place(tmp_path: Path) -> None:
    one, two = tmp_path / "a.gguf", tmp_path / "b.gguf"
    one.write_bytes(bytes(1000))
    two.write_bytes(bytes(1000))
    assert fingerprint_of(one, "kv f16") == fingerprint_of(two, "kv f16")
    assert fingerprint_of(one, "kv f16") != fingerprint_of(one, "kv q8")
    two.write_bytes(bytes(999) + b"1")
    assert fingerprint_of(one) != fingerprint_of(two)
