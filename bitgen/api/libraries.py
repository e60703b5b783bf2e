"""Libraries of chosen kernels: write them, open them."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.api.models import preset_of, step_sizes
from bitgen.api.workshop import Workshop
from bitgen.cpu import Isa, detect_cpu, target_cpu
from bitgen.formats.config import ModelPreset
from bitgen.measure import Job
from bitgen.paths import generated_dir
from bitgen.spec import REGIMES, Shape
from bitgen.winners import family_winners

if TYPE_CHECKING:
    from bitgen.bundle import KernelEntry
    from bitgen.runtime import KernelTable


def choices_for(model: ModelPreset, workshop: Workshop, isa: Isa) -> list[KernelEntry]:
    """The kernels of a model's shapes: tuned here, else committed for this CPU family; else none.

    A shape without any runs on the default kernels that every library holds.
    """
    from bitgen.bundle import KernelEntry

    store = workshop.store
    committed = family_winners(workshop.cpu.family)
    choices: list[KernelEntry] = []
    for shape in dict.fromkeys(Shape(matmul.m, matmul.k) for matmul in model.matmuls):
        tuned = {
            winner.threads
            for record in store.tunings
            if record.shape == shape
            for winner in record.current(workshop.fingerprints)
        }
        found = [
            KernelEntry(winner.spec, shape, winner.threads)
            for threads in sorted(tuned)
            for regime in REGIMES
            if (winner := store.best(shape, regime.name, threads, workshop.fingerprints))
            and winner.spec.isa == isa.name
        ]
        found = found or [
            KernelEntry(winner.spec, shape, winner.threads)
            for winner in committed
            if winner.shape == shape and winner.spec.isa == isa.name and _is_legal(winner, workshop, isa)
        ]
        choices += dict.fromkeys(found)
    return choices


def _is_legal(winner: Job, workshop: Workshop, isa: Isa) -> bool:
    """Whether a committed schedule is one of today's: the knobs of a family change with its templates."""
    space = workshop.space(winner.spec.family, isa, winner.spec.regime, winner.shape)
    return not space.broken(winner.spec)


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
    defaults. Beside the forward step for every model there is one for this model's sizes. Returns the folder,
    ``<out>/<model>-<cpu family>``.

    ``target`` names a CPU of configs/targets.yaml, and ``system`` (Linux or Darwin; this one's) what runs
    there. A library that this machine cannot run is written without being tried.
    """
    from bitgen.bundle.contents import Target
    from bitgen.bundle.write import write_library

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
        sizes=step_sizes(preset),
        fingerprint=_fingerprint(choices, workshop),
        threads=workshop.store.best_threads(targets, workshop.fingerprints) if choices else 0,
        check=workshop.runs(level),
    )


def _fingerprint(choices: Sequence[KernelEntry], workshop: Workshop) -> str | None:
    """Stands for the fingerprints of all chosen kernels; None without any."""
    digests = [workshop.fingerprints(choice.spec).digest for choice in choices]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if digests else None


def load(path: str | Path | None = None, threads: int | None = None) -> KernelTable:
    """Open a kernel library: a .so, a bundle folder, or without a path the best one built or installed here.

    Where nothing was built yet, an untuned library of default kernels is built once (seconds) and kept.
    """
    from bitgen.bundle import all_bundles, choose_bundle, refused_features
    from bitgen.runtime import load as open_library

    if path is not None:
        return open_library(path, threads)
    cpu = detect_cpu()
    bundle, _ = choose_bundle(all_bundles()[0], cpu, refused_features(cpu))
    return open_library(untuned_library() if bundle is None else bundle.path, threads)


def untuned_library() -> Path:
    from bitgen.bundle.contents import Target
    from bitgen.bundle.write import write_library

    workshop = Workshop()
    target = Target.of(workshop.cpu, None, workshop.isas)
    return write_library((), workshop.toolchain, generated_dir(), f"untuned-{workshop.cpu.family}", target)
