"""What is tuned: a model's matrices x families x ISA levels x regimes x threads, and with which budget."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from bitgen.cpu import Cpu, Isa
from bitgen.errors import BitgenError, UsageError, unknown
from bitgen.families import families_of
from bitgen.formats.config import ModelPreset
from bitgen.paths import configs_dir
from bitgen.records import load, load_yaml
from bitgen.search.propose import STRATEGIES
from bitgen.space import Space
from bitgen.spec import (
    EVERY_FAMILY,
    LARGE,
    REGIMES,
    TERNARY_ROWS,
    KernelSpec,
    Layout,
    Shape,
    WeightKind,
    family_named,
    regime_named,
    regime_of,
)

SpaceFactory = Callable[[str, Isa, str, Shape], Space]  # family, ISA level, regime, shape

# ---- configs/search.yaml ----


@dataclass(frozen=True)
class RegimeConfig:
    """How kernels of a regime are timed; configs/search.yaml explains each field."""

    n: int
    cold: bool
    finalists: int
    time_share: float
    drop_ratio: float | None

    def __post_init__(self) -> None:
        if (
            self.finalists < 1
            or self.time_share <= 0
            or (self.drop_ratio is not None and self.drop_ratio <= 1)
        ):
            raise BitgenError("finalists must be at least 1, time_share above 0, drop_ratio above 1")


@dataclass(frozen=True)
class Budget:
    """What a tune may spend: ``trials`` candidates a family and regime, ``timeout_s`` of wall time."""

    trials: int
    timeout_s: float
    race_blocks: int
    regimes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.trials < 1 or self.race_blocks < 1 or not self.timeout_s > 0:
            raise BitgenError("trials and race_blocks must be at least 1, timeout_s above 0")
        for regime in self.regimes:
            regime_named(regime)


@dataclass(frozen=True)
class SearchConfig:
    """The constants of the search; configs/search.yaml explains each field."""

    regimes: dict[str, RegimeConfig]
    objectives: dict[str, dict[str, float]]
    objective: str
    budgets: dict[str, Budget]
    strategy: str
    enumerate_up_to: int
    batch: int
    patience: float
    least_trials: int
    roofline_share: float
    first_share: float
    hopeless_ratio: float
    race_share: float
    finalist_ratio: float
    race_block: int
    alpha: float
    drop_alpha: float
    margin: float
    min_gain: float

    def __post_init__(self) -> None:
        names = {regime.name for regime in REGIMES}
        if set(self.regimes) != names:
            raise BitgenError(f"regimes must be exactly {', '.join(sorted(names))}")
        for name, regime in self.regimes.items():
            if regime_of(regime.n).name != name:
                raise BitgenError(f"regimes: {name}: n = {regime.n} belongs to {regime_of(regime.n).name}")
        for name, tokens in self.objectives.items():
            if set(tokens) != names or min(tokens.values()) < 0 or not any(tokens.values()):
                raise BitgenError(f"objectives: {name} needs the tokens of each regime, not all of them 0")
        if self.objective not in self.objectives or set(self.budgets) != {"default", "quick"}:
            raise BitgenError("objective must be one of objectives; budgets are default and quick")
        if self.strategy not in ("auto", *STRATEGIES):
            raise unknown("strategy", self.strategy, ("auto", *STRATEGIES))
        if min(self.batch, self.race_block) < 1 or self.finalist_ratio < 1:
            raise BitgenError("batch, race_block and finalist_ratio must be at least 1")
        if self.patience <= 0 or not (0 <= self.race_share < 1 and 0 <= self.first_share <= 1):
            raise BitgenError("patience must be above 0, race_share in [0, 1), first_share in [0, 1]")
        if self.hopeless_ratio < 1:
            raise BitgenError("hopeless_ratio must be at least 1")

    def smoke(self) -> SearchConfig:
        """For `Plan.smoke`: the least tokens of each regime, one round, beyond which nothing is compared."""
        regimes = {
            name: replace(regime, n=regime_named(name).n_min, finalists=1, drop_ratio=None)
            for name, regime in self.regimes.items()
        }
        return replace(self, regimes=regimes, race_block=1)


def load_search_config(file: Path | None = None) -> SearchConfig:
    """configs/search.yaml, or ``file``. FileError when it is wrong."""
    path = file if file is not None else configs_dir() / "search.yaml"
    return load(SearchConfig, load_yaml(path), str(path))


# ---- the plan ----


@dataclass(frozen=True)
class TuneOptions:
    """What a tune may be asked for; what is left out comes from the budget, the CPU and the model.

    ``threads`` "auto": all usable cores, three quarters and half of them. ``fresh``: measure again what the
    records know. ``smoke``: `Plan.smoke`, and nothing is recorded. ``cc`` and ``logs`` as in `bitgen.tune`.
    """

    isas: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    regimes: tuple[str, ...] = ()
    threads: tuple[int, ...] | Literal["auto"] = ()
    objective: str | None = None
    seed: int = 0
    trials: int | None = None
    timeout_s: float | None = None
    quick: bool = False
    fresh: bool = False
    smoke: bool = False
    cc: str | None = None
    logs: Path | None = None


@dataclass(frozen=True)
class Target:
    """One weight shape of the model; a token is multiplied with ``count`` matrices of it."""

    shape: Shape
    roles: tuple[str, ...]
    count: int

    @property
    def weights(self) -> int:
        """Weights a token is multiplied with."""
        return self.count * self.shape.m * self.shape.k

    def tokens(self, session: Mapping[str, float]) -> Mapping[str, float]:
        """Of a session's tokens in each regime those that this is multiplied with."""
        return tokens_of(self.roles, session)


def tokens_of(roles: Sequence[str], session: Mapping[str, float]) -> Mapping[str, float]:
    """Of a session's tokens in each regime those that matrices of these roles are multiplied with.

    The head is multiplied with the last token of a prompt, not with all that a large regime is made of.
    """
    steps = {regime: 0.0 if regime == LARGE.name else tokens for regime, tokens in session.items()}
    return steps if set(roles) == {"head"} and any(steps.values()) else session


@dataclass(frozen=True)
class Plan:
    """Everything a tune is asked for. ``isas`` are best first; ``timeout_s`` None: only trials limit it."""

    model: str
    targets: tuple[Target, ...]
    families: tuple[str, ...]
    isas: tuple[Isa, ...]
    regimes: tuple[str, ...]
    threads: tuple[int, ...]
    objective: str
    seed: int
    trials: int
    timeout_s: float | None
    race_blocks: int
    kind: WeightKind = TERNARY_ROWS

    def __post_init__(self) -> None:
        for name in ("targets", "families", "isas", "regimes", "threads"):
            if not getattr(self, name):
                raise UsageError(f"nothing to tune: no {name} given")
        if self.trials < 1 or (self.timeout_s is not None and not self.timeout_s > 0):
            raise UsageError("--trials must be at least 1 and --timeout above 0 seconds")
        if min(self.threads) < 1:
            raise UsageError("--threads must be at least 1")

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(target.shape for target in self.targets)

    def smoke(self) -> Plan:
        """The same steps with as little work as they allow: for emulators, and to see that tuning works.

        Two kernels of each family and regime, no time limit, one block of the race, after which every default
        keeps its place: one round is beyond no noise.
        """
        return replace(self, trials=min(self.trials, 2), timeout_s=None, race_blocks=1)


def targets_of(model: ModelPreset) -> tuple[Target, ...]:
    """The distinct weight shapes of a model, the one with most weights a token first."""
    merged: dict[Shape, Target] = {}
    for matmul in model.matmuls:
        shape = Shape(matmul.m, matmul.k)
        known = merged.get(shape, Target(shape, (), 0))
        merged[shape] = Target(shape, (*known.roles, matmul.role), known.count + matmul.count)
    return tuple(sorted(merged.values(), key=lambda t: (-t.weights, t.shape)))


def _families(model: ModelPreset, names: Sequence[str]) -> tuple[str, ...]:
    """Those asked for, or all that hold the model's weights. UsageError for one that does not."""
    asked = [family_named(name) for name in names]
    for family in asked:
        if family.weights != model.weights:
            raise UsageError(
                f"{family.title} does not hold {model.weights} weights, as {model.alias} has them"
            )
    return tuple(dict.fromkeys(family.name for family in asked)) or families_of(model.weights)


def plan_for(
    model: ModelPreset,
    cpu: Cpu,
    isas: Sequence[Isa],
    config: SearchConfig,
    options: TuneOptions = TuneOptions(),
) -> Plan:
    """The plan of `bitgen tune`; ``isas``: the levels to search, best first, usually only the best one."""
    budget = config.budgets["quick" if options.quick else "default"]
    if options.objective is not None and options.objective not in config.objectives:
        raise unknown("objective", options.objective, config.objectives)
    threads = thread_candidates(cpu) if options.threads == "auto" else options.threads
    return Plan(
        model=model.alias,
        targets=targets_of(model),
        families=_families(model, options.families),
        isas=tuple(isas),
        regimes=tuple(dict.fromkeys(regime_named(r).name for r in options.regimes)) or budget.regimes,
        threads=tuple(dict.fromkeys(threads)) or (cpu.usable_threads,),
        objective=options.objective or config.objective,
        seed=options.seed,
        trials=budget.trials if options.trials is None else options.trials,
        timeout_s=budget.timeout_s if options.timeout_s is None else options.timeout_s,
        race_blocks=budget.race_blocks,
        kind=model.kind,
    )


def thread_candidates(cpu: Cpu) -> tuple[int, ...]:
    """Numbers of threads that may be the best: all usable cores, three quarters and half of them."""
    cores = cpu.usable_threads
    return tuple(dict.fromkeys(max(1, n) for n in (cores, cores * 3 // 4, cores // 2)))


def seed_of(seed: int, *parts: object) -> int:
    """A seed of its own for each part of a tune: 31 bits, the same on every machine."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# ---- groups ----


@dataclass(frozen=True)
class Group:
    """What is searched together: one compiled kernel serves every shape, so the shapes share candidates.

    ``spaces`` may differ from shape to shape (a cache block must be smaller than the matrix): a candidate is
    legal for some shapes and is timed on those.
    """

    family: str
    isa: Isa
    regime: str
    threads: int
    spaces: Mapping[Shape, Space]

    @property
    def name(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{EVERY_FAMILY[self.family].title} {self.isa.name} {self.regime}, {threads}"

    @cached_property
    def legal(self) -> Mapping[Shape, frozenset[KernelSpec]]:
        """The legal points of each shape's space."""
        return {shape: frozenset(space) for shape, space in self.spaces.items()}

    @cached_property
    def points(self) -> tuple[KernelSpec, ...]:
        """Every kernel that is legal for at least one shape, in a fixed order."""
        return tuple(dict.fromkeys(spec for space in self.spaces.values() for spec in space))

    @cached_property
    def defaults(self) -> Mapping[Shape, KernelSpec]:
        """What each shape would run untuned."""
        return {shape: space.default for shape, space in self.spaces.items()}

    @property
    def known_good(self) -> list[KernelSpec]:
        """The presets of the spaces, each once."""
        return list(dict.fromkeys(spec for space in self.spaces.values() for spec in space.known_good))

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(dict.fromkeys(layout for space in self.spaces.values() for layout in space.layouts))


def groups_of(plan: Plan, spaces: SpaceFactory) -> tuple[list[Group], list[str]]:
    """The groups of a plan, and why others are left out.

    A family that makes no sense on an ISA level says so by a BitgenError when its space is asked for.
    """
    groups, rejected = [], []
    for threads in plan.threads:
        for regime in plan.regimes:
            for family in plan.families:
                for isa in plan.isas:
                    try:
                        by_shape = {shape: spaces(family, isa, regime, shape) for shape in plan.shapes}
                    except BitgenError as error:
                        rejected.append(
                            f"{EVERY_FAMILY[family].title} on {isa.name}, {regime}: {error.message}"
                        )
                        continue
                    groups.append(Group(family, isa, regime, threads, by_shape))
    if not groups:
        raise UsageError(f"nothing to tune: {'; '.join(rejected)}")
    return groups, list(dict.fromkeys(rejected))
