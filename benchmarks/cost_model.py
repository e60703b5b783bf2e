"""Does a model of costs find the best kernels sooner? Learnt on one CPU's recorded spaces, tried on another.

    python benchmarks/cost_model.py                  # the tables of docs/lab/search.md
    python benchmarks/cost_model.py --bursts 0.2     # the same beside other work
    python benchmarks/cost_model.py --patience 0.125 # searches that end sooner

The model is a ridge regression of log(time / mean of its space) on what is known of a schedule before it is
compiled: its knobs, one by one; registers, instructions of the inner loop, chains of sums; blocks against L1
and L2. It says which points a search tries behind the default, and nothing else.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from replay import Contention
from search_study import NEAR, Log, Outcome, read_logs, search, true_times

from bitgen.cli.tables import Column, Table, add_output, render_tables
from bitgen.cpu import Cpu, Isa, find_isa, load_isas, target_cpu
from bitgen.search import SearchConfig, load_search_config
from bitgen.spec import EVERY_FAMILY, KernelSpec

DATA = Path(__file__).parent / "data"
CPUS = ("zen4", "zen5")
FIRST = 16  # points that the model puts first, two batches
_RIDGE = 3.0  # pull of every coefficient to 0; a space has some 100 points

Group = tuple[str, str, str, int]
Pairs = Sequence[tuple["Recorded", "Recorded"]]  # a CPU, and the one that was learnt from


# ---- the model ----


@dataclass(frozen=True)
class Place:
    """What a kernel's cost depends on besides its spec: the caches, and the columns of the matrices."""

    cpu: Cpu
    k: int


def terms(spec: KernelSpec, place: Place) -> dict[str, float]:
    """What the model knows of a kernel: once for all spaces, and once more for its own."""
    algorithm = spec.schedule.algorithm
    knobs = {f"{algorithm}.{knob}={value}": 1.0 for knob, value in spec.knobs.items()}
    sizes = {f"{algorithm}:{name}": value for name, value in _sizes(spec, place).items()}
    own = {algorithm: 1.0, f"{algorithm}.rows={spec.layout.row_block}": 1.0, **knobs, **sizes}
    space = f"{spec.family} {spec.isa} {spec.regime}"
    return own | {f"{space}|{name}": value for name, value in own.items()}


def _sizes(spec: KernelSpec, place: Place) -> dict[str, float]:
    """Registers as a share; logs of instructions a product, chains of sums, blocks in units of a cache."""
    isa, family, knobs = find_isa(spec.isa, load_isas()), EVERY_FAMILY[spec.family], spec.knobs
    algorithm = family.algorithm(spec.schedule.algorithm)
    share = algorithm.registers(family, isa, knobs, spec.layout.row_block) / max(1, isa.register_count)
    found = {"registers": share, "registers squared": share * share}
    if algorithm.name == "direct" and not family.looks_up:
        found |= _multiplying(spec, isa)
    if algorithm.name == "panel":
        rows, blocks, nr = knobs["mr"] / 16, isa.block_registers, knobs["nr"]
        each = 2 if knobs["widen_every"] else 1
        found["instructions"] = math.log((rows * blocks + nr + rows * blocks * nr * each) / (rows * nr))
        found["chains"] = math.log(rows * nr * blocks)
    if "kc" in knobs:
        kc = knobs["kc"] or place.k
        found["activations in L1"] = math.log(knobs["nr"] * kc / place.cpu.l1d_bytes)
        found["panel in L2"] = math.log(knobs["mc"] * kc / place.cpu.l2_bytes)
        found["panel in L1"] = max(-2.0, math.log(knobs["mc"] * kc / place.cpu.l1d_bytes))
    return found


def _multiplying(spec: KernelSpec, isa: Isa) -> dict[str, float]:
    """Of a chunk: a load, the fields' masks and shifts, the products of each token, its activations."""
    family, knobs = EVERY_FAMILY[spec.family], spec.knobs
    accumulators, nr, fields = knobs["accumulators"], knobs["nr"], family.fields
    rows = knobs["streams"] * spec.layout.row_block / 16
    decode = 1 + fields + {1: 3, 2: 1, 3: 1, 4: 0}[accumulators]
    widen = knobs["widen_every"]
    each = 2 + 2 * accumulators / (widen * fields) if widen else 1
    turn = rows * isa.block_registers * (decode + nr * fields * each) + nr * fields
    return {
        "instructions": math.log(turn / (rows * nr)),
        "chains": math.log(rows * nr * accumulators * isa.block_registers),
        "decoding": math.log(1 + decode / nr),
    }


@dataclass(frozen=True)
class CostModel:
    """log(time) of a kernel, up to what is the same for all of its space, as a sum of terms."""

    coefficients: Mapping[str, float]

    def cost(self, spec: KernelSpec, place: Place) -> float:
        known = self.coefficients
        return sum(known.get(name, 0.0) * value for name, value in terms(spec, place).items())


def learn(spaces: Sequence[tuple[Place, Mapping[KernelSpec, float]]]) -> CostModel:
    """The model of ``spaces``, each with the times of its points: only ratios within one count."""
    known = [[terms(spec, place) for spec in times] for place, times in spaces]
    names = {
        name: i for i, name in enumerate(dict.fromkeys(n for own in known for point in own for n in point))
    }
    rows, answers = [], []
    for own, (_, times) in zip(known, spaces, strict=True):
        part = np.zeros((len(own), len(names)))
        for row, point in zip(part, own, strict=True):
            row[[names[name] for name in point]] = list(point.values())
        logs = np.log(np.array(list(times.values())))
        rows.append(part - part.mean(axis=0))
        answers.append(logs - logs.mean())
    x, y = np.concatenate(rows), np.concatenate(answers)
    weights = x.T @ np.linalg.solve(x @ x.T + _RIDGE * np.eye(len(x)), y)
    return CostModel(dict(zip(names, weights.tolist(), strict=True)))


# ---- the study ----


@dataclass(frozen=True)
class Recorded:
    """The recorded spaces of a CPU, each on every shape."""

    cpu: str
    spaces: dict[Group, list[Log]]

    @classmethod
    def read(cls, cpu: str) -> Recorded:
        logs = read_logs(DATA / f"spaces-{cpu}.jsonl.gz")
        return cls(cpu, {log.group: [other for other in logs if other.group == log.group] for log in logs})

    def place(self, group: Group) -> Place:
        columns = statistics.geometric_mean(log.shape.k for log in self.spaces[group])
        return Place(target_cpu(self.cpu), round(columns))

    def model(self) -> CostModel:
        return learn([(self.place(group), mean_times(logs)) for group, logs in self.spaces.items()])

    def order(self, model: CostModel, group: Group) -> list[KernelSpec]:
        """The points of a space, those first that the model takes for fast."""
        points = dict.fromkeys(spec for log in self.spaces[group] for spec in log.points)
        return sorted(points, key=lambda spec: model.cost(spec, self.place(group)))


def mean_times(logs: Sequence[Log]) -> dict[KernelSpec, float]:
    """Of every point the mean over the shapes of its time in units of that shape's mean."""
    shapes = [true_times(log) for log in logs]
    units = [statistics.geometric_mean(times.values()) for times in shapes]
    found: dict[KernelSpec, list[float]] = {}
    for times, unit in zip(shapes, units, strict=True):
        for spec, time in times.items():
            found.setdefault(spec, []).append(time / unit)
    return {spec: statistics.geometric_mean(times) for spec, times in found.items()}


def winner(log: Log, points: Sequence[KernelSpec]) -> KernelSpec:
    """The best point of ``log`` as one of ``points``: the logs differ by a knob, prefetch_hint."""
    times = true_times(log)
    best = min(times, key=times.__getitem__)
    plain = tuple((knob, value) for knob, value in best.schedule if knob != "prefetch_hint")
    ways = (best.schedule.knobs, plain, (*plain, ("prefetch_hint", 0)))
    specs = [replace(best, schedule=replace(best.schedule, knobs=knobs)) for knobs in ways]
    return next(spec for spec in specs if spec in points)


def starts(ordered: Sequence[KernelSpec], near: Sequence[Log]) -> dict[str, list[KernelSpec]]:
    """What a search may try behind its default; ``near``: the same space on the other CPU."""
    winners = list(dict.fromkeys(winner(log, ordered) for log in near))
    first = list(ordered[:FIRST])
    return {
        "nothing": [],
        "winners of the other CPU": winners,
        f"{FIRST} of the model": first,
        "winners, then the model": [*winners, *first],
    }


@dataclass(frozen=True)
class How:
    """How spaces are searched."""

    seeds: int
    config: SearchConfig
    contention: Contention | None


def searches(here: Recorded, there: Recorded, groups: Sequence[Group], how: How) -> dict[str, list[Outcome]]:
    """Searches of ``here`` with what was learnt ``there``, by what they tried first."""
    model = there.model()
    found: dict[str, list[Outcome]] = {}
    for group in groups:
        for name, first in starts(here.order(model, group), there.spaces[group]).items():
            found.setdefault(name, []).extend(
                search(here.spaces[group], seed, how.config, how.contention, first)
                for seed in range(how.seeds)
            )
    return found


def table(pairs: Pairs, groups: Sequence[Group], how: How) -> Table:
    """A row for each CPU and start, over all of its spaces, shapes and seeds."""
    rows: list[tuple[Any, ...]] = []
    for here, there in pairs:
        for name, outcomes in searches(here, there, groups, how).items():
            regret = [value for outcome in outcomes for value in outcome.regret.values()]
            until = [count for outcome in outcomes for count in outcome.until.values()]
            rows.append(
                (
                    here.cpu,
                    name,
                    len(regret),
                    sum(value <= NEAR for value in regret) / len(regret),
                    statistics.mean(regret),
                    statistics.mean(until),
                    statistics.mean(outcome.candidates for outcome in outcomes),
                    statistics.mean(outcome.share for outcome in outcomes),
                )
            )
    columns = (
        Column("cpu", "CPU"),
        Column("first", "behind the default"),
        Column("searches", "searches", "d"),
        Column("near", "<= 3 % of the best", ".1%"),
        Column("regret", "mean regret", ".2%"),
        Column("until", "until one is within 3 %", ".1f"),
        Column("tried", "tried", ".1f"),
        Column("share", "time / exhaustive", ".1%"),
    )
    return Table("what a search tries first", columns, rows)


def unmeasured(pairs: Pairs, groups: Sequence[Group]) -> Table:
    """How far from the best is what a CPU gets that nobody measured: a row for each space."""
    rows: list[tuple[Any, ...]] = []
    for here, there in pairs:
        model = there.model()
        for group in groups:
            ordered = here.order(model, group)
            regrets = []
            for log, near in zip(here.spaces[group], there.spaces[group], strict=True):
                times = true_times(log)
                chosen = (log.points[0], winner(near, log.points), next(s for s in ordered if s in times))
                regrets.append([times[spec] / min(times.values()) - 1 for spec in chosen])
            family, isa, regime, threads = group
            name = f"{family} {isa} {regime} t={threads}"
            rows.append((here.cpu, name, *(statistics.mean(each) for each in zip(*regrets, strict=True))))
    columns = (
        *(Column("cpu", "CPU"), Column("group", "space"), Column("default", "the default", ".1%")),
        *(Column("winner", "the other CPU's winner", ".1%"), Column("model", "the model's first", ".1%")),
    )
    return Table("mean regret of what needs no measurement", columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--regime", help="only spaces of this one")
    config = load_search_config()
    parser.add_argument(
        "--patience", type=float, default=config.patience, help="of the points without a gain, to the end"
    )
    parser.add_argument("--bursts", type=float, default=0.0, help="share of turns that a burst hits (0)")
    parser.add_argument("--longer", type=float, default=0.5, help="what a burst adds on average (0.5)")
    add_output(parser)
    args = parser.parse_args()
    one, two = map(Recorded.read, CPUS)
    pairs = ((one, two), (two, one))
    groups = [group for group in one.spaces if args.regime in (None, group[2])]
    contention = Contention(args.bursts, args.longer) if args.bursts else None
    how = How(args.seeds, replace(config, patience=args.patience), contention)
    print(render_tables([unmeasured(pairs, groups), table(pairs, groups, how)], args.output))


if __name__ == "__main__":
    main()
