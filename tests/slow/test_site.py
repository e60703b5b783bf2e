"""The documents become a site: every link leads somewhere, every public name is on a page."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bitgen

ROOT = Path(__file__).parents[2]
has_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="mkdocs-material or mkdocstrings is not installed (the extra docs)",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


@has_mkdocs
def test_links_lead_somewhere_and_names_are_there(site: Path) -> None:
    """--strict has looked at the links of pages; here at those that hooks and themes made."""
    pages = {page.relative_to(site).as_posix(): page.read_text("utf-8") for page in site.rglob("*.html")}
    assert {"index.html", "contributing.html", "guide/tuning.html", "reference/api/text.html"} <= set(pages)
    for name, text in pages.items():
        for link in re.findall(r'(?:href|src)="?([^"\s>]+)', text):
            target, _, anchor = link.partition("#")
            if re.match(r"\w+:|//|/", target) or name == "404.html":
                continue
            file = (site / name).parent / target if target else site / name
            assert file.exists(), f"{name}: {link}"
            if anchor and file.suffix == ".html":
                there = file.read_text("utf-8")
                assert re.search(rf'(id|name)="?{re.escape(anchor)}"?[\s>]', there), f"{name}: {link}"
    api = "".join(text for name, text in pages.items() if name.startswith("reference/api/"))
    for public in (*bitgen._HOME, "KernelTable", "Linear", "optimize", "install", "BitgenLM"):
        assert re.search(rf'id="bitgen\.[\w.]*\b{public}"', api), public


@has_mkdocs
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert not re.search(r'<(script|img|iframe)[^>]*src="?(https?:)?//', text), page.name
        assert not re.search(r'<link[^>]*rel="?stylesheet"?[^>]*href="?(https?:)?//', text), page.name
