"""litellm against a server (BITGEN_URL), in the three dialects that it speaks; says what it saw as JSON."""

import importlib
import json
import os
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # nothing from the network
litellm: Any = importlib.import_module("litellm")
litellm.num_retries = 0
litellm.suppress_debug_info = True
URL = os.environ["BITGEN_URL"]
OPENAI = {"model": "openai/tiny", "api_base": f"{URL}/v1", "api_key": "none"}
MESSAGES = [{"role": "user", "content": "Who was Moses?"}]
SMALL = {"max_tokens": 12, "seed": 1}
PARAMETERS = {
    "type": "object",
    "properties": {"to": {"type": "integer", "maximum": 9}},
    "required": ["to"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "count", "description": "Count", "parameters": PARAMETERS}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "age", "schema": PARAMETERS, "strict": True}}


def streamed(**options: object) -> str:
    parts = litellm.completion(**options, stream=True)
    return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)


def refused(call: Callable[..., object], **options: object) -> str:
    try:
        call(**options)
    except Exception as error:
        return type(error).__name__
    return "not refused"


def main() -> None:
    whole = litellm.completion(**OPENAI, messages=MESSAGES, **SMALL)
    calls = litellm.completion(**OPENAI, messages=MESSAGES, tools=[TOOL], tool_choice="required", seed=1)
    call = calls.choices[0].message.tool_calls[0]
    told = [
        *MESSAGES,
        calls.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    object_ = litellm.completion(**OPENAI, messages=MESSAGES, response_format=SCHEMA, seed=1)
    plain = {**OPENAI, "model": "text-completion-openai/tiny", "prompt": "In the", **SMALL}
    text = litellm.text_completion(**plain)
    usage = {"stream_options": {"include_usage": True}}
    ollama = {"model": "ollama_chat/tiny", "api_base": URL, "messages": MESSAGES, **SMALL}
    anthropic: dict[str, Any] = {
        "model": "anthropic/tiny",
        "api_base": URL,
        "api_key": "none",
        "messages": MESSAGES,
    }
    anthropic |= {"max_tokens": 12, "temperature": 0}  # it has no seed
    long = [{"role": "user", "content": "the " * 600}]
    saw = {
        "whole": whole.choices[0].message.content,
        "streamed": streamed(**OPENAI, messages=MESSAGES, **SMALL, **usage),
        "call": [call.function.name, call.function.arguments],
        "after the call": bool(litellm.completion(**OPENAI, messages=told, tools=[TOOL], **SMALL).choices),
        "object": object_.choices[0].message.content,
        "text": text.choices[0].text,
        "ollama": litellm.completion(**ollama).choices[0].message.content,
        "ollama streamed": streamed(**ollama),
        "anthropic": litellm.completion(**anthropic).choices[0].message.content,
        "anthropic streamed": streamed(**anthropic),
        "refused": [
            refused(litellm.completion, **OPENAI, messages=long),
            refused(litellm.completion, **OPENAI, messages=MESSAGES, temperature=-1),
            refused(litellm.embedding, **OPENAI, input=["a"]),
        ],
    }
    print(json.dumps(saw))


main()
