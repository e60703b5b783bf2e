"""A worker: takes jobs for its kind of CPU, one after the other, and answers them under the machine's lock.

procrastinate's loop fetches and finishes jobs and gives signs of life; measuring is done in a thread, which
waits for processes of its own. What is here beside: jobs are fetched only while the owner leaves the machine
alone; a finished answer is on disk before it is sent; and a worker that was stopped or slept so long that
others may have its job drops what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import psycopg
from procrastinate import App, PsycopgConnector, exceptions, retry
from procrastinate.job_context import JobContext
from procrastinate.jobs import Job as QueueJob
from procrastinate.jobs import Status as QueueStatus
from procrastinate.manager import JobManager
from psycopg.types.json import Json, Jsonb

from bitgen import __version__
from bitgen.errors import BitgenError, FileError
from bitgen.fingerprints import Fingerprints
from bitgen.fleet.answering import AbortedError, answer_of, calibrate
from bitgen.fleet.bounds import BOUNDS, Bounds, Machine, RefusedError, check_request
from bitgen.fleet.database import AwayError, Database, raised
from bitgen.fleet.messages import TASK, Answer, Request, queue_name, read_request
from bitgen.fleet.outbox import Outbox
from bitgen.fleet.schema import require
from bitgen.measure import Runner, Status
from bitgen.measure.load import Load, sample_load
from bitgen.records import dump

if TYPE_CHECKING:
    from typing_extensions import LiteralString

HEARTBEAT_S, BEATS = 10.0, 6  # a sign of life at least so often while a worker may be silent
_POLL_S = 2.0
_AWAY_S = 1.0
_NAME_S = 5.0  # in which the connection of a worker that was killed is gone
_STILL_S = 3.0  # between two beats, a second apart: kernels that failed meanwhile are measured again
_POOL_S = 5.0  # to wait for a connection before the database counts as away
_LOAD_EVERY_S = 5.0  # between looks at the load, each of which costs 0.3 s
_CALIBRATE_EVERY_S = 3600.0
_STEAL = 0.05  # of the CPUs, taken by a hypervisor for others: times mean nothing then
_TRIES = 5  # of a job that fails for no fault of its own, such as a full disk
_AGAIN_S = 1.0
_BROKEN_S = 60.0
_GRACE_S = 30.0  # for the job under way when the worker is told to stop

T = TypeVar("T")


class Measurer(Runner, Protocol):
    """A `Runner` that can give the machine back between jobs."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Settings:
    """How a worker behaves. ``max_load``: the share of the CPUs that others may use; 1 never asks.

    ``idle_s``: it ends when no job has come for so long; None: never.
    """

    max_load: float = 0.25
    idle_s: float | None = None
    bounds: Bounds = BOUNDS


class LateError(BitgenError):
    """This process stood still so long that its job may have been given to another."""


_AGAIN = (LateError, AwayError, AbortedError)  # by whoever is free: nothing is wrong with the job


class Worker:
    """One machine's worker; `run` serves until it is told to stop.

    ``measurer`` makes the runner that measures, anew for each calibration. ``report`` gets what a person
    should know, a line at a time.
    """

    def __init__(
        self,
        database: Database,
        machine: Machine,
        measurer: Callable[[], Measurer],
        fingerprints: Fingerprints,
        outbox: Outbox,
        compiler: str,
        settings: Settings,
        report: Callable[[str], None],
    ) -> None:
        self._database = database
        self._machine = machine
        self._make_measurer = measurer
        self._fingerprints = fingerprints
        self._outbox = outbox
        self._compiler = compiler
        self._settings = settings
        self._report = report
        self._measurer: Measurer | None = None
        self._stalled_s = math.inf
        self._pulse = Pulse()
        self._state = ""
        self._calibrated_at = -math.inf
        self._looked_at = -math.inf
        self._broken = ("", -math.inf)  # why it cannot measure, and until when it does not try again
        self._worked_at = time.monotonic()
        self._busy = False
        self._stopped = False
        self._connection: psycopg.Connection[Any] | None = None  # of jobs and calibrations
        self._using = threading.Lock()

    def run(self) -> None:
        """Work until a signal, or until idle for too long; BitgenError for what a person must mend."""
        logging.getLogger("procrastinate").setLevel(logging.CRITICAL)  # it logs whole jobs
        logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)  # what it says is told below, once
        away = False
        while not self._stopped:
            try:
                # Closed, not committed: it may have been cut, which is no matter to what the others did.
                with contextlib.closing(self._database.connect()) as connection:
                    self._take_name(connection)  # for as long as this connection is open
                    self._begin(connection)
                    if away:
                        self._report("the database is back")
                    away = False
                    asyncio.run(self._serve())
            except (AwayError, exceptions.ConnectorException) as error:
                if isinstance(error.__cause__, psycopg.errors.ForeignKeyViolation):
                    self._report("this worker was silent for too long and registers again")
                    continue  # its jobs are others' by now
                if not away:
                    self._report(f"the database is away, waiting for it: {_line(error)}")
                away = True
                if self._is_idle():
                    self._report("ending: no job came, and the database is away")
                    break
                time.sleep(_AWAY_S)
        self._close()
        if self._connection:
            self._connection.close()

    # ---- with the database ----

    def _take_name(self, connection: psycopg.Connection[Any]) -> None:
        """Hold the lock of this worker's name; BitgenError when another one has it."""
        ends = time.monotonic() + _NAME_S
        while True:
            with raised("the worker cannot register"):
                query = "SELECT pg_try_advisory_lock(hashtextextended('bitgen worker ' || %s, 0))"
                row = connection.execute(query, (self._machine.name,)).fetchone()
            if row and row[0]:
                return
            if time.monotonic() > ends:
                name = self._machine.name
                raise BitgenError(f"another worker is called {name}; give this one a name with --name")
            time.sleep(_AWAY_S / 4)

    def _begin(self, connection: psycopg.Connection[Any]) -> None:
        """Register, and send what was left from before."""
        self._stalled_s = require(connection)
        machine = self._machine
        with raised("the worker cannot register"):
            connection.execute(
                "SELECT fleet_register(%s, %s, %s, %s, %s, %s, %s)",
                (
                    *(machine.name, machine.label, __version__, machine.code, machine.threads),
                    *(self._compiler[:200], Jsonb(dump(machine.cpu))),
                ),
            )
        self._calibrated_at = -math.inf
        self._flush(connection)

    def _flush(self, connection: psycopg.Connection[Any]) -> None:
        """Send what is finished and was not sent."""
        for path, job, answer in self._outbox.kept():
            self._send(connection, job, answer)
            self._outbox.sent(path)
            self._report(f"an answer that was kept here was sent: {answer.key[:12]}")

    async def _serve(self) -> None:
        """Fetch and answer jobs until the connection is lost or somebody stops the worker."""
        connector = PsycopgConnector(conninfo=self._database.text, min_size=1, max_size=3, timeout=_POOL_S)
        app = App(connector=connector)
        app.job_manager = _Manager(app.connector, self._may_work, self._machine.name)
        app.task(name=TASK, pass_context=True, retry=_Again())(self._do)
        beat = min(HEARTBEAT_S, self._stalled_s / BEATS)
        with raised("lost the connection"):
            async with app.open_async():
                work = asyncio.create_task(
                    app.run_worker_async(
                        queues=list(self._queues()),
                        name=self._machine.name,
                        fetch_job_polling_interval=min(_POLL_S, beat),
                        update_heartbeat_interval=beat,
                        stalled_worker_timeout=self._stalled_s,
                        shutdown_graceful_timeout=_GRACE_S,
                        install_signal_handlers=False,
                    )
                )
                for signum in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(signum, self._stop, work)
                watch = asyncio.create_task(self._watch(beat, work))
                try:
                    await work
                except asyncio.CancelledError:
                    self._stopped = True
                finally:
                    watch.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await watch

    def _stop(self, work: asyncio.Task[None]) -> None:
        """By a signal, or because nothing came: the job under way is finished if that does not take long."""
        if not self._stopped:
            self._report("ending" + (", after the job under way" if self._busy else ""))
        self._stopped = True
        work.cancel()

    def _is_idle(self) -> bool:
        """Whether no job came for as long as it may wait."""
        idle_s = self._settings.idle_s
        return idle_s is not None and not self._busy and time.monotonic() - self._worked_at > idle_s

    def _queues(self) -> Iterator[str]:
        """Of every number of threads that this machine gives, and of the jobs for itself alone."""
        machine = self._machine
        for threads in range(1, machine.threads + 1):
            yield queue_name(machine.label, machine.code, threads)
            yield queue_name(machine.label, machine.code, threads, machine.name)

    async def _watch(self, beat: float, work: asyncio.Task[None]) -> None:
        """Feel the pulse, give signs of life, look after the jobs of the dead, end when idle."""
        reaped = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, beat))
            self._pulse.beat()
            if self._is_idle():
                self._stop(work)
                return
            if time.monotonic() - reaped >= self._stalled_s / 2:
                reaped = time.monotonic()
                with contextlib.suppress(AwayError):
                    await asyncio.to_thread(self._call, "SELECT fleet_reap()")

    def _call(self, query: str, *values: object) -> tuple[Any, ...]:
        """One row of the database; ``query`` is one of this module's."""
        return self._with_connection(lambda connection: _row(connection, query, values))

    def _with_connection(self, use: Callable[[psycopg.Connection[Any]], T]) -> T:
        """What ``use`` gives, of the connection of jobs; asked once more where that was lost meanwhile.

        A new connection for each call costs the server a process (10 ms), three times a job.
        """
        with self._using:
            if self._connection:
                try:
                    return use(self._connection)
                except AwayError:
                    self._connection.close()
            self._connection = self._database.connect()
            return use(self._connection)

    # ---- before a job ----

    async def _may_work(self, connector: PsycopgConnector) -> bool:
        """Whether to fetch a job now. It is asked while nothing is measured, so it may look at the load."""
        row = await connector.execute_query_one_async(
            "SELECT hold, calibrated FROM fleet_seen(%(machine)s, %(state)s)",
            machine=self._machine.name,
            state=self._state[:200] or None,
        )
        reason: str = row["hold"]
        if not reason and time.monotonic() - self._looked_at >= _LOAD_EVERY_S:
            load = await asyncio.to_thread(sample_load) if self._settings.max_load < 1 else None
            reason = self._too_loaded(load)
            self._looked_at = -math.inf if reason else time.monotonic()
        due = time.monotonic() - self._calibrated_at >= _CALIBRATE_EVERY_S or not row["calibrated"]
        if due and (not reason or reason.startswith("quarantined")):  # it may be well again
            reason = await asyncio.to_thread(self._calibrate) or reason
        if not reason and any(self._outbox.folder.glob("*.json")):
            await asyncio.to_thread(self._flush_now)
        if self._state != (reason or "waiting"):
            self._report(reason or "waiting for jobs")
            self._state = reason or "waiting"
        self._pulse.mark()  # the job is this worker's from before it is fetched
        return not reason

    def _flush_now(self) -> None:
        self._with_connection(self._flush)

    def _too_loaded(self, load: Load | None) -> str:
        if load is None:
            return ""
        if load.steal > _STEAL:
            return f"paused: the hypervisor takes {load.steal:.0%} of the CPUs for others"
        if load.busy > self._settings.max_load:
            return f"paused: its owner uses {load.busy:.0%} of the CPUs"
        return ""

    def _calibrate(self) -> str:
        """Measure what the machine can do at most; why it cannot, empty where it could."""
        if time.monotonic() < self._broken[1]:
            return self._broken[0]
        try:
            load = sample_load() if self._settings.max_load < 1 else None
            self._close()
            self._measurer = self._make_measurer()
            found = calibrate(self._measurer, self._machine)
            self._measurer.close()
        except BitgenError as error:
            self._broken = (f"broken: {error.message}", time.monotonic() + _BROKEN_S)
            return self._broken[0]
        found = replace(found, busy=load.busy, steal=load.steal) if load else found
        values = (found.threads, found.dram_gbs, found.peak_gops, found.ratio, found.busy, found.steal)
        self._call("SELECT fleet_calibrated(%s, %s, %s, %s, %s, %s, %s)", self._machine.name, *values)
        self._calibrated_at = time.monotonic()
        return ""

    # ---- a job ----

    def _do(self, context: JobContext, /, request: object = None, **_: object) -> None:
        """Answer one job; whatever it holds, the worker goes on."""
        key = context.job.queueing_lock or ""
        self._busy = True
        try:
            asked = self._read(context.job, request)
            if self._call("SELECT fleet_known(%s)", asked.key)[0]:
                return
            self._call("SELECT * FROM fleet_seen(%s, 'measuring')", self._machine.name)
            answer = self._answer(asked, context.should_abort)
            still_s = self._pulse.longest()
            if still_s > self._stalled_s / 2 or (still_s > _STILL_S and _has_failures(answer)):
                raise LateError("this machine stood still; what it measured meanwhile is dropped")
            self._deliver(answer, {"attempt": context.job.attempts, "label": asked.label})
        except RefusedError as error:
            self._report(f"refused a job: {error.message}")
            self._call("SELECT fleet_refuse(%s, %s, %s)", key, self._machine.name, error.message)
            raise
        except BitgenError as error:
            self._report(f"a job failed: {error.message}")
            if not isinstance(error, _AGAIN):
                self._calibrated_at = -math.inf  # before another one: is it the job, or this machine?
            if context.job.attempts + 1 >= _TRIES and not isinstance(error, _AGAIN):
                self._call("SELECT fleet_refuse(%s, %s, %s)", key, self._machine.name, error.message)
            raise
        finally:
            self._worked_at, self._busy = time.monotonic(), False
            if self._measurer:
                self._measurer.close()  # the owner may tune, too

    def _read(self, job: QueueJob, text: object) -> Request:
        try:
            asked = read_request(text)
        except BitgenError as error:
            raise RefusedError(error.message) from error
        if asked.key != job.queueing_lock:
            raise RefusedError("a request with the key of another")
        check_request(asked, self._machine, self._settings.bounds)
        return asked

    def _answer(self, request: Request, stops: Callable[[], bool]) -> Answer:
        if self._measurer is None:
            self._measurer = self._make_measurer()
        name, bounds = self._machine.name, self._settings.bounds
        return answer_of(request, name, self._measurer, self._fingerprints, bounds, stops)

    def _deliver(self, answer: Answer, job: dict[str, Any]) -> None:
        """On disk first, then to the database. A full disk is no reason not to send."""
        kept = None
        try:
            kept = self._outbox.put(answer, job)
        except FileError as error:
            self._report(f"{error.message}; the answer is sent without a copy here")
        self._with_connection(lambda connection: self._send(connection, job, answer))
        if kept:
            self._outbox.sent(kept)

    def _send(self, connection: psycopg.Connection[Any], job: dict[str, Any], answer: Answer) -> None:
        with raised("the answer was not taken"):
            connection.execute(
                "SELECT fleet_result(%s, %s, %s, %s, %s, %s)",
                (
                    *(answer.key, str(job.get("label", ""))[:64], answer.machine),
                    *(int(job.get("attempt", 0)), answer.seconds, Json(dump(answer))),
                ),
            )

    def _close(self) -> None:
        if self._measurer:
            self._measurer.close()
            self._measurer = None


def _row(connection: psycopg.Connection[Any], query: str, values: Sequence[object]) -> tuple[Any, ...]:
    with raised("the database refused"):
        row = connection.execute(query.encode(), values).fetchone()
    return tuple(row or ())


def _line(error: BaseException) -> str:
    """What is behind an error of procrastinate, which says no more than that there was one."""
    text = error.message if isinstance(error, BitgenError) else str(error.__cause__ or error)
    return text.strip().partition("\n")[0]


def _has_failures(answer: Answer) -> bool:
    """Whether a kernel hung or crashed, as one seems to that is measured by processes that are stopped."""
    hung = any(trial.measurement.status in (Status.TIMEOUT, Status.CRASHED) for trial in answer.trials)
    return hung or (answer.race is not None and any(answer.race.dropped))


class Pulse:
    """Tells how long this process stood still: stopped by a signal, or on a machine that slept.

    By a clock that goes on while the machine sleeps, never by that on the wall, which people set.
    """

    def __init__(self) -> None:
        self._last = _awake()
        self._longest = 0.0

    def beat(self) -> None:
        now = _awake()
        self._longest = max(self._longest, now - self._last)
        self._last = now

    def mark(self) -> None:
        """What comes from now on counts."""
        self.beat()
        self._longest = 0.0

    def longest(self) -> float:
        """The seconds between two beats at most, since the mark."""
        self.beat()
        return self._longest


def _awake() -> float:
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


# ---- procrastinate, with a gate before jobs and a fence behind them ----


class _Manager(JobManager):
    """Fetches only while ``may_work``; what it changes is its own job, or nothing.

    What the database does not take is not lost: an answer is in the outbox, and the job comes back to
    somebody.
    """

    def __init__(self, connector: Any, may_work: Callable[[Any], Awaitable[bool]], machine: str) -> None:
        super().__init__(connector)
        self._may_work = may_work
        self._machine = machine
        self._owed: list[tuple[LiteralString, dict[str, Any]]] = []  # changes that the database did not take

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> QueueJob | None:
        while self._owed:
            query, values = self._owed[0]
            await self.connector.execute_query_async(query, **values)
            del self._owed[0]
        return await super().fetch_job(queues, worker_id) if await self._may_work(self.connector) else None

    async def finish_job(self, job: QueueJob, status: QueueStatus, delete_job: bool) -> None:  # noqa: ARG002
        await self._change("SELECT fleet_finish(%(id)s, %(worker)s, %(tries)s, %(x)s)", job, status.value)

    async def retry_job(self, job: QueueJob, *_: Any, **__: Any) -> None:
        # By the database's clock: that of this machine may be anywhere.
        await self._change("SELECT fleet_retry(%(id)s, %(worker)s, %(tries)s, %(x)s)", job, _AGAIN_S)

    async def update_heartbeat(self, worker_id: int) -> None:
        with contextlib.suppress(exceptions.ConnectorException):  # the next one makes up for it
            await super().update_heartbeat(worker_id)
            await self.connector.execute_query_async(
                "SELECT FROM fleet_seen(%(machine)s, NULL)", machine=self._machine
            )

    async def _change(self, query: LiteralString, job: QueueJob, x: object) -> None:
        values = {"id": job.id, "worker": job.worker_id, "tries": job.attempts, "x": x}
        try:
            await self.connector.execute_query_async(query, **values)
        except exceptions.ConnectorException:
            self._owed.append((query, values))


class _Again(retry.BaseRetryStrategy):
    """A refused job is not tried again here; a failure of the machine a few times, a late one always."""

    def get_retry_decision(self, *, exception: BaseException, job: QueueJob) -> retry.RetryDecision | None:
        late = isinstance(exception, _AGAIN)
        if isinstance(exception, RefusedError) or (job.attempts + 1 >= _TRIES and not late):
            return None
        return retry.RetryDecision()
