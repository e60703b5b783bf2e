"""The examples of the Python API do what they say; test_documented_code.py runs those of C."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "python"
LINES = 8  # beside imports, comments and blank lines


def run(name: str, *arguments: str, home: Path) -> str:
    """What an example prints; nothing goes wrong, and nothing is written elsewhere than in ``home``."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env={**os.environ, "BITGEN_HOME": str(home), "PYTHONPATH": str(ROOT)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=1200,  # it compiles a library, and a loaded machine is slow, not wrong
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_it_is_short_and_says_what_it_does(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    code = re.sub(r'^""".*?"""', "", text, flags=re.DOTALL).splitlines()
    lines = [line for line in code if line.strip() and not re.match(r"(import|from|#)", line)]
    assert len(lines) <= LINES


@pytest.mark.deep
def test_tune(bitgen_home: Path) -> None:
    out = run("tune.py", home=bitgen_home)
    assert re.search(r"^\d+x\d+ \w+", out, re.MULTILINE)
    assert list((bitgen_home / "tune_logs").glob("*.jsonl"))


@pytest.mark.deep
def test_build_then_multiply(bitgen_home: Path) -> None:
    assert re.search(r"tiny-\w+ \d+ kernels, \d+ threads", run("build.py", home=bitgen_home))
    assert run("linear.py", home=bitgen_home) == "(3, 256) True\n"


def test_text_and_a_server(bitgen_home: Path) -> None:
    assert "And it came to pass" not in run("llm.py", home=bitgen_home)[:19]
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (the extra serve)")
    assert run("serve.py", home=bitgen_home).strip()


@pytest.mark.deep
def test_optimize(bitgen_home: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed (the extra hf)")
    pytest.importorskip("transformers", reason="transformers is not installed (the extra hf)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra hf)")
    from torch_models import save_tiny

    assert run("optimize.py", str(save_tiny(tmp_path / "tiny")), home=bitgen_home).startswith("And God said")
