"""Layout before schedule: which layout each shape gets, and which format the model gets.

One packed copy of a matrix serves every regime and thread count, so a layout is judged by the best kernels
that read it, over the whole objective:

    cost(shape, layout) = sum over regimes of tokens[regime] / n * time of the layout's winner

on one number of threads. Where several were searched each has a choice of its own, and the model takes the
number whose session is shortest, non-matmul cost included.

All costs are vectors over the rounds of the races. Comparing two of them is the same paired test that
compares two kernels: the default layout, the first family and a uniform format stay unless beaten beyond the
noise. Races of different regimes ran at different moments, so which of their rounds are added is open: the
quietest of each are, and so on. In any other order a load that disturbs three rounds of ten disturbs two sums
of three, and their median with them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import truediv

from bitgen.fingerprints import Fingerprints
from bitgen.measure import Job, Measurement, RaceJob, Status
from bitgen.measure.stats import select
from bitgen.search.plan import Group, SearchConfig, Target
from bitgen.search.race import Raced
from bitgen.spec import KernelSpec, Layout, Shape
from bitgen.store import Winner


@dataclass(frozen=True, order=True)
class Slot:
    """A case every layout must serve: a regime on a number of threads."""

    regime: str
    threads: int


def slot_of(group: Group) -> Slot:
    return Slot(group.regime, group.threads)


@dataclass(frozen=True)
class Option:
    """One shape in one layout: a winner for every slot, and what a session costs, round by round (ns)."""

    shape: Shape
    layout: Layout
    winners: Mapping[Slot, Winner]
    cost_ns: tuple[float, ...]  # the quietest rounds first


@dataclass(frozen=True)
class Choice:
    """What was decided: for each shape the option it gets, and the best option of every family."""

    options: Mapping[Shape, Option]
    by_family: Mapping[Shape, Mapping[str, Option]]
    every: Mapping[Shape, tuple[Option, ...]]


@dataclass(frozen=True)
class SlotRace:
    """The race of one shape and slot, with the default kernel of each family in it."""

    raced: Raced
    defaults: Mapping[str, KernelSpec]
    job: RaceJob  # of its first block
    fingerprints: Fingerprints

    @cached_property
    def quiet_first(self) -> tuple[int, ...]:
        """The rounds, those first in which the finishers took the least of what they usually take."""
        times = [self.raced.rounds_ns[spec] for spec in self.raced.finishers]
        usual = [statistics.median(mine) for mine in times]
        slowness = [statistics.median(map(truediv, now, usual)) for now in zip(*times, strict=True)]
        return tuple(sorted(range(len(slowness)), key=slowness.__getitem__))

    def winner(self, layout: Layout, config: SearchConfig) -> Winner | None:
        """The kernel that won among those that read ``layout``; None where nothing ran."""
        default = self.defaults.get(layout.family)
        spec = self.raced.best(layout, default, config)
        measured = spec and self._measured(spec)
        if spec is None or default is None or not measured:
            return None
        return Winner(measured, self._measured(default), self.fingerprints(spec))

    def _measured(self, spec: KernelSpec) -> Measurement | None:
        rounds = self.raced.rounds_ns.get(spec, ())
        job = Job(spec, self.job.shape, self.job.n, self.job.threads, self.job.cold)
        return Measurement(job, Status.OK, times_ns=rounds) if rounds else None


def options_of(
    target: Target,
    layouts: Sequence[Layout],
    races: Mapping[Slot, SlotRace],
    config: SearchConfig,
    objective: str,
    threads: int,
) -> tuple[Option, ...]:
    """The layouts that serve every slot of a shape, and what they cost on ``threads`` threads."""
    weights = target.tokens(token_weights(config, objective, [slot.regime for slot in races]))
    options = []
    for layout in layouts:
        winners = {slot: race.winner(layout, config) for slot, race in races.items()}
        found = {slot: winner for slot, winner in winners.items() if winner is not None}
        if len(found) == len(races):
            parts = [
                [
                    weights[slot.regime] / config.regimes[slot.regime].n * winner.measurement.times_ns[i]
                    for i in races[slot].quiet_first
                ]
                for slot, winner in found.items()
                if slot.threads == threads
            ]
            options.append(Option(target.shape, layout, found, _sum(parts)))
    return tuple(options)


def token_weights(config: SearchConfig, objective: str, regimes: Sequence[str]) -> dict[str, float]:
    """Tokens of a session in each of ``regimes``; all alike where the objective has none in any of them."""
    tokens = {regime: config.objectives[objective][regime] for regime in regimes}
    return tokens if any(tokens.values()) else dict.fromkeys(tokens, 1.0)


def choose(
    targets: Sequence[Target],
    families: Sequence[str],
    every: Mapping[Shape, tuple[Option, ...]],
    default_layouts: Mapping[str, Layout],
    config: SearchConfig,
) -> Choice:
    """Choose a layout for each shape; ``families[0]`` is the incumbent format.

    1. Each family enters with its best layout of each shape. 2. The family with the least total over the
    model is the format. 3. A shape leaves it for another family only where that wins beyond the noise.
    BitgenError when some shape has no kernel at all.
    """
    by_family: dict[Shape, dict[str, Option]] = {}
    for target in targets:
        mine = {f: [o for o in every[target.shape] if o.layout.family == f] for f in families}
        by_family[target.shape] = {
            f: _best(options, default_layouts.get(f), config) for f, options in mine.items() if options
        }
    everywhere = [f for f in families if all(f in by_family[target.shape] for target in targets)]
    totals = {f: total_ns(targets, {s: options[f] for s, options in by_family.items()}) for f in everywhere}
    uniform = select(totals, families[0], config.alpha, config.min_gain, config.margin) if totals else None
    chosen = {}
    for shape, options in by_family.items():
        costs = {family: option.cost_ns for family, option in options.items()}
        chosen[shape] = options[select(costs, uniform, config.alpha, config.min_gain, config.margin)]
    return Choice(chosen, by_family, every)


def total_ns(targets: Sequence[Target], options: Mapping[Shape, Option]) -> tuple[float, ...]:
    """What a session costs on the whole model with these options, round by round: sum of count * cost."""
    return _sum([[target.count * c for c in options[target.shape].cost_ns] for target in targets])


def _best(options: Sequence[Option], default: Layout | None, config: SearchConfig) -> Option:
    by_layout = {option.layout: option for option in options}
    costs = {layout: option.cost_ns for layout, option in by_layout.items()}
    return by_layout[select(costs, default, config.alpha, config.min_gain, config.margin)]


def _sum(parts: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Added round by round, over the rounds that all of them have."""
    return tuple(sum(values) for values in zip(*parts, strict=False))


def fastest_threads(session_ns: Mapping[int, float], margin: float) -> int:
    """The number of threads whose session is shortest.

    The largest number stays unless another is faster by ``margin``: their times are of different moments.
    """
    most = max(session_ns)
    best = min(session_ns, key=lambda threads: session_ns[threads])
    return best if session_ns[best] < (1 - margin) * session_ns[most] else most
