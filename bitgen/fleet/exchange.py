"""The coordinator's end of the database: jobs go into the queue, answers come back, whatever dies meanwhile.

The table of results is what is true; the state of a job is a hint. A request whose answer is there already is
never put into the queue, so a coordinator that restarts finds everything that was answered before.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psycopg
from procrastinate import SyncPsycopgConnector, exceptions
from procrastinate.jobs import Job as QueueJob
from procrastinate.manager import JobManager

from bitgen.errors import BitgenError, InterruptError
from bitgen.fleet.admin import set_aside
from bitgen.fleet.database import AwayError, Database, raised
from bitgen.fleet.messages import TASK, Answer, Request, queue_name, read_answer
from bitgen.fleet.schema import require

_POLL_S = 2.0  # between looks at the queue itself; answers are notified
_AWAY_S = 1.0
_START_S = 60.0  # to wait for a database that is away when a tune begins; later for as long as it takes
_LOCK_S = 5.0  # in which the lock of a coordinator that was killed is free
_LOST_S = 90.0  # the same of a connection that was lost on the way, whose end the server notices in a minute
_TOGETHER = 64  # jobs put into the queue by one statement
_ATTEMPTS = 3  # of different machines before a request that fails everywhere ends the tune


@dataclass
class _Pending:
    request: Request
    apart_from: str
    future: Future[Answer] = field(default_factory=Future)
    machine: str = ""  # the one whose queue it is in; "": that of the family
    tries: int = 0


class _Bell:
    """Wakes a thread that waits for a connection."""

    def __init__(self) -> None:
        self._here, self._there = socket.socketpair()
        for end in (self._here, self._there):
            end.setblocking(False)

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # it rings already, or nobody listens any more
            self._there.send(b"\0")

    def wait(self, connection: psycopg.Connection[Any], seconds: float) -> None:
        """Until it rings, something comes on ``connection``, or the time is over."""
        select.select([connection.fileno(), self._here.fileno()], [], [], max(0.0, seconds))
        with contextlib.suppress(OSError):
            self._here.recv(4096)

    def close(self) -> None:
        self._here.close()
        self._there.close()


class PostgresExchange:
    """An `Exchange` over a database, used in a ``with`` statement: it has a thread that listens for answers.

    ``report`` gets a line when the database is away, when it is back, and when a machine refuses a job.
    ``label``: the kind of CPU that this is the only coordinator of; "" for whoever only asks. The database
    keeps that lock as long as the connection lives, and each new connection takes it anew.
    BitgenError where another coordinator has the lock, or the database is away for a minute at the start.
    """

    def __init__(self, database: Database, report: Callable[[str], None], label: str = "") -> None:
        self._database = database
        self._report = report
        self._label = label
        self._pending: dict[str, _Pending] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._bell = _Bell()
        self._manager = JobManager(SyncPsycopgConnector())
        self._refused: int | None = None  # the last refusal that was told, or was there before
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PostgresExchange:
        try:
            first = self._first()
        except BaseException:
            self._bell.close()
            raise
        self._thread = threading.Thread(target=self._run, args=(first,), name="fleet answers", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._bell.ring()
        if self._thread:
            self._thread.join(timeout=10)
        self._fail(InterruptError("the coordinator ended"))
        self._bell.close()

    def ask(self, request: Request, apart_from: str = "") -> Future[Answer]:
        """The answer to ``request``, put into the queue unless it is there or was answered before."""
        with self._lock:
            known = self._pending.get(request.key)
            if known is None:
                known = self._pending[request.key] = _Pending(request, apart_from)
        if self._failure:
            self._end(known, self._failure)
        self._bell.ring()
        return known.future

    # ---- connections ----

    def _first(self) -> psycopg.Connection[Any]:
        """The connection of the start: what is wrong is told now, and once."""
        ends, told = time.monotonic() + _START_S, False
        while True:
            try:
                return self._connected(_LOCK_S)
            except AwayError as error:
                if time.monotonic() >= ends:
                    message = f"the database was away for {_START_S:g} s: {error.message}"
                    raise BitgenError(message) from error
                if not told:
                    self._report(f"the database is away, waiting {_START_S:g} s for it: {error.message}")
                told = True
            time.sleep(_AWAY_S)

    def _connected(self, lock_s: float) -> psycopg.Connection[Any]:
        """A connection that listens and has the coordinator's lock."""
        connection = self._database.connect()
        try:
            with raised("lost the connection"):
                require(connection)
                if self._label:
                    self._take_lock(connection, lock_s)
                connection.execute("LISTEN bitgen_fleet_results")
                if self._refused is None:
                    row = connection.execute("SELECT coalesce(max(id), 0) FROM refusals").fetchone()
                    self._refused = row[0] if row else 0
        except BaseException:
            connection.close()
            raise
        return connection

    def _take_lock(self, connection: psycopg.Connection[Any], seconds: float) -> None:
        ends = time.monotonic() + seconds
        query = "SELECT pg_try_advisory_lock(hashtextextended('bitgen fleet ' || %s, 0))"
        while connection.execute(query, (self._label,)).fetchone() != (True,):
            if time.monotonic() >= ends or self._ended.is_set():
                raise BitgenError(f"another coordinator tunes {self._label} now")
            self._ended.wait(_AWAY_S / 4)

    # ---- the thread ----

    def _run(self, first: psycopg.Connection[Any]) -> None:
        kept: psycopg.Connection[Any] | None = first
        away = False
        while not self._ended.is_set():
            try:
                # Closed, not committed: it may have been cut.
                with contextlib.closing(kept or self._connected(_LOST_S)) as connection:
                    kept = None
                    if away:
                        self._report("the database is back")
                    away = False
                    self._serve(connection)
            except AwayError as error:
                if not away:
                    self._report(f"the database is away, waiting for it: {error.message}")
                away = True
                self._ended.wait(_AWAY_S)
            except BaseException as error:
                self._fail(error)
                return

    def _serve(self, connection: psycopg.Connection[Any]) -> None:
        looked = -math.inf
        with raised("lost the connection"):
            while not self._ended.is_set():
                # What came while something else was asked is here, and not on the network any more.
                notified = list(connection.notifies(timeout=0))
                due, new = time.monotonic() - looked >= _POLL_S, self._new()
                if notified or due or new:
                    self._collect(connection)
                if new:
                    self._put(connection, new)
                if due:
                    self._look_after(connection)
                    looked = time.monotonic()
                if not (notified or due or new):
                    self._bell.wait(connection, looked + _POLL_S - time.monotonic())

    def _new(self) -> list[_Pending]:
        return [p for p in self._open() if not p.tries]

    def _open(self) -> list[_Pending]:
        with self._lock:
            return [p for p in self._pending.values() if not p.future.done()]

    def _collect(self, connection: psycopg.Connection[Any]) -> None:
        """Take the answers that have come. What is not believed is asked for again."""
        waiting = {p.request.key: p for p in self._open()}
        if not waiting:
            return
        found = connection.execute(
            "SELECT job_key, payload, machine FROM results WHERE job_key = ANY(%s)", (list(waiting),)
        ).fetchall()
        for key, payload, machine in found:
            pending = waiting[key]
            try:
                answer = read_answer(payload)
                if answer.machine != machine:
                    raise BitgenError(f"{machine} answered as {answer.machine}")
                answer.check(pending.request)
            except BitgenError as error:
                # The machine is set aside, and what it said is out of the way of a better answer.
                connection.execute("SELECT fleet_reject(%s, %s)", (key, error.message))
                pending.tries = 0
                continue
            self._end(pending, answer)

    def _put(self, connection: psycopg.Connection[Any], asked: Sequence[_Pending]) -> None:
        """Put what nobody has answered into the queue; what waits there or is being done stays as it is."""
        new = [pending for pending in asked if not pending.future.done()]
        keys = [p.request.key for p in new]
        there = connection.execute(
            "SELECT queueing_lock FROM procrastinate_jobs WHERE queueing_lock = ANY(%s) "
            "AND status IN ('todo', 'doing')",
            (keys,),
        ).fetchall()
        queued = {row[0] for row in there}
        for pending in new:
            pending.tries = 1
        self._defer(connection, [pending for pending in new if pending.request.key not in queued])

    def _defer(self, connection: psycopg.Connection[Any], new: Sequence[_Pending]) -> None:
        """All at once: whom the first of them wakes would find it taken, and the next ones not there yet."""
        for start in range(0, len(new), _TOGETHER):
            jobs = [self._job(connection, pending) for pending in new[start : start + _TOGETHER]]
            try:
                with _plain_errors():
                    self._manager.batch_defer_jobs(jobs=jobs, connection=connection)
            except exceptions.AlreadyEnqueued:  # one of them, meanwhile
                for job in jobs:
                    with contextlib.suppress(exceptions.AlreadyEnqueued), _plain_errors():
                        self._manager.batch_defer_jobs(jobs=[job], connection=connection)

    def _job(self, connection: psycopg.Connection[Any], pending: _Pending) -> QueueJob:
        request = pending.request
        live = self._live(connection, request) if pending.apart_from else []
        if others := [name for name in live if name != pending.apart_from]:
            # The one with the fewest of these jobs: by chance one of eight machines got three at once, and
            # they were the end of a tune. Of equals by the key, not always the same.
            has = Counter(other.machine for other in self._open())
            pending.machine = min(others, key=lambda name: (has[name], _mixed(request.key, name)))
        return QueueJob(
            queue=queue_name(request.label, request.code, request.threads, pending.machine),
            priority=request.priority,
            lock=None,
            queueing_lock=request.key,
            task_name=TASK,
            task_kwargs={"label": request.label, "request": request.text},
        )

    def _live(self, connection: psycopg.Connection[Any], request: Request) -> list[str]:
        """The machines that may answer ``request`` now."""
        rows = connection.execute(
            "SELECT name FROM live_machines WHERE label = %s AND code = %s AND threads >= %s",
            (request.label, request.code, request.threads),
        ).fetchall()
        return [row[0] for row in rows]

    def _look_after(self, connection: psycopg.Connection[Any]) -> None:
        """What nobody else does: jobs that stalled, failed or vanished, jobs of machines that are gone."""
        connection.execute("SELECT fleet_reap()")
        for line in set_aside(connection):
            self._report(line)
        self._tell_refusals(connection)
        waiting = {p.request.key: p for p in self._open() if p.tries}
        if not waiting:
            return
        rows = connection.execute(
            "SELECT queueing_lock, max(id), bool_or(status = 'todo'), bool_or(status = 'doing') "
            "FROM procrastinate_jobs WHERE queueing_lock = ANY(%s) GROUP BY queueing_lock",
            (list(waiting),),
        ).fetchall()
        known = {row[0]: row[1:] for row in rows}
        for key, pending in waiting.items():
            last, todo, doing = known.get(key, (None, False, False))
            if todo and pending.machine and pending.machine not in self._live(connection, pending.request):
                with _plain_errors():  # its machine is gone: another one gets the job
                    self._manager.cancel_job_by_id(last, delete_job=True, connection=connection)
                pending.machine = ""
                self._defer(connection, [pending])
            elif not todo and not doing:
                self._again(connection, pending, failed=last is not None)

    def _again(self, connection: psycopg.Connection[Any], pending: _Pending, failed: bool) -> None:
        """A job that ended without an answer is tried by others; then the tune says why it cannot go on."""
        key = pending.request.key
        if connection.execute("SELECT fleet_known(%s)", (key,)).fetchone() == (True,):
            return  # it came meanwhile
        if pending.tries >= _ATTEMPTS:
            rows = connection.execute(
                "SELECT machine, reason FROM refusals WHERE job_key = %s ORDER BY id DESC LIMIT 1", (key,)
            ).fetchall()
            why = "; ".join(f"{machine}: {reason}" for machine, reason in rows) or "no machine says why"
            self._end(pending, BitgenError(f"a job failed {pending.tries} times: {why}"))
            return
        pending.tries += failed
        self._defer(connection, [pending])

    def _tell_refusals(self, connection: psycopg.Connection[Any]) -> None:
        rows = connection.execute(
            "SELECT id, machine, reason FROM refusals WHERE id > %s ORDER BY id LIMIT 20", (self._refused,)
        ).fetchall()
        for number, machine, reason in rows:
            self._refused = number
            self._report(f"{machine} refused a job: {reason}")

    # ---- ends ----

    def _end(self, pending: _Pending, outcome: Answer | BaseException) -> None:
        with self._lock:
            self._pending.pop(pending.request.key, None)
        with contextlib.suppress(InvalidStateError):
            if isinstance(outcome, Answer):
                pending.future.set_result(outcome)
            else:
                pending.future.set_exception(outcome)

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self._ended.set()
        for pending in self._open():
            self._end(pending, error)


def _mixed(key: str, name: str) -> str:
    """An order of names that is another one for each key."""
    return hashlib.sha256(f"{key} {name}".encode()).hexdigest()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Procrastinate's errors as what they come from."""
    try:
        yield
    except exceptions.AlreadyEnqueued:
        raise
    except exceptions.ConnectorException as error:
        raise error.__cause__ or error from error
