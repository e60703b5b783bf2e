"""The steps of bitgen as functions: render, tune, build, load. The command line calls these and nothing else.

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
import json
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bitgen import __version__
from bitgen.config import ModelPreset, find_model
from bitgen.errors import EXIT_USAGE, BitgenError
from bitgen.paths import ensure_dir, generated_dir, tune_logs_dir
from bitgen.render import Source, render_kernel, render_quantize, render_tables, template_digest
from bitgen.space import Space, space_for
from bitgen.spec import (
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
from bitgen.store import Fingerprint, RecordStore
from bitgen.target import (
    Cpu,
    Isa,
    accepted_isas,
    detect_cpu,
    find_isa,
    load_isas,
    require_isa,
    target_cpu,
)
from bitgen.toolchain import Toolchain, find_compiler, find_cross_compiler
from bitgen.winners import export_winners, family_winners, nearest_winners

if TYPE_CHECKING:
    from bitgen.library import KernelChoice
    from bitgen.measure import Limits, Race, TileState
    from bitgen.measure.sweep import SweepCounts
    from bitgen.runtime import KernelTable
    from bitgen.search import Progress, TuningResult

# Schedules depend on the shape only through cache blocks; where no shape is given, this one stands for it.
ANY_SHAPE = Shape(4096, 4096)


@dataclass(frozen=True)
class Workshop:
    """What every step needs: this CPU, the ISA levels, a compiler, and the folder of records.

    ``cc`` names a compiler (None: $CC, gcc, clang, zig); ``logs`` is the folder of records. ``target`` is the
    CPU to build for, None: this machine's.
    """

    cc: str | None = None
    logs: Path | None = None
    target: Cpu | None = None

    @cached_property
    def cpu(self) -> Cpu:
        return self.target or detect_cpu()

    @cached_property
    def isas(self) -> tuple[Isa, ...]:
        return load_isas()

    @cached_property
    def toolchain(self) -> Toolchain:
        if self.is_foreign:
            return Toolchain(find_cross_compiler(self.cpu.arch, self.cpu.os, self.cc))
        return Toolchain(find_compiler(self.cc))

    @cached_property
    def is_foreign(self) -> bool:
        """Whether this machine can neither compile for the CPU without a cross compiler nor run its code."""
        if self.target is None:
            return False
        here = detect_cpu()
        return (here.arch, here.os) != (self.cpu.arch, self.cpu.os)

    def runs(self, isa: Isa) -> bool:
        """Whether this machine can execute kernels of ``isa``."""
        return not self.is_foreign and isa in accepted_isas(detect_cpu(), self.isas)

    @cached_property
    def store(self) -> RecordStore:
        return RecordStore(tune_logs_dir(self.logs) / f"{self.cpu.family}.jsonl")

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Everything a timing depends on besides the spec; a record with another fingerprint is stale."""
        cpu, flags = self.cpu, {isa.name: self.toolchain.fingerprint(isa) for isa in self.isas}
        return Fingerprint(
            cpu=f"{cpu.family} {cpu.model_name} {_digest(sorted(cpu.features))}",
            compiler=f"{self.toolchain.compiler.version.splitlines()[0]} {_digest(flags)}",
            templates=template_digest(cpu.arch)[:16],
            version=__version__,
        )

    def isa(self, name: str | None) -> Isa:
        """The named ISA level, which this CPU must run; None: the best one it runs."""
        return require_isa(name, self.cpu, self.isas) if name else accepted_isas(self.cpu, self.isas)[0]

    def space(self, family: str, isa: Isa, regime: str, shape: Shape) -> Space:
        return space_for(family, isa, regime_named(regime), shape, self.cpu)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---- render ----


def legal_space(
    family: str, *, isa: str | None = None, shape: str | None = None, regime: str = "n1"
) -> Space:
    """The legal schedules of a family; ``isa`` may be a level that this CPU cannot run."""
    workshop = Workshop()
    level = find_isa(isa, workshop.isas) if isa else workshop.isa(None)
    at = Shape.parse(shape) if shape else ANY_SHAPE
    return workshop.space(family_named(family).name, level, regime, at)


def render_source(
    family: str,
    *,
    shape: str | None = None,
    isa: str | None = None,
    regime: str = "n1",
    row_block: int | None = None,
    algorithm: str | None = None,
    knobs: Sequence[str] = (),
) -> Source:
    """The C text of one kernel: the default schedule of its space, with ``knobs`` ("name=value") set.

    ``family`` may also be quantize, or tables such as tl1_tables or tl5_wide_tables. BitgenError quotes the
    rules that a schedule breaks.
    """
    level = isa or Workshop().isa(None).name
    if family == "quantize":
        return render_quantize(level)
    if family.endswith("_tables"):
        stem = family.removesuffix("_tables")
        kinds = (kind for known in FAMILIES.values() for kind, _ in known.tables)
        kind = next((kind for kind in kinds if stem.endswith(f"_{kind}")), None)
        return render_tables(stem.removesuffix(f"_{kind}"), level, kind or algorithm)
    space = legal_space(family, isa=level, shape=shape, regime=regime)
    start = next(
        (s for s in (space.default, *space) if algorithm in (None, s.schedule.algorithm)),
        None,
    )
    if start is None:
        space.knobs(algorithm or "")  # raises, naming the algorithms there are
        raise BitgenError(f"no legal schedule uses {algorithm}", EXIT_USAGE)
    layout = Layout(space.family, row_block) if row_block else start.layout
    spec = space.make(start.schedule.algorithm, layout, {**dict(start.schedule), **_parse_knobs(knobs)})
    space.check(spec, local=False)
    fixed = Shape.parse(shape) if shape else None
    return render_kernel(KernelSpec(spec.family, spec.isa, spec.regime, layout, spec.schedule, fixed))


def _parse_knobs(knobs: Sequence[str]) -> dict[str, int]:
    values = {}
    for knob in knobs:
        name, sep, value = knob.partition("=")
        if not sep or not re.fullmatch(r"-?[0-9]+", value.strip()):
            raise BitgenError(f"knob {knob!r}: write it as name=integer, for example streams=4", EXIT_USAGE)
        values[name.strip()] = int(value)
    return values


# ---- models ----


def preset_of(model: str | ModelPreset) -> ModelPreset:
    """The shapes of a preset (its name), a YAML file, or a model file or folder that `bitgen run` reads."""
    if isinstance(model, ModelPreset):
        return model
    from bitgen.model.files import open_model, shipped_model

    path = Path(model)
    if (
        path.suffix.lower() not in (".gguf", ".safetensors")
        and not path.is_dir()
        and not shipped_model(model)
    ):
        return find_model(model)
    config = open_model(model).config
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")
    return ModelPreset(
        **{f.name: getattr(config, f.name) for f in fields(ModelPreset) if f.name not in ("name", "aliases")},
        name=config.name or safe,
        aliases=(safe or "model",),
    )


# ---- tune ----


def check_threads(counts: Iterable[int], cpu: Cpu) -> None:
    """BitgenError (EXIT_USAGE) for a number of threads that this CPU cannot run at once."""
    most = max(cpu.logical_cpus, cpu.usable_threads)
    for count in counts:
        if not 1 <= count <= most:
            raise BitgenError(f"--threads {count}: this CPU runs 1 to {most} at once", EXIT_USAGE)


def likely_threads(cpu: Cpu) -> tuple[int, ...]:
    """Numbers of threads that may be the best: all usable cores, three quarters and half of them."""
    cores = cpu.usable_threads
    return tuple(dict.fromkeys(max(1, n) for n in (cores, cores * 3 // 4, cores // 2)))


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
    progress: Progress | None = None,
) -> TuningResult:
    """Find the fastest exact kernels for a model on this machine and record them.

    What is left out comes from configs/search.yaml, the CPU (its best ISA level, all usable threads) and the
    model. Of several ``threads`` ("auto": all usable cores, three quarters and half of them) the fastest for
    the whole step becomes the default of the library that is built. A second call continues: what the
    records know is not measured again, unless ``fresh``.

    ``dry_run`` goes the whole way with two kernels of each family and regime, each proven and timed once, and
    records nothing: its times mean nothing, it shows that a machine (or an emulator) can be tuned on.
    """
    from bitgen.measure.local import LocalRunner
    from bitgen.search import DRY_POLICY, dry, load_search_config, plan_for
    from bitgen.search import tune as search

    workshop = Workshop(cc, logs)
    preset = preset_of(model)
    counts = likely_threads(workshop.cpu) if threads == "auto" else tuple(threads)
    check_threads(counts, workshop.cpu)
    config = load_search_config()
    plan = plan_for(
        preset,
        workshop.cpu,
        [workshop.isa(name) for name in isas] or [workshop.isa(None)],
        config,
        quick=quick,
        families=families,
        regimes=regimes,
        threads=counts,
        objective=objective,
        seed=seed,
        trials=trials,
        timeout_s=timeout_s,
    )
    near = nearest_winners(workshop.cpu, workshop.isas)
    with contextlib.ExitStack() as stack:
        if dry_run:
            plan, config = dry(plan, config)
            store = RecordStore(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "dry-run.jsonl")
        else:
            ensure_dir(tune_logs_dir(logs))  # found out now, not after the first measurement
            store = workshop.store
        policy = DRY_POLICY if dry_run else None
        runner = stack.enter_context(LocalRunner(workshop.toolchain, workshop.cpu, policy=policy))
        return search(
            plan,
            runner,
            store,
            workshop.fingerprint,
            workshop.space,
            config=config,
            family_winners=[winner.spec for winner in near.winners] if near else (),
            rest_ns=_RestOfStep(preset, {name: regime.n for name, regime in config.regimes.items()}),
            started_from=f"winners of {near.cpu_family} ({near.why})" if near else "",
            fresh=fresh,
            progress=progress,
        )


class _RestOfStep:
    """What a token takes outside the matrices, measured by the compiled step of an untuned library."""

    def __init__(self, preset: ModelPreset, n: Mapping[str, int]) -> None:
        self._preset = preset
        self._n = n
        self._known: dict[int, Mapping[int, float]] = {}

    def __call__(self, regime: str, threads: int) -> float:
        if threads not in self._known:
            from bitgen.model.rest import rest_of_step

            self._known[threads] = rest_of_step(
                self._preset, _untuned_library(), threads, tuple(self._n.values())
            )
        return self._known[threads][self._n[regime]]


# ---- build ----


def choices_for(model: ModelPreset, workshop: Workshop, isa: Isa) -> list[KernelChoice]:
    """The kernels of a model's shapes: tuned here, else committed for this CPU family; else none.

    A shape without any runs on the default kernels that every library holds.
    """
    from bitgen.library import KernelChoice

    store, fingerprint = workshop.store, workshop.fingerprint
    committed = family_winners(workshop.cpu.family)
    choices: list[KernelChoice] = []
    for shape in dict.fromkeys(Shape(matmul.m, matmul.k) for matmul in model.matmuls):
        tuned = {
            winner.threads
            for record in store.tunings
            if record.shape == shape and record.fingerprint.digest == fingerprint.digest
            for winner in record.winners
        }
        found = [
            KernelChoice(shape, winner.spec, winner.threads)
            for threads in sorted(tuned)
            for regime in REGIMES
            if (winner := store.best(shape, regime.name, threads, fingerprint))
            and winner.spec.isa == isa.name
        ]
        found = found or [
            KernelChoice(shape, winner.spec, winner.threads)
            for winner in committed
            if winner.shape == shape and winner.spec.isa == isa.name
        ]
        choices += dict.fromkeys(found)
    return choices


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
) -> Path:
    """Write the kernel library of a model: a folder with library, header, manifest and the C text.

    The kernels are the winners tuned on this machine, else those committed for this CPU family, else the
    defaults. Returns the folder, ``<out>/<model>-<cpu family>``.

    ``target`` names a CPU of configs/targets.yaml, and ``system`` (Linux or Darwin; this one's) what runs
    there. A library that this machine cannot run is written without being tried.
    """
    from bitgen.library import Target, write_library

    cpu = target_cpu(target, system or platform.system()) if target else None
    workshop = Workshop(cc, logs, cpu)
    preset = preset_of(model)
    level = workshop.isa(isa)
    choices = choices_for(preset, workshop, level)
    targets = {Shape(matmul.m, matmul.k) for matmul in preset.matmuls}
    return write_library(
        choices,
        workshop.toolchain,
        generated_dir(out),
        name or f"{preset.alias}-{workshop.cpu.family}",
        Target.of(workshop.cpu, level.name, workshop.isas),
        model=preset.alias,
        fingerprint=workshop.fingerprint.digest if choices else None,
        threads=workshop.store.best_threads(targets, workshop.fingerprint) if choices else 0,
        check=workshop.runs(level),
    )


# ---- load ----


def load(path: str | Path | None = None, threads: int | None = None) -> KernelTable:
    """Open a kernel library: a .so, a bundle folder, or without a path the best one built here.

    Where nothing was built yet, an untuned library of default kernels is built once (seconds) and kept.
    """
    from bitgen.bundle import choose_bundle, find_bundles
    from bitgen.runtime import load as open_library

    if path is not None:
        return open_library(path, threads)
    bundles, _ = find_bundles(generated_dir())
    bundle, _ = choose_bundle(bundles, detect_cpu())
    return open_library(_untuned_library() if bundle is None else bundle.path, threads)


def _untuned_library() -> Path:
    from bitgen.library import Target, write_library

    workshop = Workshop()
    target = Target.of(workshop.cpu, None, workshop.isas)
    return write_library((), workshop.toolchain, generated_dir(), f"untuned-{workshop.cpu.family}", target)


# ---- prove and time ----


def check(
    *,
    isas: Sequence[str] = (),
    families: Sequence[str] = (),
    regimes: Sequence[str] = (),
    sample: int | None = None,
    seed: int = 0,
    inherit: bool = True,
    cc: str | None = None,
    progress: Callable[[SweepCounts], None] | None = None,
) -> SweepCounts:
    """Hold every schedule of the spaces (or ``sample`` of each) against numpy, on all levels of this CPU."""
    from bitgen.measure.local import LocalRunner
    from bitgen.measure.sweep import exact_sweep

    if sample is not None and sample < 1:
        raise BitgenError(f"--sample must be at least 1, not {sample}", EXIT_USAGE)
    workshop = Workshop(cc)
    levels = [workshop.isa(name) for name in isas] or list(accepted_isas(workshop.cpu, workshop.isas))
    with LocalRunner(workshop.toolchain, workshop.cpu) as runner:
        return exact_sweep(
            runner,
            workshop.cpu,
            [level.name for level in levels],
            [family_named(name).name for name in families] or list(FAMILIES),
            sample,
            seed,
            [regime_named(name) for name in regimes] or REGIMES,
            progress,
            inherit,
        )


@dataclass(frozen=True)
class KernelTiming:
    """A kernel timed in interleaved rounds with the untuned default; times are medians for one call.

    ``limit_ns`` is the roofline of this run: reading the packed weights once, or the int8 operations at the
    peak of the ISA level, whichever takes longer. Where a probe of tiles took part, ``tile_states`` are the
    kernel's fast and slow rounds (`Race.tile_states`), and all times are of the fast ones if there are any.
    """

    shape: Shape
    n: int
    threads: int
    spec: KernelSpec
    tuned: bool
    time_ns: float
    default_ns: float
    limit_ns: float
    tile_states: tuple[TileState, TileState] | None = None

    @property
    def weight_gbs(self) -> float:
        return self.spec.layout.packed_bytes(self.shape) / self.time_ns

    @property
    def gops(self) -> float:
        return 2 * self.shape.m * self.shape.k * self.n / self.time_ns

    @property
    def limit_share(self) -> float:
        return self.limit_ns / self.time_ns


def bench_kernels(
    model: str | ModelPreset,
    *,
    tokens: Sequence[int] = (1, 8, 128, 512),
    threads: int | None = None,
    rounds: int = 9,
    isa: str | None = None,
    cc: str | None = None,
    logs: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[KernelTiming]:
    """Time what the model would run, tuned or not, against the default of each space; small n cold."""
    from bitgen.measure.local import LocalRunner

    workshop = Workshop(cc, logs)
    preset = preset_of(model)
    level, count = workshop.isa(isa), workshop.cpu.usable_threads if threads is None else threads
    check_threads([count], workshop.cpu)
    if rounds < 1 or min(tokens, default=0) < 1:
        raise BitgenError("numbers of tokens and of rounds must be at least 1", EXIT_USAGE)
    chosen = {
        (choice.shape, choice.spec.regime): choice.spec
        for choice in choices_for(preset, workshop, level)
        if choice.threads <= count
    }
    raced = []
    with LocalRunner(workshop.toolchain, workshop.cpu) as runner:
        limits = runner.limits(count, [level.name])
        for shape in dict.fromkeys(Shape(matmul.m, matmul.k) for matmul in preset.matmuls):
            for n in tokens:
                if progress:
                    progress(f"{shape.name}, n = {n}")
                regime = regime_of(n)
                default = workshop.space("i2s", level, regime.name, shape).default
                tuned = chosen.get((shape, regime.name))
                spec = tuned or default
                race = runner.race([spec, default], shape, n, count, rounds, regime is not LARGE)
                if spec not in race or default not in race:
                    raise BitgenError(f"{shape.name}, n = {n}: {'; '.join(race.dropped.values())}")
                raced.append((shape, n, spec, tuned is not None, default, race))
    # Only the whole run tells how fast its tiles can be.
    peak = max([limits.peak_gops[level.name], *(gops for *_, race in raced for gops in race.tile_gops)])
    return [_timing_of(limits, peak, count, *row) for row in raced]


def _timing_of(
    limits: Limits,
    peak_gops: float,
    threads: int,
    shape: Shape,
    n: int,
    spec: KernelSpec,
    tuned: bool,
    default: KernelSpec,
    race: Race,
) -> KernelTiming:
    from bitgen.search import roofline_ns

    cold = regime_of(n) is not LARGE
    time_ns, default_ns = (race.median_ns(s, peak_gops) for s in (spec, default))
    packed = spec.layout.packed_bytes(shape)
    fastest_read = max(limits.best_dram_gbs, race.read_gbs or 0.0, packed / time_ns if cold else 0.0)
    limit = roofline_ns(spec.layout, shape, n, cold, fastest_read, peak_gops)
    states = race.tile_states(spec, peak_gops)
    return KernelTiming(shape, n, threads, spec, tuned, time_ns, default_ns, limit, states)


# ---- share ----


def export(*, cc: str | None = None, logs: Path | None = None, out: Path | None = None) -> Path:
    """Write this machine's winners as schedules of its CPU family; returns the file.

    Without ``out`` that is ``winners/`` in the folder of records: in a checkout the one that is committed.
    BitgenError when nothing was tuned here with this compiler and version.
    """
    workshop = Workshop(cc, logs)
    digest = workshop.fingerprint.digest
    if not any(record.fingerprint.digest == digest for record in workshop.store.tunings):
        raise BitgenError("there are no current winners to export: run bitgen tune --model NAME first")
    folder = out if out is not None else tune_logs_dir(logs) / "winners"
    return export_winners(workshop.store, workshop.fingerprint, workshop.cpu, workshop.isas, folder)
