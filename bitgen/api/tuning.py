"""Tune a model on this machine, and share what won."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from bitgen.api.libraries import untuned_library
from bitgen.api.models import preset_of
from bitgen.api.workshop import Workshop, check_threads
from bitgen.errors import BitgenError
from bitgen.formats.config import ModelPreset
from bitgen.paths import ensure_dir, tune_logs_dir
from bitgen.store import RecordStore
from bitgen.winners import export_winners, nearest_winners

if TYPE_CHECKING:
    from bitgen.search import Progress, TuneOptions, TuningResult


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


def tune_with(
    model: str | ModelPreset, options: TuneOptions, progress: Progress | None = None
) -> TuningResult:
    """`tune` with its options as a record, which the command line makes."""
    from bitgen.measure.runner import LocalRunner, TimingPolicy
    from bitgen.search import Session, load_search_config, plan_for
    from bitgen.search import tune as search

    workshop = Workshop(options.cc, options.logs)
    cpu, preset, config = workshop.cpu, preset_of(model), load_search_config()
    levels = [workshop.isa(name) for name in options.isas] or [workshop.isa(None)]
    plan = plan_for(preset, cpu, levels, config, options)
    check_threads(plan.threads, cpu)
    near = nearest_winners(cpu, workshop.isas)
    policy = None
    with contextlib.ExitStack() as stack:
        if options.smoke:
            plan, config, policy = plan.smoke(), config.smoke(), TimingPolicy.smoke()
            store = RecordStore(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "smoke.jsonl")
        else:
            ensure_dir(tune_logs_dir(options.logs))  # found out now, not after the first measurement
            store = workshop.store
        runner = stack.enter_context(LocalRunner(workshop.toolchain, cpu, policy=policy))
        session = Session(
            config=config,
            family_winners=tuple(winner.spec for winner in near.winners) if near else (),
            started_from=f"winners of {near.cpu_family} ({near.why})" if near else "",
            rest_ns=_RestOfStep(preset, {name: regime.n for name, regime in config.regimes.items()}),
            fresh=options.fresh,
            progress=progress,
        )
        return search(plan, runner, store, workshop.fingerprints, workshop.space, session)


class _RestOfStep:
    """What a token takes outside the matrices, measured by the compiled step of an untuned library."""

    def __init__(self, preset: ModelPreset, n: Mapping[str, int]) -> None:
        self._preset = preset
        self._n = n
        self._known: dict[int, Mapping[int, float]] = {}

    def __call__(self, regime: str, threads: int) -> float:
        if threads not in self._known:
            from bitgen.inference.non_matmul_cost import non_matmul_cost

            self._known[threads] = non_matmul_cost(
                self._preset, untuned_library(), threads, tuple(self._n.values())
            )
        return self._known[threads][self._n[regime]]


def export(*, cc: str | None = None, logs: Path | None = None, out: Path | None = None) -> Path:
    """Write this machine's winners as schedules of its CPU family; returns the file.

    Without ``out`` that is ``winners/`` in the folder of records: in a checkout the one that is committed.
    BitgenError when nothing was tuned here with this compiler and version.
    """
    workshop = Workshop(cc, logs)
    if not any(record.current(workshop.fingerprints) for record in workshop.store.tunings):
        raise BitgenError("there are no current winners to export: run bitgen tune --model NAME first")
    folder = out if out is not None else tune_logs_dir(logs) / "winners"
    return export_winners(workshop.store, workshop.fingerprints, workshop.cpu, workshop.isas, folder)
