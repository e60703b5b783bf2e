"""openai for JavaScript talks with `bitgen serve`. BITGEN_NPM: a folder of `npm install openai@6`."""

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

SCRIPT = Path(__file__).parents[1] / "data" / "clients" / "openai.cjs"


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
