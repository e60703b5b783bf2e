"""Which candidates next? Small spaces are enumerated, in large ones a model (optuna's TPE) proposes.

Both are deterministic: the same seed and measurements give the same candidates, in the same order, each
of them once. So a search that was killed walks the same way again, and finds its measurements in the store.
This is the only module that imports optuna; it takes 0.9 s, so only a large space pays for it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bitgen.spec import KernelSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


class Proposer(Protocol):
    """Ask for new candidates, tell what they cost."""

    def ask(self, count: int) -> list[KernelSpec]:
        """Up to ``count`` candidates that were never asked before; empty when there are none left."""
        ...

    def tell(self, spec: KernelSpec, cost: float | None) -> None:
        """The cost of a candidate, lower is better; None when it has none because it failed."""
        ...


class Enumeration:
    """Every point once: the starters, then the others in a seeded order, since a budget may cut it short."""

    def __init__(self, points: Sequence[KernelSpec], first: Sequence[KernelSpec], seed: int) -> None:
        taken = set(first)
        rest = [spec for spec in points if spec not in taken]
        random.Random(seed).shuffle(rest)  # noqa: S311 - no secret
        self._queue = [*first, *rest]

    def ask(self, count: int) -> list[KernelSpec]:
        batch, self._queue = self._queue[:count], self._queue[count:]
        return batch

    def tell(self, spec: KernelSpec, cost: float | None) -> None:
        """An enumeration learns nothing."""


class TpeProposer:
    """Points near what TPE asks for.

    TPE knows neither the rules of a space nor what was tried: it repeats points (125 distinct in 200) and
    mixes illegal ones. Each of its trials becomes the nearest legal point that was not asked before, and the
    cost is told for the point that was really measured.
    """

    def __init__(self, points: Sequence[KernelSpec], first: Sequence[KernelSpec], seed: int) -> None:
        optuna = _import_optuna()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=16
            )
        self._optuna = optuna
        self._study = optuna.create_study(sampler=sampler)
        self._coordinates = _Coordinates(points)
        self._open = dict.fromkeys(points)  # not asked yet, in a fixed order
        self._starters = list(first)
        self._pending: dict[KernelSpec, Any] = {}  # candidate -> the optuna trial that asked for it

    def ask(self, count: int) -> list[KernelSpec]:
        batch: list[KernelSpec] = []
        while self._open and len(batch) < count:
            if self._starters:
                spec = self._starters.pop(0)
            else:
                trial = self._study.ask()
                spec = self._coordinates.nearest(self._coordinates.suggest(trial), self._open)
                self._pending[spec] = trial
            del self._open[spec]
            batch.append(spec)
        return batch

    def tell(self, spec: KernelSpec, cost: float | None) -> None:
        states = self._optuna.trial.TrialState
        if spec in self._pending:
            # Until now the pending trial kept the sampler away from itself (constant liar).
            self._study.tell(self._pending.pop(spec), state=states.FAIL)
        params = self._coordinates.params(spec)
        told = self._optuna.trial.create_trial(
            state=states.PRUNED if cost is None else states.COMPLETE,
            value=cost,
            params=params,
            distributions=self._coordinates.distributions(params),
        )
        self._study.add_trial(told)


class _Coordinates:
    """The axes of a space as optuna sees them, taken from its points.

    A path is an algorithm with a layout; its knobs are indices into their sorted values, so that TPE knows
    which values are neighbours. Knobs with one value are no axes.
    """

    def __init__(self, points: Sequence[KernelSpec]) -> None:
        seen: dict[str, dict[str, set[int]]] = {}
        for spec in points:
            axes = seen.setdefault(spec.schedule.algorithm, {})
            for knob, value in spec.knobs.items():
                axes.setdefault(knob, set()).add(value)
        self._values = {
            algorithm: {knob: sorted(values) for knob, values in axes.items() if len(values) > 1}
            for algorithm, axes in seen.items()
        }
        self._algorithms = list(self._values)
        self._layouts = list(dict.fromkeys(spec.layout.name for spec in points))
        self._params = {spec: self._params_of(spec) for spec in points}

    def params(self, spec: KernelSpec) -> dict[str, str | int]:
        return self._params[spec]

    def _params_of(self, spec: KernelSpec) -> dict[str, str | int]:
        algorithm, own = spec.schedule.algorithm, spec.knobs
        params: dict[str, str | int] = {"algorithm": algorithm, "layout": spec.layout.name}
        for knob, values in self._values[algorithm].items():
            params[f"{algorithm}.{knob}"] = values.index(own[knob])
        return params

    def distributions(self, params: Mapping[str, str | int]) -> dict[str, BaseDistribution]:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {
            "algorithm": CategoricalDistribution(self._algorithms),
            "layout": CategoricalDistribution(self._layouts),
        }
        for name in params:
            algorithm, dot, knob = name.partition(".")
            if dot:
                found[name] = IntDistribution(0, len(self._values[algorithm][knob]) - 1)
        return found

    def suggest(self, trial: Any) -> dict[str, str | int]:
        algorithm: str = trial.suggest_categorical("algorithm", self._algorithms)
        params: dict[str, str | int] = {
            "algorithm": algorithm,
            "layout": trial.suggest_categorical("layout", self._layouts),
        }
        for knob, values in self._values[algorithm].items():
            params[f"{algorithm}.{knob}"] = trial.suggest_int(f"{algorithm}.{knob}", 0, len(values) - 1)
        return params

    def nearest(self, wanted: Mapping[str, str | int], candidates: Iterable[KernelSpec]) -> KernelSpec:
        """The candidate with the fewest steps along its axes away from ``wanted``; the first of equals."""
        return min(candidates, key=lambda spec: self._distance(wanted, self._params[spec]))

    @staticmethod
    def _distance(wanted: Mapping[str, str | int], point: Mapping[str, str | int]) -> int:
        if wanted["algorithm"] != point["algorithm"]:
            return 1000  # another algorithm is another place altogether
        steps = 0 if wanted["layout"] == point["layout"] else 3
        for name, value in point.items():
            near = wanted[name]
            if isinstance(value, int) and isinstance(near, int):
                steps += abs(value - near)
        return steps


# What `strategy` in configs/search.yaml may name: points, those to try first, seed -> Proposer.
STRATEGIES: dict[str, Callable[[Sequence[KernelSpec], Sequence[KernelSpec], int], Proposer]] = {
    "enumerate": Enumeration,
    "tpe": TpeProposer,
}


def proposer_for(
    points: Sequence[KernelSpec],
    starters: Iterable[KernelSpec],
    seed: int,
    strategy: str,
    enumerate_up_to: int,
) -> Proposer:
    """The proposer for a space; ``starters`` (those that are legal points) are proposed first.

    ``strategy`` is one of `STRATEGIES`, or "auto": enumerate spaces of up to ``enumerate_up_to`` points.
    """
    legal = set(points)
    first = [spec for spec in dict.fromkeys(starters) if spec in legal]
    if strategy == "auto":
        strategy = "enumerate" if len(points) <= enumerate_up_to else "tpe"
    return STRATEGIES[strategy](points, first, seed)


def _import_optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
