"""A PostgreSQL of a test's own: in a folder of its own, reached by a socket, killed and started at will."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

START_S = 60.0
_FAST = ("fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_connections=80")


@cache
def missing() -> str:
    """Why there can be no database here; empty where there can."""
    try:
        import procrastinate  # noqa: F401
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed (the extra fleet)"
    if not _binaries():
        return "PostgreSQL is not installed (apt install postgresql)"
    if os.getuid() == 0:
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            return "PostgreSQL does not run as root, and there is no user postgres"
    return ""


def _binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[4]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def _as_postgres() -> dict[str, Any]:
    """PostgreSQL refuses root: what runs it becomes the user postgres then."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("postgres")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


class Postgres:
    """A server; its superuser is ``postgres``, whom everybody on the socket may be."""

    def __init__(self) -> None:
        # Not in pytest's folder, which another user may not enter; and names of sockets are short.
        self.folder = Path(tempfile.mkdtemp(prefix="bitgen-pg-"))
        self.port = 5432
        self._process: subprocess.Popen[bytes] | None = None
        self._settings: list[str] = []
        binaries = _binaries()
        assert binaries is not None
        self._binaries = binaries
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "-D", str(self.data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.start()

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def dsn(self, user: str = "postgres", **words: str) -> str:
        found = {
            "host": str(self.folder),
            "port": str(self.port),
            "user": user,
            "dbname": "postgres",
            **words,
        }
        return " ".join(f"{key}={value}" for key, value in found.items())

    def start(self, settings: Sequence[str] = ()) -> None:
        """Start it, after whatever happened to it before, and wait until it answers."""
        self._settings = list(settings) or self._settings
        options = [*_FAST, f"unix_socket_directories={self.folder}", *self._settings]
        if not any(option.startswith("listen_addresses") for option in options):
            options.append("listen_addresses=")
        command = [str(self._binaries / "postgres"), "-D", str(self.data), "-p", str(self.port)]
        for option in options:
            command += ["-c", option]
        end = time.monotonic() + START_S
        while True:
            with (self.folder / "log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, **_as_postgres()
                )
            while self._process.poll() is None and time.monotonic() < end:
                if self.answers():
                    return
                time.sleep(0.02)
            # The children of one that was killed hold its memory for a moment.
            if time.monotonic() >= end:
                raise RuntimeError((self.folder / "log").read_text(errors="replace")[-2000:])
            time.sleep(0.1)

    def answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """As a power cut does it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()  # nobody wants what is in it
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, name: str, *arguments: str) -> None:
        command = [str(self._binaries / name), *arguments]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, check=False, **_as_postgres())
        if done.returncode:
            raise RuntimeError(done.stderr.decode(errors="replace"))
