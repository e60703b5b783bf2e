"""Which kernels a library holds: those chosen, and what serves every other shape.

Beside the chosen kernels a library always holds, for each layout that occurs and for I2_S, kernels of the
target's ISA level with default schedules and portable ones: every shape is served, tuned or not. SVE leaves
the length of registers to the system: a library with kernels for one length holds others for the rest. The
universal library of an architecture holds all of its ISA levels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bitgen.bundle.manifest import DEFAULT, PORTABLE, KernelEntry
from bitgen.cpu import Cpu, Isa, accepted_isas, find_isa, load_isas, target_cpu, target_names, told_features
from bitgen.errors import BitgenError, UnsupportedError
from bitgen.families import first_family
from bitgen.families.base import COMMON_GROUP, GROUPS, TERNARY
from bitgen.render import Source, render_kernel, render_quantize, render_step, render_tables
from bitgen.space import space_for
from bitgen.spec import (
    EVERY_FAMILY,
    LARGE,
    N1,
    REGIMES,
    TERNARY_ROWS,
    KernelSpec,
    Layout,
    Shape,
    StepSizes,
    WeightKind,
    regime_named,
)

DEFAULT_LAYOUT = Layout("i2s", 16)  # of shapes nobody tuned
_ANY_SHAPE = Shape(4096, 4096)  # default schedules of kernels for every shape come from this one's space
# Weights in groups as files have them. Whoever has a library for every CPU may have no compiler, so it has
# kernels of all its levels for them: 126 more for x86-64, 1.4 times the bytes.
KINDS_OF_FILES = (
    WeightKind("q4", 32),  # Q4_0
    WeightKind("q4m", 32),  # Q4_1
    WeightKind("t4", 32),  # IQ4_NL, MXFP4
    WeightKind("t4", 16),  # NVFP4
    WeightKind("t4", 128),  # bitgen quantize, with 4 bits
    WeightKind("t3", 128),  # and with 3; Q2_0 with a fourth code
    WeightKind(TERNARY, 64),  # Q2_0
)
BASELINES = {"x86_64": "x86-64", "aarch64": "armv8-a"}  # the targets that stand for every CPU


@dataclass(frozen=True)
class Target:
    """What a library is for: a CPU (its family, features and caches) and the ISA level of default kernels.

    ``universal``: every CPU of its architecture, with all ISA levels; one is chosen when it is loaded.
    """

    cpu: Cpu
    isa: Isa
    isas: tuple[Isa, ...]
    universal: bool = False

    @classmethod
    def of(cls, cpu: Cpu, isa: str | None = None, isas: Sequence[Isa] | None = None) -> Target:
        """The target ``cpu`` at ISA level ``isa`` (None: the best it runs), out of ``isas`` (None: all)."""
        known = tuple(load_isas() if isas is None else isas)
        best = accepted_isas(cpu, known)
        return cls(cpu, find_isa(isa, known) if isa else best[0], known)

    @classmethod
    def every(cls, arch: str, system: str, isas: Sequence[Isa] | None = None) -> Target:
        """Every CPU of an architecture, at those ``isas`` (None: all) that its system tells about."""
        known = tuple(load_isas() if isas is None else isas)
        if arch not in BASELINES:
            raise UnsupportedError(f"there is no host code for {arch}; there is for {', '.join(BASELINES)}")
        known = tuple(isa for isa in known if isa.arch != arch or isa.requires <= told_features(arch, system))
        best = [isa for isa in known if isa.generic or isa.arch == arch][-1]
        return cls(target_cpu(BASELINES[arch], system), best, known, universal=True)

    @cached_property
    def levels(self) -> tuple[Isa, ...]:
        """The levels with default kernels for every shape, best first; `scalar` comes besides."""
        if self.universal:
            return tuple(isa for isa in reversed(self.isas) if isa.arch == self.cpu.arch)
        return (self.isa, *self.other_lengths)

    def cpu_of(self, isa: Isa) -> Cpu:
        """The CPU whose caches default schedules of a level are chosen for.

        That of the library; for a universal one the first known CPU whose best level it is.
        """
        if not self.universal:
            return self.cpu
        known = (target_cpu(name, self.cpu.os) for name in target_names())
        same = (cpu for cpu in known if cpu.arch == self.cpu.arch)
        return next((cpu for cpu in same if accepted_isas(cpu, self.isas)[0] == isa), self.cpu)

    @cached_property
    def other_lengths(self) -> tuple[Isa, ...]:
        """Where `isa` is for one length of registers: what serves the others, best first.

        For each length the best level that has what the CPU has, where it is better than the best level for
        any length; and that one.
        """
        if not self.isa.exact_vector:
            return ()
        any_length = next(isa for isa in accepted_isas(self.cpu, self.isas) if not isa.exact_vector)
        better = self.isas[self.isas.index(any_length) + 1 :]
        lengths = {
            isa.vector_bytes: isa
            for isa in better
            if isa.exact_vector
            and isa.vector_bytes != self.isa.vector_bytes
            and isa.requires <= self.cpu.features
        }
        return (*reversed(lengths.values()), any_length)

    @property
    def scalar(self) -> Isa:
        """The level that runs on every CPU."""
        return next(isa for isa in self.isas if isa.generic)


@dataclass(frozen=True)
class Contents:
    """What a library holds: entries in order of preference, and everything those need.

    ``threads``: the default; ``sizes``: of the models that get a forward step of their own.
    """

    target: Target
    entries: tuple[KernelEntry, ...]
    threads: int = 0
    sizes: StepSizes | None = None

    @property
    def cores(self) -> int:
        """On how many usable cores ``threads`` is the default; 0: on none."""
        return self.target.cpu.usable_threads if self.threads else 0

    @cached_property
    def specs(self) -> tuple[KernelSpec, ...]:
        return tuple(dict.fromkeys(entry.spec for entry in self.entries))

    @property
    def any_n(self) -> frozenset[KernelSpec]:
        """Kernels for many tokens that serve fewer too: the portable ones of all but ternary rows."""
        portable = (entry.spec for entry in self.entries if entry.role == PORTABLE and not entry.shape)
        others = (spec for spec in portable if spec.layout.kind != TERNARY_ROWS)
        return frozenset(spec for spec in others if spec.regime == LARGE.name)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(dict.fromkeys(spec.layout for spec in self.specs))

    @cached_property
    def isas(self) -> tuple[Isa, ...]:
        names = dict.fromkeys(spec.isa for spec in self.specs)
        return tuple(find_isa(name, self.target.isas) for name in names)

    @cached_property
    def steps(self) -> tuple[Source, ...]:
        """The step of every model, for each level of the target."""
        levels = dict.fromkeys(isa.name for isa in (*self.target.levels, self.target.scalar))
        return tuple(render_step(name) for name in levels)

    @cached_property
    def sized_step(self) -> Source | None:
        """The forward step of the models of ``sizes``, where their kernels run: at the target's ISA level."""
        return render_step(self.target.isa.name, self.sizes) if self.sizes else None

    @cached_property
    def cpu_families(self) -> tuple[str, ...]:
        """The families on which some kernels come before others of their ISA level."""
        return tuple(dict.fromkeys(entry.cpu_family for entry in self.entries if entry.cpu_family))

    @cached_property
    def features(self) -> tuple[str, ...]:
        return tuple(sorted({feature for isa in self.isas for feature in isa.requires}))

    @property
    def required(self) -> tuple[str, ...]:
        """Those of `features` without which a CPU cannot use the library."""
        return () if self.target.universal else self.features

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Kernels, then the quantiser of each ISA level, then the table builders."""
        tables = dict.fromkeys(
            (spec.family, spec.isa, spec.schedule.algorithm) for spec in self.specs if spec.table_bytes
        )
        return (
            *(render_kernel(spec) for spec in self.specs),
            *(render_quantize(isa.name) for isa in self.isas),
            *(render_tables(*which) for which in tables),
        )


def choose_contents(choices: Sequence[KernelEntry], target: Target) -> Contents:
    """The entries of a library with these ``choices``: tuned, then defaults, then portable ones.

    In a universal library the entries of one ISA level come together, those of better levels first.
    BitgenError when the choices for one shape, thread count, level and CPU family read different layouts: its
    weights are packed once and serve every n.
    """
    layout_of: dict[tuple[Shape, int, str, str], Layout] = {}
    for choice in choices:
        if choice.shape is not None:
            slot = (choice.shape, choice.threads, choice.spec.isa, choice.cpu_family)
            layout = layout_of.setdefault(slot, choice.spec.layout)
            if layout != choice.spec.layout:
                names = f"{layout.name} and {choice.spec.layout.name}"
                raise BitgenError(f"kernels for {choice.shape.name} read two layouts, {names}")
    generic = [choice.spec.layout for choice in choices if choice.shape is None]
    layouts = dict.fromkeys([*generic, DEFAULT_LAYOUT, *common_layouts(target)])
    layouts |= dict.fromkeys(choice.spec.layout for choice in choices)
    entries = [choice for choice in choices if choice.shape]
    entries += [choice for choice in choices if not choice.shape]
    entries += [entry for isa in target.levels for entry in _for_other_shapes(choices, isa)]
    if target.universal:
        kinds = ((kind, isa) for isa in target.levels for kind in KINDS_OF_FILES)
        entries += [entry for kind, isa in kinds for entry in default_entries(kind, target, isa)]
    for isa, role in (*((isa, DEFAULT) for isa in target.levels), (target.scalar, PORTABLE)):
        entries += [
            KernelEntry(_default_spec(layout, regime.name, isa, target, choices), role=role)
            for layout in layouts
            for regime in REGIMES
            if role != PORTABLE or layout.kind == TERNARY_ROWS
        ]
    # One generic kernel serves every n of weights in groups and of codes: what is slow need not make
    # libraries large.
    others = [layout for layout in layouts if layout.kind != TERNARY_ROWS]
    others += [replace(DEFAULT_LAYOUT, group=group) for group in GROUPS]
    others += [Layout(name, 16, g) for name, one in EVERY_FAMILY.items() for g in one.portable]
    for layout in dict.fromkeys(others):
        spec = _default_spec(layout, LARGE.name, target.scalar, target, choices)
        entries.append(KernelEntry(spec, role=PORTABLE))
    if target.universal:
        order = [isa.name for isa in (*target.levels, target.scalar)]
        entries.sort(key=lambda entry: order.index(entry.spec.isa))
    rendered = [replace(entry, sha256=render_kernel(entry.spec).digest) for entry in entries]
    return Contents(target, tuple(dict.fromkeys(rendered)))


def _for_other_shapes(choices: Sequence[KernelEntry], isa: Isa) -> Iterator[KernelEntry]:
    """What shapes get that nobody tuned: of each kind of weights the layout that won most on ``isa``.

    With the kernels of its largest shape on the most threads. What wins on a CPU mostly does so for other
    models, and TL5 has a tenth fewer bytes a token of 2B-4T than I2_S; on a Xeon with AMX that untuned model
    decoded at 0.98 of the speed that I2_S gave it (13 interleaved rounds), so it is no gain everywhere.
    """
    tuned = [(c.shape, c) for c in choices if c.shape and c.spec.isa == isa.name]
    weights: Counter[Layout] = Counter()
    for layout, shape in {(choice.spec.layout, shape) for shape, choice in tuned}:
        weights[layout] += shape.m * shape.k
    for kind in sorted({layout.kind for layout in weights}, key=lambda of: (of.weights, of.group)):
        most = max((of for of in weights if of.kind == kind), key=lambda of: (weights[of], of.name))
        mine = [((shape.m * shape.k, c.threads), c.spec) for shape, c in tuned if c.spec.layout == most]
        largest = max(size for size, _ in mine)
        yield from (KernelEntry(spec) for size, spec in mine if size == largest and spec.shape is None)


def default_entries(kind: WeightKind, target: Target, isa: Isa | None = None) -> list[KernelEntry]:
    """Kernels of a level (None: the target's) for every shape of such weights, all of one layout."""
    level = isa or target.isa
    cpu = target.cpu_of(level)
    layout = space_for(first_family(kind.weights), level, N1, _ANY_SHAPE, cpu, kind.group).default.layout
    return [KernelEntry(_default_spec(layout, one.name, level, target, ())) for one in REGIMES]


def untuned_entries(target: Target) -> list[KernelEntry]:
    """Kernels of a library that was tuned for nothing: of I2_S, and of TL5, a fifth fewer bytes.

    Which of them is the faster one depends on the memory, so the first use races them.
    """
    cpu = target.cpu_of(target.isa)
    small = space_for("tl5", target.isa, N1, _ANY_SHAPE, cpu).default.layout
    return [
        KernelEntry(_default_spec(layout, regime.name, target.isa, target, ()), role=DEFAULT)
        for layout in (DEFAULT_LAYOUT, small)
        for regime in REGIMES
    ]


def common_layouts(target: Target) -> tuple[Layout, ...]:
    """The layouts of weights in groups of `COMMON_GROUP` that nobody tuned: of ternary ones, and of bits.

    16 rows and a group are 544 bytes, or 288, so every other group would begin in the middle of a register of
    64.
    """
    wide = all(isa.vector_bytes == 64 for isa in target.levels)
    rows = 32 if wide else DEFAULT_LAYOUT.row_block
    return tuple(Layout(family, rows, COMMON_GROUP) for family in (DEFAULT_LAYOUT.family, "q1"))


def _default_spec(
    layout: Layout, regime: str, isa: Isa, target: Target, choices: Sequence[KernelEntry]
) -> KernelSpec:
    """A kernel for every shape of a layout: the space's default, else the first legal point that reads it."""
    space = space_for(layout.family, isa, regime_named(regime), _ANY_SHAPE, target.cpu_of(isa), layout.group)
    default = replace(space.default, layout=layout)
    if not space.broken(default):
        return default
    chosen = (choice.spec for choice in choices)
    alike = (replace(spec, layout=layout) for spec in space.known_good)
    points: Iterator[KernelSpec] = (
        spec
        for specs in (chosen, (spec for spec in alike if not space.broken(spec)), space)
        for spec in specs
        if (spec.layout, spec.regime, spec.isa, spec.shape) == (layout, regime, isa.name, None)
    )
    spec = next(points, None)
    if spec is None:
        raise BitgenError(f"no {isa.name} kernel for {regime} reads the layout {layout.name}")
    return spec
