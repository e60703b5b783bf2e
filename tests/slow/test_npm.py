"""openai and Continue for JavaScript talk with `bitgen serve`.

BITGEN_NPM: a folder of `npm install openai@6 @continuedev/openai-adapters`, or of one of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from libraries import built_library
from processes import Server

pytest.importorskip("uvicorn", reason="uvicorn is not installed (the extra serve)")

CLIENTS = Path(__file__).parents[1] / "data" / "clients"
SCRIPT = CLIENTS / "openai.cjs"

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "clients.md"


def test_the_client_of_openai_for_javascript(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    node, modules = shutil.which("node"), Path(os.environ.get("BITGEN_NPM", ""), "node_modules").absolute()
    if node is None or not (modules / "openai").is_dir():
        pytest.skip("node, or the folder BITGEN_NPM of `npm install openai@6`, is not there")
    code = re.search(r"```js\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code
    with Server(built_library(tmp_path_factory), tmp_path_factory.mktemp("home")) as server:
        env = {**os.environ, "BITGEN_URL": server.url, "NODE_PATH": str(modules)}
        (tmp_path / "page.cjs").write_text(code[1].replace("http://127.0.0.1:8080", server.url))
        done, page = (
            subprocess.run([node, str(script)], env=env, capture_output=True, text=True, check=False)
            for script in (SCRIPT, tmp_path / "page.cjs")
        )
    assert (done.returncode, page.returncode) == (0, 0), done.stderr + page.stderr
    assert len(page.stdout) > 10
    saw = json.loads(done.stdout)
    assert saw["whole"] == saw["streamed"]
    assert saw["whole"]
    assert saw["response"]
    assert saw["tokens"][0] == saw["tokens"][1] <= 12
    assert saw["refused"] == [400, "context_length_exceeded"]
    assert saw["models"] == ["tiny"]


def test_continue_asks_as_it_was_recorded(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    node, modules = shutil.which("node"), Path(os.environ.get("BITGEN_NPM", ""), "node_modules").absolute()
    if node is None or not (modules / "@continuedev" / "openai-adapters").is_dir():
        pytest.skip("node, or the folder BITGEN_NPM with @continuedev/openai-adapters, is not there")
    (tmp_path / "node_modules").symlink_to(modules)
    shutil.copy(CLIENTS / "continue.mjs", tmp_path)
    with Server(built_library(tmp_path_factory), tmp_path_factory.mktemp("home")) as server:
        env = {**os.environ, "BITGEN_URL": server.url}
        command = [node, str(tmp_path / "continue.mjs")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout.splitlines()[-1])  # the packages of the adapter may print before
    assert saw["whole"] == saw["streamed"]
    assert saw["text"] == saw["completed"]
    assert saw["tokens"][0] == saw["tokens"][1] <= 12
    assert (saw["refused"], saw["models"]) == (501, ["tiny"])
