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
from bitgen.config import ModelPreset
from bitgen.cpu import Cpu
from bitgen.errors import BitgenError
from bitgen.paths import ensure_dir, tune_logs_dir
from bitgen.store import RecordStore
from bitgen.winners import export_winners, nearest_winners

if TYPE_CHECKING:
    from bitgen.search import Progress, TuningResult


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
    from bitgen.measure.runner import LocalRunner
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
                self._preset, untuned_library(), threads, tuple(self._n.values())
            )
        return self._known[threads][self._n[regime]]


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
