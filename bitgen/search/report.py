"""What a tune shows of its decision: a row for each kernel, and what each format would cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from bitgen.search.choose import Champion, Choice, Option, Slot, slot_of, total_ns
from bitgen.search.group import GroupOutcome
from bitgen.search.plan import Plan, SearchConfig
from bitgen.search.result import FormatCost, Row
from bitgen.spec import KernelSpec, Shape


def rows_of(
    plan: Plan,
    config: SearchConfig,
    choice: Choice,
    outcomes: Sequence[GroupOutcome],
    limit_ns: Callable[[KernelSpec, Shape, Slot], float],
) -> tuple[Row, ...]:
    """The best layout of every family on every shape; ``limit_ns`` is the roofline of a kernel."""
    rows = []
    for target in plan.targets:
        for family, option in choice.by_family[target.shape].items():
            for slot, champion in option.champions.items():
                mine = [o for o in outcomes if o.group.family == family and slot_of(o.group) == slot]
                rows.append(
                    Row(
                        shape=target.shape,
                        roles=target.roles,
                        count=target.count,
                        regime=slot.regime,
                        n=config.regimes[slot.regime].n,
                        threads=slot.threads,
                        spec=champion.spec,
                        time_ns=champion.time_ns,
                        default_ns=champion.default_ns,
                        space_median_ns=_space_median_ns(target.shape, champion, mine),
                        candidates=sum(len(o.times_ns(target.shape)) for o in mine),
                        limit_ns=limit_ns(champion.spec, target.shape, slot),
                        chosen=option is choice.options[target.shape],
                    )
                )
    return tuple(rows)


def _space_median_ns(shape: Shape, champion: Champion, outcomes: Sequence[GroupOutcome]) -> float | None:
    """The median time of all candidates on ``shape``, as it would have been in the moments of the race.

    The search and the race see the machine in different moments; the default was timed in both, and stands
    for the difference.
    """
    times = [time for outcome in outcomes for time in outcome.times_ns(shape)]
    if not times:
        return None
    then = next(
        (c.time_ns(shape) for o in outcomes for c in o.candidates if c.spec == champion.default), math.inf
    )
    moment = champion.default_ns / then if champion.default_ns and math.isfinite(then) else 1.0
    return statistics.median(times) * moment


def formats_of(plan: Plan, config: SearchConfig, choice: Choice) -> tuple[FormatCost, ...]:
    """Every family that could serve the whole model, then the format chosen."""
    whole: list[tuple[str | None, Mapping[Shape, Option]]] = []
    for family in plan.families:
        options = {s: found[family] for s, found in choice.by_family.items() if family in found}
        if len(options) == len(plan.targets):
            whole.append((family, options))
    whole.append((None, choice.options))
    return tuple(_format(plan, config, family, options) for family, options in whole)


def _format(
    plan: Plan, config: SearchConfig, family: str | None, options: Mapping[Shape, Option]
) -> FormatCost:
    token_ns: dict[tuple[str, int], float] = {}
    for target in plan.targets:
        for slot, champion in options[target.shape].champions.items():
            key = (slot.regime, slot.threads)
            each = target.count * champion.time_ns / config.regimes[slot.regime].n
            token_ns[key] = token_ns.get(key, 0.0) + each
    return FormatCost(
        family=family,
        token_ns=token_ns,
        session_ns=statistics.median(total_ns(plan.targets, options)),
        packed_bytes=sum(t.count * options[t.shape].layout.packed_bytes(t.shape) for t in plan.targets),
    )
