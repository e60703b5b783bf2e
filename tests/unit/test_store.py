from __future__ import annotations

import fcntl
import json
import multiprocessing
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import FINGERPRINT, SCALAR, TALL, WIDE, Grid, measured

from bitgen.errors import BitgenError, FileError
from bitgen.measure import Job, Race, Status
from bitgen.spec import KernelSpec, Layout
from bitgen.store import (
    Fingerprint,
    RaceRecord,
    RecordStore,
    TrialRecord,
    TuningRecord,
    Winner,
)

OTHER = replace(FINGERPRINT, compiler="clang 14")
POINTS = Grid(
    "i2s", SCALAR, "n1", {"streams": (1, 2, 4), "unroll": (1, 2, 4), "prefetch": (0, 512, 1024)}
).points
LARGE = Grid("i2s", SCALAR, "large", {"streams": (1, 2), "unroll": (1,), "prefetch": (0,)}).points
R16, R32 = Layout("i2s", 16), Layout("i2s", 32)


def trial(i: int = 0, fingerprint: Fingerprint = FINGERPRINT, status: Status = Status.OK) -> TrialRecord:
    return TrialRecord(fingerprint, measured(Job(POINTS[i], WIDE, 1, 1, True), 0.1, status=status), seed=7)


def race() -> RaceRecord:
    times = {POINTS[0]: (3.0, 4.0), POINTS[1]: (5.0, 6.5)}
    race = Race(times, {POINTS[2]: "crashed: SIGSEGV"}, (0.06, 0.07))
    return RaceRecord(FINGERPRINT, WIDE, 1, 1, True, 2, 11, POINTS[:3], race)


def tuning(
    winners: list[tuple[KernelSpec, int]], layout: Layout = R16, fingerprint: Fingerprint = FINGERPRINT
) -> TuningRecord:
    n = {"n1": 1, "large": 128}
    rows = tuple(Winner(spec, n[spec.regime], threads, 10.0, None) for spec, threads in winners)
    return TuningRecord(fingerprint, WIDE, "balanced", layout, rows, seed=7)


def of_layout(layout: Layout, points: tuple[KernelSpec, ...] = POINTS, i: int = 0) -> KernelSpec:
    return [spec for spec in points if spec.layout == layout][i]


# ---- what was written comes back ----


@pytest.mark.parametrize(
    "record",
    [trial(), trial(status=Status.CRASHED), race(), tuning([(POINTS[0], 1)])],
    ids=lambda r: r.kind,
)
def test_a_record_reads_back_as_it_was(
    tmp_path: Path, record: TrialRecord | RaceRecord | TuningRecord
) -> None:
    RecordStore(tmp_path / "r.jsonl").append(record)
    data = json.loads((tmp_path / "r.jsonl").read_text())
    assert data["schema"] == 1
    assert data["fingerprint"]["compiler"] == "gcc 12"
    read = type(record).from_dict(Fingerprint.from_dict(data["fingerprint"]), data)
    assert read == record


def test_an_answer_is_known_only_for_the_same_job_and_fingerprint(tmp_path: Path) -> None:
    RecordStore(tmp_path / "r.jsonl").append(trial())
    store = RecordStore(tmp_path / "r.jsonl")
    known = trial().measurement
    assert store.known(known.job.key, FINGERPRINT) == known
    assert store.known(known.job.key, OTHER) is None
    for different in (
        Job(POINTS[1], WIDE, 1, 1, True),
        Job(POINTS[0], TALL, 1, 1, True),
        Job(POINTS[0], WIDE, 1, 2, True),
        Job(POINTS[0], WIDE, 1, 1, False),
    ):
        assert store.known(different.key, FINGERPRINT) is None


def test_a_race_is_known_only_with_its_seed_and_its_participants(tmp_path: Path) -> None:
    RecordStore(tmp_path / "r.jsonl").append(race())
    store = RecordStore(tmp_path / "r.jsonl")
    assert store.known_race(race().key, FINGERPRINT) == race().race
    assert store.known_race(race().key, OTHER) is None
    assert store.known_race(replace(race(), seed=12).key, FINGERPRINT) is None
    assert store.known_race(replace(race(), specs=POINTS[:2]).key, FINGERPRINT) is None


def test_every_part_of_the_fingerprint_counts() -> None:
    digests = {FINGERPRINT.digest}
    for part in ("cpu", "compiler", "templates", "version"):
        digests.add(replace(FINGERPRINT, **{part: "changed"}).digest)
    assert len(digests) == 5


# ---- the file survives ----


def test_a_line_torn_anywhere_costs_that_record_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    store = RecordStore(path)
    store.append(trial(0))
    whole = path.stat().st_size
    store.append(trial(1))
    data = path.read_bytes()
    for cut in [whole, whole + 1, (whole + len(data)) // 2, len(data) - 2, len(data) - 1]:
        path.write_bytes(data[:cut])
        torn = RecordStore(path)
        torn.append(trial(2))
        again = RecordStore(path)
        # Cut just before its newline the record is whole, and the next append completes the line.
        lost = whole < cut < len(data) - 1
        specs = {record.measurement.job.spec for record in again.trials()}
        survivors = {POINTS[0], POINTS[2]} | ({POINTS[1]} if cut == len(data) - 1 else set())
        assert specs == survivors, cut
        assert again.skipped == lost, cut


def test_foreign_and_broken_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordStore(path).append(trial())
    good = json.loads(path.read_text())
    lines = [
        {**good, "schema": 99},
        {**good, "kind": "dream"},
        {**good, "measurement": {**good["measurement"], "times_ns": []}},
        {**good, "fingerprint": "all"},
        {**good, "fingerprint": {"cpu": ["a"]}},
        {key: value for key, value in good.items() if key != "seed"},
        7,
        None,
        [],
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_bytes(text.encode() + b'{"a\xff\n\n[' * 3 + b"\n" + path.read_bytes())
    store = RecordStore(path)
    assert len(list(store.trials())) == 1
    assert store.skipped == len(lines) + 4


def test_two_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def write() -> None:
        store = RecordStore(path)
        for i in range(20):
            store.append(trial(i % len(POINTS)))

    writers = [multiprocessing.get_context("fork").Process(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(path.read_text().splitlines()) == 60
    assert RecordStore(path).skipped == 0


def test_a_writer_waits_for_the_one_before(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    with (tmp_path / "r.jsonl").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=store.append, args=(trial(),))
        writer.start()
        writer.join(0.1)
        assert (tmp_path / "r.jsonl").stat().st_size == 0
    writer.join()
    assert len(list(RecordStore(store.path).trials())) == 1


def test_a_disk_that_fills_up_in_the_middle_of_a_record_loses_only_that_record(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    RecordStore(path).append(trial(0))
    size = path.stat().st_size

    def write() -> None:
        # A limit on file sizes stands for the disk: the kernel takes what fits and refuses the rest.
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, size + 40))
        store = RecordStore(path)
        try:
            store.append(trial(1))
        except BitgenError as error:
            raise SystemExit(error.exit_code if str(path) in error.message else 99) from error

    writer = multiprocessing.get_context("fork").Process(target=write)
    writer.start()
    writer.join()
    assert writer.exitcode == FileError.exit_code
    assert path.stat().st_size == size
    RecordStore(path).append(trial(2))
    store = RecordStore(path)
    assert {r.measurement.spec for r in store.trials()} == {POINTS[0], POINTS[2]}
    assert store.skipped == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.path.symlink_to("/dev/full")
    with pytest.raises(FileError, match=r"cannot write to .*r\.jsonl: No space left on device"):
        store.append(trial())


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BitgenError, match="cannot read"):
        RecordStore(tmp_path)


# ---- the best for this ----


def test_best_follows_the_layout_of_the_newest_tune(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    a16, a32, large16 = of_layout(R16), of_layout(R32), of_layout(R16, LARGE)
    assert store.best(WIDE, "n1", 4, FINGERPRINT) is None
    store.append(tuning([(large16, 1)], R16))
    store.append(tuning([(a16, 1), (a32, 1)], R32))
    for opened in (store, RecordStore(store.path)):
        found = opened.best(WIDE, "n1", 1, FINGERPRINT)
        assert found is not None
        assert found.spec == a32
        assert opened.layout(WIDE, FINGERPRINT) == R32
        assert opened.best(WIDE, "large", 1, FINGERPRINT) is None  # the only one known reads another layout
        assert opened.best(TALL, "n1", 1, FINGERPRINT) is None


def test_an_older_tune_fills_in_for_a_regime_in_the_same_layout(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)]))
    store.append(tuning([(of_layout(R16, i=1), 1)]))
    n1, large = (store.best(WIDE, regime, 1, FINGERPRINT) for regime in ("n1", "large"))
    assert n1 is not None
    assert n1.spec == of_layout(R16, i=1)
    assert large is not None
    assert large.spec == of_layout(R16, LARGE)


def test_the_nearest_lower_thread_count_serves(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    for threads in (4, 1, 2, 8):
        store.append(tuning([(of_layout(R16, i=threads), threads)]))
    for asked, expected in ((1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (100, 8)):
        found = store.best(WIDE, "n1", asked, FINGERPRINT)
        assert found is not None
        assert found.threads == expected


def test_a_stale_winner_is_a_starting_point_and_nothing_else(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(POINTS[0], 1)], fingerprint=OTHER))
    store.append(tuning([(POINTS[1], 1), (POINTS[0], 2)], fingerprint=OTHER))
    store.append(tuning([(POINTS[2], 1)]))
    assert store.stale(FINGERPRINT) == [POINTS[1], POINTS[0]]
    assert store.current(WIDE, FINGERPRINT) == [POINTS[2]]
    assert store.stale(OTHER) == [POINTS[2]]
    assert store.best(WIDE, "n1", 1, replace(FINGERPRINT, version="2")) is None


def test_a_layout_that_no_winner_reads_cannot_be_recorded() -> None:
    with pytest.raises(BitgenError, match="no winner for 640x256 reads the layout i2s_r32"):
        tuning([(of_layout(R16), 1)], R32)


def test_a_tune_that_looked_at_less_overrules_none_that_saw_more(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)], R16))
    store.append(tuning([(of_layout(R32), 1)], R32))
    assert store.layout(WIDE, FINGERPRINT) == R16
    store.append(tuning([(of_layout(R32), 1), (of_layout(R32, LARGE), 1)], R32))
    assert store.layout(WIDE, FINGERPRINT) == R32
