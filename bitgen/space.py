"""The legal schedules of a family for a shape on an ISA level.

A `Space` is a grid of knob values per algorithm plus a few presets, thinned by named rules. What a rule
forbids cannot be built: `Space` never yields it, and `Space.check` says in words which rule it breaks. What
the knobs mean, and the rules of each algorithm: bitgen/families/algorithms.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from bitgen.cpu import Cpu, Isa
from bitgen.errors import BitgenError, UsageError, unknown
from bitgen.families import EVERY_FAMILY, Family
from bitgen.families.algorithms import presets_of
from bitgen.families.base import INT16_MAX, INT16_MIN, UNPACKING, Axes, Check, Int16Sums, Knobs, told
from bitgen.spec import K_MAX, KernelSpec, Layout, Regime, Schedule, Shape, ceil_to


@dataclass(frozen=True)
class Rule:
    """A named constraint; ``text`` is what a user is told when a schedule breaks it.

    ``local``: it is about the shape and the caches of this CPU. A kernel that breaks it is right, and may be
    useful elsewhere.
    """

    text: str
    holds: Callable[[KernelSpec], bool] = field(repr=False, compare=False)
    local: bool = False


@dataclass(frozen=True)
class Space:
    """All legal kernels of one family, ISA level and regime for one shape. Iterating yields `KernelSpec`."""

    family: str
    isa: Isa
    regime: Regime
    shape: Shape
    layouts: tuple[Layout, ...]
    axes: Mapping[str, Axes]
    presets: tuple[KernelSpec, ...]
    bounds: tuple[Rule, ...] = field(repr=False)  # what each value may be at all
    rules: tuple[Rule, ...] = field(repr=False)  # what values may be together; asked only within the bounds

    @property
    def algorithms(self) -> tuple[str, ...]:
        return tuple(self.axes)

    def knobs(self, algorithm: str) -> Axes:
        """The values each knob of an algorithm may take."""
        if algorithm not in self.axes:
            raise UsageError(
                f"{EVERY_FAMILY[self.family].title} for {self.regime.name} has no algorithm {algorithm!r}; "
                f"it has {', '.join(self.axes)}",
            )
        return self.axes[algorithm]

    def make(self, algorithm: str, layout: Layout, values: Mapping[str, int]) -> KernelSpec:
        """The spec of one point; it may still break rules (see `broken`)."""
        knobs = self.knobs(algorithm)
        unknown = set(values) - set(knobs)
        if unknown:
            names = ", ".join(sorted(unknown))
            raise UsageError(f"{algorithm} has no knob {names}; it has {', '.join(knobs)}")
        off = EVERY_FAMILY[self.family].algorithm(algorithm).off
        given = {**off, **values}
        missing = set(knobs) - set(given)
        if missing:
            raise UsageError(f"{algorithm} needs a value for {', '.join(sorted(missing))}")
        schedule = Schedule(
            algorithm, tuple((name, int(given[name])) for name in knobs if given[name] != off.get(name))
        )
        return KernelSpec(self.family, self.isa.name, self.regime.name, layout, schedule)

    def broken(self, spec: KernelSpec) -> list[Rule]:
        """The rules that ``spec`` breaks; empty for a legal one."""
        outside = [rule for rule in self.bounds if not rule.holds(spec)]
        return outside or [rule for rule in self.rules if not rule.holds(spec)]

    def check(self, spec: KernelSpec, local: bool = True) -> None:
        """BitgenError that quotes every broken rule; ``local`` False: only those that make a kernel wrong."""
        texts = [rule.text for rule in self.broken(spec) if local or not rule.local]
        if texts:
            message = f"schedule {spec.schedule.name} is not legal: {'; '.join(texts)}"
            raise UsageError(message)

    @cached_property
    def points(self) -> tuple[KernelSpec, ...]:
        grid = (
            self.make(algorithm, layout, dict(zip(axes, values, strict=True)))
            for algorithm, axes in self.axes.items()
            for layout in self.layouts
            for values in product(*axes.values())
        )
        legal = [spec for spec in grid if not self.broken(spec)]
        return tuple(dict.fromkeys([*legal, *self.known_good]))

    def __iter__(self) -> Iterator[KernelSpec]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def known_good(self) -> tuple[KernelSpec, ...]:
        """Points worth trying first: the default, and what other projects ship for such a shape."""
        return tuple(dict.fromkeys(spec for spec in self.presets if not self.broken(spec)))

    @property
    def default(self) -> KernelSpec:
        """The schedule used where nothing was tuned. BitgenError when no preset of the family is legal."""
        if not self.known_good:
            raise BitgenError(self._why_no_default())
        return self.known_good[0]

    def _why_no_default(self) -> str:
        """For who adds a knob or a level: the first preset, and what it breaks."""
        where = f"{self.family} on {self.isa.name} for {self.regime.name}"
        if not self.presets:
            return f"{where} has no preset, so it has no default schedule"
        first = self.presets[0]
        rules = "; ".join(rule.text for rule in self.broken(first))
        return f"{where} has no legal preset; the first, {first.schedule.name}, breaks: {rules}"


def space_for(family: str, isa: Isa, regime: Regime, shape: Shape, cpu: Cpu, group: int = 0) -> Space:
    """The space of a family on an ISA level for one shape; ``cpu`` gives the cache sizes and the vendor.

    ``group``: weights along k that share a scale; 0: scales lie outside. UsageError where the family has no
    such layout.
    """
    if family not in EVERY_FAMILY:
        raise unknown("family", family, EVERY_FAMILY)
    facts = EVERY_FAMILY[family]
    if group or not facts.in_rows:
        facts.require_group(group)
        facts = facts.in_groups(group, regime)
    axes = facts.axes(isa, regime)
    if group:
        axes = {name: _grouped_axes(facts, name, group, own) for name, own in axes.items()}
    layouts = tuple(Layout(family, rows, group) for rows in ((16, 32) if facts.rows == 16 else (facts.rows,)))
    presets = (
        KernelSpec(
            family,
            isa.name,
            regime.name,
            Layout(family, max(preset.row_block, facts.rows), group),
            Schedule(preset.algorithm, tuple(_grouped(facts, preset.algorithm, group, preset.knobs).items())),
        )
        for preset in presets_of(facts, isa, regime)
        if (preset.algorithm in axes or not group) and preset.vendor in ("", cpu.vendor)
    )
    return Space(
        family=family,
        isa=isa,
        regime=regime,
        shape=shape,
        layouts=layouts,
        axes=axes,
        presets=tuple(presets),
        bounds=tuple(_bounds(facts, isa, regime, layouts, axes)),
        rules=(*_rules(facts, isa, axes, shape, cpu), *(_group_rules(facts, group) if group else ())),
    )


def _grouped(family: Family, algorithm: str, group: int, knobs: Knobs) -> Knobs:
    """Knobs made to fit groups: int16 sums end with a group, blocks along k hold whole groups."""
    turns = family.algorithm(algorithm).turns(family, group)
    fitting = dict(knobs)
    if group and "widen_every" in knobs:
        fitting["widen_every"] = min(knobs["widen_every"], turns)
    if group and "kc" in knobs:
        fitting["kc"] = ceil_to(knobs["kc"], group)
    return fitting


def _grouped_axes(family: Family, algorithm: str, group: int, axes: Axes) -> Axes:
    """The values of each knob that fit groups, see `_grouped`."""
    fits = {
        name: dict.fromkeys(_grouped(family, algorithm, group, {name: value})[name] for value in values)
        for name, values in axes.items()
    }
    return {name: tuple(values) for name, values in fits.items()}


# ---- What makes a schedule legal


def _bounds(
    family: Family, isa: Isa, regime: Regime, layouts: tuple[Layout, ...], axes: Mapping[str, Axes]
) -> Iterator[Rule]:
    yield Rule(
        f"it must be a kernel of {family.name} on {isa.name} for {regime.name}",
        lambda s: (s.family, s.isa, s.regime) == (family.name, isa.name, regime.name),
    )
    yield Rule(
        "it must have all knobs of its algorithm, in order: "
        + "; ".join(f"{name} has {', '.join(knobs)}" for name, knobs in axes.items()),
        lambda s: s.schedule.algorithm in axes and _names_its_knobs(family, axes[s.schedule.algorithm], s),
    )
    yield Rule(
        f"row_block must be one of {', '.join(str(layout.row_block) for layout in layouts)}",
        lambda s: s.layout in layouts,
    )
    for algorithm, knobs in axes.items():
        for knob in knobs:
            values = family.algorithm(algorithm).domain(knob) or knobs[knob]
            text = f"{knob} of {algorithm} must be {told(values)}"
            yield Rule(text, _of(algorithm, _within(knob, values)))


def _rules(family: Family, isa: Isa, axes: Mapping[str, Axes], shape: Shape, cpu: Cpu) -> Iterator[Rule]:
    yield Rule(
        f"int16 partial sums must stay within {INT16_MIN} .. {INT16_MAX}: a smaller widen_every",
        lambda s: (sums := int16_sums(s)) is None or sums.exact,
    )
    if family.by_table:
        yield Rule(
            "values of a table are signed, and sums of int16 take unsigned codes: widen_every must be 0",
            lambda s: s.schedule.get("widen_every", 0) == 0,
        )
    if not isa.generic:  # its blocks are arrays: the compiler decides
        yield Rule(
            f"accumulators and operands must fit the registers of {isa.name}",
            lambda s: _registers(family, isa, s) <= isa.register_count,
        )
    for algorithm, own in axes.items():
        for check in family.algorithm(algorithm).checks(family, isa, own):
            yield _checked(algorithm, check)
    knobs = {name for one in axes.values() for name in one}
    if "prefetch_hint" in knobs:
        yield Rule(
            "prefetch_hint says where prefetched lines go: 1 and 2 need a prefetch distance",
            lambda s: s.schedule.get("prefetch_hint", 0) == 0 or s.schedule["prefetch"] > 0,
        )
    if "kc" in knobs:
        yield Rule(
            f"kc must be 0 (all of k) or a multiple of the family's chunk, {family.k_chunk}",
            lambda s: bool(s.layout.group) or s.schedule.get("kc", 0) % family.k_chunk == 0,
        )
        yield Rule(f"kc must be below k = {shape.k}", lambda s: s.schedule.get("kc", 0) < shape.k, local=True)
    if UNPACKING & axes.keys():
        yield Rule("mc of a panel must be a multiple of mr and of the row block, not 0", _panel_rows_divide)
        yield Rule(
            f"a panel of mc x kc bytes must leave a quarter of the L2 cache free ({cpu.l2_bytes} bytes)",
            lambda s: _panel_bytes(s, shape.k) <= cpu.l2_bytes * 3 // 4,
            local=True,
        )


def _group_rules(family: Family, group: int) -> Iterator[Rule]:
    yield Rule(
        f"int16 sums end with a group of {group} weights: a smaller widen_every",
        lambda s: (
            s.schedule.get("widen_every", 0)
            <= family.algorithm(s.schedule.algorithm).turns(family, s.layout.group)
        ),
    )
    yield Rule(
        f"kc must be 0 (all of k) or a multiple of the group, {group}",
        lambda s: s.schedule.get("kc", 0) % group == 0,
    )


def _of(algorithm: str, holds: Callable[[KernelSpec], bool]) -> Callable[[KernelSpec], bool]:
    """What holds for the schedules of one algorithm; others are no matter of it."""
    return lambda s: s.schedule.algorithm != algorithm or holds(s)


def _names_its_knobs(family: Family, knobs: Axes, spec: KernelSpec) -> bool:
    """Whether a schedule has the knobs of its algorithm, and those that are off nowhere."""
    off = family.algorithm(spec.schedule.algorithm).off
    values = spec.knobs
    wanted = (name for name in knobs if name not in off or values[name] != off[name])
    return tuple(name for name, _ in spec.schedule) == tuple(wanted)


def _within(knob: str, values: Sequence[int]) -> Callable[[KernelSpec], bool]:
    return lambda s: s.schedule.get(knob, values[0]) in values


def _checked(algorithm: str, check: Check) -> Rule:
    text, holds = check
    return Rule(text, _of(algorithm, lambda s: holds(s.knobs, s.layout.row_block, s.layout.group)))


def _registers(family: Family, isa: Isa, spec: KernelSpec) -> int:
    algorithm = family.algorithm(spec.schedule.algorithm)
    return algorithm.registers(family, isa, spec.knobs, spec.layout.row_block)


def _panel_rows_divide(spec: KernelSpec) -> bool:
    s = dict(spec.schedule)
    if not spec.schedule.unpacks or "mc" not in s:
        return True
    return s["mc"] > 0 and s["mc"] % s.get("mr", 16) == 0 and s["mc"] % spec.layout.row_block == 0


def _panel_bytes(spec: KernelSpec, k: int) -> int:
    s = dict(spec.schedule)
    if not spec.schedule.unpacks or "mc" not in s:
        return 0
    if s["kc"] == 0 and s["mc"] == spec.layout.row_block and s.get("mr", 16) <= 32:
        return 0  # the smallest panel is always legal, so that every shape has a kernel
    return s["mc"] * (s["kc"] or k)


# ---- What a kernel adds up at most


def int16_sums(spec: KernelSpec) -> Int16Sums | None:
    """The int16 partial sums of a kernel; None when every product goes to int32 at once."""
    family = EVERY_FAMILY[spec.family]
    return family.algorithm(spec.schedule.algorithm).int16_sums(family, spec.knobs)


def headroom_lines(spec: KernelSpec) -> list[str]:
    """The bounds of a kernel's accumulators as arithmetic."""
    sums, family = int16_sums(spec), EVERY_FAMILY[spec.family]
    lines = [f"int16: {sums}, within {INT16_MIN} .. {INT16_MAX}"] if sums else []
    share, most = family.algorithm(spec.schedule.algorithm).int32_share(family, spec.knobs)
    if spec.layout.group:
        return [*lines, f"int32: {share} of a group of {spec.layout.group} x {most} is below 2^31"]
    return [*lines, f"int32: {share} of k x {most} is below 2^31 for k <= {K_MAX}"]
