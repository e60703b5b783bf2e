"""Run one program under a time limit: its whole process group ends with it, whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitgen.errors import ToolchainError

_DRAIN_S = 5.0  # after SIGKILL: time to collect what was printed; an escaped grandchild may hold the pipe


@dataclass(frozen=True)
class Finished:
    """A program that ended by itself; ``status`` is negative when a signal ended it."""

    command: tuple[str, ...]
    status: int
    stdout: str
    stderr: str


class TimedOutError(Exception):
    """A program that was killed, with all of its process group, because its time was up."""

    def __init__(self, command: Sequence[str], timeout_s: float, stderr: str) -> None:
        super().__init__(f"{command[0]} did not finish within {timeout_s:g} s")
        self.command = tuple(command)
        self.timeout_s = timeout_s
        self.stderr = stderr


class LiveProcesses:
    """The programs that several threads run at this moment, so that one of them can end them all.

    Every program sits in a session of its own; Ctrl-C in a terminal therefore does not reach it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def add(self, process: subprocess.Popen[bytes]) -> None:
        """Watch ``process``; it is killed at once when `kill_all` was called before."""
        with self._lock:
            self._running.add(process)
            closed = self._closed
        if closed:
            _kill_group(process)

    def discard(self, process: subprocess.Popen[bytes]) -> None:
        """Forget a program that has ended."""
        with self._lock:
            self._running.discard(process)

    def kill_all(self) -> None:
        """Kill what runs now and whatever is started later."""
        with self._lock:
            self._closed = True
            running = tuple(self._running)
        for process in running:
            _kill_group(process)


def run(
    command: Sequence[str], *, timeout_s: float, cwd: Path | None = None, live: LiveProcesses | None = None
) -> Finished:
    """Run ``command`` without a shell or input and return what it said.

    Messages are in English (LC_ALL=C), so that they can be read by rules. TimedOutError after ``timeout_s``;
    BitgenError when the program cannot be started.
    """
    process = _start(command, cwd)
    live = live or LiveProcesses()
    live.add(process)
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise TimedOutError(command, timeout_s, _kill_and_drain(process)) from None
    except BaseException:
        _kill_and_drain(process)
        raise
    finally:
        live.discard(process)
    return Finished(tuple(command), process.returncode, _text(stdout), _text(stderr))


def _start(command: Sequence[str], cwd: Path | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # makes it the leader of a group that can be killed as one
        )
    except OSError as error:
        if cwd is not None and not cwd.is_dir():
            raise  # the folder is missing, not the program
        message = f"cannot run {command[0]}: {error.strerror or error}; is it installed and executable?"
        raise ToolchainError(message) from error


def _kill_and_drain(process: subprocess.Popen[bytes]) -> str:
    _kill_group(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return _text(process.communicate(timeout=_DRAIN_S)[1])
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    return ""


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Once reaped, the number may belong to somebody else.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", errors="replace")
