"""How much of exhaustive search does the tuner save, and what does that cost? Answered from recorded timings.

python benchmarks/search_study.py                  # replay the committed log: the table of docs/lab/search.md
python benchmarks/search_study.py contention       # the same with other work on the machine, against without
python benchmarks/search_study.py record --log F   # time every point of the spaces anew (about five minutes)
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replay import Contention, RoundReplay

from bitgen.cli.tables import Column, Table, add_output, render_tables
from bitgen.cpu import Isa, find_isa, load_isas
from bitgen.environment import Environment
from bitgen.fingerprints import Fingerprint
from bitgen.formats.config import find_model
from bitgen.measure import Job, MachinePeak, Measurement, RaceJob, Status
from bitgen.measure.runner import LocalRunner, TimingPolicy
from bitgen.records import dump, load
from bitgen.search import Plan, SearchConfig, Session, load_search_config, targets_of, tune
from bitgen.spec import KernelSpec, Layout, Schedule, Shape
from bitgen.store import RecordStore

LOG = Path(__file__).parent / "data" / "spaces-zen4.jsonl.gz"
MODEL = "3B"
ROUNDS = 16
_MIN_NS = 3e6  # a turn of a kernel lasts at least this long
_CONTENDERS = 60  # kernels of one interleaved run; a space is taken in several
_TURN = 2  # rounds of a run before the next one's turn
NEAR = 0.03  # regret of a search that ended well

# family, ISA level, regime, threads
RECORDED = (
    ("i2s", "avx512_vbmi", "n1", 1),
    ("t5", "avx512_vbmi", "n1", 1),
    ("i2s", "avx512_vbmi", "n1", 2),
    ("i2s", "avx2", "n1", 1),
    ("t5", "avx2", "n1", 1),
    ("i2s", "avx512_vbmi", "small", 1),
    ("i2s", "avx512_vbmi", "large", 1),
)


@dataclass(frozen=True)
class Log:
    """Every point of one space on one shape, timed in rounds: ``rounds_ns[r][i]`` is point i in round r."""

    shape: Shape
    n: int
    threads: int
    points: tuple[KernelSpec, ...]  # the default first
    rounds_ns: tuple[tuple[float, ...], ...]

    @property
    def group(self) -> tuple[str, str, str, int]:
        spec = self.points[0]
        return (spec.family, spec.isa, spec.regime, self.threads)

    def to_dict(self) -> dict[str, Any]:
        family, isa, regime, threads = self.group
        return {
            "family": family,
            "isa": isa,
            "regime": regime,
            "threads": threads,
            "n": self.n,
            "shape": self.shape.name,
            "points": [[p.layout.row_block, dump(p.schedule)] for p in self.points],
            "rounds_ns": [[round(t) for t in row] for row in self.rounds_ns],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Log:
        family = data["family"]
        points = tuple(
            KernelSpec(
                family,
                data["isa"],
                data["regime"],
                Layout(family, rows),
                load(Schedule, schedule, "schedule"),
            )
            for rows, schedule in data["points"]
        )
        rounds = tuple(tuple(map(float, row)) for row in data["rounds_ns"])
        return cls(Shape.parse(data["shape"]), data["n"], data["threads"], points, rounds)


def read_logs(path: Path = LOG) -> list[Log]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [Log.from_dict(json.loads(line)) for line in lines]


# ---- recording ----


def record(only: Sequence[int]) -> Iterator[Log]:
    """Time every point of `RECORDED` (or the entries ``only``) on the shapes of 3B."""
    environment, config = Environment(), load_search_config()
    policy = TimingPolicy(race_min_ms=3.0)
    with LocalRunner(environment.toolchain, environment.cpu, policy=policy) as runner:
        for at, (family, isa, regime, threads) in enumerate(RECORDED):
            for target in targets_of(find_model(MODEL)):
                if only and at not in only:
                    continue
                space = environment.space(family, environment.isa(isa), regime, target.shape)
                points = tuple(dict.fromkeys([space.default, *space]))
                timing = config.regimes[regime]
                yield _record_space(runner, points, target.shape, timing.n, threads, timing.cold)


def _record_space(
    runner: LocalRunner, points: tuple[KernelSpec, ...], shape: Shape, n: int, threads: int, cold: bool
) -> Log:
    times: dict[KernelSpec, list[float]] = {spec: [] for spec in points}
    for turn in range(ROUNDS // _TURN):
        for start in range(0, len(points), _CONTENDERS):
            part = points[start : start + _CONTENDERS]
            race = runner.race(RaceJob(part, shape, n, threads, _TURN, cold, seed=turn))
            for spec in part:
                times[spec] += race[spec]  # a kernel that fails ends the recording: KeyError
    rounds = tuple(tuple(times[spec][r] for spec in points) for r in range(ROUNDS))
    return Log(shape, n, threads, points, rounds)


# ---- replaying ----


@dataclass(frozen=True)
class Outcome:
    """One search of a group: how far each winner is from the true best, and what the search took."""

    regret: dict[Shape, float]  # time of the winner / time of the best point - 1
    share: float  # of the time that timing every point in every round takes
    candidates: int
    until: dict[Shape, int]  # candidates until one was as near as `NEAR`; all and one more where none was


@dataclass(frozen=True)
class RecordedSpace:
    """The points of a log as a space."""

    points: tuple[KernelSpec, ...]

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(dict.fromkeys(spec.layout for spec in self.points))

    @property
    def default(self) -> KernelSpec:
        return self.points[0]

    @property
    def known_good(self) -> tuple[KernelSpec, ...]:
        return self.points[:1]

    def __iter__(self) -> Iterator[KernelSpec]:
        return iter(self.points)


def true_times(log: Log) -> dict[KernelSpec, float]:
    """The time of every point in units of its round's median: the median over all rounds."""
    rounds = [[time / statistics.median(row) for time in row] for row in log.rounds_ns]
    return {spec: statistics.median(row[i] for row in rounds) for i, spec in enumerate(log.points)}


def exhaustive_ns(logs: Sequence[Log]) -> float:
    """What timing every point in every round takes."""
    return sum(max(t, _MIN_NS) for log in logs for row in log.rounds_ns for t in row)


def search(
    logs: Sequence[Log],
    seed: int,
    config: SearchConfig,
    contention: Contention | None = None,
    first: Sequence[KernelSpec] = (),
) -> Outcome:
    """Search a group (``logs``: one a shape) as `bitgen tune` does, on the recorded times.

    ``first``: what is tried behind the default, as winners of a near CPU family are.
    """
    (group,) = {log.group for log in logs}
    family, isa_name, regime, threads = group
    isa = find_isa(isa_name, load_isas())
    by_shape = {log.shape: log for log in logs}
    count = {target.shape: target for target in targets_of(find_model(MODEL))}
    plan = Plan(
        model=MODEL,
        targets=tuple(count[log.shape] for log in logs),
        families=(family,),
        isas=(isa,),
        regimes=(regime,),
        threads=(threads,),
        objective=config.objective,
        seed=seed,
        trials=config.budgets["default"].trials,
        timeout_s=None,
        race_blocks=config.budgets["default"].race_blocks,
    )
    policy = TimingPolicy()
    runner = RoundReplay(
        _measurements(logs, config.regimes[regime].cold),
        [MachinePeak(threads, {"none": 1e9}, {isa_name: 1e9})],  # no roofline ends a search
        stopping=policy.stopping,
        repeats=policy.repeats,
        batch=policy.batch,
        min_ns=_MIN_NS,
        seed=seed,
        contention=contention,
    )

    def spaces(family: str, isa: Isa, regime: str, shape: Shape) -> RecordedSpace:  # noqa: ARG001 - one group
        return RecordedSpace(by_shape[shape].points)

    with tempfile.TemporaryDirectory() as folder:
        store = RecordStore(Path(folder) / "records.jsonl")
        result = tune(
            plan,
            runner,
            store,
            lambda spec: Fingerprint("replay", "replay", spec.name, "replay"),
            spaces,  # type: ignore[arg-type]
            Session(config=config, family_winners=tuple(first)),
        )
    tried = list(dict.fromkeys(trial.measurement.job.spec for trial in store.trials()))
    true = {log.shape: true_times(log) for log in logs}
    return Outcome(
        {row.shape: true[row.shape][row.spec] / min(true[row.shape].values()) - 1 for row in result.winners},
        runner.spent_ns / exhaustive_ns(logs),
        sum(result.outcomes.values()),
        {shape: _until(tried, times) for shape, times in true.items()},
    )


def _until(tried: Sequence[KernelSpec], true: dict[KernelSpec, float]) -> int:
    bar = (1 + NEAR) * min(true.values())
    return next(
        (i for i, spec in enumerate(tried, start=1) if true.get(spec, math.inf) <= bar), len(tried) + 1
    )


def _measurements(logs: Sequence[Log], cold: bool) -> Iterator[Measurement]:
    for log in logs:
        for i, spec in enumerate(log.points):
            job = Job(spec, log.shape, log.n, log.threads, cold)
            yield Measurement(job, Status.OK, "", tuple(row[i] for row in log.rounds_ns))


def table(logs: Sequence[Log], seeds: int) -> Table:
    """A row for each group and shape: regret over the seeds, and the share of the exhaustive time."""
    config = load_search_config()
    groups = {log.group: [other for other in logs if other.group == log.group] for log in logs}
    rows = []
    for (family, isa, regime, threads), mine in groups.items():
        outcomes = [search(mine, seed, config) for seed in range(seeds)]
        for log in mine:
            regret = sorted(outcome.regret[log.shape] for outcome in outcomes)
            share = [outcome.share for outcome in outcomes]
            rows.append(
                (
                    f"{family} {isa} {regime} t={threads}",
                    log.shape.name,
                    len(log.points),
                    statistics.mean(o.candidates for o in outcomes),
                    statistics.median(regret),
                    regret[-1],
                    sum(r <= NEAR for r in regret),
                    statistics.mean(share),
                    max(share),
                )
            )
    columns = (
        Column("group", "space"),
        Column("shape", "m x k"),
        Column("points", "points", "d"),
        Column("tried", "tried", ".0f"),
        Column("regret", "median regret", ".1%"),
        Column("worst", "worst", ".1%"),
        Column("within", f"<= 3 % of {seeds}", "d"),
        Column("share", "time / exhaustive", ".1%"),
        Column("most", "most", ".1%"),
    )
    return Table("search", columns, rows)


def contention_table(logs: Sequence[Log], seeds: int, contention: Contention) -> Table:
    """A row for each group: searches beside other work against quiet ones of the same seed, on all shapes.

    A search is near when the true time of its winner is within 3 % of that of the quiet winner.
    """
    config = load_search_config()
    groups = {log.group: [other for other in logs if other.group == log.group] for log in logs}
    rows: list[tuple[Any, ...]] = []
    for (family, isa, regime, threads), mine in groups.items():
        pairs = [
            (search(mine, seed, config), search(mine, seed, config, contention)) for seed in range(seeds)
        ]
        each = [(quiet.regret[s], noisy.regret[s]) for quiet, noisy in pairs for s in quiet.regret]
        rows.append(
            (
                f"{family} {isa} {regime} t={threads}",
                len(each),
                sum(quiet <= NEAR for quiet, _ in each) / len(each),
                sum(noisy <= NEAR for _, noisy in each) / len(each),
                sum(1 + noisy <= (1 + NEAR) * (1 + quiet) for quiet, noisy in each) / len(each),
                statistics.mean(quiet.share for quiet, _ in pairs),
                statistics.mean(noisy.share for _, noisy in pairs),
            )
        )
    total = sum(row[1] for row in rows)
    means = (sum(row[1] * row[i] for row in rows) / total for i in range(2, 7))
    columns = (
        Column("group", "space"),
        Column("searches", "searches", "d"),
        Column("quiet", "quiet, <= 3 % of the best", ".1%"),
        Column("noisy", "beside other work", ".1%"),
        Column("near", "<= 3 % of the quiet choice", ".1%"),
        Column("share", "time / exhaustive, quiet", ".1%"),
        Column("noisy_share", "beside other work", ".1%"),
    )
    title = f"bursts in {contention.share:.0%} of the turns, {contention.mean:.0%} longer on average"
    return Table(title, columns, [*rows, ("all", total, *means)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("table", "record", "contention"), default="table")
    parser.add_argument("--log", type=Path, default=LOG, help="the log to replay, or to record")
    parser.add_argument("--only", type=int, action="append", default=[], help="an entry of RECORDED")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--bursts", type=float, default=0.2, help="share of turns that a burst hits (0.2)")
    parser.add_argument("--longer", type=float, default=0.5, help="what a burst adds on average (0.5)")
    add_output(parser)
    args = parser.parse_args()
    if args.command == "record":
        args.log.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(args.log, "at", encoding="utf-8") as lines:
            for log in record(args.only):
                lines.write(json.dumps(log.to_dict(), separators=(",", ":")) + "\n")
                print(*log.group, log.shape.name, len(log.points), file=sys.stderr, flush=True)
        return
    logs = read_logs(args.log)
    if args.command == "contention":
        found = contention_table(logs, args.seeds, Contention(args.bursts, args.longer))
        print(render_tables([found], args.output))
        return
    print(render_tables([table(logs, args.seeds)], args.output))


if __name__ == "__main__":
    main()
