"""The size report counts every tracked file once, in the room that its name says."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
GIT = shutil.which("git") or ""
pytestmark = pytest.mark.skipif(not GIT, reason="git is not installed")


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("rooms")


@pytest.fixture
def repository(rooms: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository with one commit in the old house and a working tree in the new one."""

    def git(*argv: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run([GIT, *identity, *argv], cwd=tmp_path, check=True, capture_output=True)

    git("init", "--initial-branch", "main")
    (tmp_path / "bitgen" / "target").mkdir(parents=True)
    (tmp_path / "bitgen" / "target" / "cpu.py").write_text("1\n2\n3\n")
    (tmp_path / "untracked.py").write_text("1\n")
    git("add", "bitgen")
    git("commit", "-m", "old")
    git("mv", "bitgen/target", "bitgen/cpu")
    (tmp_path / "bitgen" / "cpu" / "cpu.py").write_text("\n" * 1700)
    monkeypatch.setattr(rooms, "ROOT", tmp_path)


@pytest.mark.usefixtures("repository")
def test_a_room_is_compared_with_what_it_was_called_before(
    rooms: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rooms.main(["--against", "main"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["room", "before", "lines", "planned", "budget", "over", "why"]
    assert ["bitgen/cpu/", "3", "1,700", "600", "1,200", "+500", "three"] in [line[:7] for line in lines]
    assert ["bitgen/whole.py", "0", "0", "60", "60"] in lines
    rooms.main(["--markdown"])
    assert "| bitgen/cpu/ | 1,700 | 600 | 1,200 | +500 | three ways" in capsys.readouterr().out


def test_a_room_that_is_larger_than_planned_says_why(rooms: ModuleType) -> None:
    for room in rooms.ROOMS:
        assert room.budget is None or room.budget >= room.planned, room.name
        assert bool(room.why) == bool(room.budget and room.budget > 1.05 * room.planned), room.name


def test_the_document_has_rooms_budgets_and_reasons_of_today(rooms: ModuleType) -> None:
    """And the lines of when it was written last, which may be others by now."""
    lines = rooms.DESIGN.read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {row[0]: (*row[3:5], row[-1]) for row in cells if len(row) == 7}
    for room in rooms.ROOMS:
        numbers = [f"{number:,}" if number else "" for number in (room.planned, room.budget or room.planned)]
        assert found[room.name] == (*numbers, room.why), "python tools/rooms.py --update"


@pytest.mark.usefixtures("repository")
def test_an_unknown_commit_is_one_line(rooms: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"^rooms: .*nope$"):
        rooms.main(["--against", "nope"])


@pytest.mark.parametrize(
    ("path", "room"),
    [
        ("bitgen/spec.py", "bitgen/spec.py"),
        ("bitgen/families/i2s.py", "bitgen/families/"),
        ("bitgen/model/engine.py", "bitgen/inference/"),  # its own former name, before that of its folder
        ("bitgen/model/gguf.py", "bitgen/formats/"),
        ("bitgen/__main__.py", "bitgen/"),
        ("templates/host/run.c.j2", "csrc/"),
        ("templates/isa/avx2.h", "templates/"),
        ("tests/golden/i2s_n1__avx2.c", "tests/golden/"),
        ("README.md", None),
    ],
)
def test_a_file_is_in_the_room_that_names_most_of_it(rooms: ModuleType, path: str, room: str | None) -> None:
    found = rooms.room_of(path)
    assert (found.name if found else None) == room
