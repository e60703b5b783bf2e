"""The coordinator: one search for each kind of CPU, on all its machines, and what may be committed of it.

The search is that of `bitgen tune`, over a `FleetRunner`: a function of the seed, the answers and what it
tried first when it began, so a coordinator that was killed walks the same way again. Then every winner meets
the kernel that it would replace once more, on two machines, and takes its place only where both agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bitgen import __version__
from bitgen.cpu import Cpu, Isa, accepted_isas, find_isa, load_isas, require_isa
from bitgen.errors import BitgenError
from bitgen.fingerprints import Fingerprint, Fingerprints
from bitgen.fleet.admin import append_jobs
from bitgen.fleet.database import AwayError, Database, raised
from bitgen.fleet.exchange import PostgresExchange
from bitgen.fleet.messages import code_digest
from bitgen.fleet.runner import Exchange, FleetRunner
from bitgen.fleet.statistics import OCCASIONS, Effect, Pooled, may_replace, pooled
from bitgen.formats.config import ModelPreset
from bitgen.measure import Job, RaceJob
from bitgen.paths import ensure_dir, tune_logs_dir
from bitgen.progress import Progress
from bitgen.records import dump, load
from bitgen.search import (
    Plan,
    SearchConfig,
    Session,
    SpaceFactory,
    Target,
    TuneOptions,
    TuningResult,
    load_search_config,
    plan_for,
    tune,
)
from bitgen.search.choose import token_weights
from bitgen.search.plan import seed_of
from bitgen.space import space_for
from bitgen.spec import KernelSpec, Shape, regime_named
from bitgen.store import RecordStore, StartRecord
from bitgen.winners import commit_winners, winners_in_force

AT_ONCE = 32  # searches, races and comparisons under way for one kind of CPU
_WAIT_S = 1.0
_COMMIT = threading.Lock()  # zen4 and zen4.avx2 are of one file


@dataclass(frozen=True)
class Contest:
    """A new kernel against the one whose place it wants, for one shape and regime, on each occasion.

    ``share`` is the old one's part of what a session costs on this shape. No effects: they are the same.
    """

    shape: Shape
    n: int
    threads: int
    old: KernelSpec
    new: KernelSpec
    effects: tuple[Effect, ...] = ()
    share: float = 1.0

    @property
    def pooled(self) -> Pooled:
        return pooled(self.effects)


@dataclass(frozen=True)
class Decision:
    """Contests won or lost together: of one kernel, or of all of a shape whose layout would change."""

    contests: tuple[Contest, ...]
    effects: tuple[Effect, ...]
    replaced: bool


@dataclass(frozen=True)
class FleetTune:
    """What came of one kind of CPU. ``file``: its committed winners, None where nothing changed."""

    label: str
    result: TuningResult
    decisions: tuple[Decision, ...]
    file: Path | None


@dataclass(frozen=True)
class Family:
    """A kind of CPU as the coordinator works with it."""

    label: str
    cpu: Cpu
    isas: tuple[Isa, ...]

    def spaces(self, group: int) -> SpaceFactory:
        def space(family: str, isa: Isa, regime: str, shape: Shape) -> object:
            return space_for(family, isa, regime_named(regime), shape, self.cpu, group)

        return space  # type: ignore[return-value]


def tune_fleet(
    database: Database,
    preset: ModelPreset,
    labels: Sequence[str],
    options: TuneOptions,
    report: Callable[[str], None],
    out: Path | None = None,
) -> list[FleetTune]:
    """Tune ``preset`` for every kind of CPU of ``labels``, all at once; winners go to ``out``.

    None: ``winners/`` in the folder of records. BitgenError when another coordinator is at one of them.
    """
    with ThreadPoolExecutor(max(1, len(labels))) as pool:
        one = partial(_tune_label, database, preset, options=options, report=report, out=out)
        return list(pool.map(one, labels))


def _tune_label(
    database: Database,
    preset: ModelPreset,
    label: str,
    options: TuneOptions,
    report: Callable[[str], None],
    out: Path | None,
) -> FleetTune:
    def say(text: str) -> None:
        report(f"{label}: {text}")

    with PostgresExchange(database, say, label) as exchange:
        family = _family(database, label, say)
        logs = ensure_dir(tune_logs_dir(options.logs) / "fleet")
        store = RecordStore(logs / f"{label}.jsonl")
        folder = out if out is not None else tune_logs_dir(options.logs) / "winners"
        try:
            return search_family(family, preset, options, exchange, store, folder, say)
        finally:
            with contextlib.suppress(BitgenError):  # for the report only
                append_jobs(database, label, store)


def _family(database: Database, label: str, say: Callable[[str], None]) -> Family:
    """The kind of CPU as its first worker described it; waits for one."""
    told = False
    while True:
        # While the database is away there is nothing to say: the exchange tells that.
        with contextlib.suppress(AwayError), database.connect() as connection, raised("lost the connection"):
            row = connection.execute("SELECT cpu FROM families WHERE label = %s", (label,)).fetchone()
            if row:
                return Family(label, load(Cpu, row[0], f"the family {label}"), load_isas())
            if not told:
                say("no worker of this kind was ever here; waiting for one (bitgen worker)")
            told = True
        time.sleep(_WAIT_S)


def search_family(
    family: Family,
    preset: ModelPreset,
    options: TuneOptions,
    exchange: Exchange,
    store: RecordStore,
    folder: Path,
    say: Callable[[str], None],
) -> FleetTune:
    """Search, let two machines compare what is new with what is committed, and commit what both prefer."""
    config, code = _wider(load_search_config()), code_digest()
    usual = accepted_isas(family.cpu, family.isas)[:1]
    levels = [require_isa(name, family.cpu, family.isas) for name in options.isas] or list(usual)
    plan = replace(plan_for(preset, family.cpu, levels, config, options), timeout_s=options.timeout_s)
    if len(plan.threads) > 1:
        raise BitgenError("a fleet tunes for one number of threads at a time")
    spaces = family.spaces(plan.kind.group)
    searches = len(plan.families) * len(plan.regimes) * len(plan.isas)
    runner = FleetRunner(exchange, family.label, code, plan.isas, spaces, searches)
    fingerprints = fleet_fingerprints(family.label, code)
    known = winners_in_force(family.cpu.family, folder)
    first = _first(plan, f"{family.label} {code}", store, fingerprints, known)
    session = Session(
        config=config,
        family_winners=first,
        started_from=f"winners committed for {family.cpu.family}" if first else "",
        fresh=options.fresh,
        earlier=False,
        at_once=AT_ONCE,
        progress=lambda progress: say(_text(progress)),
    )
    result = tune(plan, runner, store, fingerprints, spaces, session)
    decisions = _decide(plan, config, runner, result, known, family)
    jobs = [c for d in decisions if d.replaced for c in d.contests]
    if not jobs:
        return FleetTune(family.label, result, tuple(decisions), None)
    tuned_on = {"cpu": f"a fleet of {family.label}", "harness": code, "version": __version__}
    winners = [Job(c.new, c.shape, regime_named(c.new.regime).n_min, c.threads) for c in jobs]
    with _COMMIT:
        file = commit_winners(family.cpu, family.isas, winners, tuned_on, folder)
    return FleetTune(family.label, result, tuple(decisions), file)


def _wider(config: SearchConfig) -> SearchConfig:
    """As many finalists in each regime as in the one with most.

    A search compares candidates that machines of different noise have timed, three times each. Of 100 seeds
    of made-up noise 2 lost more than 2 % with eight finalists, of 89 seeds 5 with three.
    """
    most = max(regime.finalists for regime in config.regimes.values())
    wider = {name: replace(regime, finalists=most) for name, regime in config.regimes.items()}
    return replace(config, regimes=wider)


def _first(
    plan: Plan, where: str, store: RecordStore, fingerprints: Fingerprints, known: Iterable[Job]
) -> tuple[KernelSpec, ...]:
    """What the search tries first: winners of earlier tunes and those committed, when this tune began.

    A tune is known by what it is asked, its seed and ``where``. Begun again, after a kill or an end, it
    starts from the same kernels whatever it recorded and committed meanwhile: it finds the same winners.
    """
    asked = {**dump(plan), "isas": [isa.name for isa in plan.isas]}
    text = json.dumps([where, asked], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in store.starts:
        earlier = [spec for shape in plan.shapes for spec in store.current(shape, fingerprints, plan.kind)]
        first = (*store.stale(fingerprints), *earlier, *(job.spec for job in known))
        store.append(StartRecord(key, tuple(dict.fromkeys(first))))
    return store.starts[key].first


def fleet_fingerprints(label: str, code: str) -> Callable[[KernelSpec], Fingerprint]:
    """Of the coordinator's own records: times of many machines, in units of one, for one version."""
    found = Fingerprint(f"{label} fleet {code}", f"the workers' own {code}", code, code)
    return lambda _: found


def _text(progress: Progress) -> str:
    return progress.text


# ---- what is committed ----


def _decide(
    plan: Plan,
    config: SearchConfig,
    runner: FleetRunner,
    result: TuningResult,
    known: Sequence[Job],
    family: Family,
) -> list[Decision]:
    """Every winner of ``result`` against what is committed, or what runs untuned where nothing is."""
    contests = []
    committed = {(j.shape, j.spec.regime, j.spec.isa, j.threads): j.spec for j in known}
    for row in result.winners:
        isa = find_isa(row.spec.isa, plan.isas)
        space = family.spaces(plan.kind.group)
        old = committed.get((row.shape, row.regime, row.spec.isa, row.threads))
        if old is None or space(old.family, isa, row.regime, row.shape).broken(old):
            old = space(plan.families[0], isa, row.regime, row.shape).default
        contests.append(Contest(row.shape, row.n, row.threads, old, row.spec))
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        met = list(pool.map(partial(_meet, plan, config, runner), contests))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [decision for target in plan.targets for decision in _of_target(target, met, plan, config)]


def _meet(plan: Plan, config: SearchConfig, runner: FleetRunner, contest: Contest) -> tuple[Contest, float]:
    """Race the two on `OCCASIONS`, on different machines where there are some; the old one's time."""
    if contest.old == contest.new:
        return contest, 0.0
    regime = config.regimes[contest.new.regime]
    effects: list[Effect] = []
    times: list[float] = []
    machine = ""
    for occasion in range(1, OCCASIONS + 1):
        seed = seed_of(plan.seed, "again", contest.shape.name, regime.n, contest.threads, occasion)
        rounds = 2 * config.race_block + 1
        specs = (contest.new, contest.old)
        job = RaceJob(specs, contest.shape, regime.n, contest.threads, rounds, regime.cold, seed)
        race, machine = runner.raced(job, occasion, machine)
        if contest.new not in race:
            return contest, 0.0  # it failed: nothing is replaced
        if contest.old not in race:  # the committed one fails on this machine: any other is better
            effects.append(Effect(machine, -1.0, 1e-6, rounds))
            continue
        effects.append(Effect.of(machine, race[contest.new], race[contest.old]))
        times.append(statistics.median(race[contest.old]))
    return replace(contest, effects=tuple(effects)), statistics.fmean(times) if times else 0.0


def _of_target(
    target: Target, met: Sequence[tuple[Contest, float]], plan: Plan, config: SearchConfig
) -> Iterator[Decision]:
    """Kernels of one layout are replaced one by one; another layout only for all regimes at once."""
    mine = [(contest, time_ns) for contest, time_ns in met if contest.shape == target.shape]
    if all(contest.old.layout == contest.new.layout for contest, _ in mine):
        for contest, _ in mine:
            yield Decision((contest,), contest.effects, may_replace(contest.effects, config.min_gain))
        return
    weights = target.tokens(token_weights(config, plan.objective, plan.regimes))
    costs = [weights[contest.new.regime] / contest.n * time_ns for contest, time_ns in mine]
    whole = sum(costs)
    shared = [
        replace(contest, share=cost / whole if whole else 0.0)
        for (contest, _), cost in zip(mine, costs, strict=True)
    ]
    effects = together([c for c in shared if c.effects])
    failed = any(c.old != c.new and not c.effects for c in shared)
    yield Decision(tuple(shared), effects, not failed and may_replace(effects, config.min_gain))


def together(contests: Sequence[Contest]) -> tuple[Effect, ...]:
    """Effects on the cost of a session, of which each contest is a share: log of sum of share * exp(mean)."""
    found = []
    for occasion in range(min((len(c.effects) for c in contests), default=0)):
        parts = [(c.share, c.effects[occasion]) for c in contests]
        total = sum(share * math.exp(effect.mean) for share, effect in parts)
        if total <= 0:
            continue
        weights = [share * math.exp(effect.mean) / total for share, effect in parts]
        variance = sum(w * w * e.variance for w, (_, e) in zip(weights, parts, strict=True))
        machines = "+".join(dict.fromkeys(effect.machine for _, effect in parts))
        whole = sum(share for share, _ in parts)
        rounds = min(effect.rounds for _, effect in parts)
        found.append(Effect(machines, math.log(total / whole), variance, rounds))
    return tuple(found)
