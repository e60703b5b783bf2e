"""Requests made up from `/openapi.json`: whatever comes, the answer has the shape of one or of an error."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from libraries import built_library
from processes import Server

pytest.importorskip("uvicorn", reason="uvicorn is not installed (the extra serve)")
schemathesis: Any = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed (the extra clients)"
)
hypothesis: Any = pytest.importorskip("hypothesis", reason="hypothesis is not installed (the extra test)")
pytestmark = pytest.mark.slow

EXAMPLES = 15  # of each endpoint and mode
# What is hard to guess right: left out of every second body.
HARD = {
    "best_of",
    "echo",
    "json_schema",
    "logit_bias",
    "n",
    "response_format",
    "seed",
    "suffix",
    "tool_choice",
}
HARD |= {"max_completion_tokens", "prompt", "stop", "tools", "top_logprobs", "tokens"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    library: Path = built_library(tmp_path_factory)
    flags = ("--parallel", "4", "--max-tokens", "4", "--log-format", "none")
    with Server(library, tmp_path_factory.mktemp("home"), *flags) as server:
        yield server


def test_no_request_fails_otherwise_than_told(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 12
    statuses: Counter[int] = Counter()
    for operation in operations:
        modes = [schemathesis.GenerationMode.POSITIVE]
        if operation.method == "post":
            modes.append(schemathesis.GenerationMode.NEGATIVE)
        for mode in modes:
            statuses += asked(operation, mode, server.url)
    assert statuses[200] > 30, statuses
    assert statuses[400] > 30, statuses
    assert not [line for line in server.lines if "Traceback" in line or "failed" in line]


def asked(operation: Any, mode: Any, url: str) -> Counter[int]:
    """The statuses of what was made up."""
    statuses: Counter[int] = Counter()
    options = {"deadline": None, "database": None, "derandomize": True}
    checks = list(hypothesis.HealthCheck)

    @hypothesis.settings(max_examples=EXAMPLES, suppress_health_check=checks, **options)  # type: ignore[untyped-decorator]
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))  # type: ignore[untyped-decorator]
    def ask(case: Any) -> None:
        if sum(statuses.values()) % 2 and isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name not in HARD}
            case.body |= (
                {"prompt": "In"} if "completions" in operation.path else {"tokens": [5], "content": "a"}
            )
        reply = case.call(base_url=url)
        statuses[reply.status_code] += 1
        judge(reply)

    with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong about it
        ask()
    return statuses


def judge(reply: Any) -> None:
    assert reply.status_code not in (500, 502, 504), reply.content
    if reply.status_code < 400:
        return
    found = reply.json()["error"]
    if isinstance(found, str):  # as Ollama's clients read it
        assert "/api/" in reply.request.url
        found = {"message": found, **reply.json()}
    assert {"message", "type", "param", "code"} <= set(found)
    assert reply.status_code not in (429, 503) or "retry-after" in reply.headers
