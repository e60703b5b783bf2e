"""The report: its numbers, its SVG, and that nothing in it runs, loads or breaks out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from synthetic import fingerprints, plan, runner, spaces

import bitgen.report.page
from bitgen import cli
from bitgen.errors import BitgenError
from bitgen.formats.config import find_model
from bitgen.measure import Status
from bitgen.measure.stats import median_interval
from bitgen.report import MAX_BYTES, Tune, render_plot, render_report, tune_of
from bitgen.report.page import sections_of
from bitgen.report.plots import Axis, number
from bitgen.search import tune
from bitgen.search.plan import targets_of
from bitgen.spec import KernelSpec, Shape
from bitgen.store import LoadRecord, RecordStore

MODEL = find_model("TriLM-99M")
SNAPSHOTS = Path(__file__).parents[1] / "data" / "report"
HOSTILE = "</script><script>alert('1')</script>\" onload=\"x&amp;<b>{{ 7 * 7 }}\u202e"


def some_fail(spec: KernelSpec, shape: Shape) -> Status:  # noqa: ARG001 - a kernel fails on every shape
    return Status.INCORRECT if spec.schedule["unroll"] == 4 else Status.OK


def recorded(path: Path, seed: int = 0, **changes: Any) -> Path:
    """The records of a tune on the synthetic machine, a record each half second."""
    asked = plan(
        model="TriLM-99M",
        targets=targets_of(MODEL),
        seed=seed,
        **{"threads": (1, 2), "trials": 12, **changes},
    )
    tune(asked, runner(asked, seed=seed, fails=some_fail), RecordStore(path), fingerprints, spaces())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed = [json.dumps({**line, "time": 1.7e9 + i / 2}) for i, line in enumerate(lines)]
    path.write_text("\n".join(timed) + "\n")
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("records") / "zen5.jsonl")


@pytest.fixture(scope="module")
def one(records: Path) -> Tune:
    return tune_of(RecordStore(records))


class Page(HTMLParser):
    """The tags of a page with their attributes, its visible text, and what is in its script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.raw: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in ("meta", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "circle"):
            assert self.open.pop() == tag
        elif tag == "path":
            assert self.tags

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.raw[self.open[-1]] = self.raw.get(self.open[-1], "") + data
        else:
            self.text.append(data)

    @property
    def data(self) -> Any:
        return json.loads(self.raw["script"])


def check_harmless(text: str) -> Page:
    """It parses, every tag is closed, nothing runs and nothing is loaded."""
    page = Page(text)
    assert not page.open
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}]
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "image", "use", "base", "form", "b")
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "style", "xlink:href")
        ]
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import|expression", page.raw["style"])
    assert not re.search(r"https?:|//[a-z]|javascript:", text)
    assert "default-src 'none'" in text
    return page


# ---- the page ----


def test_a_page_is_one_harmless_file_with_all_sections(one: Tune) -> None:
    text = render_report(one)
    page = check_harmless(text)
    assert len(text.encode()) < MAX_BYTES
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == [
        *("winners", "formats", "forward", "roofline", "history", "threads", "noise", "machine"),
    ]
    assert list(page.data["sections"]) == sections
    assert {tag for tag, _ in page.tags} >= {"svg", "table", "figure"}
    assert "prefers-color-scheme: dark" in page.raw["style"]
    assert "@media print" in page.raw["style"]


def test_the_numbers_are_those_of_the_records(one: Tune, records: Path) -> None:
    store = RecordStore(records)
    data = Page(render_report(one)).data
    (part,) = (p for p in data["sections"]["winners"] if p["name"].startswith("n1"))
    rows = [dict(zip(part["columns"], row, strict=True)) for row in part["rows"]]
    assert len(rows) == len(MODEL.shapes)
    for row in rows:
        record = next(r for r in store.tunings if r.shape.name == row["shape"])
        (winner,) = (
            w
            for w in record.winners
            if w.spec.layout == record.layout and w.regime == "n1" and w.threads == one.threads
        )
        assert winner.baseline is not None
        assert row["time_us"] == pytest.approx(winner.time_ns / 1e3, rel=1e-5)
        assert row["default_us"] == pytest.approx(winner.baseline.median_ns / 1e3, rel=1e-5)
        assert row["low"] <= row["ratio"] <= row["high"]
    (kernels,) = (p for p in data["sections"]["winners"] if p["name"] == "kernels")
    for slot, shape, layout, schedule, isa in kernels["rows"]:
        record = next(r for r in store.tunings if r.shape.name == shape)
        specs = [w.spec for w in record.winners if slot.startswith(f"{w.regime}, {w.threads} thread")]
        assert (layout, schedule, isa) in [(s.layout.name, s.schedule.name, s.isa) for s in specs]
    assert len(kernels["rows"]) == len(one.shown) * len(MODEL.shapes)
    (every,) = (p for p in data["sections"]["formats"] if p["name"] == "all")
    chosen = dict(zip(every["columns"], every["rows"][-1], strict=True))
    token_ms = sum(one.count(Shape.parse(row["shape"])) * row["time_us"] for row in rows) / 1e3
    assert chosen[f"token_ms_n1_t{one.threads}"] == pytest.approx(token_ms, rel=1e-4)
    (shares,) = (p for p in data["sections"]["forward"] if p["name"].startswith("n1"))
    assert sum(row[2] for row in shares["rows"]) == pytest.approx(1, abs=1e-4)


def test_every_chosen_kernel_is_on_the_roofline(one: Tune) -> None:
    """Also one in another layout than the one that its family alone would take."""
    decisions = {}
    for shape, record in one.decisions.items():
        taken = {winner.spec.layout for (at, _), winner in one.kernels("i2s").items() if at == shape}
        others = [w.spec.layout for w in record.winners if w.spec.family == "i2s"]
        decisions[shape] = replace(record, layout=next(each for each in others if each not in taken))
    moved = replace(one, decisions=decisions)
    assert not set(moved.kernels(None).values()) & set(moved.kernels("i2s").values())
    for shown in (one, moved):
        section = next(s for s in sections_of(shown) if s.key == "roofline")
        for part in section.parts:
            assert part.table
            assert part.plot
            assert sum(row[-1] == "yes" for row in part.table.rows) == len(shown.decisions)
            assert sum(mark.ring for mark in part.plot.marks) == len(shown.decisions)


def test_the_history_only_falls_and_tells_who_was_eliminated(one: Tune) -> None:
    history = next(s for s in sections_of(one) if s.key == "history")
    for part in history.parts[:-1]:
        assert part.plot
        assert len(part.plot.lines) == 2
        for line in part.plot.lines:
            times, costs = zip(*line.points, strict=True)
            assert list(times) == sorted(times)
            assert list(costs) == sorted(costs, reverse=True)
        assert part.table
        keys = [key for key, _, _ in part.table.columns]
        rows = [dict(zip(keys, row, strict=True)) for row in part.table.rows]
        assert sum(row["failed"] for row in rows) > 0
        assert all(row["dropped"] == 0 for row in rows)
        assert all(0 < row["pruned"] + row["failed"] + row["partly"] <= row["kernels"] for row in rows)
        assert all(row["raced"] >= row["left"] for row in rows)
    failures = history.parts[-1].table
    assert failures
    assert {row[1] for row in failures.rows} == {"incorrect: made to fail"}


def test_what_its_pairs_pruned_is_counted(records: Path, tmp_path: Path) -> None:
    """The replay times no pairs; here every second trial is twice as slow as the kernel beside it."""
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    slow = {"n1": 0, "large": 0}
    for line in lines[::2]:
        measurement = line.get("measurement", {})
        if measurement.get("status") == "ok":
            measurement["job"]["against"] = measurement["job"]["spec"]
            measurement["against_ns"] = [time / 2 for time in measurement["times_ns"]]
            slow[measurement["job"]["spec"]["regime"]] += 1
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = next(s for s in sections_of(tune_of(RecordStore(path))) if s.key == "history")
    for part, regime in zip(history.parts, slow, strict=False):
        assert part.table
        place = [key for key, _, _ in part.table.columns].index("pruned")
        assert 0 < sum(row[place] for row in part.table.rows) <= slow[regime]


def test_pauses_are_no_part_of_a_tune(records: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    late = [{**line, "time": line["time"] + (1e5 if i > 40 else 0)} for i, line in enumerate(lines)]
    path = tmp_path / "resumed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in late))
    resumed = tune_of(RecordStore(path))
    assert resumed.elapsed(resumed.races[-1].time) < len(lines)


def test_what_the_records_do_not_hold_is_left_out_with_a_sentence(records: Path, tmp_path: Path) -> None:
    kept = [line for line in records.read_text().splitlines() if '"kind": "tuning"' in line]
    path = tmp_path / "decisions.jsonl"
    path.write_text("\n".join(kept))
    text = "".join(check_harmless(render_report(tune_of(RecordStore(path)))).text)
    assert "The records hold no trials of this tune" in text
    assert "The records hold no peaks for n1" in text
    assert "hold no times of attention" in text
    assert "neither load nor frequency" in text
    assert "not of this CPU" in text


def test_the_load_of_the_tune_is_shown(records: Path, tmp_path: Path) -> None:
    """What was told while the tune ran, and not what another tune was told."""
    path = tmp_path / "loaded.jsonl"
    path.write_text(records.read_text())
    times = [json.loads(line)["time"] for line in records.read_text().splitlines()]
    store = RecordStore(path)
    for time, busy, steal in ((1.0, 0.9, 0.0), (times[9] + 0.1, 0.25, 0.0), (times[30] + 0.1, 0.5, 0.125)):
        store.append(LoadRecord(busy, steal, time))
    tune = tune_of(RecordStore(path))
    noise = next(s for s in sections_of(tune) if s.key == "noise")
    (part,) = (part for part in noise.parts if part.name == "load")
    assert part.table
    assert part.plot
    assert [row[1:] for row in part.table.rows] == [(25.0, 0.0), (50.0, 12.5)]
    assert [row[0] for row in part.table.rows] == sorted(row[0] for row in part.table.rows)
    text = "".join(check_harmless(render_report(tune)).text)
    assert "The records hold no frequency" in text


def test_without_a_model_each_matrix_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    asked = plan(trials=4, families=("i2s",))
    tune(asked, runner(asked), RecordStore(path), fingerprints, spaces())
    toy = tune_of(RecordStore(path))
    assert toy.model is None
    text = "".join(check_harmless(render_report(toy)).text)
    assert "each matrix counts once" in text
    assert "One number of threads was tuned, 1;" in text


def test_of_several_tunes_the_newest_of_the_model_is_shown(records: Path, tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(records.read_text())
    asked = plan(trials=4, families=("i2s",))
    tune(asked, runner(asked), RecordStore(path), fingerprints, spaces())
    store = RecordStore(path)
    assert tune_of(store).model is None
    assert tune_of(store, MODEL).decisions == tune_of(RecordStore(records)).decisions
    with pytest.raises(BitgenError, match="holds no finished tune of 3B"):
        tune_of(store, find_model("3B"))


def test_two_tunes_are_compared(one: Tune, tmp_path: Path) -> None:
    other = tune_of(RecordStore(recorded(tmp_path / "other.jsonl", seed=3)))
    section = next(s for s in sections_of(one, other) if s.key == "against")
    assert "without interval" in " ".join(section.left_out)
    for part in section.parts[1:-1]:
        assert part.table
        assert [row[0] for row in part.table.rows][-1] == "all, a token"
        for _, this, against, ratio in part.table.rows:
            assert ratio == pytest.approx(this / against)
    names = section.parts[-1].table
    assert names
    counts = Counter(tune for _, _, tune, *_ in names.rows)
    assert counts["this"] == counts["against"] > 0
    assert counts["this"] + counts["both"] == len(one.shown) * len(one.decisions)
    check_harmless(render_report(one, other))


def test_hostile_texts_stay_texts(records: Path, tmp_path: Path) -> None:
    escaped = json.dumps(HOSTILE)[1:-1]
    text = records.read_text()
    text = text.replace("zen5 26 68", f"{escaped} digest").replace("made to fail", escaped)
    path = tmp_path / "</title><script>x.jsonl".replace("/", "_")
    path.write_text(text.replace("gcc 12", f"gcc {escaped} digest"))
    hostile = tune_of(RecordStore(path), replace(MODEL, name=f"a model {HOSTILE}"))
    page = check_harmless(render_report(hostile, hostile))
    shown = HOSTILE.replace("\u202e", "?")
    assert page.data["cpu"] == HOSTILE
    assert f"bitgen tune: a model {shown} on {shown}" in page.text
    assert any(f"incorrect: {shown}" in piece for piece in page.text)


def test_a_page_is_never_larger_than_its_bound(one: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(render_report(one).encode())
    monkeypatch.setattr(bitgen.report.page, "MAX_BYTES", whole - 6000)
    cut = render_report(one)
    assert len(cut.encode()) <= whole - 6000
    assert "more rows are in the records only" in "".join(check_harmless(cut).text)
    monkeypatch.setattr(bitgen.report.page, "MAX_BYTES", 20_000)
    with pytest.raises(BitgenError, match="too many for one page"):
        render_report(one)


@pytest.mark.parametrize("key", ["winners", "formats", "roofline", "history", "threads", "noise"])
def test_the_svg_is_as_it_was(key: str, one: Tune) -> None:
    """To accept a change, delete the file in tests/data/report and run the test twice."""
    section = next(s for s in sections_of(one) if s.key == key)
    drawn = render_plot(next(part.plot for part in section.parts if part.plot))
    file = SNAPSHOTS / f"{key}.svg"
    if not file.exists():
        file.write_text(drawn, encoding="utf-8")
        pytest.fail(f"{file} was not there and is written: look at it, and run again")
    assert drawn == file.read_text(encoding="utf-8")


# ---- axes and statistics ----


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0, 10), [0, 2.5, 5, 7.5, 10]),
        (Axis("", 0.93, 1.07), [0.95, 1.0, 1.05]),
        (Axis("", 1, 1000, log=True), [1, 10, 100, 1000]),
        (Axis("", 40, 900, log=True), [50, 100, 200, 500]),
        (Axis("", 7.5, 12.5, log=True), [8, 10, 12]),
    ],
)
def test_ticks_are_round_and_inside(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks == pytest.approx(ticks)


def test_axes_have_room_for_one_value_and_for_none() -> None:
    for log in (False, True):
        for values in ([], [3.0], [3.0, 3.0], [float("inf"), 2.0]):
            axis = Axis.over("", values, log=log)
            assert axis.low < axis.high
            assert axis.ticks
            assert all(0 <= axis.share(value) <= 1 for value in values if value < 1e9)


def test_numbers_are_written_as_people_do() -> None:
    written = [number(value) for value in (0, 0.05, 1, 2.5, 999, 1500, 25000, 2e6, 1e-4)]
    assert written == ["0", "0.05", "1", "2.5", "999", "1,500", "2.5e4", "2e6", "1e-4"]


@pytest.mark.parametrize(
    ("n", "interval"), [(5, None), (6, (0, 5)), (7, (0, 6)), (9, (1, 7)), (14, (2, 11)), (20, (5, 14))]
)
def test_the_interval_of_a_median(n: int, interval: tuple[int, int] | None) -> None:
    """The ranks in tables of the sign test at 95 %."""
    assert median_interval([float(i) for i in reversed(range(n))]) == interval


# ---- the command line ----


@pytest.fixture
def report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("BITGEN_HOME", str(tmp_path / "home"))

    def run(*argv: str) -> tuple[int, str, str]:
        code = cli.main(["report", "--out", str(tmp_path / "page.html"), *argv])
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_the_page(
    report: Callable[..., tuple[int, str, str]], records: Path, tmp_path: Path
) -> None:
    code, out, err = report(str(records.parent), "--against", str(records), "-m", "TriLM-99M")
    assert (code, err) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/page.html \(\d+ kB\)\n", out)
    assert "Two tunes compared" in "".join(check_harmless((tmp_path / "page.html").read_text()).text)


def test_wrong_input_is_one_line(
    report: Callable[..., tuple[int, str, str]], records: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "noise.jsonl").write_bytes(b"\0\xff{}\n[[[")
    folder = tmp_path / "folder"
    folder.mkdir()
    for argv, code, message in (
        ([], 5, "there are no records at"),
        ([str(folder)], 5, "there are no records in"),
        ([str(tmp_path / "empty.jsonl")], 1, "holds no finished tune: run bitgen tune --model NAME first"),
        ([str(tmp_path / "noise.jsonl")], 1, "holds no finished tune"),
        ([str(tmp_path)], 5, "several microarchitectures: give one file of empty.jsonl, noise.jsonl"),
        ([str(records), "-m", "3B"], 1, "holds no finished tune of 3B"),
        ([str(records), "-m", "nope"], 2, "unknown model 'nope'"),
        ([str(records), "--against", str(tmp_path / "none")], 5, "there are no records at"),
        ([str(records), "--out", str(folder)], 5, "cannot write"),
    ):
        got, out, err = report(*argv)
        assert (got, out) == (code, "")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dry-run", "--report", "page.html"], "--report needs records"),
        (["--report", "not/there/page.html"], "cannot write not/there/page.html"),
        (["--report", "."], "cannot write ."),
    ],
)
def test_a_tune_refuses_a_report_it_cannot_write(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "-m", "TriLM-99M", *argv]) != 0
    assert message in capsys.readouterr().err
