"""The fleet over a real PostgreSQL with real workers: everything dies at bad moments, nothing is lost."""

from __future__ import annotations

import contextlib
import ctypes.util
import datetime
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import postgres
import pytest

if postgres.missing():
    pytest.skip(postgres.missing(), allow_module_level=True)

import psycopg
from fleet_machines import FakeMachine, fingerprints, machine_of
from fleet_processes import FLAGS, ROOT, STALLED_S, Fleet, Trouble, check_outcome, replayed
from postgres import Postgres

from bitgen import cli
from bitgen.errors import BitgenError
from bitgen.fleet.admin import hold, prune, pull, release, set_aside, status
from bitgen.fleet.answering import answer_of
from bitgen.fleet.database import find_database
from bitgen.fleet.exchange import PostgresExchange
from bitgen.fleet.messages import TASK, Answer, Request, queue_name
from bitgen.fleet.outbox import Outbox
from bitgen.fleet.schema import WORKER, initialise, require
from bitgen.fleet.worker import Settings, Worker
from bitgen.measure import Job
from bitgen.records import dump
from bitgen.space import space_for
from bitgen.spec import Shape, regime_named
from bitgen.store import RecordStore

SHAPE = Shape(640, 256)


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    made = Postgres()
    yield made
    made.close()


@pytest.fixture
def new_fleet(server: Postgres, tmp_path: Path) -> Iterator[Callable[..., Fleet]]:
    made: list[Fleet] = []

    def make(**options: Any) -> Fleet:
        made.append(Fleet(server, f"fleet{time.monotonic_ns()}", tmp_path, **options))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()


@pytest.fixture(scope="module")
def shared(server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two workers for all tests that hurt nobody."""
    made = Fleet(server, "shared", tmp_path_factory.mktemp("shared"), stalled_s=30)
    made.worker("m1")
    made.worker("m2", "--factor", "2")
    made.wait(lambda: len(made.sql("SELECT FROM live_machines")) == 2)
    yield made
    made.close()


_serial = iter(range(1, 1000))


def request(machine: str = "m1", cpu: str = "zen4", count: int = 4, **changes: Any) -> Request:
    """One that nobody asked before."""
    it = machine_of(machine, cpu)
    level = next(iter(it.levels.values()))
    points = space_for("i2s", level, regime_named("n1"), SHAPE, it.cpu).points
    jobs = tuple(Job(spec, SHAPE, 1, 1, True) for spec in points[:count])
    asked = Request("measure", it.label, it.code, 1, (level.name,), jobs, occasion=next(_serial))
    return replace(asked, **changes)


@contextlib.contextmanager
def exchange_of(fleet: Fleet, label: str = "") -> Iterator[tuple[PostgresExchange, list[str]]]:
    lines: list[str] = []
    with PostgresExchange(fleet.database("coordinator1"), lines.append, label) as exchange:
        yield exchange, lines


def asked(fleet: Fleet, *requests: Request) -> list[Answer]:
    with exchange_of(fleet) as (exchange, _):
        futures: list[Future[Answer]] = [exchange.ask(one) for one in requests]
        return [future.result(60) for future in futures]


# ---- the schema ----


def test_init_may_be_called_again(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    lines = initialise(fleet.database("postgres"), 60.0)
    assert lines == [
        "the schema is up to date",
        "a worker without a sign of life for 60 s loses its job to another",
    ]
    with fleet.database("worker1").connect() as connection:
        assert require(connection) == 60.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("UPDATE fleet SET schema = 99", "newer"),
        ("UPDATE fleet SET procrastinate = '99.0'", "newer"),
        ("UPDATE fleet SET procrastinate = '3.1'", "bitgen fleet init to migrate"),
        ("DROP SCHEMA bitgen_fleet CASCADE", "holds no fleet: run bitgen fleet init"),
    ],
)
def test_another_schema_is_refused_in_one_line(
    change: str, text: str, new_fleet: Callable[..., Fleet]
) -> None:
    fleet = new_fleet()
    fleet.sql(change)
    with fleet.database("postgres").connect() as connection, pytest.raises(BitgenError, match=text):
        require(connection)


def test_who_may_not_make_roles_is_told(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    fleet.sql("CREATE ROLE nobody1 LOGIN") if not fleet.sql(
        "SELECT FROM pg_roles WHERE rolname = 'nobody1'"
    ) else None
    fleet.sql("DROP SCHEMA bitgen_fleet CASCADE")
    with pytest.raises(BitgenError, match="permission denied"):
        initialise(fleet.database("nobody1"), 60.0)


# ---- rights ----


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM results",
        "SELECT args FROM procrastinate_jobs",
        "INSERT INTO results VALUES (repeat('0', 64), 'zen4', 'm1', 0, 0, '{}')",
        "DELETE FROM results",
        "UPDATE machines SET role = 'worker1'",
        "DELETE FROM holds",
        "INSERT INTO procrastinate_jobs (queue_name, task_name) VALUES ('a', 'b')",
        "SELECT procrastinate_defer_jobs_v1(NULL)",
        "SELECT procrastinate_finish_job_v1(1, 'succeeded', true)",
        "SELECT fleet_prune('1 day')",
        "SELECT fleet_reject('', '')",
        "CREATE TABLE bitgen_fleet.mine (a int)",
        "DROP TABLE results",
    ],
)
def test_a_worker_may_do_its_work_and_no_more(query: str, shared: Fleet) -> None:
    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.InsufficientPrivilege)):
        shared.sql(query, user="worker1")


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM results",
        "INSERT INTO machines (name) VALUES ('x')",
        "SELECT fleet_register('x', 'zen4', '1', '1', 1, 'c', '{}')",
        "SELECT fleet_result(repeat('0', 64), 'zen4', 'm1', 0, 0, '{}')",
        "DROP SCHEMA bitgen_fleet CASCADE",
    ],
)
def test_a_coordinator_asks_and_does_not_answer(query: str, shared: Fleet) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        shared.sql(query, user="coordinator1")


def test_a_machine_is_of_one_role(shared: Fleet) -> None:
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        shared.sql(f"CREATE ROLE worker2 LOGIN IN ROLE {WORKER}")
    for call in (
        "SELECT fleet_register('m1', 'zen4', '1', '1', 1, 'c', '{}')",
        "SELECT fleet_result(repeat('0', 64), 'zen4', 'm1', 0, 0, '{}')",
        "SELECT fleet_calibrated('m1', 1, 1, 1, 1, 0, 0)",
        "SELECT fleet_seen('m1', 'mine now')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="m1"):
            shared.sql(call, user="worker2")


# ---- work ----


def test_a_question_is_answered_once(shared: Fleet) -> None:
    one, two = request(), request()
    answers = asked(shared, one, two, one)
    assert answers[0] == answers[2] != answers[1]
    assert asked(shared, one) == answers[:1]  # from the table
    rows = shared.sql("SELECT status FROM procrastinate_jobs WHERE queueing_lock = %s", one.key)
    assert rows == [("succeeded",)]
    expected = answer_of(
        one, answers[0].machine, FakeMachine(2 if answers[0].machine == "m2" else 1), fingerprints
    )
    assert [t.measurement for t in answers[0].trials] == [t.measurement for t in expected.trials]


def test_a_second_opinion_comes_from_another_machine(shared: Fleet) -> None:
    with exchange_of(shared) as (exchange, _):
        for _ in range(3):
            first = exchange.ask(request()).result(60).machine
            assert exchange.ask(request(), apart_from=first).result(60).machine != first


def test_what_is_measured_can_be_seen_and_pulled(shared: Fleet, tmp_path: Path) -> None:
    asked(shared, request())
    families, machines = status(shared.database("coordinator1"))
    assert [(row.label, row.machines) for row in families] == [("zen4", 2)]
    assert [row.name for row in machines] == ["m1", "m2"]
    assert sum(row.done for row in machines) == families[0].done == shared.results()
    lines: list[str] = []
    added = pull(shared.database("coordinator1"), tmp_path, lines.append)
    assert list(added) == [tmp_path / "zen4.jsonl"]
    assert not pull(shared.database("coordinator1"), tmp_path, lines.append)
    assert len(list(RecordStore(tmp_path / "zen4.jsonl").trials())) > 0
    assert not lines
    assert prune(shared.database("coordinator1"), 1.0)["results"] == 0


@pytest.mark.parametrize("kind", ["machine", "family"])
def test_whoever_is_held_gets_nothing(kind: str, shared: Fleet) -> None:
    coordinator = shared.database("coordinator1")
    names = ["m1", "m2"] if kind == "machine" else ["zen4"]
    hold(coordinator, kind, names, "paused", "a test")
    shared.wait(lambda: all("paused: a test" in shared.said(name).splitlines()[-1] for name in ("m1", "m2")))
    with exchange_of(shared) as (exchange, _):
        future = exchange.ask(request())
        time.sleep(0.5)
        assert not future.done()
        release(coordinator, kind, names)
        future.result(60)
    with pytest.raises(BitgenError, match="has no machine m9; it has m1, m2"):
        hold(coordinator, "machine", ["m9"], "paused", "x")


def test_hostile_jobs_are_refused_and_the_worker_goes_on(shared: Fleet) -> None:
    """Rows as somebody writes them who owns the database."""
    good = request()
    queue = queue_name(good.label, good.code, 1)
    plain = json.loads(good.text)
    bad = [
        {"kind": "measure"},
        {**plain, "jobs": "; rm -rf /"},
        {**plain, "code": "import os"},
        {**plain, "jobs": plain["jobs"] * 1000},
        {**plain, "threads": 4096},
        plain,  # with the key of another
        "[" * 100_000,
    ]
    rows = [{"request": json.dumps(row)} for row in bad]
    rows += [{"request": "]" * (2 << 20)}, {"request": plain}, {"nonsense": 1}, {}]  # type: ignore[dict-item]
    before = shared.sql("SELECT count(*) FROM refusals")[0][0]
    for number, row in enumerate(rows):
        shared.sql(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, queueing_lock, args, priority) "
            "VALUES (%s, %s, %s, %s, 99)",
            *(queue, TASK if number else "os.system", f"hostile{number}", json.dumps(row)),
        )
    assert asked(shared, good)[0].key == good.key
    shared.wait(lambda: not shared.sql("SELECT FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"))
    ended = shared.sql("SELECT DISTINCT status FROM procrastinate_jobs WHERE queueing_lock LIKE 'hostile%%'")
    assert ended == [("failed",)]
    assert shared.sql("SELECT count(*) FROM refusals")[0][0] - before == len(rows) - 1
    assert "Traceback" not in shared.said("m1") + shared.said("m2")


def test_answers_that_cannot_be_are_asked_for_again(shared: Fleet) -> None:
    """A worker that lies is set aside, and another one answers."""
    good = request()
    payload = dump(answer_of(good, "m2", FakeMachine(), fingerprints))
    payload["trials"] = payload["trials"][:1]
    shared.sql(
        "SELECT fleet_result(%s, 'zen4', 'm2', 0, 1, %s)", good.key, json.dumps(payload), user="worker1"
    )
    try:
        assert asked(shared, good)[0].machine == "m1"
        held = shared.sql("SELECT name, state, reason FROM holds")
        assert held == [("m2", "quarantined", "m2 answered for other kernels than it was asked for")]
    finally:
        release(shared.database("coordinator1"), "machine", ["m2"])


def test_what_every_machine_refuses_ends_the_tune(shared: Fleet) -> None:
    wide = request(jobs=(replace(request().jobs[0], shape=Shape(1 << 20, 1 << 12)),))
    with pytest.raises(BitgenError, match=r"a job failed 3 times: m[12]: a matrix of 1048576x4096; at most"):
        asked(shared, wide)


REFUSED = "another coordinator tunes zen4 now"


def test_there_is_one_coordinator(
    shared: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bitgen.fleet.exchange._LOCK_S", 0.1)
    monkeypatch.setenv("BITGEN_FLEET_DSN", shared.dsn("coordinator1"))
    with exchange_of(shared, "zen4"):
        argv = ["fleet", "tune", *FLAGS, "--families", "zen4", "--logs", str(shared.folder / "logs")]
        assert cli.main(argv) == BitgenError.exit_code
    assert capsys.readouterr().err == f"bitgen: {REFUSED}\n"
    with exchange_of(shared, "zen4"), exchange_of(shared, "zen3"), exchange_of(shared):
        pass


def test_there_is_one_coordinator_after_the_database_died(
    new_fleet: Callable[..., Fleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock died with its connection, and comes back with it; where another has it meanwhile, it ends."""
    monkeypatch.setattr("bitgen.fleet.exchange._LOCK_S", 0.1)
    monkeypatch.setattr("bitgen.fleet.exchange._LOST_S", 0.1)
    fleet = new_fleet()
    locked = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted"
    with exchange_of(fleet, "zen4") as (exchange, lines):
        fleet.server.kill()
        fleet.server.start()
        fleet.wait(lambda: "the database is back" in lines and fleet.sql(locked))
        with pytest.raises(BitgenError, match=REFUSED), exchange_of(fleet, "zen4"):
            pass
        monkeypatch.setattr("bitgen.fleet.exchange._AWAY_S", 2.0)
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'coordinator1'"
        fleet.sql(cut)
        fleet.wait(lambda: len(lines) > 2)  # it is away for two seconds
        with exchange_of(fleet, "zen4"):
            future = exchange.ask(request())
            with pytest.raises(BitgenError, match=REFUSED):
                future.result(60)


def test_a_tune_waits_for_a_database_that_is_away(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    fleet.worker("m1")
    fleet.wait(lambda: fleet.sql("SELECT FROM live_machines"))
    fleet.server.kill()
    coordinator = fleet.coordinator()
    fleet.wait(lambda: "zen4: the database is away, waiting 60 s for it: " in fleet.said("coordinator"))
    fleet.server.start()
    assert coordinator.wait(120) == 0, fleet.said("coordinator")
    assert (fleet.folder / "winners" / "zen4.json").exists()


# ---- whole tunes, through everything ----


def test_a_tune_survives_kills_of_everybody(new_fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """Worker, coordinator and database by kill -9, a worker that stands still and goes on."""
    fleet = new_fleet()
    workers = {f"m{i}": fleet.worker(f"m{i}", "--factor", str(2**i), "--sleep", "0.01") for i in range(3)}
    coordinator = fleet.coordinator()
    fleet.wait(lambda: fleet.results() >= 4)
    workers["m0"].kill()
    workers["m1"].send_signal(signal.SIGSTOP)
    seen = fleet.results()
    fleet.wait(lambda: fleet.results() >= seen + 3)
    coordinator.kill()
    fleet.worker("m0", "--sleep", "0.01")
    stopped = time.monotonic()
    coordinator = fleet.coordinator()
    seen = fleet.results()
    fleet.wait(lambda: fleet.results() >= seen + 3 and time.monotonic() > stopped + STALLED_S)
    workers["m1"].send_signal(signal.SIGCONT)
    seen = fleet.results()
    fleet.wait(lambda: fleet.results() >= seen + 3)
    fleet.server.kill()
    time.sleep(0.5)
    fleet.server.start()
    assert coordinator.wait(90) == 0, fleet.said("coordinator")
    check_outcome(fleet, {"zen4": replayed(tmp_path)})


@pytest.mark.deep
def test_eight_workers_of_two_families_through_random_kills(
    new_fleet: Callable[..., Fleet], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    fleet, kinds = new_fleet(), ("zen4", "zen3")
    trouble = Trouble(fleet, kinds, 4, 0.1, random.Random(os.environ.get("SEED", "1")))
    assert trouble.run(90.0) == 0, fleet.said("coordinator")
    record_property("oracle", f"fleet: {fleet.results()} results through {trouble.counts}")
    check_outcome(fleet, {cpu: replayed(tmp_path, cpu) for cpu in kinds})


@pytest.mark.deep
def test_eight_workers_take_a_fifth_of_the_time(
    new_fleet: Callable[..., Fleet], record_property: Callable[..., None]
) -> None:
    seconds = {}
    for count in (1, 8):
        fleet = new_fleet()
        for i in range(count):
            fleet.worker(f"m{i}", "--sleep", "0.25")
        fleet.wait(lambda: len(fleet.sql("SELECT FROM live_machines")) == count, 300)  # noqa: B023
        began = time.monotonic()
        assert fleet.coordinator().wait(600) == 0
        seconds[count] = time.monotonic() - began
        fleet.close()
        shutil.rmtree(fleet.folder / "logs")
        shutil.rmtree(fleet.folder / "winners")
    load = os.getloadavg()[1]
    said = f"{seconds[1]:.1f} s with one worker, {seconds[8]:.1f} s with eight, load {load:.1f}"
    record_property("oracle", f"fleet: {said}")
    assert seconds[8] <= seconds[1] / 5


# ---- a worker in trouble ----


def test_a_zombie_changes_nothing_of_who_has_its_job(new_fleet: Callable[..., Fleet]) -> None:
    """It stands still until another one does its job, and wakes up in the middle of that."""
    fleet = new_fleet()
    zombie = fleet.worker("m1", "--sleep", "0.2")
    fleet.wait(lambda: fleet.sql("SELECT FROM live_machines"))
    slow = request()
    with exchange_of(fleet) as (exchange, _):
        future = exchange.ask(slow)
        doing = "SELECT worker_id, attempts FROM procrastinate_jobs WHERE status = 'doing'"
        fleet.wait(lambda: fleet.sql(doing))
        zombie.send_signal(signal.SIGSTOP)
        other = fleet.worker("m2", "--sleep", "0.6")
        fleet.wait(lambda: any(attempts for _, attempts in fleet.sql(doing)))
        zombie.send_signal(signal.SIGCONT)
        fleet.wait(lambda: "stood still" in fleet.said("m1"))
        assert fleet.sql(doing), "the other one still has it"
        assert future.result(60).machine == "m2"
        assert exchange.ask(request()).result(60)
    fleet.wait(lambda: not fleet.sql(doing))
    assert zombie.poll() is None
    assert other.poll() is None
    assert fleet.sql("SELECT DISTINCT status FROM procrastinate_jobs") == [("succeeded",)]


def test_a_kernel_that_was_stopped_with_its_worker_has_not_hung(new_fleet: Callable[..., Fleet]) -> None:
    """Ctrl-Z, too short for its job to be another's: what timed out meanwhile is measured again."""
    fleet = new_fleet(stalled_s=60.0)
    worker = fleet.worker("m1", "--sleep", "0.2", "--hangs", "2")
    fleet.wait(lambda: fleet.sql("SELECT FROM live_machines"))
    with exchange_of(fleet) as (exchange, _):
        future = exchange.ask(request())
        fleet.wait(lambda: fleet.sql("SELECT FROM machines WHERE state = 'measuring'"))
        worker.send_signal(signal.SIGSTOP)
        time.sleep(4)
        worker.send_signal(signal.SIGCONT)
        assert all(trial.measurement.ok for trial in future.result(60).trials)
    assert "stood still" in fleet.said("m1")


def test_an_answer_outlives_the_database_and_the_worker(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet(stalled_s=30.0)
    worker = fleet.worker("m1", "--sleep", "0.2")
    fleet.wait(lambda: fleet.sql("SELECT FROM live_machines"))
    asked_for = request()
    with exchange_of(fleet) as (exchange, lines):
        future = exchange.ask(asked_for)
        fleet.wait(lambda: fleet.sql("SELECT FROM machines WHERE state = 'measuring'"))
        fleet.server.kill()
        kept = fleet.folder / "outbox" / "m1" / f"{asked_for.key}.json"
        fleet.wait(kept.exists)
        worker.kill()
        fleet.server.start()
        assert not future.done()
        fleet.worker("m1")
        assert future.result(60).key == asked_for.key
        fleet.wait(lambda: not kept.exists())
    assert "the database is back" in lines
    sent = f"an answer that was kept here was sent: {asked_for.key[:12]}"
    fleet.wait(lambda: sent in fleet.said("m1"))  # said when it is gone already


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 kB, full but for what a folder takes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.getuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs: {done.stderr.decode(errors='replace').strip()}")
    (folder / "outbox").mkdir()
    with contextlib.suppress(OSError):
        (folder / "full").write_bytes(bytes(16384))
    yield folder / "outbox"
    subprocess.run([shutil.which("umount") or "umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_no_answer(new_fleet: Callable[..., Fleet], small_disk: Path) -> None:
    answer = answer_of(request(), "m1", FakeMachine(), fingerprints)
    with pytest.raises(BitgenError, match="No space left"):
        Outbox(small_disk).put(answer, {})
    assert not list(small_disk.iterdir())
    fleet = new_fleet()
    worker = fleet.worker("m1", "--outbox", str(small_disk), "--idle", "3")
    assert asked(fleet, request())[0].machine == "m1"
    assert "No space left on device; the answer is sent without a copy here" in fleet.said("m1")
    assert worker.wait(60) == 0, "it ends when nothing comes"


def faketime() -> str:
    """Why clocks cannot be made to jump; empty where they can."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    return str(found[0]) if found else ctypes.util.find_library("faketime") or ""


@pytest.mark.skipif(not faketime(), reason="libfaketime is not installed (apt install faketime)")
def test_a_clock_that_jumps_is_no_matter(new_fleet: Callable[..., Fleet], tmp_path: Path) -> None:
    """A worker lives a year ahead, and its clock jumps by days back and forth while it works."""
    fleet = new_fleet()
    clock = tmp_path / "clock"
    clock.write_text("+365d")
    fake = {"LD_PRELOAD": faketime(), "FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
    fleet.worker("m1", "--sleep", "0.02", **fake, FAKETIME_TIMESTAMP_FILE=str(clock))
    fleet.wait(lambda: fleet.sql("SELECT FROM live_machines"))
    with exchange_of(fleet) as (exchange, _):
        futures = [exchange.ask(request())]
        futures[0].result(60)
        for jump in ("+3d", "-3d", "+0", "+400d", "-1d"):
            clock.write_text(jump)
            futures += [exchange.ask(request()) for _ in range(3)]
            time.sleep(0.2)
        answers = [future.result(60) for future in futures]
    assert len(answers) == fleet.results() == 16
    times = [trial.time - time.time() for answer in answers for trial in answer.trials]
    assert max(times) > 300 * 86400, "the clock was not faked"
    pulled = pull(fleet.database("coordinator1"), tmp_path / "logs", print)
    assert sum(pulled.values()) == 16 * 4
    store = RecordStore(tmp_path / "logs" / "zen4.jsonl")
    now = datetime.datetime.now().timestamp()
    assert all(abs(trial.time - now) < 600 for trial in store.trials()), "records have the database's time"


def test_a_slow_machine_is_set_aside(new_fleet: Callable[..., Fleet]) -> None:
    """By what its calibration says; it comes back when that is well again. Nonsense is slow, too."""
    fleet = new_fleet()
    cpu = json.dumps(dump(machine_of("x", "zen4").cpu))

    def calibrate(name: str, **changes: Any) -> None:
        found = {"dram_gbs": 60.0, "peak_gops": 900.0, "ratio": 1.2, **changes}
        register = "SELECT fleet_register(%s, 'zen4', '0', '0', 2, 'gcc', %s)"
        fleet.sql(register, name, cpu, user="worker1")
        calibrated = "SELECT fleet_calibrated(%s, 2, %s, %s, %s, 0, 0)"
        fleet.sql(calibrated, name, *found.values(), user="worker1")

    for name in ("m0", "m1", "m2", "odd"):
        calibrate(name)
    calibrate("slow", dram_gbs=40.0)
    calibrate("odd", dram_gbs=float("nan"), ratio=-1.0)
    with fleet.database("coordinator1").connect() as connection:
        assert sorted(set_aside(connection)) == [
            "odd is set aside: its calibration cannot be read",
            "slow is set aside: slow: 40 GB/s, its family's median is 60",
        ]
        assert not set_aside(connection)
        live = fleet.sql("SELECT name FROM live_machines ORDER BY name")
        assert [name for (name,) in live] == ["m0", "m1", "m2"]
        _, machines = status(fleet.database("coordinator1"))
        assert machines[-1].state == "quarantined: slow: 40 GB/s, its family's median is 60"
        calibrate("slow")
        assert set_aside(connection) == ["slow is well again"]


def test_of_two_workers_of_one_name_the_second_ends(shared: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitgen.fleet.worker._NAME_S", 0.1)
    database, said = shared.database("worker1"), list[str]()
    with database.connect() as held:
        held.execute("SELECT pg_advisory_lock(hashtextextended('bitgen worker twin', 0))")
        twin = Worker(
            *(database, machine_of("twin", "zen4"), lambda: FakeMachine(1.0), fingerprints),
            *(Outbox(shared.folder / "twin"), "none", Settings(max_load=1.0, idle_s=0.0), said.append),
        )
        with pytest.raises(BitgenError, match="another worker is called twin; give this one a name"):
            twin.run()
    twin.run()  # whose name is free now
    assert said[-1] == "ending"


def test_a_signal_ends_a_worker_after_its_job(new_fleet: Callable[..., Fleet]) -> None:
    fleet = new_fleet()
    worker = fleet.worker("m2", "--sleep", "0.2")
    fleet.wait(lambda: fleet.sql("SELECT FROM live_machines WHERE name = 'm2'"))
    with exchange_of(fleet) as (exchange, _):
        future = exchange.ask(request())
        fleet.wait(lambda: fleet.sql("SELECT FROM machines WHERE state = 'measuring'"))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        assert future.result(60).machine == "m2"
    assert not fleet.sql("SELECT FROM procrastinate_workers"), "it said goodbye"


# ---- between machines ----


def own_address() -> str:
    """An address of this machine that is not loopback; empty where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        found = str(probe.getsockname()[0])
    return "" if found.startswith("127.") else found


@pytest.mark.skipif(not own_address(), reason="this machine has no address but loopback")
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_between_machines_the_server_must_prove_who_it_is(tmp_path: Path) -> None:
    address = own_address()
    server = Postgres()
    try:
        certificate(server, address)
        key = (
            "ssl=on",
            f"ssl_cert_file={server.folder}/server.crt",
            f"ssl_key_file={server.folder}/server.key",
        )
        rules = "local all all trust\nhostssl all all all scram-sha-256\n"
        (server.data / "pg_hba.conf").write_text(rules)
        server.kill()
        with socket.socket() as probe:
            probe.bind((address, 0))
            server.port = probe.getsockname()[1]
        server.start([*key, f"listen_addresses={address}"])
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("CREATE ROLE far LOGIN PASSWORD 's3cret'")
        words = f"host={address} port={server.port} user=far dbname=postgres"
        root = tmp_path / "root.crt"
        shutil.copy(server.folder / "server.crt", root)
        secret = {"BITGEN_FLEET_DSN": f"{words} password=s3cret sslrootcert={root}"}
        find_database(None, secret).connect().close()
        other = {"BITGEN_FLEET_DSN": secret["BITGEN_FLEET_DSN"].replace(str(root), "system")}
        for env in (other, {"BITGEN_FLEET_DSN": f"{words} password=wrong sslrootcert={root}"}):
            with pytest.raises(BitgenError) as caught:
                find_database(None, env).connect()
            assert "s3cret" not in caught.value.message
        with pytest.raises(BitgenError, match="only verify-full"):
            find_database(None, {"BITGEN_FLEET_DSN": f"{words} sslmode=disable"})
    finally:
        server.close()


def certificate(server: Postgres, address: str) -> None:
    command = [shutil.which("openssl") or "", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
    command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=fleet"]
    command += ["-addext", f"subjectAltName=IP:{address}", "-keyout", str(server.folder / "server.key")]
    command += ["-out", str(server.folder / "server.crt")]
    subprocess.run(command, check=True, capture_output=True)
    for name in ("server.key", "server.crt"):
        (server.folder / name).chmod(0o600)
        if os.getuid() == 0:
            shutil.chown(server.folder / name, "postgres", "postgres")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    unit = tmp_path / "bitgen-worker.service"
    text = (ROOT / "examples" / "fleet" / "bitgen-worker.service").read_text()
    unit.write_text(text)
    done = subprocess.run(
        [shutil.which("systemd-analyze") or "", "verify", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "bitgen-worker.service" not in done.stderr, done.stderr
