from __future__ import annotations

import json
import multiprocessing
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from synthetic import FINGERPRINT, SCALAR, TALL, WIDE, Grid, fingerprints, measured

from bitgen.cli.show import newest_winners
from bitgen.errors import BitgenError, FileError
from bitgen.fingerprints import Fingerprint, Fingerprints
from bitgen.measure import Job, Measurement, Race, RaceJob, Status
from bitgen.records import dump, load
from bitgen.spec import RENAMED_KNOBS, KernelSpec, Layout, WeightKind
from bitgen.store import (
    RaceRecord,
    RecordStore,
    TrialRecord,
    TuningRecord,
    Winner,
)

OTHER = replace(FINGERPRINT, compiler="clang 14")


def others(spec: KernelSpec) -> Fingerprint:  # noqa: ARG001 - all kernels have the same
    return OTHER


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
    return RaceRecord.of([FINGERPRINT] * 3, RaceJob(POINTS[:3], WIDE, 1, 1, 2, True, 11), race)


def tuning(
    winners: list[tuple[KernelSpec, int]], layout: Layout = R16, made: Fingerprints = fingerprints
) -> TuningRecord:
    n = {"n1": 1, "large": 128}
    jobs = [Job(spec, WIDE, n[spec.regime], threads) for spec, threads in winners]
    rows = tuple(Winner(Measurement(job, Status.OK, "", (10.0,)), None, made(job.spec)) for job in jobs)
    return TuningRecord(WIDE, "balanced", layout, rows, seed=7)


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
    assert (data.pop("schema"), data.pop("kind")) == (2, record.kind)
    assert load(type(record), data, "") == record


def test_an_answer_is_known_only_for_the_same_job_and_fingerprint(tmp_path: Path) -> None:
    RecordStore(tmp_path / "r.jsonl").append(trial())
    store = RecordStore(tmp_path / "r.jsonl")
    known = trial().measurement
    assert store.known(known.job, fingerprints) == known
    assert store.known(known.job, others) is None
    for different in (
        Job(POINTS[1], WIDE, 1, 1, True),
        Job(POINTS[0], TALL, 1, 1, True),
        Job(POINTS[0], WIDE, 1, 2, True),
        Job(POINTS[0], WIDE, 1, 1, False),
    ):
        assert store.known(different, fingerprints) is None


def test_a_race_is_known_only_with_its_seed_and_its_participants(tmp_path: Path) -> None:
    RecordStore(tmp_path / "r.jsonl").append(race())
    store = RecordStore(tmp_path / "r.jsonl")
    job = race().job
    assert store.known_race(job, fingerprints) == race().race
    assert store.known_race(job, others) is None
    one_changed = lambda spec: OTHER if spec == POINTS[1] else FINGERPRINT  # noqa: E731
    assert store.known_race(job, one_changed) is None
    assert store.known_race(replace(job, seed=12), fingerprints) is None
    assert store.known_race(replace(job, specs=POINTS[:2]), fingerprints) is None


def test_every_part_of_the_fingerprint_counts() -> None:
    digests = {FINGERPRINT.digest}
    for part in ("cpu", "compiler", "kernel", "harness"):
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
    assert store.damage.startswith(f"{len(lines) + 4} lines of {path} cannot be read")
    path.write_text("7\n")
    assert RecordStore(path).damage.startswith(f"1 line of {path} cannot be read")
    assert not RecordStore(tmp_path / "none.jsonl").damage


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
    with FileLock(tmp_path / "r.jsonl.lock"):
        writer = threading.Thread(target=store.append, args=(trial(),))
        writer.start()
        writer.join(0.1)
        assert not (tmp_path / "r.jsonl").exists()
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
    assert {r.measurement.job.spec for r in store.trials()} == {POINTS[0], POINTS[2]}
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
    assert store.best(WIDE, "n1", 4, fingerprints) is None
    store.append(tuning([(large16, 1)], R16))
    store.append(tuning([(a16, 1), (a32, 1)], R32))
    for opened in (store, RecordStore(store.path)):
        found = opened.best(WIDE, "n1", 1, fingerprints)
        assert found is not None
        assert found.spec == a32
        assert opened.layout(WIDE, fingerprints) == R32
        assert opened.best(WIDE, "large", 1, fingerprints) is None  # the only one known reads another layout
        assert opened.best(TALL, "n1", 1, fingerprints) is None


def test_a_tune_of_another_isa_level_hides_no_winner(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    wide, narrow = replace(of_layout(R16), isa="avx2"), of_layout(R32)
    store.append(tuning([(wide, 1)], R16))
    store.append(tuning([(narrow, 1)], R32))
    for isa, expected in (("avx2", wide), ("scalar", narrow), (None, narrow)):
        found = store.best(WIDE, "n1", 1, fingerprints, isa)
        assert found is not None
        assert found.spec == expected


def test_tunes_of_groups_and_of_whole_rows_do_not_shadow_each_other(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    plain, layout = of_layout(R16), replace(R32, group=128)
    grouped = replace(plain, layout=layout)
    store.append(tuning([(plain, 1)]))
    store.append(tuning([(grouped, 1)], layout))
    read = RecordStore(tmp_path / "r.jsonl")
    assert (read.layout(WIDE, fingerprints), read.layout(WIDE, fingerprints, kind=WeightKind(group=128))) == (
        R16,
        layout,
    )
    assert read.layout(WIDE, fingerprints, kind=WeightKind(group=64)) is None
    for group, spec in ((0, plain), (128, grouped)):
        winner = read.best(WIDE, "n1", 1, fingerprints, kind=WeightKind(group=group))
        assert winner is not None
        assert winner.spec == spec
        assert read.current(WIDE, fingerprints, WeightKind(group=group)) == [spec]
    assert {winner.spec for _, winner in newest_winners(read, fingerprints)} == {plain, grouped}


def test_show_has_one_winner_for_each_use(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(of_layout(R16), 1), (of_layout(R16), 2)], R16))
    store.append(tuning([(of_layout(R32), 1)], R32))
    shown = newest_winners(store, fingerprints)
    assert [(w.threads, w.spec) for _, w in shown] == [(1, of_layout(R32)), (2, of_layout(R16))]
    store.append(tuning([(of_layout(R16, i=1), 1), (of_layout(R16, LARGE), 1)], R16))
    store.append(tuning([(of_layout(R32), 1)], R32))  # overruled: it saw less
    shown = newest_winners(store, fingerprints)
    assert [w.spec for _, w in shown if w.threads == 1 and w.regime == "n1"] == [of_layout(R16, i=1)]


def test_an_older_tune_fills_in_for_a_regime_in_the_same_layout(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)]))
    store.append(tuning([(of_layout(R16, i=1), 1)]))
    n1, large = (store.best(WIDE, regime, 1, fingerprints) for regime in ("n1", "large"))
    assert n1 is not None
    assert n1.spec == of_layout(R16, i=1)
    assert large is not None
    assert large.spec == of_layout(R16, LARGE)


def test_the_nearest_lower_thread_count_serves(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    for threads in (4, 1, 2, 8):
        store.append(tuning([(of_layout(R16, i=threads), threads)]))
    for asked, expected in ((1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (100, 8)):
        found = store.best(WIDE, "n1", asked, fingerprints)
        assert found is not None
        assert found.threads == expected


def test_a_stale_winner_is_a_starting_point_and_nothing_else(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(POINTS[0], 1)], made=others))
    store.append(tuning([(POINTS[1], 1), (POINTS[0], 2)], made=others))
    store.append(tuning([(POINTS[2], 1)]))
    assert store.stale(fingerprints) == [POINTS[1], POINTS[0]]
    assert store.current(WIDE, fingerprints) == [POINTS[2]]
    assert store.stale(others) == [POINTS[2]]
    assert store.best(WIDE, "n1", 1, lambda _: replace(FINGERPRINT, harness="2")) is None


def test_a_layout_that_no_winner_reads_cannot_be_recorded() -> None:
    with pytest.raises(BitgenError, match="no winner for 640x256 reads the layout i2s_r32"):
        tuning([(of_layout(R16), 1)], R32)


def test_a_tune_that_looked_at_less_overrules_none_that_saw_more(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    store.append(tuning([(of_layout(R16), 1), (of_layout(R16, LARGE), 1)], R16))
    store.append(tuning([(of_layout(R32), 1)], R32))
    assert store.layout(WIDE, fingerprints) == R16
    store.append(tuning([(of_layout(R32), 1), (of_layout(R32, LARGE), 1)], R32))
    assert store.layout(WIDE, fingerprints) == R32


def test_of_a_tune_the_part_that_holds_counts(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "r.jsonl")
    n1, large, n1_32 = of_layout(R16), of_layout(R16, LARGE), of_layout(R32)
    store.append(tuning([(n1, 1), (large, 1), (n1_32, 1)]))
    edited = lambda spec: OTHER if spec == n1 else FINGERPRINT  # noqa: E731
    assert store.layout(WIDE, edited) == R16
    assert store.best(WIDE, "n1", 1, edited) is None
    assert (found := store.best(WIDE, "large", 1, edited))
    assert found.spec == large
    assert store.stale(edited) == [n1]
    assert store.current(WIDE, edited) == [large, n1_32]
    # When nothing that reads the layout holds any more, the layout does not either.
    assert store.layout(WIDE, lambda spec: FINGERPRINT if spec == n1_32 else OTHER) is None


# ---- older files ----

OLD = {"cpu": "zen5 26 68", "compiler": "gcc 12", "templates": "abcd", "version": "0.1.0"}


def old_lines() -> list[dict[str, object]]:
    """A trial and a tune as version 0.1.0 wrote them."""
    spec = dump(POINTS[0])
    common = {"schema": 1, "time": 1.0, "fingerprint": OLD, "seed": 7}
    measurement = {"spec": spec, "shape": [640, 256], "n": 1, "threads": 1, "cold": True, "status": "ok"}
    winner = {"spec": spec, "n": 1, "threads": 2, "time_ns": 10.5, "default_ns": 12.0}
    tuned = {"shape": "640x256", "objective": "balanced", "layout": spec["layout"], "winners": [winner]}
    return [
        {**common, "kind": "trial", "measurement": {**measurement, "times_ns": [1.0], "load": 0.5}},
        {**common, "kind": "tuning", **tuned, "best_threads": 2},
    ]


def test_records_of_an_older_version_are_kept_and_their_winners_are_tried_first(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in old_lines())
    path.write_text(text)
    store = RecordStore(path)
    assert (store.skipped, store.outdated) == (0, 1)
    assert store.stale(fingerprints) == [POINTS[0]]
    assert store.best(WIDE, "n1", 2, fingerprints) is None  # nobody can say what its time depended on
    (old,) = store.tunings
    assert (old.best_threads, old.winners[0].threads, old.winners[0].time_ns) == (2, 2, 10.5)
    store.append(tuning([(POINTS[1], 1)]))
    assert path.read_text().startswith(text)
    again = RecordStore(path)
    assert (len(again.tunings), again.skipped, again.outdated) == (2, 0, 1)


def test_renamed_knobs_of_old_records_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    lines = json.dumps(old_lines()[1]).replace('"streams"', '"rivers"')
    RecordStore(path).append(tuning([(POINTS[1], 1)]))
    path.write_text(lines + "\n" + path.read_text().replace('"streams"', '"rivers"'))
    monkeypatch.setitem(RENAMED_KNOBS, "rivers", "streams")
    store = RecordStore(path)
    assert store.stale(fingerprints) == [POINTS[0]]
    assert (found := store.best(WIDE, "n1", 1, fingerprints))
    assert found.spec == POINTS[1]  # under its new name, and its time still holds
