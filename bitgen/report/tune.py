"""The records of one tune, taken out of a store: what a report is about."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from bitgen.cpu import Cpu
from bitgen.errors import BitgenError
from bitgen.fingerprints import Fingerprint
from bitgen.formats.config import ModelPreset, load_models
from bitgen.measure import MachinePeak
from bitgen.search.choose import Slot, token_weights
from bitgen.search.plan import load_search_config, tokens_of
from bitgen.spec import REGIMES, Shape
from bitgen.store import (
    JobRecord,
    LoadRecord,
    RaceRecord,
    Record,
    RecordStore,
    TrialRecord,
    TuningRecord,
    Winner,
)

PAUSE_S = 120.0  # a longer gap between two records is no part of a tune: it was resumed


@dataclass(frozen=True)
class Tune:
    """One tune: its decisions, and the trials, races and peaks that share their machine and compiler.

    ``source`` names the file. ``model`` weighs the matrices: the one asked for, or the only preset with
    exactly these shapes (``guessed``); None where there is none. ``machine`` is the CPU as it is detected
    here, None where the records are of another one. Trials and races are in the order of their time.
    ``loads`` are those told meanwhile; ``jobs`` tell which machine of a fleet did what.
    """

    source: str
    decisions: Mapping[Shape, TuningRecord]
    trials: tuple[TrialRecord, ...]
    races: tuple[RaceRecord, ...]
    peaks: Mapping[int, MachinePeak]
    model: ModelPreset | None
    guessed: bool
    machine: Cpu | None
    loads: tuple[LoadRecord, ...] = ()
    jobs: tuple[JobRecord, ...] = ()

    @property
    def first(self) -> TuningRecord:
        return next(iter(self.decisions.values()))

    @property
    def winners(self) -> list[Winner]:
        return [winner for record in self.decisions.values() for winner in record.winners]

    @cached_property
    def slots(self) -> list[Slot]:
        """The regimes and thread counts that were searched, n = 1 first."""
        order = [regime.name for regime in REGIMES]
        found = {Slot(winner.regime, winner.threads) for winner in self.winners}
        return sorted(found, key=lambda slot: (order.index(slot.regime), slot.threads))

    @property
    def shown(self) -> list[Slot]:
        """The regimes on the number of threads the model takes: of the others only the scaling is shown."""
        return [slot for slot in self.slots if slot.threads == self.threads]

    @property
    def cpu(self) -> str:
        """The microarchitecture and the name of the CPU, as the fingerprint has them."""
        return self.first.winners[0].fingerprint.cpu.rpartition(" ")[0]

    @property
    def compilers(self) -> list[str]:
        return sorted({winner.fingerprint.compiler.rpartition(" ")[0] for winner in self.winners})

    @property
    def families(self) -> list[str]:
        return list(dict.fromkeys(winner.spec.family for winner in self.winners))

    @property
    def threads(self) -> int:
        """The number the model takes: the one chosen, else the largest one searched."""
        return self.first.best_threads or max(slot.threads for slot in self.slots)

    def count(self, shape: Shape) -> int:
        """How many matrices of ``shape`` a token is multiplied with; 1 without a model."""
        if self.model is None:
            return 1
        return sum(matmul.count for matmul in self.model.matmuls if matmul.shape == shape)

    def roles(self, shape: Shape) -> str:
        matmuls = self.model.matmuls if self.model else ()
        return "/".join(matmul.role for matmul in matmuls if matmul.shape == shape)

    def cost(self, winners: list[Winner]) -> float:
        """What a session pays for one shape whose kernels these are, in nanoseconds: the objective's mix."""
        mine = [winner for winner in winners if winner.threads == self.threads]
        weights = self._weights
        if mine:
            weights = tokens_of(self.roles(mine[0].measurement.job.shape).split("/"), weights)
        return sum(weights[w.regime] * w.time_ns / w.measurement.job.n for w in mine)

    @cached_property
    def _weights(self) -> Mapping[str, float]:
        regimes = [slot.regime for slot in self.slots]
        return token_weights(load_search_config(), self.first.objective, regimes)

    def kernels(self, family: str | None) -> dict[tuple[Shape, Slot], Winner]:
        """The kernels of the chosen layouts (None), or of the layouts of a family that cost least."""
        found: dict[tuple[Shape, Slot], Winner] = {}
        for shape, record in self.decisions.items():
            layouts: dict[str, list[Winner]] = {}
            for winner in record.winners:
                if winner.spec.layout == record.layout if family is None else winner.spec.family == family:
                    layouts.setdefault(winner.spec.layout.name, []).append(winner)
            whole = [kernels for kernels in layouts.values() if len(kernels) == len(self.slots)]
            for winner in min(whole, key=self.cost, default=[]):
                found[shape, Slot(winner.regime, winner.threads)] = winner
        return found

    def token_ms(self, kernels: Mapping[tuple[Shape, Slot], Winner], slot: Slot) -> float | None:
        """Milliseconds a token of all the model's matrices; None where a shape has no kernel."""
        own = {shape: winner for (shape, at), winner in kernels.items() if at == slot}
        if own.keys() != self.decisions.keys():
            return None
        return sum(self.count(shape) * w.time_ns / w.measurement.job.n for shape, w in own.items()) / 1e6

    @cached_property
    def elapsed(self) -> Callable[[float], float]:
        """Unix time -> seconds of the tune; pauses (`PAUSE_S`) are left out."""
        records: tuple[Record, ...] = (*self.trials, *self.races, *self.loads)
        times = sorted({record.time for record in records})
        at, seconds = dict.fromkeys(times[:1], 0.0), 0.0
        for before, time in pairwise(times):
            seconds += time - before if time - before <= PAUSE_S else 0.0
            at[time] = seconds
        return at.__getitem__


def tune_of(
    store: RecordStore, model: ModelPreset | None = None, here: Cpu | None = None, cpu: str = ""
) -> Tune:
    """The newest tune in ``store``, or the newest of ``model``; BitgenError when there is none.

    ``here`` is the detected CPU, of which the report tells more where the records are of ``cpu``, its text in
    fingerprints.
    """
    finished = [found for found in _finished(store) if model is None or _is_of(found, model)]
    if not finished:
        what = f"finished tune of {model.alias}" if model else "finished tune"
        raise BitgenError(f"{store.path} holds no {what}: run bitgen tune --model NAME first")
    decisions = finished[-1]
    winners = [winner for record in decisions.values() for winner in record.winners]
    alike = {_conditions(winner.fingerprint) for winner in winners}
    searched = {(winner.spec.family, winner.regime, winner.threads) for winner in winners}
    trials = [
        trial
        for trial in store.trials()
        if (job := trial.measurement.job).shape in decisions
        and job.spec.layout.kind == decisions[job.shape].layout.kind
        and _conditions(trial.fingerprint) in alike
        and (job.spec.family, job.spec.regime, job.threads) in searched
    ]
    digests = {winner.fingerprint.digest for winner in winners} | {t.fingerprint.digest for t in trials}
    races = [r for r in store.races() if r.job.shape in decisions and digests.issuperset(r.fingerprints)]
    cpus = {fingerprint[0] for fingerprint in alike}
    shown: tuple[Record, ...] = (*trials, *races)
    measured = sorted(record.time for record in shown)
    presets = [preset for preset in load_models() if _is_of(decisions, preset)]
    guess = presets[0] if len(presets) == 1 else None
    return Tune(
        source=store.path.name,
        decisions=decisions,
        trials=tuple(sorted(trials, key=lambda record: record.time)),
        races=tuple(sorted(races, key=lambda record: record.time)),
        peaks=_best_peaks(record.peak for record in store.peaks if record.cpu in cpus),
        model=model or guess,
        guessed=model is None and guess is not None,
        machine=here if cpus == {cpu} else None,
        loads=tuple(record for record in store.loads if _within(record.time, measured)),
        jobs=tuple(store.jobs),
    )


def _within(time: float, measured: list[float]) -> bool:
    """Whether a load was told soon after a measurement that is shown."""
    place = bisect(measured, time)
    return place > 0 and time - measured[place - 1] <= PAUSE_S


def _conditions(fingerprint: Fingerprint) -> tuple[str, str, str]:
    return fingerprint.cpu, fingerprint.compiler, fingerprint.harness


def _is_of(decisions: Mapping[Shape, TuningRecord], model: ModelPreset) -> bool:
    """Whether these are the decisions about a model's matrices."""
    kinds = {record.layout.kind for record in decisions.values()}
    return set(decisions) == set(model.shapes) and kinds == {model.kind}


def _finished(store: RecordStore) -> list[dict[Shape, TuningRecord]]:
    """The decisions of each tune, oldest first: they follow each other with nothing measured in between."""
    every: tuple[Record, ...] = (*store.trials(), *store.races(), *store.peaks)
    measured = sorted(record.time for record in every)
    found: list[dict[Shape, TuningRecord]] = []
    before = None
    for record in store.tunings:
        own = (record.seed, record.objective, record.best_threads, bisect(measured, record.time))
        if own != before or record.shape in found[-1]:
            found.append({})
        found[-1][record.shape] = record
        before = own
    return found


def _best_peaks(peaks: Iterable[MachinePeak]) -> dict[int, MachinePeak]:
    """For each number of threads the most of each probe: a disturbance makes a probe slower, never faster."""
    best: dict[int, MachinePeak] = {}
    for peak in peaks:
        known = best.get(peak.threads, peak)
        dram, gops = dict(known.dram_gbs), dict(known.peak_gops)
        for most, new in ((dram, peak.dram_gbs), (gops, peak.peak_gops)):
            most.update({name: max(value, most.get(name, 0.0)) for name, value in new.items()})
        best[peak.threads] = MachinePeak(peak.threads, dram, gops)
    return best
