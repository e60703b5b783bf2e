"""Bars on terminals, lines elsewhere, and no thread of their own."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time

import pytest

from bitgen.cli.progress import ProgressBar
from bitgen.cli.tables import Column, Table, render_tables
from bitgen.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_without_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    before = threading.active_count()
    with ProgressBar() as bar:
        bar.show(Progress("i2s n1", 3, 10, "kernels"))
        assert threading.active_count() == before
        written = screen.getvalue()
        assert "i2s n1" in written
        assert "3/10 kernels" in re.sub(r"\x1b\[[?\d;]*\w", "", written)
    assert screen.getvalue() != written, "the bar is removed at the end"


def test_lines_elsewhere_tell_the_share_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 20.0, 20.0, 20.0, 21.0, 21.0, 40.0, 40.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with ProgressBar() as bar:
        bar.show(Progress("checking", 1, 4))
        bar.show(Progress("too soon", 2, 4))
        bar.show(Progress("done", 4, 4))
    assert capsys.readouterr().err == "checking: 25%, 60 s left\ndone: 100%\n"


def test_the_time_left_does_not_count_work_of_unknown_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute of compiling says nothing about how fast weights are packed after it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with ProgressBar() as bar:
        for second, step in (
            (11.0, Progress("building the kernels")),
            (71.0, Progress("packing", 1, 100)),
            (91.0, Progress("packing", 11, 100)),
        ):
            now[0] = second
            bar.show(step)
    assert capsys.readouterr().err.splitlines()[2] == "packing: 11%, 162 s left"


def test_of_a_budget_in_seconds_the_rest_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as bar:
        bar.show(Progress("probing", 1, 480, "seconds"))
        bar.show(Progress("searching", 0.5, 480, "seconds"))
    assert capsys.readouterr().err == "probing: 0%, 479 s left\nsearching: 0%, 480 s left\n"


def test_the_last_line_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar() as bar:
        bar.show(Progress("packing"))
        bar.show(Progress("packed"))
    assert capsys.readouterr().err == "packing\npacked\n"


def test_a_table_is_never_folded_or_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    table = Table("t", (Column("a", "name"), Column("b", "us", ".1f")), [("x" * 300, 1.25), ("[y]", None)])
    lines = render_tables([table], "text").splitlines()
    assert lines[1].split() == ["name", "us"]
    assert set(lines[2]) == {"-"}
    assert lines[3].split() == ["x" * 300, "1.2"]
    assert lines[4].split() == ["[y]", "-"]


def test_a_share_beyond_a_limit_is_no_share() -> None:
    column = Column("limit_share", "% of limit", ".0%", of_limit=True)
    assert [column.show(share) for share in (0.5, 1, 1.01, None)] == ["50%", "100%", "> limit", "-"]
    assert json.loads(render_tables([Table("t", [column], [[1.25]])], "json")) == {
        "t": [{"limit_share": 1.25}]
    }
