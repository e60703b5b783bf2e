from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import broken_kernels
import numpy as np
import pytest
from broken_kernels import ALL, RIGHT, SLOW, Broken, spec_of
from libraries import share_cache, toolchain_of
from replay import ReplayRunner, RoundReplay

from bitgen.cpu import accepted_isas, detect_cpu, find_isa, load_isas
from bitgen.errors import BitgenError
from bitgen.measure import (
    EarlyStopping,
    Job,
    LocalRunner,
    MachinePeak,
    Measurement,
    Missing,
    Race,
    RaceJob,
    Runner,
    Status,
    TimingPolicy,
    Verification,
    exact_sweep,
    guarded,
)
from bitgen.measure.cases import EDGES, RAGGED, TOKENS, Case, case_activations, case_weights, cases_of
from bitgen.measure.guarded import Pools
from bitgen.measure.harness import Harness, build_harness
from bitgen.measure.jobs import batches
from bitgen.measure.lock import MachineLock
from bitgen.measure.probes import Fma, build_probes, peak_probes
from bitgen.progress import Progress
from bitgen.records import dump, load
from bitgen.reference import ternary_matmul
from bitgen.space import space_for
from bitgen.spec import N1, SMALL, KernelSpec, Layout, Schedule, Shape

pytestmark = pytest.mark.slow

SHAPE = Shape(700, 96)  # more rows than any check has, so that a kernel can tell the timing from the checks
# Right kernels need 10 ms; the rest of the 3 s, which every hanging kernel costs, is for loaded machines.
# Turns of 0.1 ms are too noisy to prune anybody.
QUICK = TimingPolicy(
    repeats=3,
    min_repeat_ms=0.1,
    race_min_ms=0.1,
    check_timeout_s=3,
    timeout_s=3,
    stopping=EarlyStopping(min_pairs=9),
)


def job(spec: KernelSpec, **changes: Any) -> Job:
    return replace(Job(spec, SHAPE, 1, cold=True), **changes)


def invented(index: int = 0, regime: str = "n1") -> KernelSpec:
    return KernelSpec("i2s", "scalar", regime, Layout("i2s", 16), Schedule("direct", (("streams", index),)))


def answers_of(runner: Runner, jobs: Sequence[Job]) -> list[Measurement]:
    """The measurements of ``jobs``, none of which is missing."""
    answers = list(runner.measure(jobs))
    assert not any(isinstance(answer, Missing) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Measurement)]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[LocalRunner]:
    toolchain = toolchain_of(strict=False)
    with LocalRunner(
        toolchain,
        detect_cpu(),
        policy=QUICK,
        render=broken_kernels.render,
        lock_folder=tmp_path,
    ) as local:
        yield local


# ---- records


def test_a_measurement_survives_json() -> None:
    asked = Job(invented(), SHAPE, 1, 2, cold=True, against=invented(1))
    answer = Measurement(asked, Status.OK, "", (3.0, 1.0, 2.0), (2.0, 2.0, 2.0))
    assert load(Measurement, json.loads(json.dumps(dump(answer))), "") == answer
    assert answer.median_ns == 2
    assert answer.ratio == 1
    failed = Measurement(asked, Status.CRASHED, "SIGSEGV")
    assert load(Measurement, dump(failed), "") == failed
    assert failed.median_ns == math.inf
    assert failed.ratio is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"times_ns": ()}, "at least one time"),
        ({"times_ns": (1.0, -1.0), "against_ns": (1.0, 1.0)}, "positive"),
        ({"times_ns": (math.nan,), "against_ns": (1.0,)}, "finite"),
        ({"against_ns": (1.0, 1.0)}, "as many"),
        ({"job": Job(invented(), SHAPE, 1)}, "not named"),
        ({"status": Status.CRASHED, "detail": "x"}, "no times"),
        ({"status": Status.TIMEOUT, "times_ns": (), "against_ns": ()}, "says why"),
    ],
)
def test_a_measurement_that_contradicts_itself_cannot_be_built(changes: dict[str, Any], says: str) -> None:
    right = Measurement(job(invented(), against=invented(1)), Status.OK, "", (1.0,), (1.0,))
    with pytest.raises(BitgenError, match=says):
        replace(right, **changes)


def test_a_job_must_fit_its_kernel() -> None:
    with pytest.raises(BitgenError, match="not for n = 2"):
        Job(invented(), SHAPE, 2)
    with pytest.raises(BitgenError, match="not for n = 1"):
        Job(invented(), SHAPE, 1, against=invented(regime="small"))
    with pytest.raises(BitgenError, match="not for 700x96"):
        Job(replace(invented(), shape=Shape(1, 1)), SHAPE, 1)
    with pytest.raises(BitgenError, match="threads"):
        Job(invented(), SHAPE, 1, 0)


def test_a_peak_names_the_best_pattern() -> None:
    peak = MachinePeak(2, {"streams1": 10.0, "streams4": 15.0}, {"avx2": 200.0})
    assert peak.best_dram_gbs == 15
    assert peak.best_pattern == "streams4"
    with pytest.raises(BitgenError, match="at least one"):
        MachinePeak(1, {}, {"avx2": 1.0})


# ---- replay


def test_a_replay_answers_what_was_recorded_and_says_what_was_not() -> None:
    known, unknown = job(invented(0)), job(invented(1))
    record = Measurement(known, Status.OK, "", (5.0, 6.0))
    newer = Measurement(known, Status.OK, "", (7.0, 8.0))
    replay = ReplayRunner([record, newer], [MachinePeak(1, {"p": 1.0}, {"scalar": 2.0})])
    assert list(replay.measure([unknown, known, replace(known, against=invented(2))])) == [
        Missing(unknown),
        newer,
        newer,
    ]
    assert "never measured on 700x96" in Missing(unknown).detail
    assert replay.machine_peak(1, ["scalar"]).peak_gops == {"scalar": 2.0}
    with pytest.raises(BitgenError, match="2 threads"):
        replay.machine_peak(2, ["scalar"])
    with pytest.raises(BitgenError, match="avx2"):
        replay.machine_peak(1, ["avx2"])


def test_a_replayed_race_draws_the_same_rounds_for_the_same_seed() -> None:
    jobs = [job(invented(i)) for i in range(3)]
    replay = ReplayRunner(
        [
            Measurement(jobs[0], Status.OK, "", (1.0, 2.0, 3.0)),
            Measurement(jobs[1], Status.CRASHED, "SIGILL"),
        ]
    )
    specs = tuple(j.spec for j in jobs)
    asked = RaceJob(specs, SHAPE, 1, 1, rounds=20, cold=True, seed=7)
    race = replay.race(asked)
    assert list(race) == [specs[0]]
    assert len(race[specs[0]]) == 20
    assert set(race[specs[0]]) == {1.0, 2.0, 3.0}
    assert race.dropped[specs[1]] == "SIGILL"
    assert "never measured" in race.dropped[specs[2]]
    assert replay.race(asked) == race
    assert replay.race(replace(asked, specs=specs[:1]))[specs[0]] == race[specs[0]]
    assert replay.race(replace(asked, seed=8)) != race


def test_reading_records_imports_no_machinery() -> None:
    heavy = "{'bitgen.measure.worker', 'bitgen.toolchain', 'cffi', 'jinja2', 'filelock'}"
    script = f"import sys, bitgen.measure; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout == b"[]\n"


# ---- early stopping


def test_a_candidate_is_pruned_when_its_pairs_agree() -> None:
    rule, one = EarlyStopping(), [1.0] * 8
    assert rule.should_prune([1.15], one)  # three times the usual noise
    assert not rule.should_prune([1.12], one)
    assert not EarlyStopping(min_pairs=2).should_prune([9.0], one)
    assert not rule.should_prune([1.07] * 2, one)
    assert rule.should_prune([1.07] * 3, one)
    assert not rule.should_prune([1.0, 2.0], one)
    assert not rule.should_prune([0.99] * 8, one)
    assert not rule.should_prune([1.3, 0.9, 1.4, 0.8], one)
    assert rule.should_prune([2.3, 1.15], [2.0, 1.0])  # a slow moment of both cancels
    assert [rule.pairs([x] * 4, one[:4]) for x in (1.5, 1.07, 0.9)] == [1, 3, 4]
    assert rule.pairs([1.2], [1.0]) == 1
    with pytest.raises(BitgenError, match="at least 1 pair"):
        EarlyStopping(min_pairs=0)


def test_batches_hold_jobs_of_one_shape_and_threads() -> None:
    jobs = [job(invented(i)) for i in range(5)] + [job(invented(0), threads=2), job(invented(1), threads=2)]
    assert [len(batch) for batch in batches(jobs, 4)] == [4, 1, 2]
    assert [j for batch in batches(jobs, 4) for j in batch] == jobs
    assert list(batches([], 4)) == []


def test_a_replay_of_rounds_prunes_losers_keeps_pairs_together_and_adds_up_the_time() -> None:
    # Round i took i times as long for both: only pairs of the same round tell that one is 20 % slower.
    incumbent, loser, rest = (job(invented(i)) for i in range(3))
    records = [
        Measurement(j, Status.OK, "", tuple(factor * 10 ** (i % 3) for i in range(8)))
        for j, factor in ((incumbent, 1.0), (loser, 1.2), (rest, 1.001))
    ]
    jobs = [replace(j, against=incumbent.spec) for j in (loser, rest)]
    replay = RoundReplay(records, stopping=EarlyStopping(), repeats=4, batch=8, min_ns=2000.0)
    lost, stayed = replay.measure(jobs)
    assert isinstance(lost, Measurement)
    assert isinstance(stayed, Measurement)
    assert (len(lost.times_ns), len(stayed.times_ns)) == (1, 4)
    assert lost.ratio == pytest.approx(1.2)
    assert stayed.ratio == pytest.approx(1.001)
    assert replay.spent_ns == (1 + 4 + 4) * 2000.0  # the incumbent's turns serve both
    race = replay.race(RaceJob((loser.spec, rest.spec), SHAPE, 1, 1, rounds=9, cold=True, seed=1))
    assert [a / b for a, b in zip(*race.values(), strict=True)] == pytest.approx([1.2 / 1.001] * 9)
    assert replay.spent_ns == (9 + 18) * 2000.0
    other = RoundReplay(records, stopping=EarlyStopping(), repeats=4, batch=8, min_ns=1.0, seed=1)
    assert [a.times_ns for a in answers_of(other, jobs)] != [lost.times_ns, stayed.times_ns]


# ---- cases


def test_every_case_has_the_numbers_its_name_says() -> None:
    for name, ((w0, w1), (x0, x1)) in EDGES.items():
        case = Case(name, Shape(3, 7), 2)
        assert case_weights(case).tolist() == [[w0, w1, w0, w1, w0, w1, w0]] * 3
        assert case_activations(case).tolist() == [[x0, x1, x0, x1, x0, x1, x0]] * 2
    extremes = {
        int(np.abs(ternary_matmul(case_activations(c), case_weights(c))).max())
        for c in (Case(name, Shape(1, 1000), 1) for name in EDGES)
    }
    assert max(extremes) == 128 * 1000  # the largest sum there is
    one = Case("one product", Shape(4, 9), 1)
    assert ternary_matmul(case_activations(one), case_weights(one)).tolist() == [[0, 0, 0, 128]]


@pytest.mark.parametrize("regime", TOKENS)
def test_cases_cover_every_ragged_shape_and_n_as_integers_and_floats(regime: str) -> None:
    random = {(c.shape, c.n, c.floats) for c in cases_of(regime) if c.name == "random"}
    assert random >= {(shape, n, f) for shape in RAGGED for n in TOKENS[regime] for f in (False, True)}
    assert set(EDGES) <= {c.name for c in cases_of(regime)}
    assert len(cases_of(regime, deep=True)) >= len(cases_of(regime))


# ---- kernels that are wrong, crash and hang


def test_every_way_to_fail_is_a_recorded_value_and_ends_nothing(runner: LocalRunner) -> None:
    jobs = [job(spec_of(kernel)) for kernel in ALL]
    answers = answers_of(runner, jobs)
    assert [a.job.spec for a in answers] == [j.spec for j in jobs]
    seen = [(kernel.name, a.status, a.detail) for kernel, a in zip(ALL, answers, strict=True)]
    wanted = [(kernel.name, kernel.status, kernel.says) for kernel in ALL]
    assert [row[:2] for row in seen] == [row[:2] for row in wanted], seen
    for (name, _, detail), (_, _, says) in zip(seen, wanted, strict=True):
        assert says in detail, name
    # After all that: another answer of the same process.
    (answer,) = answers_of(runner, [job(spec_of(RIGHT), shape=Shape(100, 50))])
    assert answer.status is Status.OK


def test_the_neighbours_of_a_kernel_that_crashes_when_loaded_are_measured(runner: LocalRunner) -> None:
    names = ["right", "crashes when loaded", "int16 sums overflow"]
    specs = tuple(_spec(name) for name in names)
    race = runner.race(RaceJob(specs, SHAPE, 1, 1, rounds=2))
    assert list(race) == [specs[0]]
    assert "while it was loaded" in race.dropped[specs[1]]
    found = {v.spec: v.status for v in runner.verify(specs, deep=False)}
    assert [found[spec] for spec in specs] == [Status.OK, Status.CRASHED, Status.INCORRECT]


_MAPS = """
    import sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import broken_kernels as b
    from bitgen.api import tune
    from bitgen.measure import Job, LocalRunner
    from bitgen.spec import Shape
    from bitgen.cpu import detect_cpu
    from bitgen.toolchain import Toolchain, find_compiler

    tune({model!r}, isas=["scalar"], families=["i2s"], regimes=["n1"], dry_run=True, logs=Path({logs!r}))
    kernels = [b.RIGHT, next(k for k in b.ALL if k.name == "crashes when loaded")]
    toolchain = Toolchain(find_compiler())
    with LocalRunner(toolchain, detect_cpu(), render=b.render) as runner:
        jobs = [Job(b.spec_of(kernel), Shape(50, 50), 1) for kernel in kernels]
        print(*(answer.status.value for answer in runner.measure(jobs)))
    kinds = [Path({home!r}, "cache", kind).resolve() for kind in ("modules", "libraries")]
    made = [str(path) for kind in kinds for path in kind.rglob("*.so")]
    print(len(made) >= 3)
    maps = Path("/proc/self/maps").read_text()
    print([path for path in made if path in maps])
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc/self/maps")
def test_the_process_that_tunes_maps_no_candidate(tmp_path: Path) -> None:
    """Neither one of a tune nor one whose constructor would end it: only the worker loads them."""
    model = tmp_path / "tiny.yaml"
    model.write_text(
        "name: tests/tiny\nhidden: 64\nffn: 96\nlayers: 1\nheads: 2\nkv_heads: 1\nhead_dim: 32\nvocab: 32\n"
        "rope_theta: 10000.0\nactivation: silu\nsub_norms: true\ntied_head: true\nnorm_eps: 1.0e-5\n"
        "architecture: bitnet\n"
    )
    home = share_cache(tmp_path / "home")
    script = textwrap.dedent(_MAPS).format(
        tests=str(Path(__file__).parents[1] / "support"),
        model=str(model),
        logs=str(tmp_path / "logs"),
        home=str(home),
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "BITGEN_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["ok crashed", "True", "[]"], done.stdout + done.stderr


def test_a_right_kernel_has_times_and_so_has_its_incumbent(runner: LocalRunner) -> None:
    right, baseline = spec_of(RIGHT), spec_of(_named("only wrong for many rows"))
    small = Shape(300, 96)
    alone, both = answers_of(runner, [job(right), job(right, against=baseline, shape=small)])
    assert len(alone.times_ns) == QUICK.repeats
    assert alone.job.against is None
    assert (both.job.against, len(both.times_ns), len(both.against_ns)) == (
        baseline,
        QUICK.repeats,
        QUICK.repeats,
    )
    ratios = sorted(t / a for t, a in zip(both.times_ns, both.against_ns, strict=True))
    assert both.ratio == ratios[1]
    # An incumbent that fails is no fault of the candidate.
    (answer,) = answers_of(runner, [job(right, against=_spec("crashes when timed"))])
    assert (answer.status, answer.ratio, answer.against_ns) == (Status.OK, None, ())
    (answer,) = answers_of(runner, [job(right, against=_spec("no C"))])
    assert (answer.status, answer.ratio) == (Status.OK, None)


def test_a_candidate_that_lost_leaves_its_batch_and_the_others_stay(runner: LocalRunner) -> None:
    fast, slow = spec_of(RIGHT), spec_of(SLOW)
    runner._policy = replace(QUICK, repeats=6, stopping=EarlyStopping(min_pairs=2))
    (alone,) = answers_of(runner, [job(fast)])
    same, loser = answers_of(runner, [job(fast), job(slow, against=fast)])
    assert len(alone.times_ns) == len(same.times_ns) == 6
    assert (loser.status, loser.job.against) == (Status.OK, fast)
    assert 2 <= len(loser.times_ns) == len(loser.against_ns) < 6
    assert loser.against_ns == same.times_ns[: len(loser.times_ns)]  # of the same rounds
    assert loser.ratio is not None
    assert loser.ratio > 1.2


def test_one_that_fails_does_not_spoil_the_batch_of_the_others(runner: LocalRunner) -> None:
    names = ["right", "crashes when timed", "int16 sums overflow", "no C", "slow"]
    specs = [_spec(name) for name in names]
    answers = answers_of(runner, [job(spec, against=specs[0]) for spec in specs])
    assert [a.job.spec for a in answers] == specs
    assert [a.status.value for a in answers] == ["ok", "crashed", "incorrect", "compile error", "ok"]


def test_several_threads_and_a_matrix_smaller_than_a_row_block(runner: LocalRunner) -> None:
    jobs = [
        job(spec_of(RIGHT), threads=3),
        job(spec_of(RIGHT), shape=Shape(1, 1)),
        job(spec_of(RIGHT), cold=False),
    ]
    assert [a.status for a in answers_of(runner, jobs)] == [Status.OK] * 3


def test_a_verification_names_the_kernel_that_ended_the_process_of_several(runner: LocalRunner) -> None:
    names = ["right", "aborts", "int16 sums overflow", "no C", "hangs", "only wrong for many rows"]
    found = {v.spec: v for v in runner.verify([_spec(name) for name in names], deep=False)}
    assert [found[_spec(name)].status for name in names] == [
        Status.OK,
        Status.CRASHED,
        Status.INCORRECT,
        Status.COMPILE_ERROR,
        Status.TIMEOUT,
        Status.OK,
    ]
    assert found[_spec("right")].cases == len(cases_of("n1"))


def test_a_race_interleaves_drops_who_fails_and_times_the_memory(runner: LocalRunner) -> None:
    good = spec_of(RIGHT)
    specs = (good, _spec("crashes when timed"), _spec("no C"), _spec("hangs"), _spec("rows it was not given"))
    race = runner.race(RaceJob(specs, SHAPE, 1, 1, rounds=4, cold=True, seed=1))
    assert list(race) == [good]
    assert len(race[good]) == 4
    assert set(race.dropped) == set(specs[1:])
    assert len(race.read_ns_a_byte) == 4
    assert race.read_gbs is not None
    warm = runner.race(RaceJob((good,), SHAPE, 1, 1, rounds=2))
    assert warm.read_gbs is None
    assert not warm.peak_gops, "one token multiplies no faster than memory reads"
    assert runner.race(RaceJob((good,), SHAPE, 8, 1, rounds=2)).peak_gops["scalar"] > 0
    assert runner.race(RaceJob(specs[1:3], SHAPE, 1, 1, rounds=2)) == Race(
        {}, {s: race.dropped[s] for s in specs[1:3]}
    )


def test_a_killed_worker_is_started_again(runner: LocalRunner) -> None:
    answers = runner.measure([job(spec_of(RIGHT)), job(spec_of(RIGHT), shape=Shape(100, 50))])
    assert getattr(next(answers), "status", None) is Status.OK
    pid = runner.worker_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert getattr(next(answers), "status", None) is Status.OK
    assert runner.worker_pid not in (None, pid)


def test_the_peak_of_tiles_is_probed(runner: LocalRunner) -> None:
    """A whole call for 16 rows: the probe asks for the registers and gives them back."""
    if not find_isa("amx_int8", load_isas()).requires <= detect_cpu().features:
        pytest.skip("this CPU lacks amx_int8")
    (probe,) = peak_probes("amx_int8")
    assert probe.source().text.count("vt_dot4(&t") == 4
    built = build_probes(toolchain_of(), [probe.source()])
    (nanoseconds,) = runner._probe_ns(built, Shape(16, 64), 1, False)
    assert 0 < nanoseconds < 1e9


def test_the_peak_of_float_multiply_adds_is_probed(runner: LocalRunner) -> None:
    levels = accepted_isas(detect_cpu(), load_isas())
    for isa in dict.fromkeys((levels[0], levels[-1])):  # the best one, and the one that every CPU has
        probe = Fma(isa.name)
        assert probe.source().text.count("= vf_fma(sum") == probe.chains
        assert runner.fma_gflops(1, isa.name) > 0


def test_the_peak_has_every_pattern_and_level(runner: LocalRunner) -> None:
    levels = [isa.name for isa in load_isas() if isa.arch in ("any", detect_cpu().arch)]
    runnable = [name for name in levels if find_isa(name, load_isas()).requires <= detect_cpu().features]
    strongest = list(dict.fromkeys([*runnable[::-1][:1], "scalar"]))
    peak = runner.machine_peak(1, strongest)
    assert set(peak.peak_gops) == set(strongest)
    assert {"streams1_prefetch0", "streams16_prefetch6144"} <= set(peak.dram_gbs)
    assert all(0.01 < value < 1e6 for value in (*peak.dram_gbs.values(), *peak.peak_gops.values()))
    assert runner.machine_peak(1, strongest) is peak  # once a run
    with pytest.raises(BitgenError, match="at least one ISA"):
        runner.machine_peak(2, [])


def test_a_sweep_counts_schedules_and_cases(tmp_path: Path) -> None:
    cpu = detect_cpu()
    patient = TimingPolicy(check_timeout_s=120, timeout_s=600)
    with LocalRunner(toolchain_of(), cpu, policy=patient, lock_folder=tmp_path) as local:
        seen: list[Progress] = []
        counts = exact_sweep(
            local,
            cpu,
            ["scalar"],
            ["i2s", "tl2"],
            sample=1,
            seed=3,
            regimes=[N1],
            progress=seen.append,
        )
    assert not counts.failures
    assert counts.schedules == 2
    assert [(each.done, each.total) for each in seen] == [(1, 2), (2, 2)]
    assert counts.cases >= 2 * len(cases_of("n1", deep=True))
    assert str(counts) == f"2 schedules, {counts.cases} (schedule, shape, n) cases: all exact"
    counts.add(Verification(spec_of(RIGHT), Status.INCORRECT, 1, "wrong"))
    assert not counts.exact
    assert "1 NOT exact" in str(counts)


def test_a_kernel_for_one_shape_is_verified_on_that_shape(tmp_path: Path) -> None:
    cpu, shape = detect_cpu(), Shape(45, 130)
    space = space_for("i2s", find_isa("scalar", load_isas()), SMALL, shape, cpu)
    patient = replace(QUICK, check_timeout_s=120, timeout_s=600)
    with LocalRunner(toolchain_of(), cpu, policy=patient, lock_folder=tmp_path) as local:
        (answer,) = answers_of(local, [Job(replace(space.default, shape=shape), shape, 5)])
    assert answer.status is Status.OK, answer.detail


# ---- processes and the lock


_SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import broken_kernels as b
    from bitgen.measure import Job, LocalRunner, TimingPolicy
    from bitgen.spec import KernelSpec, Shape
    from bitgen.render import Source
    from bitgen.cpu import detect_cpu
    from bitgen.toolchain import Toolchain, find_compiler

    def render(spec):
        source = b.render(spec)
        says_pid = 'FILE *f = fopen({pid_file!s}, "w"); fprintf(f, "%d", getpid()); fclose(f);'
        text = source.text.replace("/*START*/", says_pid + " for (;;) pause();")
        text = text.replace("/*PRELUDE*/", "#include <stdio.h>")
        return Source(source.name, text, source.isa, source.prototypes)

    toolchain = Toolchain(find_compiler(), cache_dir=Path({cache!r}))
    with LocalRunner(toolchain, detect_cpu(), render=render, lock_folder=Path({lock!r})) as runner:
        for answer in runner.measure([Job(b.spec_of(b.RIGHT), Shape(50, 50), 1)]):
            print(answer)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_behind_when_the_runner_is_ended(ending: signal.Signals, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = textwrap.dedent(_SCRIPT).format(
        tests=str(Path(__file__).parents[1] / "support"),
        pid_file=json.dumps(str(pid_file)),
        cache=str(toolchain_of().cache_dir),
        lock=str(tmp_path),
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text() != "", "the kernel runs")
        task = int(pid_file.read_text())
        worker = parent_of(task)
        assert parent_of(worker) == runner.pid
        runner.send_signal(ending)
        assert runner.wait(300) != 0
    finally:
        runner.kill()
        runner.wait()
    wait_for(lambda: not alive(task) and not alive(worker), "both processes are gone")


def test_two_runs_wait_for_each_other_and_say_so(tmp_path: Path) -> None:
    messages: list[str] = []
    first, done = MachineLock(tmp_path), threading.Event()
    first.acquire()
    first.acquire()  # held already: nothing to wait for

    def wait_and_take() -> None:
        second = MachineLock(tmp_path, messages.append)
        second.acquire()
        done.set()
        second.release()

    thread = threading.Thread(target=wait_and_take)
    thread.start()
    wait_for(lambda: bool(messages), "the second run says that it waits")
    holder = f"another bitgen (pid {os.getpid()})"
    assert messages == [f"{holder} is measuring on this machine; waiting until it is done"]
    assert not done.is_set()
    first.release()
    thread.join(300)
    assert done.is_set()
    MachineLock(tmp_path, messages.append).acquire()  # free again, and no message
    assert len(messages) == 1


def _named(name: str) -> Broken:
    return next(kernel for kernel in ALL if kernel.name == name)


def _spec(name: str) -> KernelSpec:
    return spec_of(_named(name))


def wait_for(condition: object, what: str, seconds: float = 600) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not after {seconds} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie has ended; whoever adopted it has not looked yet


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_memory_of_a_pool_that_went_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # New pages cost a virtual machine 1.5 s a GiB; a tune of five families asks for some 30 pools.
    harness = Harness(build_harness(toolchain_of(), detect_cpu().arch))
    monkeypatch.setattr(guarded, "_POOLS_BYTES", 2 * guarded._STEP)
    pools = Pools(harness)
    addresses = []
    for key in ("a", "b", "c", "a"):
        pools.release()
        unit = np.full(4096, ord(key), np.uint8)
        pool = pools.get((key,), 1 << 20, unit.copy)
        data = np.frombuffer(
            harness.ffi.buffer(harness.ffi.cast("char *", pool.address), pool.nbytes), np.uint8
        )
        assert (data == ord(key)).all()
        assert pool.address % 64 == 0
        addresses.append(pool.address)
    assert addresses[2:] == addresses[:2]


def test_memory_of_a_pool_in_use_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # A race of all families on a CPU with a large cache reads more pools than are kept.
    harness = Harness(build_harness(toolchain_of(), detect_cpu().arch))
    monkeypatch.setattr(guarded, "_POOLS_BYTES", 2 * guarded._STEP)
    pools = Pools(harness)
    handed_out = {}
    for key in ("a", "b", "c", "d"):
        unit = np.full(4096, ord(key), np.uint8)
        handed_out[key] = pools.get((key,), 1 << 20, unit.copy)
    handed_out["larger a"] = pools.get(("a",), 3 << 20, np.full(4096, ord("a"), np.uint8).copy)
    for key, pool in handed_out.items():
        data = harness.ffi.buffer(harness.ffi.cast("char *", pool.address), pool.nbytes)
        assert set(data[:]) == {ord(key[-1])}
