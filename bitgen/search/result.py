"""What a tune hands back: everything its tables show, in plain records."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bitgen.measure import MachinePeak, Measurement, Rates
from bitgen.search.choose import Choice, Option, Slot, slot_of, total_ns
from bitgen.search.group import GroupOutcome
from bitgen.search.plan import Plan, Target
from bitgen.spec import KernelSpec, Layout, Shape
from bitgen.store import Winner


@dataclass(frozen=True)
class Row(Rates):
    """The winner of one family for a shape, a regime and a thread count, in the family's best layout.

    ``space_median_ns`` is the median over the ``candidates`` timed on this shape, in units of the default's
    time in the race, None where nothing ran. ``limit_ns`` is the roofline.
    """

    target: Target
    winner: Winner
    space_median_ns: float | None
    candidates: int
    limit_ns: float
    chosen: bool

    @property
    def measurement(self) -> Measurement:
        return self.winner.measurement

    @property
    def roles(self) -> tuple[str, ...]:
        return self.target.roles

    @property
    def count(self) -> int:
        return self.target.count

    @property
    def regime(self) -> str:
        return self.winner.regime

    @property
    def default_ns(self) -> float | None:
        """Of the family's default in the same race; None where it failed."""
        return self.winner.default_ns

    @property
    def family(self) -> str:
        return self.spec.family

    @property
    def over_default(self) -> float | None:
        """Winner / default: below 1 is faster."""
        return None if self.default_ns is None else self.time_ns / self.default_ns

    @property
    def over_median(self) -> float | None:
        """Winner / median of the space: below 1 is faster."""
        return None if self.space_median_ns is None else self.time_ns / self.space_median_ns


@dataclass(frozen=True)
class FormatCost:
    """What the model would cost in one family throughout, and in the format chosen (``family`` None).

    ``token_ns[regime, threads]``: all the model's matrices for one token. ``session_ns``: the objective.
    ``packed_bytes``: all the model's ternary weights.
    """

    family: str | None
    token_ns: Mapping[tuple[str, int], float]
    session_ns: float
    packed_bytes: int


@dataclass(frozen=True)
class ThreadCost:
    """What the objective's session takes on a number of threads, in nanoseconds.

    ``matrices_ns``: the ternary matrices in the best layouts; ``non_matmul_ns``: head, attention, norms and
    all else, 0 where only one number was tried.
    """

    threads: int
    matrices_ns: float
    non_matmul_ns: float

    @property
    def session_ns(self) -> float:
        return self.matrices_ns + self.non_matmul_ns


@dataclass(frozen=True)
class GroupReport:
    """How the search of one group went; ``complete``: not cut short by the time."""

    name: str
    points: int
    outcomes: Counter[str]
    failures: tuple[str, ...]
    seconds: float
    complete: bool


@dataclass(frozen=True)
class TuningResult:
    """The outcome of a tune.

    ``threads``: the number of threads whose session is shortest, of those in ``thread_costs``; the layouts
    are chosen for it. ``dram_gbs[threads]`` and ``peak_gops[threads][isa]`` are what shares are quoted
    against: the most that any probe or kernel of this run reached. ``left_races``: verified kernels that
    failed in a race, and how. ``started_from``: what was known before and tried first. ``recorded`` and
    ``recalled``: measurements added to the store, and taken from it.
    """

    model: str
    objective: str
    seed: int
    rows: tuple[Row, ...]
    formats: tuple[FormatCost, ...]
    threads: int
    thread_costs: tuple[ThreadCost, ...]
    layouts: Mapping[Shape, Layout]
    peaks: Mapping[int, MachinePeak]
    dram_gbs: Mapping[int, float]
    peak_gops: Mapping[int, Mapping[str, float]]
    groups: tuple[GroupReport, ...]
    rejected: tuple[str, ...]
    left_races: tuple[str, ...]
    started_from: tuple[str, ...]
    recorded: int
    recalled: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every search ended because of its trials or its space, not of its time."""
        return all(group.complete for group in self.groups)

    @property
    def winners(self) -> tuple[Row, ...]:
        """The kernels the model runs: the rows of the chosen layouts."""
        return tuple(row for row in self.rows if row.chosen)

    @property
    def outcomes(self) -> Counter[str]:
        """Candidates of all groups by how they ended."""
        return sum((group.outcomes for group in self.groups), Counter())


def rows_of(
    plan: Plan,
    choice: Choice,
    outcomes: Sequence[GroupOutcome],
    limit_ns: Callable[[KernelSpec, Shape, Slot], float],
) -> tuple[Row, ...]:
    """The best layout of every family on every shape; ``limit_ns`` is the roofline of a kernel."""
    rows = []
    for target in plan.targets:
        for family, option in choice.by_family[target.shape].items():
            for slot, winner in option.winners.items():
                mine = [o for o in outcomes if o.group.family == family and slot_of(o.group) == slot]
                rows.append(
                    Row(
                        target=target,
                        winner=winner,
                        space_median_ns=_space_median_ns(winner, mine),
                        candidates=sum(len(o.times_ns(target.shape)) for o in mine),
                        limit_ns=limit_ns(winner.spec, target.shape, slot),
                        chosen=option is choice.options[target.shape],
                    )
                )
    return tuple(rows)


def _space_median_ns(winner: Winner, outcomes: Sequence[GroupOutcome]) -> float | None:
    """The median time of all candidates on the winner's shape, as if taken in the moments of the race.

    The search and the race see the machine in different moments; the default was timed in both, and stands
    for the difference.
    """
    shape, default = winner.measurement.job.shape, winner.baseline
    times = [time for outcome in outcomes for time in outcome.times_ns(shape)]
    if not times:
        return None
    moment = 1.0
    if default:
        then = next(
            (c.time_ns(shape) for o in outcomes for c in o.candidates if c.spec == default.job.spec), math.inf
        )
        moment = default.median_ns / then if math.isfinite(then) else 1.0
    return statistics.median(times) * moment


def formats_of(plan: Plan, choice: Choice) -> tuple[FormatCost, ...]:
    """Every family that could serve the whole model, then the format chosen."""
    whole: list[tuple[str | None, Mapping[Shape, Option]]] = []
    for family in plan.families:
        options = {s: found[family] for s, found in choice.by_family.items() if family in found}
        if len(options) == len(plan.targets):
            whole.append((family, options))
    whole.append((None, choice.options))
    return tuple(_format(plan, family, options) for family, options in whole)


def _format(plan: Plan, family: str | None, options: Mapping[Shape, Option]) -> FormatCost:
    token_ns: dict[tuple[str, int], float] = {}
    for target in plan.targets:
        for slot, winner in options[target.shape].winners.items():
            key = (slot.regime, slot.threads)
            each = target.count * winner.time_ns / winner.measurement.job.n
            token_ns[key] = token_ns.get(key, 0.0) + each
    return FormatCost(
        family=family,
        token_ns=token_ns,
        session_ns=statistics.median(total_ns(plan.targets, options)),
        packed_bytes=sum(t.count * options[t.shape].layout.packed_bytes(t.shape) for t in plan.targets),
    )
