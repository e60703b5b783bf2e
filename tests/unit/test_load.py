"""`bitgen bench --url` against a stand-in of a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bitgen.cli import main
from bitgen.errors import BitgenError, UsageError
from bitgen.serve.load import Load, percentile, run_load


@pytest.fixture
def server() -> Iterator[tuple[str, list[Any]]]:
    """A URL, and the bodies that it is asked for; prompts of 13 tokens are refused, those of 17 break off."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            self.whole(200, {"data": [{"id": "some"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["key"] = self.headers.get("Authorization")
            bodies.append(body)
            if len(body["prompt"]) == 13:
                return self.whole(429, {"error": {"message": "the queue is full"}})
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            events: list[Any] = [{"choices": [{"text": ""}], "usage": None}]
            events += [{"choices": [{"text": "a"}], "usage": None}] * body["max_tokens"]
            if len(body["prompt"]) == 17:
                events += [{"error": {"message": "broken"}}]
            events += [
                {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}}
            ]
            sent = ": ping\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events)
            sent += "data: [DONE]\n\n"
            for at in range(0, len(sent), 11):  # lines are cut anywhere
                part = sent[at : at + 11].encode()
                self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            self.wfile.write(b"0\r\n\r\n")
            return None

        def whole(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", bodies
    server.shutdown()
    server.server_close()
    thread.join()


def test_each_answer_has_a_first_token_and_gaps(server: tuple[str, list[Any]]) -> None:
    url, bodies = server
    timed = run_load(Load(url, clients=3, requests=2, prompt=7, tokens=5, key="k"))
    assert (len(timed.firsts), len(timed.gaps), timed.tokens, timed.prompt_tokens) == (6, 24, 30, 42)
    assert 0 < min(timed.firsts) <= max(timed.firsts) < timed.seconds
    assert len({tuple(body["prompt"]) for body in bodies}) == 6
    assert {(body["model"], body["key"]) for body in bodies} == {("some", "Bearer k")}


def test_prompts_start_alike_as_far_as_they_are_to() -> None:
    load = Load("", clients=2, requests=2, prompt=9, tokens=1, shared=6)
    first, second = (list(load.prompts(client)) for client in (0, 1))
    assert len({tuple(prompt) for prompt in first + second}) == 4
    assert {tuple(prompt[:6]) for prompt in first + second} == {tuple(first[0][:6])}
    assert first == list(load.prompts(0))
    assert next(replace(load, seed=1).prompts(0))[:6] != first[0][:6]


def test_the_table_has_a_row_for_each_load(
    server: tuple[str, list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["bench", "--url", server[0], "-b", "1,2", "-p", "4", "-n", "3", "-r", "1", "-o", "json"]) == 0
    )
    rows = json.loads(capsys.readouterr().out)["server"]
    assert [row["clients"] for row in rows] == [1, 2]
    assert all(row["inter_ms_p50"] <= row["inter_ms_p99"] for row in rows)


def test_what_is_wrong_with_a_server_is_one_line(server: tuple[str, list[Any]]) -> None:
    url = server[0]
    for prompt, said in ((13, r"answers 429: .*the queue is full"), (17, "broken")):
        with pytest.raises(BitgenError, match=said):
            run_load(Load(url, clients=2, requests=1, prompt=prompt, tokens=2))
    with pytest.raises(BitgenError, match=r"cannot reach http://127\.0\.0\.1:9"):
        run_load(Load("http://127.0.0.1:9", 1, 1, 1, 1))
    with pytest.raises(UsageError, match="--url is http://HOST:PORT"):
        run_load(Load("localhost", 1, 1, 1, 1))


def test_percentiles_are_of_the_values() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99)] == [50, 95, 99]
    assert percentile([3.0], 0.5) == 3
    assert percentile([], 0.5) is None
