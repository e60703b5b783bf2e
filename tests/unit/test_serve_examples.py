"""examples/serve: what the tools say that read these files, and that their flags exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitgen.cli import parser

FOLDER = Path(__file__).parents[2] / "examples" / "serve"
UNIT = (FOLDER / "bitgen.service").read_text(encoding="utf-8")
IMAGE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "bitgen.service"
    unit.write_text(UNIT)
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "bitgen.service" not in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_reads_the_configuration(tmp_path: Path) -> None:
    command = ["nginx", "-t", "-q", "-c", str(FOLDER / "nginx.conf"), "-g", f"pid {tmp_path}/pid;"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "nginx.conf:" not in done.stderr, done.stderr


def test_the_commands_of_the_examples_are_understood() -> None:
    start = re.search(r"^ExecStart=/usr/bin/env bitgen (.*)$", UNIT, re.MULTILINE)
    entry = re.search(r"^ENTRYPOINT (\[.*\])$", IMAGE, re.MULTILINE)
    command = re.search(r"^CMD (\[.*\])$", IMAGE, re.MULTILINE)
    assert start
    assert entry
    assert command
    for words in (start[1].split(), [*json.loads(entry[1]), *json.loads(command[1])][1:]):
        args = parser().parse_args(words)
        assert args.command == "serve"
        assert args.api_key_file
