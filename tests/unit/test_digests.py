"""No change of Python or templates changes the generated C unseen: tests/golden."""

from __future__ import annotations

import importlib.util
import shutil
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


CHANGED = "look at them with `python tools/digests.py --diff main`; then `python tools/digests.py --update`"


def test_rendered_c_is_as_recorded(digests: ModuleType) -> None:
    assert not digests.changes("text"), CHANGED


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.deep)])
def test_spaces_are_as_recorded(digests: ModuleType, whole: bool) -> None:
    """All names in order and every eighth text; ``whole``: every text."""
    assert not digests.changes("space", whole=whole), CHANGED


def test_texts_for_reading_are_as_recorded(digests: ModuleType) -> None:
    changed = "".join(digests.golden_changes())
    assert not changed, f"{changed}\nreview it, then `python tools/digests.py --update`"


def test_goldens_can_be_read(digests: ModuleType) -> None:
    """About 14, of each algorithm, on both architectures, without what other files define."""
    assert len(digests.GOLDENS) <= 16
    algorithms = {
        digests.example(name).schedule.algorithm for name in digests.GOLDENS.keys() & digests.EXAMPLES
    }
    assert algorithms == {"direct", "wide", "split", "panel", "tiles", "mmla"}
    texts = [path.read_text(encoding="utf-8") for path in digests.GOLDEN.glob("*.c")]
    assert sum(text.count("\n") for text in texts) < 4000
    assert not [text for text in texts if "struct bitgen_matmul {" in text or "OP vb vb_load" in text]


def test_a_changed_text_is_seen(digests: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = digests.FILE.read_text(encoding="utf-8")
    changed = tmp_path / "digests.txt"
    changed.write_text(lines.replace(digests.recorded("text")[0], "text default/i2s/scalar/n1 " + "0" * 16))
    monkeypatch.setattr(digests, "FILE", changed)
    assert [line[0] for line in digests.changes("text")] == ["-", "+"]


def test_a_changed_golden_is_seen(
    digests: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(digests.GOLDEN, folder)
    monkeypatch.setattr(digests, "GOLDEN", folder)
    assert not list(digests.golden_changes())
    (folder / "quantize__neon.c").unlink()
    (folder / "left_over.c").write_text("int x;\n", encoding="utf-8")
    changes = list(digests.golden_changes())
    assert "-int x;\n" in changes
    assert any(line.startswith("--- quantize__neon.c") for line in changes)
