"""The worker's other end: a process that is started when there is a task, and killed when it hangs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from bitgen.errors import FileError
from bitgen.measure.task import Outcome, Task
from bitgen.paths import HOME_VARIABLE

# The same import path as here, whatever the working folder and environment of the worker.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from bitgen.measure.worker import main; main()"
)
_SLACK_S = 10.0  # beyond a task's own limit: preparing weights and cases, starting up
_CLOSE_S = 2.0


class WorkerDiedError(Exception):
    """The worker ended or hung in the middle of a task."""


class WorkerClient:
    """A worker in a session of its own: Ctrl-C in a terminal reaches it only through `close`.

    It ends when its standard input does, so nothing stays behind when this process is killed.
    """

    def __init__(self, harness: Path, cold_bytes: int) -> None:
        self._arguments = (str(harness), str(cold_bytes))
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, task: Task) -> Outcome:
        """What became of ``task``. WorkerDiedError when the worker gives no answer.

        FileError where the system lets it load nothing that was compiled here, which is no kernel's fault. It
        is started when it is not running; after an error the next task starts a new one.
        """
        process = self._running()
        try:
            outcome = Outcome.from_json(_exchange(process, pickle.dumps(task), task.total_s + _SLACK_S))
            if outcome.status == "unusable":
                raise FileError(
                    f"cannot load what was compiled: {outcome.detail.partition('.  ')[0]}; if that folder is "
                    f"mounted noexec, name another one with {HOME_VARIABLE}"
                )
        except BaseException:
            self.kill()
            raise
        return outcome

    def close(self) -> None:
        """End the worker; a process it waits for ends with it."""
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
        """End the worker and its process at once."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._forget()

    @property
    def pid(self) -> int | None:
        """The process id of the worker, None when there is none."""
        return self._process.pid if self._process else None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._forget()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(sys.path), *self._arguments],
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


def _exchange(process: subprocess.Popen[bytes], request: bytes, timeout_s: float) -> bytes:
    """The line that the worker answers to ``request``."""
    if process.stdin is None or process.stdout is None:
        raise WorkerDiedError("the worker has no pipes")
    try:
        while request:
            request = request[os.write(process.stdin.fileno(), request) :]
    except BrokenPipeError:
        raise WorkerDiedError("the worker is gone") from None
    deadline, said = time.monotonic() + timeout_s, b""
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise WorkerDiedError(f"the worker gave no answer within {timeout_s:g} s")
        part = os.read(process.stdout.fileno(), 1 << 16)
        if not part:
            raise WorkerDiedError("the worker was killed")
        said += part
    return said
