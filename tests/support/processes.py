"""`bitgen serve -m tiny` as a process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path


class Server:
    """A process, the lines of its standard error, and where it listens."""

    def __init__(self, library: Path, home: Path, *flags: str) -> None:
        self.lines: list[str] = []
        command = [sys.executable, "-m", "bitgen", "serve", "-m", "tiny", "-t", "1", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--library", str(library), *flags],
            env={**os.environ, "BITGEN_HOME": str(home)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"on (http://\S+)$")[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(line.rstrip() for line in iter(self.process.stderr.readline, ""))

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

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)

    def ended(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
