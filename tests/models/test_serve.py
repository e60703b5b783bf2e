"""`bitgen serve -m tiny` as a process: foreign clients, load, signals, and what goes wrong at the start."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from libraries import built_library
from processes import Server

from bitgen.inference.sampling import log_softmax_at
from bitgen.llm import LLM

httpx = pytest.importorskip("httpx", reason="httpx is not installed (the extra test)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (the extra serve)")
pytestmark = pytest.mark.slow

# Certificates of authorities, which plain HTTP does not need, take 27 ms of the processor to read.
Client = partial(httpx.Client, verify=False, timeout=60)
get, post, stream = (
    partial(call, verify=False, timeout=60) for call in (httpx.get, httpx.post, httpx.stream)
)

PAGES = Path(__file__).parents[2] / "docs" / "guide"
GUIDE = (PAGES / "serving.md").read_text(encoding="utf-8")
CLIENTS = (PAGES / "clients.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"  # of the guide
SOAK_S = int(os.environ.get("BITGEN_TEST_SOAK", "20"))  # a minute in .ci/run
PAUSE_S = 1.0  # of a client that thinks, each second time: the soak leaves a processor to other tests
ASK: dict[str, Any] = {"prompt": "In the beginning", "max_tokens": 40, "seed": 7}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_library(tmp_path_factory)


@pytest.fixture(scope="module")
def server(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Memory for two whole texts: what is parked is given up, and long texts wait for each other.
    flags = ("--parallel", "4", "--kv-memory", "1.1")
    with Server(library, tmp_path_factory.mktemp("home"), *flags) as server:
        yield server


def text_of(url: str, body: dict[str, Any], http: Any = None) -> str:
    reply = (http.post if http else post)(f"{url}/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    if not body.get("stream"):
        return str(reply.json()["choices"][0]["text"])
    events = [line[6:] for line in reply.text.split("\n\n") if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_it_says_what_the_engine_says(server: Server, library: Path, bitgen_home: Path) -> None:
    assert bitgen_home
    with LLM("tiny", library=library, threads=1) as llm:
        expected = "".join(llm.generate("In the beginning", max_tokens=40, seed=7))
        ids = llm.tokenizer.encode("In the beginning God")
        scores = [log_softmax_at(row, ids[i + 1]) for i, row in enumerate(llm.logits(ids[:-1]))]
    assert text_of(server.url, ASK) == text_of(server.url, {**ASK, "stream": True}) == expected
    # As lm-eval asks: token ids, and the log-probabilities of the prompt beside that of one more token.
    body = {"prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choice = post(f"{server.url}/v1/completions", json=body).json()["choices"][0]
    assert choice["logprobs"]["token_logprobs"][:-1] == [None, *scores]


@pytest.mark.parametrize("seconds", [SOAK_S, pytest.param(600, marks=pytest.mark.deep)])
def test_the_soak_has_no_wrong_byte(server: Server, seconds: float) -> None:
    """Eight connections, seeded, some of which leave: every text is the one its request gets alone."""
    rng = random.Random(3)
    starts = ["In the beginning", "And Moses said unto", "The king of Israel", "In the beginning " * 60]
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    schemas = [None, None, schema] if importlib.util.find_spec("llguidance") else [None]
    bodies = [
        {
            "prompt": rng.choice(starts),
            "max_tokens": rng.choice([1, 8, 40]),
            "seed": rng.randint(0, 2),
            "temperature": rng.choice([0, 1.0]),
            "frequency_penalty": rng.choice([0, 1.5]),
            "logprobs": rng.choice([None, None, 2]),
            "json_schema": rng.choice(schemas),
            "stream": rng.random() < 0.5,
            "lookup": rng.random() < 0.3,
        }
        for _ in range(150)
    ]
    keys = [json.dumps({**body, "stream": False, "lookup": False}) for body in bodies]
    alone = {key: text_of(server.url, json.loads(key)) for key in dict.fromkeys(keys)}

    def ask(http: Any, i: int) -> bool:
        if i % 5 == 0:
            body = {**bodies[i], "stream": True, "max_tokens": 200}
            with http.stream("POST", f"{server.url}/v1/completions", json=body) as reply:
                next(reply.iter_bytes(), b"")
            return True
        return text_of(server.url, bodies[i], http) == alone[keys[i]]

    def client(number: int) -> int:
        """One that thinks now and then; each second one opens a connection for each of its requests."""
        picks, count = random.Random(number), 0
        with Client(limits=httpx.Limits(max_keepalive_connections=number % 2)) as http:
            while time.monotonic() < end:
                assert ask(http, picks.randrange(len(bodies)))
                count += 1
                time.sleep(picks.choice((0, PAUSE_S) if seconds <= 60 else (0, 0, 0, 0, PAUSE_S)))
        return count

    held = []
    with ThreadPoolExecutor(8) as pool:
        for part in (seconds / 3, 2 * seconds / 3):  # until all is warm, and after
            end = time.monotonic() + part
            counts = list(pool.map(client, range(8)))
            assert min(counts) > 0
            assert idle(server.url)
            held.append(holds(server.process.pid))
            print(f"{sum(counts)} requests in {part:.0f} s, then {said(held[-1])}")
    (files, memory), (files_after, memory_after) = held
    assert files_after <= files + 8  # connections that were kept alive close within seconds
    assert memory_after < memory + (32 << 20)


def holds(pid: int) -> tuple[int, int]:
    """Open files of a process, and bytes of its memory; nothing where there is no /proc."""
    process = Path(f"/proc/{pid}")
    if not process.exists():
        return 0, 0
    resident = re.search(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
    return len(list((process / "fd").iterdir())), 1024 * int(resident[1]) if resident else 0


def said(held: tuple[int, int]) -> str:
    return f"{held[0]} open files and {held[1] / 2**20:.1f} MiB"


def idle(url: str) -> bool:
    for _ in range(200):
        lines = get(f"{url}/metrics").text.splitlines()
        if {"bitgen_requests_running 0.0", "bitgen_requests_waiting 0.0"} <= set(lines):
            return True
        time.sleep(0.02)
    return False


@pytest.mark.deep
def test_ten_thousand_requests_leave_nothing(server: Server) -> None:
    """Short ones, of which each fifth leaves: after all as many open files as after a thousand."""

    def client(number: int, count: int) -> None:
        with Client(base_url=server.url) as http:
            for i in range(count):
                body = {"prompt": f"In the {number} {i}", "max_tokens": 1 + i % 3, "seed": i}
                if i % 5:
                    assert http.post("/v1/completions", json=body).status_code == 200
                    continue
                with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
                    next(reply.iter_bytes(), b"")

    held = []
    for count in (1_000, 9_000):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(client, range(8), [count // 8] * 8))
        assert idle(server.url)
        time.sleep(6)  # connections that nobody uses are closed after 5 s
        held.append(holds(server.process.pid))
        print(f"{count} requests, then {said(held[-1])}")
    (files, memory), (files_after, memory_after) = held
    assert files_after <= files
    assert memory_after < memory + (16 << 20)


def test_a_client_that_leaves_frees_its_slot(server: Server) -> None:
    body = {**ASK, "max_tokens": 400, "ignore_eos": True}
    for _ in range(6):
        with pytest.raises(httpx.ReadTimeout):
            post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.02))
    assert idle(server.url)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_lines_of_the_guide_run(server: Server) -> None:
    lines = [line for line in GUIDE.splitlines() if line.startswith("curl ")]
    assert len(lines) >= 8
    for line in lines:
        command = shlex.split(line.replace(ADDRESS, server.url))
        done = subprocess.run([*command, "--fail-with-body"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        assert done.stdout


def test_the_python_lines_of_the_guide_run(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="openai is not installed (the extra clients)")
    code = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    assert code
    exec(code[1].replace(ADDRESS, server.url), {})  # noqa: S102
    assert len(capsys.readouterr().out) > 20


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", CLIENTS, re.DOTALL))
def test_the_page_of_clients_runs(server: Server, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    package = code.split()[1].partition(".")[0]
    pytest.importorskip(package, reason=f"{package} is not installed")
    exec(code.replace(ADDRESS, server.url), {})  # noqa: S102
    assert len(capsys.readouterr().out) > 10


@pytest.mark.skipif(shutil.which("llm") is None, reason="llm is not installed")
def test_llm_asks_as_the_page_says(server: Server, tmp_path: Path) -> None:
    entry = re.search(r"```yaml\n(.*?)```", CLIENTS, re.DOTALL)
    command = re.search(r"^llm .*$", CLIENTS, re.MULTILINE)
    assert entry
    assert command
    (tmp_path / "extra-openai-models.yaml").write_text(entry[1].replace(ADDRESS, server.url))
    env = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run(shlex.split(command[0]), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 5


def test_the_client_of_openai(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed (the extra clients)")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    messages = [{"role": "user", "content": "Who was Moses?"}]
    whole = client.chat.completions.create(model="x", messages=messages, max_tokens=12, seed=1, n=2)
    assert len({choice.message.content for choice in whole.choices}) == 2
    assert whole.usage.completion_tokens == sum(c.finish_reason == "length" for c in whole.choices) * 12 or (
        whole.usage.completion_tokens < 24
    )
    parts = list(
        client.chat.completions.create(
            model="x",
            messages=messages,
            max_tokens=12,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    scored = client.completions.create(model="x", prompt="In the", max_tokens=1, logprobs=2, echo=True)
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    schema: dict[str, Any] = {"type": "object", "properties": {"to": {"type": "integer"}}}
    schema |= {"required": ["to"], "additionalProperties": False}
    if importlib.util.find_spec("llguidance"):
        tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
        options = {"model": "x", "messages": messages, "tools": [tool], "tool_choice": "required", "seed": 1}
        called = client.chat.completions.create(**options).choices[0].message.tool_calls[0].function
        assert list(json.loads(called.arguments)) == ["to"]
        streamed = [part.choices[0].delta for part in client.chat.completions.create(**options, stream=True)]
        (call,) = [call for delta in streamed for call in delta.tool_calls or ()]
        assert (call.function.name, call.function.arguments) == ("count", called.arguments)
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="x", prompt="the " * 600)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="x", prompt="a", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.APIStatusError) as missing:
        client.embeddings.create(model="x", input="a")
    assert missing.value.status_code == 501


def test_the_client_of_litellm(server: Server) -> None:
    """The script that was recorded (tests/unit/test_serve_clients.py replays that without litellm)."""
    if importlib.util.find_spec("litellm") is None:
        pytest.skip("litellm is not installed")
    env = {**os.environ, "BITGEN_URL": server.url}
    script = PAGES.parents[1] / "tests" / "data" / "clients" / "litellm_client.py"
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert saw["whole"] == saw["streamed"] == saw["ollama"] == saw["ollama streamed"]
    assert saw["anthropic"] == saw["anthropic streamed"]
    assert json.loads(saw["object"])["to"] <= 9
    assert saw["call"][0] == "count"
    assert saw["refused"][:2] == ["ContextWindowExceededError", "BadRequestError"]


def test_the_client_of_openai_for_responses(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed (the extra clients)")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    options = {"model": "x", "input": "Who was Moses?", "max_output_tokens": 12, "extra_body": {"seed": 1}}
    whole = client.responses.create(**options)
    assert whole.output_text
    assert whole.usage.output_tokens <= 12
    with client.responses.stream(**options) as stream:
        *parts, last = stream
    text = "".join(part.delta for part in parts if part.type == "response.output_text.delta")
    assert text == last.response.output_text == whole.output_text
    assert last.type == f"response.{whole.status}"


def test_the_client_of_anthropic(server: Server) -> None:
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed (the extra clients)")
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    options = {"model": "x", "messages": [{"role": "user", "content": "Who was Moses?"}], "max_tokens": 12}
    whole = client.messages.create(**options, extra_body={"seed": 1})
    with client.messages.stream(**options, extra_body={"seed": 1}) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text
    assert (last.stop_reason, last.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    counted = client.messages.count_tokens(model="x", messages=options["messages"])
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(**{**options, "messages": [{"role": "user", "content": "the " * 600}]})


def test_the_client_of_ollama(server: Server) -> None:
    ollama = pytest.importorskip("ollama", reason="ollama is not installed (the extra clients)")
    client = ollama.Client(host=server.url)
    assert [model.model for model in client.list().models] == ["tiny:latest"]
    talk, options = [{"role": "user", "content": "Who was Moses?"}], {"num_predict": 12, "seed": 1}
    whole = client.chat("tiny", messages=talk, options=options)
    parts = list(client.chat("tiny", messages=talk, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert parts[-1].eval_count == whole.eval_count
    assert client.generate("tiny", "Who was Moses?", options=options).response == whole.message.content
    assert client.show("tiny").modelinfo
    with pytest.raises(ollama.ResponseError, match="makes no embeddings"):
        client.embed("tiny", "a")


def test_the_page_runs_in_a_browser(server: Server, tmp_path: Path) -> None:
    """Its script is allowed by its own policy, and asks the server for the model's name."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    flags += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000", "--dump-dom", f"{server.url}/"]
    done = subprocess.run([browser, *flags], capture_output=True, text=True, check=False, timeout=120)
    assert '<h1 id="title">tiny</h1>' in done.stdout, done.stderr
    assert "<option" in done.stdout
    assert len(get(f"{server.url}/").content) < 40_000


# ---- The end ----


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_lets_texts_end(library: Path, tmp_path: Path, signum: int, code: int) -> None:
    with Server(library, tmp_path) as server:
        expected = text_of(server.url, {**ASK, "max_tokens": 400})
        body = {**ASK, "max_tokens": 400, "stream": True}
        with stream("POST", f"{server.url}/v1/completions", json=body) as reply:
            parts = reply.iter_text()
            text = next(parts)
            server.send(signum)
            server.wait_for("shutting down")
            with contextlib.suppress(httpx.ConnectError):  # the text may have ended, and with it the server
                assert post(f"{server.url}/v1/completions", json=ASK).status_code == 503
            text += "".join(parts)
        events = [line[6:] for line in text.split("\n\n") if line.startswith("data: ")]
        assert events.pop() == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == expected
        assert server.ended() == code
        assert not [line for line in server.lines if "Traceback" in line]


def test_it_ends_where_nobody_reads_what_it_says(library: Path, tmp_path: Path) -> None:
    """What started it is gone, and with it the other end of its standard error."""
    with Server(library, tmp_path, "--log-format", "json") as server:
        server.stop_reading()
        assert text_of(server.url, ASK) == text_of(server.url, ASK)
        server.send(signal.SIGTERM)
        assert server.ended() == 0


def test_prompts_outlive_the_process(library: Path, tmp_path: Path) -> None:
    body, flags = {**ASK, "prompt": "In the beginning " * 40}, ("--cache-file", str(tmp_path / "prompts"))
    answers = []
    for _ in range(2):
        with Server(library, tmp_path, *flags) as server:
            answers.append(post(f"{server.url}/v1/completions", json=body).json())
            server.send(signal.SIGTERM)
            assert server.ended() == 0
            assert server.wait_for("tokens of prompts and texts in")
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in answers]
    assert cached == [0, answers[1]["usage"]["prompt_tokens"] - 1]


def test_what_is_not_done_in_time_is_told(library: Path, tmp_path: Path) -> None:
    with Server(library, tmp_path, "--drain", "0") as server:
        body = {**ASK, "max_tokens": 480, "ignore_eos": True, "stream": True}
        with stream("POST", f"{server.url}/v1/completions", json=body) as reply:
            parts = reply.iter_text()
            text = next(parts)
            server.send(signal.SIGTERM)
            text += "".join(parts)
        assert text.endswith("data: [DONE]\n\n")
        assert '"code":"shutdown"' in text
        assert server.ended() == 0


def test_the_second_signal_ends_at_once(library: Path, tmp_path: Path) -> None:
    with Server(library, tmp_path) as server:
        body = {**ASK, "max_tokens": 480, "ignore_eos": True, "stream": True}
        many = {**body, "n": 4}
        with stream("POST", f"{server.url}/v1/completions", json=many) as reply:
            parts = reply.iter_text()
            text = next(parts)
            server.send(signal.SIGTERM)
            server.wait_for("shutting down")
            server.send(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                text += "".join(parts)
        assert server.ended(5) == 128 + signal.SIGTERM
        assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (["-m", "no-such.gguf"], "no-such.gguf", 5),
        (["-m", "tiny", "--host", "0.0.0.0"], "give --api-key-file, or --insecure", 2),  # noqa: S104
        (["-m", "tiny", "--api-key-file", "nothing"], "cannot read nothing", 5),
        (["-m", "tiny", "--parallel", "65"], "--parallel must be 1 to 64", 2),
        (["-m", "tiny", "--max-tokens", "0"], "--max-tokens must be 1 or more", 2),
        (["-m", "tiny", "--port", "70000"], "--port must be 0 to 65535", 2),
    ],
)
def test_what_is_wrong_at_the_start_is_one_line(
    flags: list[str], message: str, code: int, bitgen_home: Path
) -> None:
    assert bitgen_home
    command = [sys.executable, "-m", "bitgen", "serve", "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_a_busy_port_names_the_process_that_has_it(server: Server, bitgen_home: Path) -> None:
    assert bitgen_home
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "bitgen", "serve", "-m", "tiny", "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"(process {server.process.pid})" in done.stderr
    assert done.stderr.count("\n") == 1
