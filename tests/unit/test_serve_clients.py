"""What clients were seen to ask, replayed on a fake engine: the answers have all that these clients read.

tests/data/clients/*.json are recorded (tests/support/recorder.py), but for open_webui.json, which is written
after the source of Open WebUI.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from recorder import Shape, answers_in, distinct, shape_of
from serving import FakeEngine, once

FOLDER = Path(__file__).parents[1] / "data" / "clients"
FILES = sorted(FOLDER.glob("*.json"))


def exchanges() -> list[Any]:
    found = []
    for path in FILES:
        for number, each in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            found.append(pytest.param(each, id=f"{path.stem}-{number}"))
    return found


def lacks(shape: Shape, wanted: Shape) -> str | None:
    """Where an answer has less than ``wanted``, which may name fewer fields; None: nowhere."""
    if isinstance(wanted, dict):
        if not isinstance(shape, dict):
            return f" is {shape}"
        for name, each in wanted.items():
            if name not in shape:
                return f".{name} is missing"
            if (where := lacks(shape[name], each)) is not None:
                return f".{name}{where}"
        return None
    if isinstance(wanted, list):
        if not isinstance(shape, list):
            return f" is {shape}"
        missing = [each for each in wanted if not has(shape, each)]
        if not missing:
            return None
        return f"[]{lacks(shape[0], missing[0])}" if shape else "[] is empty"
    return None if shape == wanted else f" is {shape}, not {wanted}"


def has(shapes: list[Shape], wanted: Shape) -> bool:
    return any(lacks(shape, wanted) is None for shape in shapes)


@pytest.mark.parametrize("exchange", exchanges())
def test_an_answer_has_what_the_client_reads(exchange: Any) -> None:
    body = exchange["body"]
    grammar = body and (body.get("response_format") or body.get("tool_choice") == "required")
    if grammar and importlib.util.find_spec("llguidance") is None:
        pytest.skip("llguidance is not installed (the extra json)")
    headers = {"host": "localhost:8080", **exchange["headers"]}
    engine = FakeEngine(context=512)
    engine.config = replace(engine.config, architecture="bitnet-b1.58")  # a name of a field of /api/show
    reply = once(exchange["method"], exchange["path"], body, headers, engine=engine, names=("tiny",))
    assert reply.status == exchange["status"], reply.content
    shapes = distinct(shape_of(each) for each in answers_in(reply.content))
    for wanted in exchange["answers"]:
        assert has(shapes, wanted), [lacks(shape, wanted) for shape in shapes]


def test_what_is_lacking_is_found() -> None:
    given = shape_of({"choices": [{"delta": {"content": "a"}}], "usage": None})
    assert lacks(given, {"choices": [{"delta": {"content": "str"}}]}) is None
    assert lacks(given, {"choices": [{"delta": {"role": "str"}}]}) == ".choices[].delta.role is missing"
    assert lacks(given, {"usage": {"total": "number"}}) == ".usage is null"
    assert lacks(given, {"usage": "number"}) == ".usage is null, not number"
    assert lacks(shape_of({"data": []}), {"data": [{"id": "str"}]}) == ".data[] is empty"


def test_the_page_configures_what_was_asked() -> None:
    page = (FOLDER.parents[2] / "docs" / "guide" / "clients.md").read_text(encoding="utf-8")
    paths = {path.stem: {e["path"] for e in json.loads(path.read_text(encoding="utf-8"))} for path in FILES}
    config = re.search(r"## Continue\n.*?```yaml\n(.*?)```", page, re.DOTALL)
    assert config
    (model,) = yaml.safe_load(config[1])["models"]
    script = (FOLDER / "continue.mjs").read_text(encoding="utf-8")
    assert f'provider: "{model["provider"]}"' in script
    assert model["model"] == "tiny"
    assert urlsplit(model["apiBase"]).path + "/chat/completions" in paths["continue"]
    urls = dict(re.findall(r"^(\w+_BASE_URL)=(\S+) .*open-webui serve$", page, re.MULTILINE))
    assert urlsplit(urls["OPENAI_API_BASE_URL"]).path + "/models" in paths["open_webui"]
    assert urlsplit(urls["OLLAMA_BASE_URL"]).path + "/api/tags" in paths["open_webui"]


def test_nothing_that_was_recorded_is_private() -> None:
    assert {path.stem for path in FILES} == {"continue", "litellm", "open_webui"}
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?i)authorization|api-key|bearer|user-agent|/(home|work|root|tmp)/", text), (
            path.name
        )
