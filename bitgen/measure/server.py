"""The measuring process: reads tasks as JSON lines, forks a child for each, answers with what became of it.

Its standard input is the lifeline: when the other end is gone, whatever the reason, the child is killed and
the server ends. It starts no threads, so forking is safe.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitgen.errors import BitgenError
from bitgen.measure.harness import Harness
from bitgen.measure.worker import CHECKING, OPENING, Task, Workbench

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05  # how often a silent child's phase is looked at
_GRACE_S = 5  # a child whose server was killed outlives its time limit by this at most


@dataclass(frozen=True)
class Deadlines:
    """Seconds a child gets: for opening, for checking each kernel, and altogether."""

    check_s: float
    total_s: float


class Server:
    """Forks children for tasks; see `serve`."""

    def __init__(self, bench: Workbench, lifeline: int) -> None:
        self._bench = bench
        self._lifeline = lifeline
        ffi = bench.harness.ffi
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # shared with children: their last words when they die
        self._progress = ffi.cast("struct harness_progress *", ffi.from_buffer(self._shared))

    def run(self, task: Task, deadlines: Deadlines) -> dict[str, Any]:
        """What became of ``task``.

        {"status": "done", and what `Workbench.work` gives}, or {"status": "crashed" | "timeout" | "failed",
        "detail", "culprit": index of the kernel}.
        """
        try:
            self._bench.prepare(task)
        except BitgenError as error:
            return {"status": "failed", "detail": error.message, "culprit": 0}
        self._progress.phase = self._progress.item = 0
        receive, send = os.pipe()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(receive)
            self._child(task, send, server, deadlines)
        os.close(send)
        try:
            said, timed_out = self._listen(receive, deadlines)
        except BaseException:
            _kill(pid)
            raise
        finally:
            os.close(receive)
        if timed_out:
            _kill(pid)
        _, status = os.waitpid(pid, 0)
        return self._verdict(task, said, status, deadlines, timed_out)

    def _child(self, task: Task, send: int, server: int, deadlines: Deadlines) -> None:
        """Never returns."""
        code = 1
        try:
            _live_no_longer_than(server, deadlines.total_s)
            # A kernel's complaints (an abort's message) are no output of ours.
            null = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(null, stream)
            try:
                answer = {"status": "done", **self._bench.work(task, self._progress)}
            except BitgenError as error:
                answer = {"status": "failed", "detail": error.message, "culprit": 0}
            os.write(send, json.dumps(answer).encode())
            code = 0
        finally:
            os._exit(code)  # no exit handlers: they belong to the server

    def _listen(self, receive: int, deadlines: Deadlines) -> tuple[bytes, bool]:
        """What the child writes until it closes its end, and whether its time was up first."""
        start = step = time.monotonic()
        said, seen = b"", (OPENING, 0)
        poller = select.poll()
        poller.register(receive, select.POLLIN)
        poller.register(self._lifeline, select.POLLIN)
        while True:
            ready = dict(poller.poll(_POLL_S * 1000))
            if ready.get(self._lifeline):
                raise _Orphaned  # nobody sends while a task runs: this is the end of the stream
            if ready.get(receive):
                part = os.read(receive, 1 << 16)
                if not part:
                    return said, False
                said += part
            phase, now = int(self._progress.phase), time.monotonic()
            if seen != (phase, self._bench.culprit(phase, int(self._progress.item))):
                seen, step = (phase, self._bench.culprit(phase, int(self._progress.item))), now
            stuck = phase in (OPENING, CHECKING) and now - step > deadlines.check_s
            if stuck or now - start > deadlines.total_s:
                return said, True

    def _verdict(
        self, task: Task, said: bytes, status: int, deadlines: Deadlines, timed_out: bool
    ) -> dict[str, Any]:
        phase, item = int(self._progress.phase), int(self._progress.item)
        where = self._bench.where(task, phase, item)
        failed = {"culprit": self._bench.culprit(phase, item)}
        if timed_out:
            limit = deadlines.check_s if phase in (OPENING, CHECKING) else deadlines.total_s
            return {"status": "timeout", "detail": f"not done after {limit:g} s, {where}", **failed}
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return {"status": "crashed", "detail": f"{name} {where}", **failed}
        try:
            answer: dict[str, Any] = json.loads(said)
        except ValueError:
            code = os.WEXITSTATUS(status)
            return {
                "status": "crashed",
                "detail": f"it ended the process (exit status {code}) {where}",
                **failed,
            }
        return answer


class _Orphaned(Exception):  # noqa: N818 - not an error: nobody is left to answer to
    """The other end of the lifeline is closed."""


def _live_no_longer_than(server: int, seconds: float) -> None:
    """The child dies with its server, also when that is killed with SIGKILL."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(seconds) + _GRACE_S)  # where the next line has no effect
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:
        os._exit(1)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _requests(lifeline: int) -> Any:
    """The JSON objects of the lines of a stream; ends with it."""
    pending = b""
    while True:
        line, newline, rest = pending.partition(b"\n")
        if newline:
            pending = rest
            yield json.loads(line)
            continue
        part = os.read(lifeline, 1 << 20)
        if not part:
            return
        pending += part


def serve(options: Mapping[str, Any], lifeline: int = 0, answers: int = 1) -> None:
    """Answer one line of JSON to each line of JSON until ``lifeline`` ends.

    ``options``: harness (path), cold_bytes, pool_budget_bytes, huge_pages. A request: {"task", "check_s",
    "total_s"}.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash is a recorded value, no file
    bench = Workbench(
        Harness(options["harness"]),
        options["cold_bytes"],
        options["pool_budget_bytes"],
        options["huge_pages"],
    )
    server = Server(bench, lifeline)
    gc.collect()
    gc.freeze()  # or each child's collector would touch, and so copy, every page of the heap
    for request in _requests(lifeline):
        deadlines = Deadlines(request["check_s"], request["total_s"])
        try:
            answer = server.run(Task.from_dict(request["task"]), deadlines)
        except _Orphaned:
            return
        os.write(answers, json.dumps(answer).encode() + b"\n")


def main() -> None:
    """The process that `LocalRunner` starts: its options are the last argument, as JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's: it closes the lifeline
    with contextlib.suppress(BrokenPipeError):
        serve(json.loads(sys.argv[-1]))
