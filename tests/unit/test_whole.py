"""A file is the old one or the whole new one, whatever happens while it is written."""

from __future__ import annotations

import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from bitgen.whole import whole


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"

    def fail() -> None:
        with whole(path, synced=False) as file:
            file.write(b"newer")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_only_its_owner_reads_what_is_private(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        for private, mode in ((True, 0o600), (False, 0o644)):
            with whole(tmp_path / "key", private=private) as file:
                file.write(b"x")
            assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == mode
    finally:
        os.umask(umask)


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with whole(path) as first:
        first.write(b"fir")
        with whole(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
        first.write(b"st")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    script = """
import os, pathlib, sys
from bitgen.whole import whole
with whole(pathlib.Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.Popen([sys.executable, "-c", script, str(path)])
    assert killed.wait() == -9
    (left,) = tmp_path.iterdir()
    assert platform.node() in left.name
    lives = tmp_path / left.name.replace(str(killed.pid), str(os.getppid()))
    elsewhere = tmp_path / left.name.replace(platform.node(), "another machine")
    for theirs in (lives, elsewhere):
        theirs.touch()
    with whole(path) as file:
        file.write(b"whole")
    assert not left.exists()
    assert lives.exists()
    assert elsewhere.exists()
    assert path.read_bytes() == b"whole"
