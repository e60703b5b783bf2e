"""Numbers of threads are raced once, where the library leaves them open and the machine is quiet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from reference_model import small_config

from bitgen.cli import main
from bitgen.cpu import Topology, raced
from bitgen.cpu.raced import Raced, raced_here
from bitgen.formats.config import ModelConfig
from bitgen.inference import first_use, thread_race
from bitgen.inference.thread_race import choose, open_table, settle_threads
from bitgen.progress import Progress
from bitgen.runtime import KernelTable, load

pytestmark = pytest.mark.slow

CONFIG = small_config(hidden=160, ffn=320, head_dim=40, layers=2)
TWO = Topology(4, 2, 2, hardware=4)


@pytest.fixture
def table(bundle: Path) -> Iterator[KernelTable]:
    with load(bundle, 2) as opened:
        yield opened


class Races:
    """Stands for races, which cost what is said here: a count of threads, nanoseconds in each part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[dict[int, float]] = [{2: 10.0, 4: 20.0, 1: 9.0}] * 3
        self.raced: list[list[int]] = []
        self.cores = TWO
        self.busy = False
        monkeypatch.delenv(first_use.RACE_VARIABLE, raising=False)
        monkeypatch.setattr(first_use, "WORTH", 0)
        monkeypatch.setattr(thread_race, "_LOOK_S", 0.0)
        for module in (thread_race, raced):
            monkeypatch.setattr(module, "detect_topology", lambda: self.cores)
        monkeypatch.setattr(thread_race._OtherWork, "is_much", lambda _: self.busy)
        monkeypatch.setattr(thread_race, "race", self._race)

    def _race(self, tables: Mapping[int, KernelTable], config: ModelConfig) -> list[dict[int, float]]:
        del config
        assert all(table.threads == count for count, table in tables.items())
        self.raced.append(list(tables))
        return self.parts


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, bitgen_home: Path) -> Races:
    del bitgen_home
    return Races(monkeypatch)


def test_a_race_is_remembered(races: Races, table: KernelTable, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Progress] = []
    assert settle_threads(table, CONFIG, seen.append) == 1
    assert races.raced == [[2, 4, 1]]
    (line,) = [str(each) for each in seen if each.lasting]
    assert line == (
        "threads: 1 instead of 2 (4 0.50 times as fast, 1 1.11 times as fast) in a race, once "
        "(BITGEN_RACE=0: no race, -t: so many)"
    )
    assert settle_threads(table, CONFIG) == 1
    assert len(races.raced) == 1
    with open_table(table.path.parent, CONFIG, None) as opened:
        assert opened.threads == 1
    with open_table(table.path.parent, CONFIG, None, from_disk=True) as opened:
        assert opened.threads == table.threads
    with open_table(table.path.parent, CONFIG, 2) as opened:
        assert opened.threads == 2
    assert [str(found) for found in raced_here()] == [line[9:68]]
    assert main(["detect"]) == 0
    assert f"raced    bitnet: {line[9:68]}" in capsys.readouterr().out


def test_what_is_another_race(races: Races, table: KernelTable) -> None:
    """Another quota, another cpuset, another model; not another number of the same cores."""
    settle_threads(table, CONFIG)
    for cores in (
        Topology(4, 2, 2, 1.5, hardware=4),
        Topology(4, 2, 2, hardware=2),
        Topology(4, 2, 2, None, (("performance", 1), ("efficiency", 1)), hardware=4),
    ):
        races.cores, before = cores, len(races.raced)
        settle_threads(table, CONFIG)
        settle_threads(table, CONFIG)
        assert len(races.raced) == before + 1
    races.cores = TWO
    settle_threads(table, small_config(hidden=160, ffn=352, head_dim=40))
    assert len(races.raced) == 5
    assert len(raced_here()) == 2  # those of this machine as it is


def test_what_is_not_raced(
    races: Races, table: KernelTable, bitgen_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(when: str) -> None:
        assert settle_threads(table, CONFIG) == 2, when
        assert races.raced == [], when
        assert not (bitgen_home / "cache" / "races").exists(), when

    with monkeypatch.context() as patch:
        patch.setattr(first_use, "WORTH", 64 << 20)
        never("a small model")
    with monkeypatch.context() as patch:
        patch.setenv(first_use.RACE_VARIABLE, "0")
        never("unwanted")
    with monkeypatch.context() as patch:
        patch.setattr(races, "busy", True)
        never("other work")
    with monkeypatch.context() as patch:
        patch.setattr(table, "bundle", None)
        never("a library that no manifest names")
    with monkeypatch.context() as patch:
        patch.setattr(races, "cores", Topology(3, 3, 3, 2.0, hardware=2))
        patch.setattr(Topology, "counts", (2,))
        never("one number")
    with monkeypatch.context() as patch:
        assert table.bundle is not None
        manifest = table.bundle.manifest
        patch.setattr(races, "cores", Topology(4, 4, 4, hardware=4))
        object.__setattr__(manifest, "cores", 4)
        try:
            never("a tune compared numbers of threads on as many cores")
        finally:
            object.__setattr__(manifest, "cores", 0)


def test_other_work_in_a_race_leaves_no_trace(
    races: Races, table: KernelTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False, True])
    monkeypatch.setattr(thread_race._OtherWork, "is_much", lambda _: next(looks))
    assert settle_threads(table, CONFIG) == 2
    assert len(races.raced) == 1
    assert raced_here() == []


def test_a_damaged_outcome_is_raced_again(races: Races, table: KernelTable, bitgen_home: Path) -> None:
    settle_threads(table, CONFIG)
    (file,) = (bitgen_home / "cache" / "races").iterdir()
    file.write_text("{")
    assert raced_here() == []
    assert settle_threads(table, CONFIG) == 1
    assert len(races.raced) == 2


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{4: 10, 2: 9}] * 3, 2),
        ([{4: 10, 2: 9.85}] * 3, 4),  # less than 2 %
        ([{4: 10, 2: 5}, {4: 10, 2: 5}, {4: 10, 2: 9.9}], 4),  # not in each part
        ([{4: 10, 2: 9, 8: 8}] * 3, 8),
        ([{4: 10, 2: 1}] * 2, 4),  # a race that was not finished
        ([], 4),
    ],
)
def test_the_default_stays_unless_another_wins_clearly(parts: list[dict[int, float]], expected: int) -> None:
    assert choose(parts, 4) == expected


def test_a_race_that_was_too_slow_says_so() -> None:
    assert str(Raced("", "", 4, 4)) == "4 stay (undecided: they are too slow to be raced)"


@pytest.mark.parametrize("changes", [{}, {"group": 64}, {"weights": "q4", "group": 32}])
def test_a_real_race(
    table: KernelTable, bundle: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Of what kind of weights the model may have; each number of threads is timed in each part."""
    monkeypatch.setattr(thread_race, "BUDGET_S", 1.0)
    monkeypatch.setattr(first_use, "_POOL", 1 << 16)
    config = small_config(hidden=160, ffn=320, head_dim=40, layers=2, **changes)
    assert thread_race._bytes_of(table, config) > 0
    with load(bundle, 1) as alone:
        parts = thread_race.race({2: table, 1: alone}, config)
        assert len(parts) == 3
        assert all(list(part) == [2, 1] and min(part.values()) > 0 for part in parts)
        monkeypatch.setattr(thread_race, "BUDGET_S", -1.0)  # the clock has run out at the first look
        assert thread_race.race({2: table, 1: alone}, config) == []


def test_other_work_is_what_this_process_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, busy = [0.0], [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: clock[0])  # one core all the time
    monkeypatch.setattr(thread_race, "allowed_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(thread_race, "busy_seconds", lambda _: busy[0])
    work = thread_race._OtherWork()
    clock[0], busy[0] = 1.0, 101.3
    assert not work.is_much()  # 0.3 s of 4 cores
    busy[0] = 101.5
    assert work.is_much()
    monkeypatch.setattr(thread_race, "busy_seconds", lambda _: None)
    assert not thread_race._OtherWork().is_much()
