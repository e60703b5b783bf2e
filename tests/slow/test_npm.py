"""openai for JavaScript talks with `bitgen serve`. BITGEN_NPM: a folder of `npm install openai@6`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from libraries import built_library
from processes import Server

pytest.importorskip("uvicorn", reason="uvicorn is not installed (the extra serve)")

SCRIPT = Path(__file__).parents[1] / "data" / "clients" / "openai.cjs"


def test_the_client_of_openai_for_javascript(tmp_path_factory: pytest.TempPathFactory) -> None:
    node, modules = shutil.which("node"), Path(os.environ.get("BITGEN_NPM", ""), "node_modules").absolute()
    if node is None or not (modules / "openai").is_dir():
        pytest.skip("node, or the folder BITGEN_NPM of `npm install openai@6`, is not there")
    with Server(built_library(tmp_path_factory), tmp_path_factory.mktemp("home")) as server:
        env = {**os.environ, "BITGEN_URL": server.url, "NODE_PATH": str(modules)}
        done = subprocess.run([node, str(SCRIPT)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    saw = json.loads(done.stdout)
    assert saw["whole"] == saw["streamed"]
    assert saw["whole"]
    assert saw["response"]
    assert saw["tokens"][0] == saw["tokens"][1] <= 12
    assert saw["refused"] == [400, "context_length_exceeded"]
    assert saw["models"] == ["tiny"]
