"""The same texts in other shapes: `/v1/responses` and Ollama's API, on a fake engine."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from serving import FakeEngine, Reply, fake_llm, once

from bitgen.inference.sequence import Request
from bitgen.serve.answers import Head
from bitgen.serve.messages import ChatBody, ChatMessage, chat_ids
from bitgen.serve.ollama import OllamaAnswer
from bitgen.serve.worker import Job, Update

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 5}
TOOL = {"name": "hand", "parameters": {"type": "object", "properties": {"to": {"enum": ["the"]}}}}
TOOL["parameters"] |= {"required": ["to"], "additionalProperties": False}  # type: ignore[operator]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"age": {"enum": [1, 22]}}, "required": ["age"]}
SCHEMA["additionalProperties"] = False
with_schemas = pytest.mark.skipif(
    importlib.util.find_spec("llguidance") is None, reason="llguidance is not installed (the extra json)"
)


def expected(**fields: Any) -> str:
    choice = once("POST", CHAT, {**TALK, **fields}).json["choices"][0]
    return str(choice["message"]["content"])


def roomy() -> FakeEngine:
    return FakeEngine(context=1024)


# ---- Responses ----


def typed(reply: Reply) -> list[Any]:
    """The events of a stream; their names and numbers are right."""
    found = []
    for number, block in enumerate(reply.content.decode().strip().split("\n\n")):
        name, data = block.split("\n")
        body = json.loads(data.removeprefix("data: "))
        assert (name, body["sequence_number"]) == (f"event: {body['type']}", number)
        found.append(body)
    return found


def test_a_response_is_the_answer_of_a_chat() -> None:
    body = {"input": "hello", "instructions": "be short", "max_output_tokens": 8, "seed": 5}
    whole = once("POST", RESPONSES, body).json
    talk = [{"role": "system", "content": "be short"}, *TALK["messages"]]
    text = expected(messages=talk)
    (item,) = whole["output"]
    assert (item["type"], item["role"], item["content"][0]["text"]) == ("message", "assistant", text)
    assert (whole["object"], whole["status"]) == ("response", "incomplete")
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"
    assert whole["usage"]["output_tokens"] == 8
    assert whole["usage"]["total_tokens"] == whole["usage"]["input_tokens"] + 8
    parts = [{"type": "input_text", "text": "hel"}, {"type": "input_text", "text": "lo"}]
    items = [
        {"role": "developer", "content": "be short"},
        {"type": "message", "role": "user", "content": parts},
    ]
    again = once("POST", RESPONSES, {**body, "input": items, "instructions": None}).json
    assert again["output"][0]["content"][0]["text"] == text


def test_the_events_of_a_response() -> None:
    events = typed(
        once("POST", RESPONSES, {"input": "hello", "max_output_tokens": 8, "seed": 5, "stream": True})
    )
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert "".join(event["delta"] for event in events[4:-4]) == expected() == events[-4]["text"]
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


@with_schemas
def test_a_response_may_be_a_call_or_follow_a_schema() -> None:
    body = {"input": "hello", "seed": 5, "tools": [{"type": "function", **TOOL}], "tool_choice": "required"}
    (call,) = once("POST", RESPONSES, body, engine=roomy()).json["output"]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "hand", '{"to": "the"}')
    events = typed(once("POST", RESPONSES, {**body, "stream": True}, engine=roomy()))
    kinds = [event["type"].removeprefix("response.") for event in events[2:]]
    parts = ["function_call_arguments.delta", "function_call_arguments.done"]
    assert kinds == ["output_item.added", *parts, "output_item.done", "completed"]
    talk = [
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": "1", "name": "hand", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "done"},
    ]
    assert once("POST", RESPONSES, {"input": talk, "max_output_tokens": 2}).status == 200
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    text = once("POST", RESPONSES, {"input": "hello", "text": form}).json["output"][0]["content"][0]["text"]
    assert json.loads(text)["age"] in (1, 22)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 5}, "input"),
        ({"input": []}, "messages"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type"),
        ({"input": [{"content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "a", "background": True}, "background"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "a", "text": {"format": {"type": "grammar"}}}, "response_format"),
    ],
)
def test_wrong_responses_are_named(body: Any, param: str) -> None:
    reply = once("POST", RESPONSES, body)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


# ---- Anthropic ----

MESSAGES = "/v1/messages"
HELLO: dict[str, Any] = {"model": "fake", "max_tokens": 8, "seed": 5, "messages": TALK["messages"]}
HAND = {"name": "hand", "input_schema": TOOL["parameters"]}
IMAGE = [{"type": "image", "source": {}}]


def named(reply: Reply) -> list[Any]:
    """The events of a stream, whose names are right."""
    found = []
    for block in reply.content.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_a_message_is_the_answer_of_a_chat() -> None:
    whole = once("POST", MESSAGES, {**HELLO, "system": [{"type": "text", "text": "be short"}]}).json
    text = expected(messages=[{"role": "system", "content": "be short"}, *TALK["messages"]])
    assert whole["content"] == [{"type": "text", "text": text}]
    assert (whole["type"], whole["role"], whole["stop_reason"]) == ("message", "assistant", "max_tokens")
    count = {"model": "fake", "system": "be short", "messages": TALK["messages"]}
    tokens = once("POST", f"{MESSAGES}/count_tokens", count).json["input_tokens"]
    assert (whole["usage"]["input_tokens"], whole["usage"]["output_tokens"]) == (tokens, 8)
    plain = expected()
    stopped = once("POST", MESSAGES, {**HELLO, "stop_sequences": ["zzz", plain[3]]}).json
    assert stopped["content"][0]["text"] == plain[: plain.index(plain[3])]
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", plain[3])


def test_a_text_of_the_assistant_that_comes_last_goes_on() -> None:
    talk = [*TALK["messages"], {"role": "assistant", "content": expected()[:3]}]
    chat = {**TALK, "messages": talk}
    ollama = {"model": "a", "messages": talk, "stream": False, "options": {"num_predict": 8, "seed": 5}}
    begun = once("POST", CHAT, {**chat, "continue_final_message": True}).json
    texts = {
        begun["choices"][0]["message"]["content"],
        once("POST", MESSAGES, {**HELLO, "messages": talk}).json["content"][0]["text"],
        once("POST", "/api/chat", ollama).json["message"]["content"],
    }
    assert len(texts) == 1
    assert texts != {once("POST", CHAT, chat).json["choices"][0]["message"]["content"]}
    llm = fake_llm(FakeEngine())
    asked = ChatBody(messages=msgspec.convert(talk, list[ChatMessage]), continue_final_message=True)
    alone = llm.tokenizer.decode(llm.chat_prompt(TALK["messages"]))
    assert llm.tokenizer.decode(chat_ids(asked, llm)) == alone + expected()[:3]
    refused = once("POST", CHAT, {**TALK, "continue_final_message": True})
    assert (refused.status, refused.json["error"]["param"]) == (400, "continue_final_message")


def test_the_events_of_a_message() -> None:
    events = named(once("POST", MESSAGES, {**HELLO, "stream": True}))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event["delta"]["text"] for event in events[2:-3]) == expected()
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 8


@with_schemas
def test_a_message_may_be_a_call() -> None:
    body = {**HELLO, "max_tokens": 100, "tools": [HAND], "tool_choice": {"type": "any"}}
    whole = once("POST", MESSAGES, body, engine=roomy()).json
    (call,) = whole["content"]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "hand", {"to": "the"})
    assert whole["stop_reason"] == "tool_use"
    events = named(once("POST", MESSAGES, {**body, "stream": True}, engine=roomy()))
    started, delta = events[1], events[2]["delta"]
    assert (started["content_block"]["name"], delta["partial_json"]) == ("hand", '{"to":"the"}')
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "done"}]}
    talk = [
        *TALK["messages"],
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    again = once("POST", MESSAGES, {**HELLO, "messages": talk, "tools": [HAND]}, engine=roomy()).json
    assert again["type"] == "message"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "messages[0].content[0].text"),
        ({"stop_sequences": ["a"] * 17}, 400, "stop_sequences"),
        ({"temperature": -1}, 400, "temperature"),
        ({"tools": [{"name": "a b"}]}, 400, "tools[0].function.name"),
        ({"tools": [{"name": "a", "type": "bash_20250124"}]}, 400, "tools"),
        ({"tool_choice": {"type": "any"}}, 400, "tool_choice"),
        ({"tool_choice": {"type": "wizard"}}, 400, "tool_choice"),
        ({"tools": [HAND], "tool_choice": {"type": "tool"}}, 400, "tool_choice"),
    ],
)
def test_wrong_messages_are_named(fields: Any, status: int, param: str) -> None:
    reply = once("POST", MESSAGES, {**HELLO, **fields})
    assert (reply.status, reply.json["type"], reply.json["error"]["param"]) == (status, "error", param)


def test_a_context_that_is_full_is_told_in_each_dialect() -> None:
    talk = {**TALK, "model": "fake", "messages": [{"role": "user", "content": "the " * 300}]}
    said = {path: once("POST", path, talk) for path in (CHAT, MESSAGES, "/api/chat")}
    assert {reply.status for reply in said.values()} == {400}
    openai, anthropic = said[CHAT].json["error"], said[MESSAGES].json["error"]
    assert openai["code"] == "context_length_exceeded"
    assert "maximum context length" in openai["message"]
    assert "exceeds the available context size" in said["/api/chat"].json["error"]
    assert anthropic["message"].startswith("prompt is too long: ")
    assert anthropic["message"].endswith(" tokens > 256 maximum")


# ---- Ollama ----


def lines(reply: Reply) -> list[Any]:
    return [json.loads(line) for line in reply.content.splitlines()]


def test_an_ollama_chat_is_the_answer_of_a_chat() -> None:
    body = {
        "model": "fake",
        "messages": TALK["messages"],
        "options": {"num_predict": 8, "seed": 5, "num_ctx": 9},
    }
    reply = once("POST", "/api/chat", body)
    assert reply.headers["content-type"] == "application/x-ndjson"
    *parts, last = lines(reply)
    assert "".join(part["message"]["content"] for part in parts) == expected()
    assert [part["done"] for part in parts] == [False] * len(parts)
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "length", 8)
    assert last["total_duration"] >= last["eval_duration"] >= 0
    whole = once("POST", "/api/chat", {**body, "stream": False}).json
    assert (whole["message"]["content"], whole["done"]) == (expected(), True)
    generated = once("POST", "/api/generate", {**body, "prompt": "hello", "stream": False}).json
    assert generated["response"] == expected()
    raw = once("POST", "/api/generate", {**body, "prompt": "the end", "raw": True, "stream": False}).json
    plain = once("POST", "/v1/completions", {"prompt": "the end", "max_tokens": 8, "seed": 5}).json
    assert raw["response"] == plain["choices"][0]["text"]


@with_schemas
def test_an_ollama_chat_may_be_a_call_or_follow_a_schema() -> None:
    body = {"model": "fake", "messages": TALK["messages"], "stream": False, "format": SCHEMA}
    assert json.loads(once("POST", "/api/chat", body).json["message"]["content"])["age"] in (1, 22)
    said = once(
        "POST", "/api/generate", {"model": "fake", "prompt": "hello", "format": "json", "stream": False}
    )
    assert said.json["response"].startswith("{")
    call = {"function": {"name": "hand", "arguments": {"to": "the"}}}
    talk = [
        *body["messages"],
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "done"},
    ]
    tools = [{"type": "function", "function": TOOL}]
    reply = once(
        "POST", "/api/chat", {**body, "messages": talk, "format": None, "tools": tools}, engine=roomy()
    )
    assert reply.status == 200


@pytest.mark.parametrize("arguments", ['"to the end"', '{"to": NaN}', "[1]", "null"])
def test_a_call_whose_arguments_are_no_object_is_told_without_them(arguments: str) -> None:
    job = Job(Request((1,)), lambda _: None, submitted=0.0)
    llm = fake_llm(FakeEngine())
    answer = OllamaAnswer([job], Head("fake", "fp", llm.tokenizer), chat=True, names=["hand"])
    answer.take(Update(job, f'{{"name": "hand", "arguments": {arguments}}}', [5], finish="end"))
    assert answer.body()["message"]["tool_calls"] == [{"function": {"name": "hand", "arguments": {}}}]


def test_what_ollama_clients_ask_beside_texts() -> None:
    listed = once("GET", "/api/tags", names=("fake", "qwen:8b")).json["models"]
    assert [model["name"] for model in listed] == ["fake:latest", "qwen:8b"]
    assert [model["model"] for model in listed] == ["fake:latest", "qwen:8b"]
    assert once("GET", "/api/ps").json["models"][0]["context_length"] == 256
    assert once("GET", "/api/version").json["version"]
    engine = FakeEngine(context=128)
    engine.config = replace(engine.config, context=4096)  # of the model, as it was trained
    shown = once("POST", "/api/show", {"model": "fake:latest"}, engine=engine).json
    assert shown["model_info"]["bitnet.context_length"] == 128
    assert shown["model_info"]["general.basename"] == "fake"  # the name that Copilot shows
    assert shown["capabilities"] == ["completion", "tools"]
    assert once("POST", "/api/generate", {"model": "fake"}).json["done_reason"] == "load"
    assert once("POST", "/api/chat", {"model": "fake"}).json["done_reason"] == "load"
    assert once("HEAD", "/").status == 200


@pytest.mark.parametrize(("name", "status"), [("fake", 200), ("fake:latest", 200), ("fake:8b", 404)])
def test_a_strict_server_knows_its_name_with_the_tag_of_ollama(name: str, status: int) -> None:
    body = {"model": name, "prompt": "hello", "stream": False, "options": {"num_predict": 2}}
    reply = once("POST", "/api/generate", body, strict_model=True)
    assert reply.status == status
    if status == 200:
        assert reply.json["model"] == name


def test_what_clients_of_ollama_leave_empty() -> None:
    call = {"index": 0, "function": {"name": "hand", "arguments": None}}
    talk = [
        {"role": "user", "content": "hello", "images": []},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]
    body = {"model": "fake", "messages": talk, "options": {"num_predict": 2, "mirostat": 1}, "format": ""}
    assert lines(once("POST", "/api/chat", {**body, "stream": None, "keep_alive": "5m"}))[-1]["done"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("chat", {}, 400, "model"),
        ("chat", {"model": "a", "messages": [{"role": "user", "images": ["x"]}]}, 400, "messages"),
        ("chat", {"model": "a", "messages": [{"role": "wizard"}]}, 400, "messages[0].role"),
        (
            "generate",
            {"model": "a", "prompt": "a", "options": {"temperature": -1}},
            400,
            "options.temperature",
        ),
        (
            "generate",
            {"model": "a", "prompt": "a", "options": {"num_predict": 0}},
            400,
            "options.num_predict",
        ),
        ("generate", {"model": "a", "prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("generate", {"model": "a", "prompt": "a", "format": "xml"}, 400, "format"),
        ("embed", {"model": "a", "input": "b"}, 501, None),
        ("pull", {"model": "a"}, 404, None),
    ],
)
def test_errors_of_ollama_are_texts(path: str, body: Any, status: int, param: str | None) -> None:
    reply = once("POST", f"/api/{path}", body)
    assert (reply.status, reply.json["param"]) == (status, param)
    assert isinstance(reply.json["error"], str)


# ---- llama.cpp ----


def test_a_completion_of_llama_cpp_is_the_text_of_a_completion() -> None:
    asked = {"prompt": "the end", "seed": 5, "temperature": 0.7}
    plain = once("POST", "/v1/completions", {**asked, "max_tokens": 8}).json["choices"][0]["text"]
    whole = once("POST", "/completion", {**asked, "n_predict": 8, "cache_prompt": True, "id_slot": 0}).json
    assert (whole["content"], whole["stop"], whole["stop_type"]) == (plain, True, "limit")
    assert (whole["tokens_predicted"], whole["timings"]["predicted_n"], whole["seed"]) == (8, 8, 5)
    *parts, last = once("POST", "/completion", {**asked, "n_predict": 8, "stream": True}).events
    assert "".join(part["content"] for part in parts) == plain
    assert {part["stop"] for part in parts} == {False}
    assert (last["content"], last["stop"], last["tokens_evaluated"]) == ("", True, whole["tokens_evaluated"])
    stopped = once("POST", "/completion", {**asked, "n_predict": 8, "stop": ["zzz", plain[3]]}).json
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", plain[3])
    assert stopped["content"] == plain[: plain.index(plain[3])]
    full = once("POST", "/completion", {**asked, "n_predict": -1, "ignore_eos": True}).json
    assert once("POST", "/completion", {**asked, "ignore_eos": True}).json["content"] == full["content"]
    assert full["tokens_predicted"] > 100


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"n_predict": 0}, "n_predict"),
        ({"n": 2}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"grammar": 'root ::= "a"'}, "grammar"),
    ],
)
def test_wrong_completions_of_llama_cpp_are_named(fields: Any, param: str) -> None:
    reply = once("POST", "/completion", {"prompt": "the end", **fields})
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
