"""The race: finalists of all families timed in interleaved rounds, until the noise is out of the decision."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bitgen.measure import Race
from bitgen.measure.stats import beats, ratio, select
from bitgen.search.group import GroupOutcome
from bitgen.search.plan import SearchConfig
from bitgen.spec import KernelSpec, Layout, Shape

_KEPT = 3  # of each layout at least, whatever their places

AskRace = Callable[[Sequence[KernelSpec], int], Race]  # participants, block -> their rounds


@dataclass(frozen=True)
class Raced:
    """The rounds of one race, in nanoseconds a call: round i of every kernel was taken in the same moments.

    Kernels that left early have fewer rounds; kernels that crashed on the way are in ``dropped``.
    """

    rounds_ns: Mapping[KernelSpec, tuple[float, ...]]
    dropped: Mapping[KernelSpec, str]
    read_gbs: float  # the best bandwidth of the memory probe that ran along; 0 without one

    @property
    def finishers(self) -> list[KernelSpec]:
        """Those who stayed to the end; the others lost to one of these."""
        last = max(map(len, self.rounds_ns.values()), default=0)
        return [spec for spec, times in self.rounds_ns.items() if len(times) == last]

    def median_ns(self, spec: KernelSpec) -> float:
        return statistics.median(self.rounds_ns[spec])

    def best(self, layout: Layout, incumbent: KernelSpec | None, config: SearchConfig) -> KernelSpec | None:
        """The fastest among the kernels that read ``layout``; None when none of them ran.

        ``incumbent`` keeps its place unless a challenger beats it beyond the noise. Where it does not take
        part (another layout, or it failed) there is nothing to defend, and the fastest wins.
        """
        own = {spec: self.rounds_ns[spec] for spec in self.finishers if spec.layout == layout}
        return select(own, incumbent, config.alpha, config.min_gain, config.margin) if own else None


def finalists_of(
    shape: Shape,
    outcomes: Sequence[GroupOutcome],
    count: int,
    ratio: float,
    defaults: Mapping[str, KernelSpec],
    previous: set[KernelSpec],
) -> list[KernelSpec]:
    """Who races on ``shape``.

    Of each family the default, the fastest of each layout, the previous winners, and the ``count``
    fastest of those at most ``ratio`` times slower than the best.
    """
    finalists: dict[KernelSpec, None] = {}
    for outcome in outcomes:
        ranked = outcome.ranked(shape)
        time_ns = {candidate.spec: candidate.time_ns(shape) for candidate in outcome.candidates}
        fastest_of_layout = {spec.layout: spec for spec in reversed(ranked)}
        near = [spec for spec in ranked[:count] if time_ns[spec] <= ratio * time_ns[ranked[0]]]
        wanted = {defaults[outcome.group.family], *near, *fastest_of_layout.values(), *previous}
        finalists.update(dict.fromkeys(spec for spec in ranked if spec in wanted))
    return list(finalists)


def run_race(
    finalists: Sequence[KernelSpec],
    defaults: Sequence[KernelSpec],
    ask: AskRace,
    blocks: int,
    config: SearchConfig,
    out_of_time: Callable[[], bool],
) -> Raced:
    """Race ``finalists`` for up to ``blocks`` blocks; the first block runs whatever the time.

    After each block the slower half of each layout leaves, and who is clearly slower than its best: layouts
    are compared later, on the whole model. The defaults stay to the end, because everything is quoted against
    them. The race ends early when nobody is left whose place is open.
    """
    rounds: dict[KernelSpec, list[float]] = {spec: [] for spec in finalists}
    dropped: dict[KernelSpec, str] = {}
    running = list(finalists)
    read_gbs = 0.0
    for block in range(blocks):
        if not running or (block and out_of_time()):
            break
        race = ask(running, block)
        dropped.update(race.dropped)
        running = [spec for spec in running if spec in race]
        for spec in running:
            rounds[spec].extend(race[spec])
        read_gbs = max(read_gbs, race.read_gbs or 0.0)
        running = _survivors(running, rounds, defaults, config)
        if _is_decided(running, rounds, config):
            break
    # A kernel that crashed in a later block is no winner either.
    kept = {spec: tuple(times) for spec, times in rounds.items() if times and spec not in dropped}
    return Raced(kept, dropped, read_gbs)


def _survivors(
    running: Sequence[KernelSpec],
    rounds: Mapping[KernelSpec, Sequence[float]],
    defaults: Sequence[KernelSpec],
    config: SearchConfig,
) -> list[KernelSpec]:
    leaders = _leaders(running, rounds)
    behind = {spec: ratio(rounds[spec], rounds[leaders[spec.layout]]) for spec in running}
    staying = {*defaults, *leaders.values()}
    for layout in leaders:
        mine = sorted((spec for spec in running if spec.layout == layout), key=behind.__getitem__)
        half = mine[: max(_KEPT, math.ceil(len(mine) / 2))]
        staying |= {s for s in half if _may_win(s, leaders[layout], rounds, config)}
    return [spec for spec in running if spec in staying]


def _may_win(
    spec: KernelSpec, leader: KernelSpec, rounds: Mapping[KernelSpec, Sequence[float]], config: SearchConfig
) -> bool:
    """Whether ``spec`` may still be faster than the leader by the margin that is worth a longer race."""
    bar = [time * (1 - config.margin) for time in rounds[leader]]
    return not beats(bar, rounds[spec], config.drop_alpha, 0.0)


def _is_decided(
    running: Sequence[KernelSpec], rounds: Mapping[KernelSpec, Sequence[float]], config: SearchConfig
) -> bool:
    """Whether the best of each layout is alone, or beside kernels about which nothing is open.

    It beats them beyond the noise, or it is faster by less than margin: then either will do.
    """
    leaders = _leaders(running, rounds)
    pairs = [(leaders[spec.layout], spec) for spec in running if spec != leaders[spec.layout]]
    return all(
        beats(rounds[leader], rounds[spec], config.alpha, config.min_gain)
        or not _may_win(leader, spec, rounds, config)
        for leader, spec in pairs
    )


def _leaders(
    running: Sequence[KernelSpec], rounds: Mapping[KernelSpec, Sequence[float]]
) -> dict[Layout, KernelSpec]:
    """The fastest of each layout so far."""
    leaders: dict[Layout, KernelSpec] = {}
    for spec in running:
        leader = leaders.setdefault(spec.layout, spec)
        if ratio(rounds[spec], rounds[leader]) < 1:
            leaders[spec.layout] = spec
    return leaders
