"""A grid of schedules thinned by rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from bitgen.cpu import Isa
from bitgen.errors import UsageError
from bitgen.space.axes import Axes
from bitgen.spec import FAMILIES, KernelSpec, Layout, Regime, Schedule, Shape


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
                f"{FAMILIES[self.family].title} for {self.regime.name} has no algorithm {algorithm!r}; "
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
        missing = set(knobs) - set(values)
        if missing:
            raise UsageError(f"{algorithm} needs a value for {', '.join(sorted(missing))}")
        schedule = Schedule(algorithm, tuple((name, int(values[name])) for name in knobs))
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
        """The schedule used where nothing was tuned. Every space has one."""
        return self.known_good[0]
