"""Compare kernels with numpy, and time those a model runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.api.libraries import choices_for
from bitgen.api.models import preset_of
from bitgen.api.workshop import Workshop, check_threads
from bitgen.cpu import accepted_isas
from bitgen.errors import BitgenError, UsageError
from bitgen.formats.config import ModelPreset
from bitgen.measure import MachinePeak, Race, RaceJob, Rates
from bitgen.spec import FAMILIES, LARGE, REGIMES, KernelSpec, Shape, family_named, regime_named, regime_of

if TYPE_CHECKING:
    from bitgen.measure.verify import SweepCounts


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
    from bitgen.measure.runner import LocalRunner
    from bitgen.measure.verify import exact_sweep

    if sample is not None and sample < 1:
        raise UsageError(f"--sample must be at least 1, not {sample}")
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
class KernelTiming(Rates):
    """A kernel timed in interleaved rounds with the untuned default; times are medians for one call.

    ``limit_ns`` is the roofline of this run: reading the packed weights once, or the int8 operations at the
    peak of the ISA level, whichever takes longer.
    """

    shape: Shape
    n: int
    threads: int
    spec: KernelSpec
    tuned: bool
    time_ns: float
    default_ns: float
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
    progress: Callable[[str], None] | None = None,
) -> list[KernelTiming]:
    """Time what the model would run, tuned or not, against the default of each space; small n cold."""
    from bitgen.measure.runner import LocalRunner

    workshop = Workshop(cc, logs)
    preset = preset_of(model)
    level, count = workshop.isa(isa), workshop.cpu.usable_threads if threads is None else threads
    check_threads([count], workshop.cpu)
    if rounds < 1 or min(tokens, default=0) < 1:
        raise UsageError("numbers of tokens and of rounds must be at least 1")
    chosen = {
        (choice.shape, choice.spec.regime): choice.spec
        for choice in choices_for(preset, workshop, level)
        if choice.threads <= count
    }
    raced = []
    with LocalRunner(workshop.toolchain, workshop.cpu) as runner:
        peak = runner.machine_peak(count, [level.name])
        for shape in dict.fromkeys(Shape(matmul.m, matmul.k) for matmul in preset.matmuls):
            for n in tokens:
                if progress:
                    progress(f"{shape.name}, n = {n}")
                regime = regime_of(n)
                default = workshop.space("i2s", level, regime.name, shape).default
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

    spec = job.specs[0]
    time_ns, default_ns = (statistics.median(race[one]) for one in job.specs)
    packed = spec.layout.packed_bytes(job.shape)
    fastest_read = max(peak.best_dram_gbs, race.read_gbs or 0.0, packed / time_ns if job.cold else 0.0)
    gops = peak.peak_gops[spec.isa]
    limit = roofline_ns(spec.layout, job.shape, job.n, job.cold, fastest_read, gops)
    return KernelTiming(job.shape, job.n, job.threads, spec, tuned, time_ns, default_ns, limit)
