"""Models by name: from a stand-in of the hub, and from the folders of other programs."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bitgen.cli import main
from bitgen.errors import BitgenError, FileError, UsageError
from bitgen.formats import downloads
from bitgen.formats.downloads import HubName, find_download
from bitgen.formats.open import open_model
from bitgen.paths import models_dir

TINY = models_dir() / "tiny.gguf"
COMMIT = "a" * 40


@dataclass
class Hub:
    """What the hub's API answers with, and what it was asked for."""

    files: dict[str, bytes]
    commit: str = COMMIT
    cut: int = 0  # bytes after which the next download breaks off
    lie: str = ""  # another sum than the file has
    private: bool = False
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    tokens: set[str] = field(default_factory=set)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (the extra hub)")
    state = Hub({"tiny.gguf": TINY.read_bytes(), "README.md": b"read me"})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            state.asked.append((self.command, self.path, self.headers.get("Range") or ""))
            state.tokens.add(self.headers.get("Authorization") or "")
            path = self.path.partition("?")[0]
            if state.private and not self.headers.get("Authorization"):
                return self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
            if path.startswith("/api/models/owner/repo"):
                siblings = [{"rfilename": name} for name in state.files]
                info = {"id": "owner/repo", "sha": state.commit, "siblings": siblings}
                return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            prefix = f"/owner/repo/resolve/{state.commit}/"
            name = path.removeprefix(prefix)
            if not path.startswith(prefix) or name not in state.files:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            data = state.files[name]
            etag = state.lie or hashlib.sha256(data).hexdigest()
            headers = {"X-Repo-Commit": state.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            first = int((self.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            return self.send(206 if first else 200, data[first:], headers)

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                cut, state.cut = state.cut if len(body) > 1000 else 0, 0 if len(body) > 1000 else state.cut
                self.wfile.write(body[:cut] if cut else body)
                if cut:
                    self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_model_is_pulled_once_and_stays_what_it_is(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "hf:owner/repo"]) == 0
    out, err = capsys.readouterr()
    path = Path(out.strip())
    assert path.read_bytes() == TINY.read_bytes()
    assert COMMIT in err
    asked = len(hub.asked)
    for name in ("hf:owner/repo", "hf:owner/repo:tiny.gguf", f"hf:owner/repo@{COMMIT}"):
        assert open_model(name).config == open_model(TINY).config
    assert len(hub.asked) == asked  # no network
    hub.commit = "b" * 40
    hub.files["tiny.gguf"] += bytes(64)
    assert find_download("hf:owner/repo").stat().st_size == TINY.stat().st_size
    downloads.pull(HubName.parse("hf:owner/repo"))
    assert find_download("hf:owner/repo").stat().st_size == TINY.stat().st_size + 64
    assert find_download(f"hf:owner/repo@{COMMIT}").stat().st_size == TINY.stat().st_size
    assert main(["list", "-o", "json"]) == 0
    listed = {row["name"]: row["runs"] for row in json.loads(capsys.readouterr().out)["models"]}
    assert listed["hf:owner/repo:tiny.gguf"] == listed["tiny"] == "yes"


def test_a_name_that_is_not_there_is_pulled_and_a_broken_download_goes_on(hub: Hub) -> None:
    hub.files["tiny.gguf"] += bytes(24 << 20)  # it is written in parts of 10 MiB
    hub.cut = 15 << 20
    assert find_download("hf:owner/repo:tiny.gguf").read_bytes() == hub.files["tiny.gguf"]
    ranges = [asked for method, path, asked in hub.asked if method == "GET" and path.endswith("tiny.gguf")]
    assert len(ranges) == 2
    assert 0 < int(ranges[1].removeprefix("bytes=").partition("-")[0]) <= 15 << 20


def test_a_file_with_another_sum_is_deleted(hub: Hub) -> None:
    hub.lie = "c" * 64
    with pytest.raises(FileError, match="SHA-256"):
        find_download("hf:owner/repo")
    hub.lie = ""
    assert find_download("hf:owner/repo").read_bytes() == TINY.read_bytes()


def test_a_token_is_sent_and_its_absence_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private = True
    with pytest.raises(FileError, match="cannot pull hf:owner/repo"):
        find_download("hf:owner/repo")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert find_download("hf:owner/repo").is_file()
    assert "Bearer hf_secret" in hub.tokens


def test_a_folder_of_safetensors_comes_whole(hub: Hub) -> None:
    wanted = ["added_tokens.json", "config.json", "model.safetensors", "tokenizer.model"]
    hub.files = dict.fromkeys([*wanted, "a.png", "consolidated.safetensors"], b"x")
    folder = find_download("hf:owner/repo")
    assert sorted(file.name for file in folder.iterdir()) == wanted


def test_a_file_whose_bytes_were_deleted_does_not_end_the_list(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = home / ".cache" / "huggingface" / "hub" / "models--a--b" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(home / "gone")
    assert main(["list", "-o", "json"]) == 0
    assert "tiny" in capsys.readouterr().out


def test_what_the_hub_cannot_give_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"a.gguf": b"1", "b.gguf": b"2"}
    with pytest.raises(
        UsageError, match=r"hf:owner/repo has 2 \.gguf files, name one: hf:owner/repo:a\.gguf"
    ):
        find_download("hf:owner/repo")
    hub.files = {"README.md": b""}
    with pytest.raises(FileError, match="holds no model that bitgen reads"):
        find_download("hf:owner/repo")
    with pytest.raises(FileError, match="cannot pull hf:owner/other"):
        find_download("hf:owner/other")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileError, match="cannot pull"):
        find_download("hf:owner/repo")


@pytest.mark.parametrize("name", ["hf:repo", "hf:a/b:c:d", "hf:a/b:../../x", "ollama:", "lmstudio:a"])
def test_wrong_names_are_named(name: str) -> None:
    with pytest.raises(UsageError, match="is no"):
        find_download(name)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HF_HOME", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_models_of_other_programs_are_found_by_name(home: Path) -> None:
    studio = home / ".lmstudio" / "models" / "owner" / "repo"
    studio.mkdir(parents=True)
    shutil.copy(TINY, studio / "tiny.gguf")
    root = home / ".ollama" / "models"
    layers = [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:abc"}]
    for path, text in (
        ("registry.ollama.ai/library/bit/latest", json.dumps({"layers": layers})),
        ("registry.ollama.ai/me/bit/2b", json.dumps({"layers": layers})),
        ("registry.ollama.ai/library/broken/latest", "{"),
    ):
        (root / "manifests" / path).parent.mkdir(parents=True)
        (root / "manifests" / path).write_text(text)
    (root / "blobs").mkdir()
    shutil.copy(TINY, root / "blobs" / "sha256-abc")
    names = [each.name for each in downloads.downloads()]
    assert names == ["lmstudio:owner/repo:tiny.gguf", "ollama:bit:latest", "ollama:me/bit:2b"]
    for name in (*names, "ollama:bit", "lmstudio:owner/repo"):
        assert open_model(name).config == open_model(TINY).config
    with pytest.raises(FileError, match="`bitgen list` shows what is"):
        find_download("ollama:other")


def test_without_huggingface_hub_a_name_that_is_not_there_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert home
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(BitgenError, match=r"pip install 'bitgen\[hub\]'"):
        find_download("hf:owner/repo")
