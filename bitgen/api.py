"""The steps of bitgen as functions: tune, build, load, verify, render, time, export. The CLI calls these.

::

    import bitgen

    result = bitgen.tune("3B")                 # records go to tune_logs/, winners are in result.winners
    bundle = bitgen.build("3B")                # generated/3B-<cpu family>/: library, header, manifest
    table = bitgen.load(bundle)                # or bitgen.load(): the best library for this CPU
    linear = table.linear(w, scale)            # w int8 (m, k) in {-1, 0, 1}
    y = linear(x)                              # x float32 (n, k) -> float32 (n, m)
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bitgen.cpu import Isa, accepted_isas, detect_cpu, find_isa, isa_cap, target_cpu
from bitgen.environment import Environment, check_threads
from bitgen.errors import BitgenError, UsageError
from bitgen.families import first_family
from bitgen.families.base import TERNARY
from bitgen.formats.config import ModelPreset
from bitgen.formats.open import preset_of
from bitgen.measure import Job, MachinePeak, Measurement, Race, RaceJob, Rates, Status
from bitgen.paths import ensure_dir, generated_dir, tune_logs_dir
from bitgen.progress import Progress, Report
from bitgen.render import Source, render_kernel, render_quantize, render_step, render_tables
from bitgen.space import Space
from bitgen.spec import (
    EVERY_FAMILY,
    FAMILIES,
    LARGE,
    REGIMES,
    KernelSpec,
    Layout,
    Shape,
    family_named,
    regime_named,
    regime_of,
)
from bitgen.store import RecordStore
from bitgen.winners import export_winners, nearest_winners

if TYPE_CHECKING:
    from bitgen.bundle import KernelEntry
    from bitgen.bundle.manifest import Label
    from bitgen.bundle.transfer import Chosen
    from bitgen.measure.verify import SweepCounts
    from bitgen.runtime import KernelTable
    from bitgen.search import TuneOptions, TuningResult

# Schedules depend on the shape only through cache blocks; where no shape is given, this one stands for it.
ANY_SHAPE = Shape(4096, 4096)


# ---- tune ----


def tune(
    model: str | ModelPreset,
    *,
    isas: Iterable[str] = (),
    families: Iterable[str] = (),
    regimes: Iterable[str] = (),
    threads: Iterable[int] | Literal["auto"] = (),
    objective: str | None = None,
    seed: int = 0,
    trials: int | None = None,
    timeout_s: float | None = None,
    quick: bool = False,
    fresh: bool = False,
    dry_run: bool = False,
    cc: str | None = None,
    logs: Path | None = None,
    progress: Report | None = None,
) -> TuningResult:
    """Find the fastest exact kernels for a model on this machine and record them.

    What is left out comes from configs/search.yaml, the CPU (its best ISA level, all usable threads) and the
    model. Of several ``threads`` ("auto": all usable cores, three quarters and half of them) the fastest for
    the whole step becomes the default of the library that is built. A second call continues: what the
    records know is not measured again, unless ``fresh``.

    ``dry_run`` is a smoke test: two kernels of each family and regime, each verified and timed once, and
    nothing is recorded. Its times mean nothing; it shows that a machine (or an emulator) can be tuned on.
    """
    from bitgen.search import TuneOptions

    options = TuneOptions(
        isas=tuple(isas),
        families=tuple(families),
        regimes=tuple(regimes),
        threads="auto" if threads == "auto" else tuple(threads),
        objective=objective,
        seed=seed,
        trials=trials,
        timeout_s=timeout_s,
        quick=quick,
        fresh=fresh,
        smoke=dry_run,
        cc=cc,
        logs=logs,
    )
    return tune_with(model, options, progress)


def tune_with(model: str | ModelPreset, options: TuneOptions, progress: Report | None = None) -> TuningResult:
    """`tune` with its options as a record, which the command line makes."""
    from bitgen.measure.load import Watch
    from bitgen.measure.runner import LocalRunner, TimingPolicy
    from bitgen.search import Session, load_search_config, plan_for
    from bitgen.search import tune as search

    env = Environment(options.cc, options.logs)
    cpu, preset, config = env.cpu, preset_of(model), load_search_config()
    levels = [env.isa(name) for name in options.isas] or [env.isa(None)]
    plan = plan_for(preset, cpu, levels, config, options)
    check_threads(plan.threads, cpu)
    near = nearest_winners(cpu, env.isas)
    policy = None
    with contextlib.ExitStack() as stack:
        if options.smoke:
            plan, config, policy = plan.smoke(), config.smoke(), TimingPolicy.smoke()
            store = RecordStore(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "smoke.jsonl")
        else:
            ensure_dir(tune_logs_dir(options.logs))  # found out now, not after the first measurement
            store = env.store
        runner = stack.enter_context(LocalRunner(env.toolchain, cpu, policy=policy))
        session = Session(
            config=config,
            family_winners=tuple(winner.spec for winner in near.winners) if near else (),
            started_from=f"winners of {near.cpu_family} ({near.why})" if near else "",
            non_matmul_ns=_non_matmul_ns(preset, {name: regime.n for name, regime in config.regimes.items()}),
            fresh=options.fresh,
            progress=progress,
            load=Watch().look,
        )
        spaces = partial(env.space, group=plan.kind.group)
        return search(plan, runner, store, env.fingerprints, spaces, session)


def _non_matmul_ns(preset: ModelPreset, n: Mapping[str, int]) -> Callable[[str, int], float]:
    """What a token takes outside the matrices, measured by the forward pass of an untuned library."""

    @cache
    def on(threads: int) -> Mapping[int, float]:
        from bitgen.inference.non_matmul_cost import non_matmul_cost

        return non_matmul_cost(preset, untuned_library(), threads, tuple(n.values()))

    return lambda regime, threads: on(threads)[n[regime]]


def export(*, cc: str | None = None, logs: Path | None = None, out: Path | None = None) -> Path:
    """Write this machine's winners as schedules of its CPU family; returns the file.

    Without ``out`` that is ``winners/`` in the folder of records: in a checkout the one that is committed.
    BitgenError when nothing was tuned here with this compiler and version.
    """
    env = Environment(cc, logs)
    if not any(record.current(env.fingerprints) for record in env.store.tunings):
        raise BitgenError("there are no current winners to export: run bitgen tune --model NAME first")
    folder = out if out is not None else tune_logs_dir(logs) / "winners"
    return export_winners(env.store, env.fingerprints, env.cpu, env.isas, folder)


def merge(file: Path, *, out: Path | None = None) -> Path:
    """Fold winners that somebody exported into those of their CPU family; returns the family's file.

    Without ``out`` that is the folder of committed winners. FileError for a file that is no export, or has a
    schedule that is not legal.
    """
    from bitgen.cpu import load_isas
    from bitgen.winners import merge_winners

    return merge_winners(file, load_isas(), out)


# ---- build and load ----


def choices_for(model: ModelPreset, env: Environment, isa: Isa) -> Chosen:
    """The kernels of a model's shapes: tuned here, else from committed winners, as a release has them.

    Those of this CPU's family or, where nobody measured it at this ISA level, of the nearest, moved to it. A
    shape that no family has winners for runs on the default kernels that every library holds.
    """
    from bitgen.bundle import KernelEntry
    from bitgen.bundle.contents import Target, default_entries
    from bitgen.bundle.manifest import in_every_library
    from bitgen.bundle.transfer import Chosen, committed_kernels

    store, target = env.store, Target.of(env.cpu, isa.name, env.isas)
    choices: list[KernelEntry] = []
    missing: list[Shape] = []
    for shape in model.shapes:
        tuned = {
            winner.threads
            for record in store.tunings
            if (record.shape, record.layout.kind) == (shape, model.kind)
            for winner in record.current(env.fingerprints)
        }
        found = [
            KernelEntry(winner.spec, shape, winner.threads)
            for threads in sorted(tuned)
            for regime in REGIMES
            if (winner := store.best(shape, regime.name, threads, env.fingerprints, isa.name, model.kind))
        ]
        choices += dict.fromkeys(found)
        if not found:
            missing.append(shape)
    label: Label = "tuned" if choices else "default"
    origin = ""
    if missing and model.weights == TERNARY:
        committed = committed_kernels(target, missing, group=model.group)
        choices += committed.entries
        if label == "default":
            label, origin = committed.label, committed.origin
    if not in_every_library(model.kind):
        choices += default_entries(model.kind, target)
    return Chosen(tuple(choices), label, origin)


def build(
    model: str | ModelPreset,
    *,
    isa: str | None = None,
    cc: str | None = None,
    out: Path | None = None,
    logs: Path | None = None,
    name: str | None = None,
    target: str | None = None,
    system: str | None = None,
    progress: Report | None = None,
) -> Path:
    """Write the kernel library of a model: a folder with library, header, manifest and the C text.

    The kernels are the winners tuned on this machine, else those committed for this CPU family or the
    nearest one, else the defaults. Beside the forward step for every model there is one for this model's
    sizes. Returns the folder, ``<out>/<model>-<cpu family>``.

    ``target`` names a CPU of configs/targets.yaml, and ``system`` (Linux, Darwin or Windows; this one's)
    what runs there. A library that this machine cannot run is written without being tried. ``progress``
    hears of winners that were tuned here and do not count any more.
    """
    from bitgen.bundle.contents import Target
    from bitgen.bundle.write import write_library

    cpu = target_cpu(target, system or platform.system()) if target else None
    env = Environment(cc, logs, cpu)
    preset = preset_of(model)
    level = env.isa(isa)
    if progress:
        for text in filter(None, (env.store.damage, _stale(preset, env, level))):
            progress(Progress(text, lasting=True))
    chosen = choices_for(preset, env, level)
    choices = chosen.entries
    return write_library(
        choices,
        env.toolchain,
        generated_dir(out),
        name or f"{preset.alias}-{env.cpu.family}",
        Target.of(env.cpu, level.name, env.isas),
        model=preset.alias,
        sizes=preset.step_sizes,
        fingerprint=_fingerprint(choices, env),
        threads=env.store.best_threads(preset.shapes, env.fingerprints, preset.kind) if choices else 0,
        check=env.runs(level),
        label=chosen.label if chosen.label == "transferred" else None,  # else it is seen by the kernels
        origin=chosen.origin,
    )


def _stale(model: ModelPreset, env: Environment, isa: Isa) -> str:
    """Why a tune of a model's shapes does not count any more, for people; empty where it does, or was none.

    An update of the compiler is enough, and nobody who builds after it thinks of that.
    """
    changed: dict[str, None] = {}
    shapes: dict[Shape, bool] = {}  # whether some winner of theirs holds
    for record in env.store.tunings:
        if record.shape not in model.shapes or record.layout.kind != model.kind:
            continue
        for winner in (winner for winner in record.winners if winner.spec.isa == isa.name):
            differences = winner.fingerprint.differences(env.fingerprints(winner.spec))
            changed |= dict.fromkeys(differences)
            shapes[record.shape] = shapes.get(record.shape, False) or not differences
    stale = sum(not holds for holds in shapes.values())
    if not stale:
        return ""
    return (
        f"what was tuned here for {stale} of {len(model.shapes)} shapes does not count, made with another "
        f"{', '.join(changed)}: `bitgen tune --model {model.alias}` again"
    )


def _fingerprint(choices: Sequence[KernelEntry], env: Environment) -> str | None:
    """Stands for the fingerprints of all chosen kernels; None without any."""
    digests = [env.fingerprints(choice.spec).digest for choice in choices]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if digests else None


def load(path: str | Path | None = None, threads: int | None = None) -> KernelTable:
    """Open a kernel library: a .so, a bundle folder, or without a path the best one built or installed here.

    Where there is none yet, or only what another CPU left here, for a lower ISA level than this one's best,
    an untuned library of default kernels is built once (seconds) and kept.
    """
    from bitgen.bundle import all_bundles, choose_bundle, level_below_best, refused_features
    from bitgen.bundle.measured import recall
    from bitgen.runtime import load as open_library

    if path is not None:
        return open_library(path, threads)
    cpu = detect_cpu()
    refused, measured = refused_features(cpu), recall(cpu)
    bundle, _ = choose_bundle(all_bundles(hashed=False, cpu=cpu)[0], cpu, refused, measured)
    if bundle is None:
        return open_library(untuned_library(), threads)
    left = bundle.manifest.cpu_family != cpu.family or bundle.label == "default"
    if left and measured.of(bundle) is None and level_below_best(bundle, cpu, refused):
        with contextlib.suppress(BitgenError):  # no compiler: what is there runs
            return open_library(untuned_library(), threads)
    return open_library(bundle, threads)


def untuned_library() -> Path:
    from bitgen.bundle.contents import Target, untuned_entries
    from bitgen.bundle.write import write_library

    env = Environment()
    target = Target.of(env.cpu, None, env.isas)
    # Beside the one of the whole CPU, or runs with and without a cap would make it again in turns.
    name = f"untuned-{env.cpu.family}" + (f"-{target.isa.name}" if isa_cap() else "")
    entries = untuned_entries(target)
    return write_library(entries, env.toolchain, generated_dir(), name, target)


# ---- render ----


def legal_space(
    family: str, *, isa: str | None = None, shape: str | None = None, regime: str = "n1", group: int = 0
) -> Space:
    """The legal schedules of a family; ``isa`` may be a level that this CPU cannot run.

    ``group``: weights along k that share a scale (0: scales lie outside the weights).
    """
    env = Environment()
    level = find_isa(isa, env.isas) if isa else env.isa(None)
    at = Shape.parse(shape) if shape else ANY_SHAPE
    return env.space(family_named(family).name, level, regime, at, group)


def render_source(
    family: str,
    *,
    shape: str | None = None,
    isa: str | None = None,
    regime: str = "n1",
    row_block: int | None = None,
    algorithm: str | None = None,
    knobs: Sequence[str] = (),
    model: str | None = None,
    group: int = 0,
) -> Source:
    """The C text of one kernel: the default schedule of its space, with ``knobs`` ("name=value") set.

    Where knobs are given, those that a schedule may leave out (`Algorithm.off`) are off unless they are among
    them: so the command in a file's banner makes the file again on every CPU, whatever its default.
    ``group``: weights along k that share a scale (0: scales lie outside the weights).
    ``family`` may also be quantize, tables such as tl1_tables or tl5_wide_tables, or step: the forward step
    for every model, or for the sizes of ``model``. BitgenError quotes the rules that a schedule breaks.
    """
    if model is not None and family != "step":
        raise UsageError("only the forward step is made for a model: bitgen render step --model NAME")
    level = isa or Environment().isa(None).name
    if family == "step":
        return render_step(level, preset_of(model).step_sizes if model else None)
    if family == "quantize":
        return render_quantize(level)
    if family.endswith("_tables"):
        stem = family.removesuffix("_tables")
        kinds = (kind for known in FAMILIES.values() for kind, _ in known.tables)
        kind = next((kind for kind in kinds if stem.endswith(f"_{kind}")), None)
        return render_tables(stem.removesuffix(f"_{kind}"), level, kind or algorithm)
    space = legal_space(family, isa=level, shape=shape, regime=regime, group=group)
    start = next((s for s in (space.default, *space) if algorithm in (None, s.schedule.algorithm)), None)
    if start is None:
        space.knobs(algorithm or "")  # raises, naming the algorithms there are
        raise UsageError(f"no legal schedule uses {algorithm}")
    layout = Layout(space.family, row_block, group) if row_block else start.layout
    off = EVERY_FAMILY[family].algorithm(start.schedule.algorithm).off
    kept = {knob: value for knob, value in start.schedule if not (knobs and knob in off)}
    spec = space.make(start.schedule.algorithm, layout, kept | _parse_knobs(knobs))
    space.check(spec, local=False)
    fixed = Shape.parse(shape) if shape else None
    return render_kernel(KernelSpec(spec.family, spec.isa, spec.regime, layout, spec.schedule, fixed))


def _parse_knobs(knobs: Sequence[str]) -> dict[str, int]:
    values = {}
    for knob in knobs:
        name, sep, value = knob.partition("=")
        if not sep or not re.fullmatch(r"-?[0-9]+", value.strip()):
            raise UsageError(f"knob {knob!r}: write it as name=integer, for example streams=4")
        values[name.strip()] = int(value)
    return values


# ---- verify and time ----


def verify(
    *,
    isas: Sequence[str] = (),
    families: Sequence[str] = (),
    regimes: Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    inherit: bool = True,
    cc: str | None = None,
    progress: Report | None = None,
    group: int = 0,
) -> SweepCounts:
    """Compare every schedule of the spaces (or ``sample`` of each) with numpy, on all levels of this CPU.

    ``inherit``: what has the text of its level's parent is counted there and not compiled again. ``group``:
    weights along k that share a scale, of the families that have such layouts (0: scales lie outside).
    """
    from bitgen.measure.runner import LocalRunner
    from bitgen.measure.verify import exact_sweep

    if sample is not None and sample < 1:
        raise UsageError(f"--sample must be at least 1, not {sample}")
    env = Environment(cc)
    levels = [env.isa(name) for name in isas] or list(accepted_isas(env.cpu, env.isas))
    with LocalRunner(env.toolchain, env.cpu) as runner:
        return exact_sweep(
            runner,
            env.cpu,
            [level.name for level in levels],
            [family_named(name).name for name in families]
            or [
                name
                for name, family in EVERY_FAMILY.items()
                if (group in family.groups if group else family.in_rows)
            ],
            sample,
            seed,
            [regime_named(name) for name in regimes] or REGIMES,
            progress,
            inherit,
            group,
        )


check = verify  # its name until it was called what it does


@dataclass(frozen=True)
class KernelTiming(Rates):
    """A kernel timed in interleaved rounds with the untuned default, its ``baseline``; medians for one call.

    ``limit_ns`` is the roofline by the probes of the same rounds: reading the packed weights once, or the
    int8 operations at the peak of the ISA level, whichever takes longer. A kernel that beats it shows that a
    faster way to read or to multiply is missing among the probes.
    """

    measurement: Measurement
    baseline: Measurement
    tuned: bool
    limit_ns: float


def bench_kernels(
    model: str | ModelPreset,
    *,
    tokens: Sequence[int] = (1, 8, 128, 512),
    threads: int | None = None,
    rounds: int = 9,
    isa: str | None = None,
    cc: str | None = None,
    logs: Path | None = None,
    progress: Report | None = None,
) -> list[KernelTiming]:
    """Time what the model would run, tuned or not, against the default of each space; small n cold."""
    from bitgen.measure.runner import LocalRunner

    env = Environment(cc, logs)
    preset = preset_of(model)
    level, count = env.isa(isa), env.cpu.usable_threads if threads is None else threads
    check_threads([count], env.cpu)
    if rounds < 1 or min(tokens, default=0) < 1:
        raise UsageError("numbers of tokens and of rounds must be at least 1")
    chosen = {
        (choice.shape, choice.spec.regime): choice.spec
        for choice in choices_for(preset, env, level).entries
        if choice.threads <= count
    }
    raced: list[KernelTiming] = []
    with LocalRunner(env.toolchain, env.cpu) as runner:
        peak = runner.machine_peak(count, [level.name])
        for shape, n in product(preset.shapes, tokens):
            if progress:
                total = len(preset.shapes) * len(tokens)
                progress(Progress(f"{shape.name}, n = {n}", len(raced), total, "races"))
            regime = regime_of(n)
            family = first_family(preset.weights)
            default = env.space(family, level, regime.name, shape, preset.group).default
            tuned = chosen.get((shape, regime.name))
            spec = tuned or default
            job = RaceJob((spec, default), shape, n, count, rounds, regime is not LARGE)
            race = runner.race(job)
            if spec not in race or default not in race:
                raise BitgenError(f"{shape.name}, n = {n}: {'; '.join(race.dropped.values())}")
            raced.append(_timing_of(peak, job, race, tuned is not None))
    return raced


def _timing_of(peak: MachinePeak, job: RaceJob, race: Race, tuned: bool) -> KernelTiming:
    from bitgen.search import roofline_ns

    timed, baseline = (
        Measurement(Job(spec, job.shape, job.n, job.threads, job.cold), Status.OK, times_ns=tuple(race[spec]))
        for spec in job.specs
    )
    layout, isa = timed.job.spec.layout, timed.job.spec.isa
    read_gbs = race.read_gbs or peak.best_dram_gbs
    peak_gops = race.peak_gops.get(isa) or peak.peak_gops[isa]
    limit_ns = roofline_ns(layout, job.shape, job.n, job.cold, read_gbs, peak_gops)
    return KernelTiming(timed, baseline, tuned, limit_ns)
