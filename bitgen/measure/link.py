"""The runner's end of the measuring process: start it, ask it, notice that it died, end it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from bitgen.measure.server import Deadlines
from bitgen.measure.worker import Task

# The same import path as here, whatever the working folder and environment of the child.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from bitgen.measure.server import main; main()"
)
_SLACK_S = 10.0  # beyond a child's own limit: preparing weights and cases, starting up
_CLOSE_S = 2.0


class ServerDiedError(Exception):
    """The measuring process ended or hung in the middle of a task."""


class ServerLink:
    """A measuring process in a session of its own: Ctrl-C in a terminal reaches it only through `close`.

    It ends when its standard input does, so nothing stays behind when this process is killed.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = json.dumps(options)
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task, deadlines: Deadlines) -> dict[str, Any]:
        """The server's answer to ``task`` (see `Server.run`). ServerDiedError when it gives none.

        It is started when it is not running; after an error the next task starts a new one.
        """
        process = self._running()
        request = {"task": task.to_dict(), "check_s": deadlines.check_s, "total_s": deadlines.total_s}
        try:
            return _exchange(process, json.dumps(request).encode() + b"\n", deadlines.total_s + _SLACK_S)
        except BaseException:
            self.kill()
            raise

    def close(self) -> None:
        """End the process; a child it waits for ends with it."""
        process = self._process
        if process is None:
            return
        if process.stdin:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        try:
            process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return
        self._forget()

    def kill(self) -> None:
        """End the process and its child at once."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._forget()

    @property
    def pid(self) -> int | None:
        """The process id of the server, None when there is none."""
        return self._process.pid if self._process else None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), self._options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                # The reference multiplies with BLAS, whose threads would neither survive a fork nor sleep.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        return self._process

    def _forget(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None


def _exchange(process: subprocess.Popen[bytes], request: bytes, timeout_s: float) -> dict[str, Any]:
    if process.stdin is None or process.stdout is None:
        raise ServerDiedError("the measuring process has no pipes")
    try:
        while request:
            request = request[os.write(process.stdin.fileno(), request) :]
    except BrokenPipeError:
        raise ServerDiedError("the measuring process is gone") from None
    deadline, said = time.monotonic() + timeout_s, b""
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ServerDiedError(f"the measuring process gave no answer within {timeout_s:g} s")
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            raise ServerDiedError("the measuring process was killed")
        said += part
    answer: dict[str, Any] = json.loads(said)
    return answer
