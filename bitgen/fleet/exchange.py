"""The coordinator's end of the database: jobs go into the queue, answers come back, whatever dies meanwhile.

The table of results is what is true; the state of a job is a hint. A request whose answer is there already is
never put into the queue, so a coordinator that starts anew finds everything that was answered before.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterator
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
_TURN_S = 0.05
_AWAY_S = 1.0
_ATTEMPTS = 3  # of different machines before a request that fails everywhere ends the tune


@dataclass
class _Pending:
    request: Request
    apart_from: str
    future: Future[Answer] = field(default_factory=Future)
    machine: str = ""  # the one whose queue it is in; "": that of the family
    tries: int = 0


class PostgresExchange:
    """An `Exchange` over a database, used in a ``with`` statement: it has a thread that listens for answers.

    ``report`` gets a line when the database is away, when it is back, and when a machine refuses a job.
    """

    def __init__(self, database: Database, report: Callable[[str], None]) -> None:
        self._database = database
        self._report = report
        self._pending: dict[str, _Pending] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._manager = JobManager(SyncPsycopgConnector())
        self._refused = 0  # the last refusal that was told
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fleet answers", daemon=True)

    def __enter__(self) -> PostgresExchange:
        with self._database.connect() as connection:  # what is wrong is told now, and once
            require(connection)
            row = connection.execute("SELECT coalesce(max(id), 0) FROM refusals").fetchone()
            self._refused = row[0] if row else 0
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=10)
        self._fail(InterruptError("the coordinator ended"))

    def ask(self, request: Request, apart_from: str = "") -> Future[Answer]:
        """The answer to ``request``, put into the queue unless it is there or was answered before."""
        with self._lock:
            known = self._pending.get(request.key)
            if known is None:
                known = self._pending[request.key] = _Pending(request, apart_from)
        if self._failure:
            self._end(known, self._failure)
        return known.future

    # ---- the thread ----

    def _run(self) -> None:
        away = False
        while not self._ended.is_set():
            try:
                with self._database.connect() as connection:
                    connection.execute("LISTEN bitgen_fleet_results")
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
                if self._new():
                    self._collect(connection)
                    self._put(connection)
                # In short turns: a request that is new wakes nobody who waits for the network.
                notified = list(connection.notifies(timeout=_TURN_S, stop_after=1))
                due = time.monotonic() - looked >= _POLL_S
                if notified or due:
                    self._collect(connection)
                if due:
                    self._look_after(connection)
                    looked = time.monotonic()

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

    def _put(self, connection: psycopg.Connection[Any]) -> None:
        """Put what is new into the queue; what waits there or is being done stays as it is."""
        new = self._new()
        keys = [p.request.key for p in new]
        there = connection.execute(
            "SELECT queueing_lock FROM procrastinate_jobs WHERE queueing_lock = ANY(%s) "
            "AND status IN ('todo', 'doing')",
            (keys,),
        ).fetchall()
        queued = {row[0] for row in there}
        for pending in new:
            pending.tries = 1
            if pending.request.key not in queued:
                self._defer(connection, pending)

    def _defer(self, connection: psycopg.Connection[Any], pending: _Pending) -> None:
        request = pending.request
        live = self._live(connection, request) if pending.apart_from else []
        others = sorted(name for name in live if name != pending.apart_from)
        if others:  # spread by the key, so that not one machine gets every second opinion
            at = int(hashlib.sha256(request.key.encode()).hexdigest()[:8], 16) % len(others)
            pending.machine = others[at]
        job = QueueJob(
            queue=queue_name(request.label, request.code, request.threads, pending.machine),
            priority=request.priority,
            lock=None,
            queueing_lock=request.key,
            task_name=TASK,
            task_kwargs={"label": request.label, "request": request.text},
        )
        with contextlib.suppress(exceptions.AlreadyEnqueued), _plain_errors():
            self._manager.batch_defer_jobs(jobs=[job], connection=connection)

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
                self._defer(connection, pending)
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
        self._defer(connection, pending)

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


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Procrastinate's errors as what they come from."""
    try:
        yield
    except exceptions.AlreadyEnqueued:
        raise
    except exceptions.ConnectorException as error:
        raise error.__cause__ or error from error
