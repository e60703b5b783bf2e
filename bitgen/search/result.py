"""What a tune hands back: everything its tables show, in plain records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from bitgen.measure import MachinePeak, Rates
from bitgen.spec import KernelSpec, Layout, Shape


@dataclass(frozen=True)
class Row(Rates):
    """The winner of one family for a shape, a regime and a thread count, in the family's best layout.

    ``default_ns`` is the family's default in the same race, ``space_median_ns`` the median over the
    ``candidates`` timed on this shape, in units of the default's time in the race; each is None where nothing
    ran. ``limit_ns`` is the roofline.
    """

    shape: Shape
    roles: tuple[str, ...]
    count: int
    regime: str
    n: int
    threads: int
    spec: KernelSpec
    time_ns: float
    default_ns: float | None
    space_median_ns: float | None
    candidates: int
    limit_ns: float
    chosen: bool

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

    ``matrices_ns``: the ternary matrices in the best layouts; ``rest_ns``: head, attention, norms and all
    else, 0 where only one number was tried.
    """

    threads: int
    matrices_ns: float
    rest_ns: float

    @property
    def session_ns(self) -> float:
        return self.matrices_ns + self.rest_ns


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
    against: the most that any probe or kernel of this run reached. ``started_from``: what was known before
    and tried first. ``recorded`` and ``recalled``: answers added to the store, and taken from it.
    """

    model: str
    objective: str
    seed: int
    rows: tuple[Row, ...]
    formats: tuple[FormatCost, ...]
    threads: int
    thread_costs: tuple[ThreadCost, ...]
    layouts: Mapping[Shape, Layout]
    limits: Mapping[int, MachinePeak]
    dram_gbs: Mapping[int, float]
    peak_gops: Mapping[int, Mapping[str, float]]
    groups: tuple[GroupReport, ...]
    rejected: tuple[str, ...]
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
