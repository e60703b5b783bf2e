"""`python -m bitgen.hf serve`: transformers' own server, whose ternary layers run on bitgen's kernels."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from libraries import share_cache
from processes import Program

import bitgen

httpx = pytest.importorskip("httpx", reason="httpx is not installed (the extra test)")
NEEDED = {
    **dict.fromkeys(("torch", "transformers", "accelerate", "safetensors"), "the extra hf"),
    **dict.fromkeys(("typer", "fastapi", "uvicorn", "openai"), "pip install 'transformers[serving]'"),
}
_missing = [f"{name} is not installed ({extra})" for name, extra in NEEDED.items() if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_missing), reason=", ".join(_missing))]

PROMPT, TOKENS = "And it came to pass", 20


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[str]:
    """Where a server of the tiny model listens; it finds the library as it would be found on a machine."""
    from torch_models import save_tiny

    folder = tmp_path_factory.mktemp("served")
    home = share_cache(folder / "home")
    shutil.copytree(bundle, home / "generated" / "tests")
    command = [sys.executable, "-m", "bitgen.hf", "serve", str(save_tiny(folder / "tiny-hf"))]
    with Program([*command, "--device", "cpu", "--port", "0"], home) as server:
        yield server.wait_for(r"running on (http://\S+)", 300)[1]


@pytest.fixture(scope="module")
def llm(bundle: Path) -> Iterator[bitgen.LLM]:
    """bitgen's engine."""
    with bitgen.LLM("tiny", library=bundle, threads=1, kv="f32") as opened:
        yield opened


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    """OpenAI's client."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_it_says_what_the_engine_says(url: str, client: Any, llm: bitgen.LLM) -> None:
    expected = "".join(llm.generate(PROMPT, max_tokens=TOKENS, temperature=0))
    (model,) = [each.id for each in client.models.list().data]
    asked = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    done = client.completions.create(**asked)
    assert done.choices[0].text == expected
    assert done.choices[0].finish_reason == "length"
    parts = [part.choices[0].text for part in client.completions.create(**asked, stream=True)]
    assert "".join(parts) == expected
    assert len([part for part in parts if part]) > 1
    plain = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    assert plain.json()["choices"][0]["text"] == expected


def test_it_chats_as_the_engine_chats(client: Any, llm: bitgen.LLM) -> None:
    messages: Any = [{"role": "user", "content": "Who was Moses?"}]
    expected = "".join(llm.chat(messages, max_tokens=TOKENS, temperature=0))
    (model,) = [each.id for each in client.models.list().data]
    asked = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    done = client.chat.completions.create(**asked).choices[0].message.content
    assert done.lstrip() == expected.lstrip()
    parts = [
        part.choices[0].delta.content or "" for part in client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(parts) == done
