"""The fleet without a database: what travels, who is believed, and what machines decide together."""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import postgres
import pytest

if postgres.missing().startswith(("procrastinate", "psycopg")):
    pytest.skip(postgres.missing(), allow_module_level=True)

from fleet_machines import DirectExchange, FakeMachine, fingerprints, machine_of, true_ns
from synthetic import SMALL_AXES, CountingRunner, Grid
from synthetic import fingerprints as synthetic_fingerprints
from synthetic import plan as synthetic_plan
from synthetic import runner as synthetic_runner
from synthetic import spaces as synthetic_spaces

from bitgen import cli
from bitgen.cpu import load_isas, target_cpu
from bitgen.errors import BitgenError, UsageError
from bitgen.fleet.answering import answer_of, calibrate
from bitgen.fleet.bounds import Bounds, RefusedError, check_request
from bitgen.fleet.database import find_database
from bitgen.fleet.exchange import PostgresExchange
from bitgen.fleet.messages import Request, label_of, queue_name, read_answer, read_request
from bitgen.fleet.outbox import Outbox
from bitgen.fleet.runner import FleetRunner
from bitgen.fleet.statistics import Calibration, Effect, judge, may_replace, pooled
from bitgen.fleet.tune import Contest, Family, FleetTune, search_family, together
from bitgen.fleet.worker import Pulse, Settings, Worker
from bitgen.formats.config import find_model
from bitgen.measure import Job, RaceJob
from bitgen.measure.load import Load, Watch, sample_load
from bitgen.records import dump
from bitgen.report import render_report, tune_of
from bitgen.report.page import sections_of
from bitgen.search import Session, TuneOptions, load_search_config, targets_of, tune
from bitgen.space import space_for
from bitgen.spec import KernelSpec, Shape, regime_named
from bitgen.store import JobRecord, RecordStore
from bitgen.winners import commit_winners, family_winners, winners_in_force

MACHINE = machine_of("m1", "zen4")
LEVEL = next(iter(MACHINE.levels.values()))
SHAPE = Shape(640, 256)
SPACE = space_for("i2s", LEVEL, regime_named("n1"), SHAPE, MACHINE.cpu)
DEFAULT, OTHER = SPACE.points[0], SPACE.points[1]


def request(**changes: Any) -> Request:
    jobs = (Job(DEFAULT, SHAPE, 1, 1, True), Job(OTHER, SHAPE, 1, 1, True, DEFAULT))
    values = {"kind": "measure", "jobs": jobs, "race": None, "threads": 1, "isas": (LEVEL.name,)}
    values |= {"label": MACHINE.label, "code": MACHINE.code, "occasion": 0}
    return Request(**{**values, **changes})


def race_request(**changes: Any) -> Request:
    job = RaceJob((DEFAULT, OTHER), SHAPE, 1, 1, 7, True)
    return request(kind="race", jobs=(), race=replace(job, **changes))


# ---- what travels ----


def test_a_key_stands_for_all_that_is_asked() -> None:
    asked = request()
    assert asked.key == read_request(asked.text).key
    others = [request(jobs=asked.jobs[:1]), request(occasion=1), request(label="zen5"), race_request()]
    others += [race_request(seed=1), race_request(rounds=8)]
    assert len({asked.key, *(other.key for other in others)}) == len(others) + 1


def test_a_key_is_the_same_in_every_process_and_release() -> None:
    """Not of this code's digest or of what spaces hold today: a change here forgets what fleets measured."""
    asked = Request("peak", "zen4", "0123456789abcdef", 2, ("avx2",))
    assert asked.key == "58b178b9245dfaeea220461235c3322c86fea3fc375d42006f239f7e3a3a5689"


@pytest.mark.parametrize(
    "changes", [{"kind": "peak"}, {"kind": "race"}, {"jobs": ()}, {"isas": ()}, {"threads": 0}]
)
def test_a_request_of_two_kinds_is_none(changes: dict[str, Any]) -> None:
    with pytest.raises(BitgenError):
        request(**changes)


def test_an_answer_comes_through_json_as_it_was() -> None:
    for asked in (request(), race_request()):
        answer = answer_of(asked, "m1", FakeMachine(), fingerprints)
        again = read_answer(json.loads(json.dumps(dump(answer))))
        assert again == answer
        again.check(asked)


def test_answers_that_contradict_the_request_are_not_believed() -> None:
    asked, raced = request(), race_request()
    good, race = (answer_of(r, "m1", FakeMachine(), fingerprints) for r in (asked, raced))
    assert race.race is not None
    wrong = [
        (replace(good, key=raced.key), "another request"),
        (replace(good, trials=good.trials[:1]), "other kernels"),
        (replace(good, trials=good.trials[::-1]), "other kernels"),
        (replace(good, unit=replace(good.unit, threads=2)), "other threads"),
        (replace(good, unit=replace(good.unit, dram_gbs={"x": math.inf})), "no machine has"),
        (replace(good, race=race.race), "other kernels"),
    ]
    for answer, text in wrong:
        with pytest.raises(BitgenError, match=text):
            answer.check(asked)
    times = race.race.times_ns
    for bad in ((times[0][:-1], times[1]), ((-1.0, *times[0][1:]), times[1]), ((math.nan,) * 7, times[1])):
        with pytest.raises(BitgenError, match="no race has"):
            replace(race, race=replace(race.race, times_ns=bad)).check(raced)


def test_a_kind_of_cpu_tells_what_is_hidden() -> None:
    isas, zen4 = load_isas(), target_cpu("zen4")
    assert label_of(zen4, isas) == "zen4"
    hidden = replace(zen4, features=frozenset(f for f in zen4.features if not f.startswith("avx512")))
    assert label_of(hidden, isas) == "zen4.avx2"
    assert label_of(replace(zen4, family="zen99"), isas) == "zen99"


def test_names_of_queues_fit_postgresql_channels() -> None:
    names = {
        queue_name("a" * 64 + ".avx512_vbmi", "0" * 16, threads, machine)
        for threads in (1, 512)
        for machine in ("", "m" * 63, "n" * 63)
    }
    assert len(names) == 6
    assert max(map(len, names)) <= 40


# ---- a worker's own bounds ----


def test_what_is_legal_is_accepted() -> None:
    for asked in (request(), race_request(), request(kind="peak", jobs=())):
        check_request(asked, MACHINE)


BIG = Shape(1 << 20, 1 << 12)


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (lambda: request(label="zen5"), "is for zen5"),
        (lambda: request(code="0" * 16), "with code 0000"),
        (lambda: request(kind="peak", jobs=(), threads=3), "3 threads"),
        (lambda: request(isas=("neon",)), "neon"),
        (lambda: request(threads=2), "jobs of 1 threads"),
        (lambda: request(jobs=request().jobs * 40), "more than 64"),
        (lambda: race_request(rounds=1000), "1000 rounds"),
        (lambda: race_request(rounds=0), "0 rounds"),
        (lambda: race_request(shape=BIG), "weights"),
        (lambda: race_request(n=8), "no kernel for 8"),
        (lambda: race_request(n=1 << 20), "tokens"),
        (lambda: race_request(specs=(illegal("row_block"),)), "not legal"),
        (lambda: race_request(specs=(illegal("knob"),)), "not legal"),
        (lambda: race_request(specs=(illegal("value"),)), "not legal"),
        (lambda: race_request(specs=(illegal("isa"),)), "does not run"),
        (lambda: race_request(specs=(illegal("shape"),)), "any shape"),
    ],
)
def test_a_worker_refuses(asked: Callable[[], Request], text: str) -> None:
    with pytest.raises(RefusedError, match=text):
        check_request(asked(), MACHINE)


def illegal(what: str) -> Any:
    """The default with one thing that is wrong."""
    schedule, layout = DEFAULT.schedule, DEFAULT.layout
    (first, value), *others = schedule.knobs
    return {
        "row_block": lambda: replace(DEFAULT, layout=replace(layout, row_block=4096)),
        "knob": lambda: replace(DEFAULT, schedule=replace(schedule, knobs=(("system", 1), *others))),
        "value": lambda: replace(
            DEFAULT, schedule=replace(schedule, knobs=((first, value + 10**6), *others))
        ),
        "isa": lambda: replace(DEFAULT, isa="neon"),
        "shape": lambda: replace(DEFAULT, shape=SHAPE),
    }[what]()


def test_seconds_end_a_job() -> None:
    with pytest.raises(RefusedError, match=r"more than 0\.01 s"):
        answer_of(request(), "m1", FakeMachine(sleep_s=0.02), fingerprints, Bounds(seconds=0.01))


# ---- the database's name ----


@pytest.fixture
def service_file(tmp_path: Path) -> Path:
    file = tmp_path / "services"
    file.write_text("[bitgen_fleet]\nhost=db.example\npassword=s3cret\n[here]\nhost=/run\n")
    return file


def test_where_the_database_is(service_file: Path) -> None:
    env = {"PGSERVICEFILE": str(service_file)}
    assert find_database("host=/run dbname=a", env).words["host"] == "/run"
    assert find_database(None, {"BITGEN_FLEET_DSN": "postgresql://u@localhost/a"}).words["dbname"] == "a"
    assert find_database("service=here dbname=b", env).words["dbname"] == "b"
    found = find_database(None, env)
    assert (found.words["host"], found.words["password"]) == ("db.example", "s3cret")
    assert "s3cret" not in repr(found) + found.place


@pytest.mark.parametrize(
    ("dsn", "text"),
    [
        ("host=/run password=s3cret", "--dsn with a password"),
        ("postgresql://u:s3cret@localhost/x", "--dsn with a password"),
        ("host=db.example sslmode=require", "only verify-full"),
        ("host=localhost hostaddr=192.0.2.1 sslmode=disable", "only verify-full"),
        ("host=/run,db.example sslmode=prefer", "only verify-full"),
        ("service=nowhere", "no service nowhere"),
        ("nonsense s3cret", "neither a DSN"),
        ("postgresql://u:s3cret@[/x", "neither a DSN"),
        (None, "no database is named"),
    ],
)
def test_what_is_not_safe_is_refused(
    dsn: str | None, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "none"))
    monkeypatch.delenv("BITGEN_FLEET_DSN", raising=False)
    argv = ["fleet", "status", *(["--dsn", dsn] if dsn is not None else [])]
    assert cli.main(argv) == UsageError.exit_code
    said = capsys.readouterr().err
    assert text in said
    assert "s3cret" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "/run/postgresql", "@abstract"]
)
def test_what_stays_on_the_machine_needs_no_tls(host: str) -> None:
    assert "sslmode" not in find_database(f"host={host}", {}).words
    assert "require_auth" not in find_database(f"host={host}", {}).words


@pytest.mark.parametrize("host", ["db.example", "10.0.0.7", "fe80::1", "localhost.example"])
def test_everything_else_is_checked(host: str) -> None:
    words = find_database(f"host={host}", {}).words
    assert words["sslmode"] == "verify-full"
    assert words["require_auth"] == "scram-sha-256,none"
    assert find_database("", {"BITGEN_FLEET_DSN": "", "PGHOST": host}).words["sslmode"] == "verify-full"


def test_settings_that_were_asked_for_stay() -> None:
    words = find_database("host=db.example options='-c work_mem=8MB'", {}).words
    assert words["options"].startswith("-c work_mem=8MB -c ")
    assert "-c tcp_keepalives_idle=30" in words["options"]
    assert words["options"].endswith("-c search_path=bitgen_fleet")


def test_a_database_that_is_not_there_is_one_line(tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["fleet", "status", "--dsn", f"host={tmp_path}"]) == BitgenError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("bitgen: no connection: ")
    assert said.count("\n") == 1


def test_a_tune_waits_a_while_for_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitgen.fleet.exchange._START_S", 0.2)
    monkeypatch.setattr("bitgen.fleet.exchange._AWAY_S", 0.05)
    said: list[str] = []
    exchange = PostgresExchange(find_database(f"host={tmp_path}", {}), said.append)
    with pytest.raises(BitgenError, match=r"the database was away for 0\.2 s: no connection: "), exchange:
        pass
    (line,) = said
    assert line.startswith("the database is away, waiting 0.2 s for it: no connection: ")


def test_second_opinions_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that wait each other machine has as many, whatever their keys are."""
    exchange = PostgresExchange(find_database("host=/run", {}), lambda _: None)
    monkeypatch.setattr(exchange, "_live", lambda *_: [f"m{i}" for i in range(4)])
    given = Counter[str]()
    for occasion in range(1, 13):
        exchange.ask(request(occasion=occasion), apart_from="m2")
        (pending,) = exchange._new()
        job = exchange._job(Any, pending)  # type: ignore[arg-type]
        assert job.queue == queue_name(MACHINE.label, MACHINE.code, 1, pending.machine)
        pending.tries, given[pending.machine] = 1, given[pending.machine] + 1
    assert given == {"m0": 4, "m1": 4, "m3": 4}


def test_an_idle_worker_ends_while_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitgen.fleet.worker._AWAY_S", 0.0)
    said: list[str] = []
    worker = Worker(
        find_database(f"host={tmp_path}", {}),
        MACHINE,
        lambda: FakeMachine(1.0),
        fingerprints,
        Outbox(tmp_path / "outbox"),
        "none",
        Settings(max_load=1.0, idle_s=0.05),
        said.append,
    )
    worker.run()
    assert [line.partition(":")[0] for line in said] == [
        "the database is away, waiting for it",
        "ending",
    ]


# ---- load, pulse, outbox ----


def test_the_load_is_what_others_use(tmp_path: Path) -> None:
    stat = tmp_path / "proc" / "stat"
    stat.parent.mkdir()
    assert sample_load(tmp_path, 0) is None
    stat.write_text("cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1\n")

    def later(_: float) -> None:
        stat.write_text("cpu  130 0 110 840 0 0 0 20 0 0\ncpu0 1\n")

    found = sample_load(tmp_path, 0, later)
    assert found is not None
    assert found.busy == pytest.approx(0.4)
    assert found.steal == pytest.approx(0.2)
    assert sample_load(tmp_path, 0) == Load(0.0, 0.0)
    stat.write_text("nonsense")
    assert sample_load(tmp_path, 0) is None


class Processes:
    """Files of /proc below a folder: of all CPUs together, and of processes with their parents."""

    def __init__(self, root: Path) -> None:
        self.root = root / "proc"
        self.root.mkdir()
        self.seconds = 0.0

    def cpu(self, user: int, idle: int, steal: int = 0) -> None:
        (self.root / "stat").write_text(f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1\n")

    def process(self, pid: int, parent: int, ticks: int, waited: int = 0) -> None:
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        zeros = " ".join("0" * 9)
        (folder / "stat").write_text(f"{pid} (a) 1 (b) S {parent} {zeros} {ticks} 0 {waited} 0 20 0 1\n")


def test_a_watch_leaves_out_what_is_its_own(tmp_path: Path) -> None:
    """Of 100 ticks 90 were busy: 60 of this process, of what it waited for and of a child's child."""
    proc = Processes(tmp_path)
    proc.cpu(0, 0)
    for pid, parent in ((7, 1), (8, 7), (9, 8), (10, 1)):
        proc.process(pid, parent, 0)
    (proc.root / "11").mkdir()  # it ended just now
    watch = Watch(tmp_path, 7, 5.0, lambda: proc.seconds)
    proc.cpu(90, 5, 5)
    proc.process(7, 1, 10, waited=20)
    proc.process(9, 8, 30)
    proc.process(10, 1, 30)
    assert watch.look() is None, "it looked just now"
    proc.seconds = 5.0
    found = watch.look()
    assert found is not None
    assert found.busy == pytest.approx(0.3)
    assert found.steal == pytest.approx(0.05)
    proc.seconds = 10.0
    assert watch.look() == Load(0.0, 0.0)
    (proc.root / "stat").unlink()
    proc.seconds = 15.0
    assert watch.look() is None


def test_a_watch_knows_this_process() -> None:
    watch = Watch(every_s=0.0)
    found = watch.look()
    assert found is None or 0.0 <= found.busy <= 1.0


def test_the_pulse_tells_that_time_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 104.0, 108.0, 120.0, 121.0, 122.0])
    monkeypatch.setattr("bitgen.fleet.worker._awake", lambda: next(clock))
    pulse = Pulse()
    pulse.mark()
    assert [pulse.longest() for _ in range(3)] == [3.0, 4.0, 12.0]
    pulse.mark()
    assert pulse.longest() == 1.0


def test_an_outbox_keeps_what_is_whole(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "box")
    asked = request()
    answer = answer_of(asked, "m1", FakeMachine(), fingerprints)
    path = box.put(answer, {"attempt": 2, "label": "zen4"})
    assert list(box.kept()) == [(path, {"attempt": 2, "label": "zen4"}, answer)]
    (box.folder / f"{'0' * 64}.json").write_text(path.read_text())  # another's name
    (box.folder / f"{'1' * 64}.json").write_text(path.read_text()[:-20])  # torn
    assert [kept for kept, _, _ in box.kept()] == [path]
    assert len(list(box.folder.glob("*.broken"))) == 2
    box.sent(path)
    assert not list(box.kept())


# ---- statistics ----


def test_random_effects_are_those_of_dersimonian_and_laird() -> None:
    """Three machines by hand: w = 100, 25, 100; Q = 100 (.02)^2 + 25 (.08)^2 + ... about the fixed mean."""
    effects = [Effect("a", -0.10, 0.01, 9), Effect("b", -0.30, 0.04, 9), Effect("c", 0.20, 0.01, 9)]
    weights = [100.0, 25.0, 100.0]
    fixed = sum(w * e.mean for w, e in zip(weights, effects, strict=True)) / 225
    q = sum(w * (e.mean - fixed) ** 2 for w, e in zip(weights, effects, strict=True))
    tau = (q - 2) / (225 - sum(w * w for w in weights) / 225)
    new = [1 / (e.variance + tau) for e in effects]
    mean = sum(w * e.mean for w, e in zip(new, effects, strict=True)) / sum(new)
    found = pooled(effects)
    assert found.between == pytest.approx(tau)
    assert found.mean == pytest.approx(mean)
    assert found.error == pytest.approx(sum(new) ** -0.5)


def test_machines_that_agree_have_no_spread_between_them() -> None:
    found = pooled([Effect("a", -0.05, 0.0001, 9), Effect("b", -0.05, 0.0001, 9)])
    assert found.between == 0.0
    assert found.mean == pytest.approx(-0.05)
    assert found.error == pytest.approx(math.sqrt(0.0001 / 2))
    assert pooled([]).machines == 0


@pytest.mark.parametrize(
    ("means", "variance", "replaced"),
    [
        ((-0.05, -0.06), 1e-6, True),
        ((-0.05,), 1e-6, False),  # one occasion is none
        ((-0.05, 0.001), 1e-6, False),  # two machines disagree
        ((-0.002, -0.003), 1e-8, False),  # it is no gain worth a change
        ((-0.05, -0.06), 0.01, False),  # it is noise
        ((-0.30, -0.01), 1e-6, False),  # nobody knows what a third machine would say
    ],
)
def test_a_committed_winner_goes_only_when_two_agree(
    means: tuple[float, ...], variance: float, replaced: bool
) -> None:
    effects = [Effect(f"m{i}", mean, variance, 15) for i, mean in enumerate(means)]
    assert may_replace(effects, 0.005) is replaced


def test_an_effect_forgets_what_was_slow_for_both_and_a_hiccup() -> None:
    draw = random.Random(1)
    moments = [math.exp(draw.gauss(0, 0.5)) for _ in range(15)]
    old = [100 * m for m in moments]
    new = [95 * m * math.exp(draw.gauss(0, 0.002)) for m in moments]
    new[3] *= 2
    found = Effect.of("m", new, old)
    assert found.mean == pytest.approx(math.log(0.95), abs=0.003)


def test_a_layout_changes_by_what_a_session_costs() -> None:
    """90 % of the session gains 10 %, 10 % of it loses 20 %: together they gain 7 %."""

    def contest(share: float, factor: float) -> Contest:
        effects = tuple(Effect(f"m{i}", math.log(factor), 1e-6, 15) for i in range(2))
        return Contest(SHAPE, 1, 1, DEFAULT, OTHER, effects, share)

    found = together([contest(0.9, 0.9), contest(0.1, 1.2)])
    assert [math.exp(effect.mean) for effect in found] == [pytest.approx(0.93)] * 2
    assert not together([contest(1.0, 0.9), replace(contest(0.0, 1.0), effects=())])


def good(**changes: float) -> Calibration:
    return Calibration(**{"threads": 2, "dram_gbs": 60.0, "peak_gops": 900.0, "ratio": 1.2, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dram_gbs": 50.0}, "slow: 50 GB/s"),
        ({"peak_gops": 700.0}, "slow: 700 GOP/s"),
        ({"peak_gops": 1800.0}, "impossible"),
        ({"ratio": 2.0}, "strange"),
        ({"dram_gbs": math.nan}, "slow"),
        ({"dram_gbs": 57.0, "peak_gops": 950.0, "ratio": 1.3}, ""),
        ({"threads": 16, "dram_gbs": 400.0}, ""),  # alone of its size: nobody can tell
    ],
)
def test_machines_unlike_their_family_are_set_aside(changes: dict[str, float], reason: str) -> None:
    fleet = {f"m{i}": good(dram_gbs=60.0 + i) for i in range(4)} | {"odd": good(**changes)}
    found = judge(fleet)
    assert list(found) == (["odd"] if reason else [])
    assert reason in found.get("odd", "")


def test_of_two_machines_nobody_is_wrong() -> None:
    assert not judge({"a": good(), "b": good(dram_gbs=10.0)})


def test_a_machine_calibrates_with_known_kernels() -> None:
    found = calibrate(FakeMachine(), MACHINE)
    assert found.threads == MACHINE.threads
    assert found.ratio == pytest.approx(calibrate(FakeMachine(factor=4), MACHINE).ratio)


# ---- the runner ----


def fleet_runner(exchange: DirectExchange, searches: int = 16) -> FleetRunner:
    family = Family(MACHINE.label, MACHINE.cpu, MACHINE.isas)
    return FleetRunner(exchange, MACHINE.label, MACHINE.code, [LEVEL], family.spaces(0), searches)


def test_times_are_told_in_units_of_one_machine() -> None:
    """Whichever machine answers, and however slow it is, the same question has the same answer."""
    slow, fast = FakeMachine(factor=8.0), FakeMachine(factor=1.0)
    jobs = [Job(spec, SHAPE, 1, 1, True) for spec in SPACE.points[:20]]
    race = RaceJob(SPACE.points[:4], SHAPE, 1, 1, 7, True)
    answers = []
    for order in (["a", "b"], ["b", "a"]):
        turn = iter(order * 50)
        exchange = DirectExchange({"a": slow, "b": fast}, lambda asked, names: next(turn))  # noqa: ARG005, B023
        runner = fleet_runner(exchange)
        unit = runner.machine_peak(1, [LEVEL.name]).best_dram_gbs
        measured = [[t * unit for t in found.times_ns] for found in runner.measure(jobs)]
        raced = {spec: [t * unit for t in times] for spec, times in runner.race(race).items()}
        answers.append((measured, raced))
        assert {name for _, name in exchange.asked} == {"a", "b"}
    assert answers[0] == answers[1]


def test_everything_is_timed_beside_something() -> None:
    exchange = DirectExchange({"a": FakeMachine()})
    others = [spec for spec in SPACE.points if spec != SPACE.default][:9]
    jobs = [Job(spec, SHAPE, 1, 1, True) for spec in (*others[:4], SPACE.default, *others[4:])]
    jobs.append(Job(others[5], SHAPE, 1, 1, True, others[3]))
    found = list(fleet_runner(exchange).measure(jobs))
    assert [f.job.key for f in found] == [job.key for job in jobs]
    against = [f.job.against for f in found]
    assert against == [*[SPACE.default] * 4, None, *[SPACE.default] * 5, others[3]]


@pytest.mark.parametrize(
    ("searches", "sizes"), [(16, [8, 3]), (4, [3, 3, 3, 2]), (2, [2, 2, 2, 2, 2, 1]), (1, [1] * 11)]
)
def test_the_fewer_searches_ask_the_smaller_is_a_job(searches: int, sizes: list[int]) -> None:
    """So that machines are not idle; by the plan alone, so that the same questions are asked again."""
    exchange = DirectExchange({"a": FakeMachine()})
    jobs = [Job(spec, SHAPE, 1, 1, True) for spec in SPACE.points[:11]]
    found = list(fleet_runner(exchange, searches).measure(jobs))
    assert [f.job.key for f in found] == [job.key for job in jobs]
    assert [len(asked.jobs) for asked, _ in exchange.asked if asked.kind == "measure"] == sizes


def test_searches_at_once_find_what_they_find_one_after_the_other(tmp_path: Path) -> None:
    plan = synthetic_plan()
    outcomes = []
    for at_once in (1, 8):
        runner = CountingRunner(synthetic_runner(plan))
        store = RecordStore(tmp_path / f"{at_once}.jsonl")
        session = Session(config=load_search_config(), at_once=at_once)
        result = tune(plan, runner, store, synthetic_fingerprints, synthetic_spaces(), session)
        jobs = sorted(map(str, runner.jobs))
        outcomes.append((result.rows, result.formats, result.layouts, jobs, sorted(map(str, runner.races))))
    assert outcomes[0] == outcomes[1]


# ---- a whole tune ----


MODEL = find_model("TriLM-99M")
OPTIONS = TuneOptions(families=("i2s", "t5"), regimes=("n1", "large"), threads=(1,), trials=24)


def tuned(folder: Path, exchange: DirectExchange, options: TuneOptions = OPTIONS) -> FleetTune:
    family = Family(MACHINE.label, MACHINE.cpu, MACHINE.isas)
    store = RecordStore(folder / "records.jsonl")
    return search_family(family, MODEL, options, exchange, store, folder / "winners", lambda _: None)


class Killed(BaseException):
    """As kill -9: nobody catches it."""


class MortalExchange(DirectExchange):
    """Its coordinator dies at the question after ``most`` others."""

    most = 10**9

    def ask(self, request: Request, apart_from: str = "") -> Any:
        if len(self.asked) >= self.most and request.key not in self._answers:
            raise Killed
        return super().ask(request, apart_from)


def test_a_killed_tune_ends_as_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it dies: in the search, in races, before it committed anything, and after it has.

    What it records and commits is what a tune starts from. It is no part of what this one starts from.
    """
    options = replace(OPTIONS, families=("i2s",), trials=16)
    whole = DirectExchange({"m": FakeMachine()})
    expected = tuned(tmp_path / "whole", whole, options).file
    assert expected is not None
    folder, exchange = tmp_path / "killed", MortalExchange({"m": FakeMachine()})
    for share in (0.1, 0.4, 0.7, 0.9):
        exchange.most = int(share * len(whole.asked))
        with pytest.raises(Killed), alone():
            tuned(folder, exchange, options)
    exchange.most = 10**9
    assert not (folder / "winners").exists()
    with monkeypatch.context() as patch:
        patch.setattr("bitgen.fleet.tune.commit_winners", committed_and_killed)
        with pytest.raises(Killed), alone():
            tuned(folder, exchange, options)
    assert (folder / "winners" / expected.name).read_bytes() == expected.read_bytes()
    asked = len(exchange.asked)
    tuned(folder, exchange, options)
    assert (folder / "winners" / expected.name).read_bytes() == expected.read_bytes()
    assert len(exchange.asked) == asked, "everything was known"
    tuned(folder, exchange, replace(options, seed=1))
    assert len(exchange.asked) > asked, "another seed is another tune"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Until the threads of a tune that died have died, too."""
    before = threading.active_count()
    try:
        yield
    finally:
        while threading.active_count() > before:
            time.sleep(0.01)


def committed_and_killed(*args: Any) -> Path:
    commit_winners(*args)
    raise Killed


def test_what_a_folder_lacks_of_what_ships_still_counts(tmp_path: Path) -> None:
    """A committed winner defends its place against each tune, also against the second one of a folder."""
    shipped = winners_in_force("zen4", tmp_path)
    assert shipped == family_winners("zen4")
    old = shipped[0]
    points = space_for(old.spec.family, LEVEL, regime_named(old.spec.regime), old.shape, MACHINE.cpu).points
    new = next(p for p in points if p.layout == old.spec.layout and p != old.spec)
    other = next(p for p in points if p.layout != old.spec.layout)
    commit_winners(MACHINE.cpu, MACHINE.isas, [replace(old, spec=new)], {}, tmp_path)
    assert set(winners_in_force("zen4", tmp_path)) == {*shipped[1:], replace(old, spec=new)}
    commit_winners(MACHINE.cpu, MACHINE.isas, [replace(old, spec=other)], {}, tmp_path)
    found = winners_in_force("zen4", tmp_path)
    alike = (old.shape, old.spec.isa, old.threads)
    assert [j.spec for j in found if (j.shape, j.spec.isa, j.threads) == alike] == [other]


def somewhere(seed: int) -> Callable[[Request, Sequence[str]], str]:
    return lambda asked, names: random.Random(f"{seed} {asked.key}").choice(sorted(names))


def test_many_machines_commit_what_one_would(tmp_path: Path) -> None:
    """Machines that are 2, 4 and 8 times as slow: bit for bit the same winners."""
    one = tuned(tmp_path / "one", DirectExchange({"m": FakeMachine()})).file
    machines = {f"m{i}": FakeMachine(factor=2.0**i) for i in range(4)}
    exchange = DirectExchange(machines, somewhere(1))
    many = tuned(tmp_path / "many", exchange).file
    assert one is not None
    assert many is not None
    assert one.read_bytes() == many.read_bytes()
    assert {name for _, name in exchange.asked} == set(machines)
    keys = [asked.key for asked, _ in exchange.asked]
    assert len(set(keys)) == len(keys)
    judges: dict[Any, list[str]] = {}
    for asked, name in exchange.asked:
        if asked.race and asked.occasion:
            judges.setdefault((asked.race.specs, asked.race.shape), []).append(name)
    assert judges
    assert all(len(names) == len(set(names)) == 2 for names in judges.values()), judges


def test_a_report_shows_who_did_what(tmp_path: Path) -> None:
    tuned(tmp_path, DirectExchange({"m": FakeMachine()}))
    store = RecordStore(tmp_path / "records.jsonl")
    assert "The fleet" not in render_report(tune_of(store))
    for i in range(600):
        machine = "m<b>" if i % 3 else "m2"
        store.append(JobRecord(machine, ("measure", "race")[i % 2], 2.0, int(i == 7), 1.7e9 + 3 * i))
    store.append(JobRecord("late", "peak", 1.0, 0, 1.7e9 + 1e6))  # the next day
    tune = tune_of(RecordStore(store.path))
    (section,) = [section for section in sections_of(tune) if section.key == "fleet"]
    (part,) = section.parts
    assert part.table is not None
    assert part.plot is not None
    rows = {row[0]: row[1:] for row in part.table.rows}
    assert [rows[name][0] for name in ("late", "m2", "m<b>")] == [1, 200, 400]
    assert sum(row[-1] for row in rows.values()) == 1
    assert len(part.plot.marks) <= 240
    assert part.plot.x.high < 2500, "a pause is left out"
    page = render_report(tune)
    assert "The fleet" in page
    other = replace(tune, jobs=(JobRecord("zen3-a", "race", 2.0, 0, 1.7e9 + 9),))
    (both,) = [section for section in sections_of(tune, other) if section.key == "fleet"]
    assert [row[0] for row in both.parts[0].table.rows] == ["late", "m2", "m<b>", "zen3-a"]  # type: ignore[union-attr]
    assert "m<b>" not in page.partition('<script type="application/json"')[0]


@dataclass(frozen=True)
class GridFamily(Family):
    """Small spaces of which the best kernel is known."""

    def spaces(self, group: int) -> Any:  # noqa: ARG002 - these have none
        return synthetic_spaces()


def regret(seed: int, folder: Path) -> float:
    """What a session costs with the winners that noisy machines commit, over the least that it could cost."""
    draw = random.Random(seed)
    machines = {
        f"m{i}": FakeMachine(
            factor=math.exp(draw.gauss(0, 0.3)),
            noise=draw.choice((0.003, 0.01, 0.03)),
            taste=0.004,
            hiccups=0.03,
            seed=(seed, i),
        )
        for i in range(4)
    }
    family = GridFamily(MACHINE.label, MACHINE.cpu, MACHINE.isas)
    options = TuneOptions(
        isas=("scalar",), families=("i2s", "tl1"), regimes=("n1", "large"), threads=(1,), seed=seed
    )
    exchange = DirectExchange(machines, somewhere(seed))
    store = RecordStore(folder / f"{seed}.jsonl")
    done = search_family(family, MODEL, options, exchange, store, folder / str(seed), lambda _: None)
    config = load_search_config()
    tokens = config.objectives[config.objective]
    isa = next(isa for isa in load_isas() if isa.name == "scalar")
    committed = {
        (c.shape, c.new.regime): c.new if d.replaced else c.old for d in done.decisions for c in d.contests
    }

    def cost(spec: KernelSpec, shape: Shape) -> float:
        n = config.regimes[spec.regime].n
        return tokens[spec.regime] / n * true_ns(spec, shape, n)

    paid = best = 0.0
    for target in targets_of(MODEL):
        shape, count = target.shape, target.count
        paid += count * sum(cost(spec, at) for (at, _), spec in committed.items() if at == shape)
        every = [Grid(f, isa, r, SMALL_AXES) for f in options.families for r in options.regimes]
        layouts = {layout for grid in every for layout in grid.layouts}
        best += count * min(
            sum(
                min(
                    cost(spec, shape)
                    for grid in every
                    for spec in grid
                    if (spec.layout, spec.regime) == (layout, r)
                )
                for r in options.regimes
            )
            for layout in layouts
        )
    return paid / best - 1


@pytest.mark.parametrize("seeds", [4, pytest.param(100, marks=pytest.mark.deep)])
def test_noise_of_each_machine_costs_little(
    seeds: int, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    found = sorted(regret(seed, tmp_path) for seed in range(seeds))
    within = sum(r <= 0.02 for r in found)
    record_property("oracle", f"fleet: regret <= 2 % in {within} of {seeds} seeds, the worst {found[-1]:.1%}")
    assert within >= 0.95 * seeds - 1e-9 if seeds >= 100 else within >= seeds - 1, found
