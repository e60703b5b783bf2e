"""A fleet of real processes on a database of its own, and trouble for all of them.

For the tests of the fleet and for the picture of one (`tools/pictures.py fleet`).
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
from fleet_machines import DirectExchange, FakeMachine, machine_of
from postgres import Postgres

from bitgen.fleet.database import Database, find_database
from bitgen.fleet.schema import COORDINATOR, WORKER, initialise
from bitgen.fleet.tune import Family, search_family
from bitgen.formats.config import find_model
from bitgen.search import TuneOptions
from bitgen.store import RecordStore

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "fleet_machines.py"
MODEL = "TriLM-99M"
FLAGS = ["-m", MODEL, "--family", "i2s", "--regime", "n1", "--regime", "large", "-t", "1", "--trials", "16"]
OPTIONS = TuneOptions(families=("i2s",), regimes=("n1", "large"), threads=(1,), trials=16)
STALLED_S = 2.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}:{ROOT / 'benchmarks'}"}


class Fleet:
    """A database of its own on the module's server, and the processes that work with it."""

    def __init__(self, server: Postgres, name: str, folder: Path, stalled_s: float = STALLED_S) -> None:
        self.server, self.name, self.folder = server, name, folder
        self.processes: list[subprocess.Popen[bytes]] = []
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        initialise(self.database("postgres"), stalled_s)
        for login, role in (("worker1", WORKER), ("coordinator1", COORDINATOR)):
            with contextlib.suppress(psycopg.errors.DuplicateObject):
                self.sql(f"CREATE ROLE {login} LOGIN IN ROLE {role}")

    def dsn(self, user: str) -> str:
        return self.server.dsn(user, dbname=self.name)

    def database(self, user: str) -> Database:
        return find_database(self.dsn(user), {})

    def sql(self, query: str, *values: object, user: str = "postgres") -> list[Any]:
        options = "'-c search_path=bitgen_fleet'"
        with psycopg.connect(
            self.server.dsn(user, dbname=self.name, options=options), autocommit=True
        ) as connection:
            cursor = connection.execute(query.encode(), values)
            has_rows = cursor.pgresult and cursor.pgresult.status == psycopg.pq.ExecStatus.TUPLES_OK
            return cursor.fetchall() if has_rows else []

    def worker(self, name: str, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("ab")
        outbox = ["--outbox", str(self.folder / "outbox" / name)] if "--outbox" not in flags else []
        command = [sys.executable, str(SCRIPT), "--dsn", self.dsn("worker1"), "--name", name, *outbox, *flags]
        process = subprocess.Popen(command, stderr=log, env={**ENVIRONMENT, **environment})
        log.close()
        self.processes.append(process)
        return process

    def coordinator(self, families: str = "zen4", seed: int = 0) -> subprocess.Popen[bytes]:
        out, logs = self.folder / "winners", self.folder / "logs"
        command = [sys.executable, "-m", "bitgen", "fleet", "tune", *FLAGS, "--families", families]
        command += ["--out", str(out), "--logs", str(logs), "--seed", str(seed)]
        log = (self.folder / "coordinator.log").open("ab")
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**ENVIRONMENT, "BITGEN_FLEET_DSN": self.dsn("coordinator1")}
        )
        log.close()
        self.processes.append(process)
        return process

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def results(self) -> int:
        return int(self.sql("SELECT count(*) FROM results")[0][0])

    def wait(self, what: Callable[[], object], seconds: float = 60.0) -> None:
        wait_for(what, seconds, lambda: "\n".join(p.read_text() for p in self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for(what: Callable[[], object], seconds: float = 60.0, why: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, why()[-4000:]
        time.sleep(0.1)


def replayed(folder: Path, cpu: str = "zen4") -> bytes:
    """The winners that one machine finds in one process, without any database."""
    machine = machine_of("alone", cpu)
    family = Family(machine.label, machine.cpu, machine.isas)
    exchange = DirectExchange({"alone": FakeMachine()})
    store, out = RecordStore(folder / f"{cpu}.jsonl"), folder / f"winners-{cpu}"
    file = search_family(family, find_model(MODEL), OPTIONS, exchange, store, out, lambda _: None).file
    assert file is not None
    return file.read_bytes()


def check_outcome(fleet: Fleet, winners: dict[str, bytes]) -> None:
    """Every job has one result, no job is left, and the winners are those of one machine alone."""
    for cpu, expected in winners.items():
        assert (fleet.folder / "winners" / f"{cpu}.json").read_bytes() == expected
    left = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
    fleet.wait(lambda: fleet.sql(left) == [(0,)], 20)
    asked_for = fleet.sql("SELECT count(DISTINCT queueing_lock) FROM procrastinate_jobs")[0][0]
    assert fleet.results() == asked_for
    for log in fleet.folder.glob("*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()


class Trouble:
    """Kills, stops and cuts what belongs to ``fleet`` at random moments until its tune is over.

    ``kinds`` of CPU have ``each`` workers, whose kernels take ``sleep_s``; something happens after each pause
    (least and most seconds). ``counts``: what happened so far.
    """

    def __init__(
        self,
        fleet: Fleet,
        kinds: Sequence[str],
        each: int,
        sleep_s: float,
        draw: random.Random,
        pause_s: tuple[float, float] = (0.2, 1.0),
    ) -> None:
        self.fleet, self._pause_s = fleet, pause_s
        self.counts = dict.fromkeys(("workers", "stops", "coordinators", "databases", "cuts"), 0)
        self._kinds, self._sleep_s, self._draw = kinds, sleep_s, draw
        self._machines = [(f"{kind}-{'abcdefgh'[i]}", kind, 2**i) for i in range(each) for kind in kinds]
        self._workers = [self._worker(i) for i in range(len(self._machines))]
        self._coordinator = self._tune()
        self._stopped: dict[int, float] = {}

    def run(self, seconds: float) -> int:
        """Make trouble for at most ``seconds``, let the tune end in peace; the coordinator's exit code."""
        self.fleet.wait(lambda: self.fleet.results() >= 8, 300)  # all are at work
        end = time.monotonic() + seconds
        causes = (self._kill_worker, self._stop, self._kill_coordinator, self._kill_database, self._cut)
        while self._coordinator.poll() is None and time.monotonic() < end:
            time.sleep(self._draw.uniform(*self._pause_s))
            (at,) = self._draw.choices(range(5), (8, 4, 2, 1, 3))
            self.counts[list(self.counts)[at]] += 1
            causes[at]()
            self._wake(2 * STALLED_S)
        self._wake(0.0)
        return self._coordinator.wait(600)

    def _worker(self, i: int) -> subprocess.Popen[bytes]:
        name, cpu, factor = self._machines[i]
        return self.fleet.worker(name, "--cpu", cpu, "--factor", str(factor), "--sleep", str(self._sleep_s))

    def _tune(self) -> subprocess.Popen[bytes]:
        return self.fleet.coordinator(",".join(self._kinds))

    def _kill_worker(self) -> None:
        i = self._draw.randrange(len(self._workers))
        self._workers[i].kill()
        self._stopped.pop(i, None)
        self._workers[i] = self._worker(i)

    def _stop(self) -> None:
        i = self._draw.randrange(len(self._workers))
        if i not in self._stopped:
            self._workers[i].send_signal(signal.SIGSTOP)
            self._stopped[i] = time.monotonic()

    def _wake(self, after_s: float) -> None:
        for i, since in list(self._stopped.items()):
            if time.monotonic() - since > after_s:
                self._workers[i].send_signal(signal.SIGCONT)
                del self._stopped[i]

    def _kill_coordinator(self) -> None:
        self._coordinator.kill()
        self._coordinator.wait()
        self._coordinator = self._tune()

    def _kill_database(self) -> None:
        self.fleet.server.kill()
        time.sleep(self._draw.uniform(0.1, 2.0))
        self.fleet.server.start()

    def _cut(self) -> None:
        with contextlib.suppress(psycopg.OperationalError):
            self.fleet.sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND datname = current_database() AND random() < 0.5"
            )
