"""The committed logs, replayed: the search ends near the true best, at a fraction of the exhaustive time."""

from __future__ import annotations

import statistics

import pytest
from replay import Contention
from search_study import LOG, MODEL, read_logs, search, true_times

from bitgen.formats.config import find_model
from bitgen.search import load_search_config, targets_of

pytestmark = pytest.mark.slow

LOGS = read_logs(LOG)


@pytest.mark.parametrize(
    "group",
    [("t5", "avx512_vbmi", "n1", 1), ("t5", "avx2", "n1", 1), ("i2s", "avx512_vbmi", "large", 1)],
    ids=lambda value: "-".join(map(str, value)),
)
def test_a_search_ends_within_three_percent_of_the_best(
    group: tuple[str, str, str, int],
) -> None:
    logs = [log for log in LOGS if log.group == group]
    assert {log.shape for log in logs} == {target.shape for target in targets_of(find_model(MODEL))}
    outcomes = [search(logs, seed, load_search_config()) for seed in range(3)]
    for log in logs:
        regrets = [outcome.regret[log.shape] for outcome in outcomes]
        assert statistics.median(regrets) <= 0.03, log.shape.name
    # 0.157 at most: kernels near the roofline run beside probes.
    assert statistics.mean(outcome.share for outcome in outcomes) <= 0.16


def test_the_logs_hold_whole_spaces_with_something_to_win() -> None:
    assert len({log.group for log in LOGS}) == 7
    for log in LOGS:
        assert len(set(log.points)) == len(log.points) >= 60
        assert {len(row) for row in log.rounds_ns} == {len(log.points)}
        assert len(log.rounds_ns) >= 16
        times = true_times(log)
        assert max(times.values()) > 1.05 * min(times.values())


def test_bursts_only_add_time() -> None:
    times, bursts = [100.0] * 1000, Contention(0.2, 0.5)
    hit = bursts.disturb(times, "a")
    assert hit == bursts.disturb(times, "a") != bursts.disturb(times, "b")
    assert min(hit) == 100.0
    assert 150 < sum(time > 100 for time in hit) < 250
    assert 105 < statistics.fmean(hit) < 115


def test_a_search_beside_other_work_sees_other_times_and_takes_longer() -> None:
    logs = [log for log in LOGS if log.group == ("t5", "avx2", "n1", 1)][:1]
    quiet, noisy = (search(logs, 0, load_search_config(), each) for each in (None, Contention(0.3, 1.0)))
    assert noisy.share > quiet.share
