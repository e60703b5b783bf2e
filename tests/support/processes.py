"""Programs that run beside a test, and `bitgen serve -m tiny` as one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

P = TypeVar("P", bound="Program")


class Program:
    """A process whose BITGEN_HOME is ``home``, and the lines of its standard error."""

    def __init__(self, command: Sequence[str], home: Path) -> None:
        self.lines: list[str] = []
        self._reading = True
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "BITGEN_HOME": str(home)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in iter(self.process.stderr.readline, ""):
            self.lines.append(line.rstrip())
            if not self._reading:
                break
        self.process.stderr.close()

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"no line like {pattern!r} in {self.lines}")

    def stop_reading(self) -> None:
        """Close this end of its standard error, at its next line."""
        self._reading = False

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def ended(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()


class Server(Program):
    """`bitgen serve -m tiny`, and where it listens."""

    def __init__(self, library: Path, home: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "bitgen", "serve", "-m", "tiny", "-t", "1", "--port", "0"]
        super().__init__([*command, "--library", str(library), *flags], home)
        self.url = self.wait_for(r"on (http://\S+)$")[1]
