"""No change of Python or templates changes the generated C unseen: tests/golden/digests.txt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "digests.py"


@pytest.fixture(scope="module")
def digests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digests", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["text", "space"])
def test_rendered_c_is_as_recorded(digests: ModuleType, kind: str) -> None:
    assert not digests.changes(kind), (
        "look at them with `python tools/digests.py --diff main`; then `python tools/digests.py --update`"
    )


def test_a_changed_text_is_seen(digests: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = digests.FILE.read_text(encoding="utf-8")
    changed = tmp_path / "digests.txt"
    changed.write_text(lines.replace(digests.recorded("text")[0], "text default/i2s/scalar/n1 " + "0" * 16))
    monkeypatch.setattr(digests, "FILE", changed)
    assert [line[0] for line in digests.changes("text")] == ["-", "+"]
