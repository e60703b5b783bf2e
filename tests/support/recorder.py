"""Record what a client asks a server, and the shape of what it is told.

    bitgen serve -m tiny --port 8080 &
    python tests/support/recorder.py http://127.0.0.1:8080 tests/data/clients/litellm.json \\
        python tests/data/clients/litellm_client.py

The client asks a proxy (BITGEN_URL); each exchange becomes an entry of the file. Of the headers only those
are kept that a server may look at, and no key. (A module of JavaScript has to be copied into the folder of
its packages first: node looks for them from where it lies.) tests/unit/test_serve_clients.py replays it.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEPT = ("accept", "content-type", "anthropic-version")
Shape = Any  # of JSON: the name of a type, a list with the shape of each item, or names with shapes


def shape_of(value: Any) -> Shape:
    """Types in the place of values; the items of a list that have the same shape are one."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in value.items()}
    if isinstance(value, list):
        return distinct(shape_of(each) for each in value)
    return "null" if value is None else "number" if type(value) in (int, float) else type(value).__name__


def distinct(shapes: Any) -> list[Shape]:
    """In the order in which they come for the first time."""
    found: list[Shape] = []
    for shape in shapes:
        if shape not in found:
            found.append(shape)
    return found


def answers_in(content: bytes) -> list[Any]:
    """The JSON of a body: one, that of each event, or that of each line."""
    text = content.decode()
    if text.startswith(("data: ", "event: ", ": ")):
        found = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
        return ["[DONE]" if line == "[DONE]" else json.loads(line) for line in found]
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line]


class Recorder(ThreadingHTTPServer):
    """A proxy before ``url`` that keeps what goes through it."""

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = urlsplit(url)
        self.exchanges: list[dict[str, Any]] = []


class _Handler(BaseHTTPRequestHandler):
    server: Recorder
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        address = self.server.address
        upstream = http.client.HTTPConnection(address.hostname or "", address.port)
        sent = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        upstream.request(self.command, self.path, body, sent)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        self.send_response(answer.status)
        for name in ("content-type", "x-should-retry", "retry-after"):
            if value := answer.getheader(name):
                self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        kept = {name: value for name in KEPT if (value := self.headers.get(name))}
        asked = {"method": self.command, "path": self.path, "headers": kept}
        answers = [shape_of(each) for each in answers_in(content)] if content else []
        found = {"status": answer.status, "answers": distinct(answers)}
        self.server.exchanges.append({**asked, "body": json.loads(body) if body else None, **found})

    do_GET = do_POST = do_HEAD = _pass_on  # noqa: N815 - the names of http.server


def main() -> None:
    url, path, *command = sys.argv[1:]
    with Recorder(url) as recorder:
        threading.Thread(target=recorder.serve_forever, daemon=True).start()
        mine = f"http://127.0.0.1:{recorder.server_address[1]}"
        done = subprocess.run(command, env={**os.environ, "BITGEN_URL": mine}, check=False)
        recorder.shutdown()
    if done.returncode:
        sys.exit(f"error: the client ended with {done.returncode}; nothing is written")
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in recorder.exchanges)
    Path(path).write_text(f"[\n{lines}\n]\n", "utf-8")
    print(f"{len(recorder.exchanges)} exchanges")


if __name__ == "__main__":
    main()
