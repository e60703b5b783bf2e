"""Show what is tuned on this machine, or what a library contains."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import add_logs
from bitgen.cli.tables import Column, Table, add_output, render_tables

if TYPE_CHECKING:
    from bitgen.fingerprints import Fingerprints
    from bitgen.store import RecordStore, TuningRecord, Winner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, help="a library's folder or .so (default: records and libraries)"
    )
    add_logs(parser)
    parser.add_argument("--cc", help="C compiler whose records count as current")
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    own = [library_table(args.path)] if args.path else []
    print(render_tables(own or [_tuned_table(args.logs, args.cc), _bundles_table()], args.output))


def library_table(path: Path) -> Table:
    """The kernels of a bundle, in the order in which the library prefers them."""
    from bitgen.bundle import read_bundle
    from bitgen.records import dump

    bundle = read_bundle(path.parent if path.is_file() else path)
    columns = (
        Column("shape", "m x k"),
        Column("regime", "regime"),
        Column("threads", "threads"),
        Column("role", "role"),
        Column("isa", "ISA"),
        Column("layout", "layout"),
        Column("schedule", "schedule"),
    )
    rows = [
        (
            entry.shape.name if entry.shape else "any",
            entry.spec.regime,
            entry.threads or "any",
            entry.role,
            entry.spec.isa,
            entry.spec.layout.name,
            entry.spec.schedule.name,
        )
        for entry in bundle.manifest.kernels
    ]
    manifest = bundle.manifest
    needs = ", ".join(sorted(manifest.features)) or "nothing special"
    title = f"{manifest.library} for {manifest.cpu_family} (needs {needs})"
    if manifest.threads:
        title += f", by default threads = {manifest.threads} on {manifest.cores} cores"
    if manifest.step:
        sizes = ", ".join(f"{name} {size}" for name, size in dump(manifest.step).items())
        title += f"; a forward pass for {sizes}, and one for every model"
    return Table(title, columns, rows)


def _tuned_table(logs: Path | None, cc: str | None) -> Table:
    """One winner for every use; a stale one tells why its timing does not count."""
    from bitgen.cli.progress import ProgressBar
    from bitgen.environment import Environment
    from bitgen.progress import Progress

    env = Environment(cc, logs)
    if env.store.damage:
        with ProgressBar() as line:
            line.show(Progress(env.store.damage, lasting=True))
    rows = []
    for record, winner in newest_winners(env.store, env.fingerprints):
        changed = winner.fingerprint.differences(env.fingerprints(winner.spec))
        ratio = winner.time_ns / winner.default_ns if winner.default_ns else None
        rows.append(
            (
                record.shape.name,
                winner.measurement.job.n,
                winner.threads,
                winner.spec.isa,
                winner.spec.layout.name,
                winner.spec.schedule.name,
                winner.time_ns / 1e3,
                ratio,
                record.objective,
                f"stale: other {', '.join(changed)}" if changed else "current",
            )
        )
    columns = (
        Column("shape", "m x k"),
        Column("n", "n", "d"),
        Column("threads", "threads", "d"),
        Column("isa", "ISA"),
        Column("layout", "layout"),
        Column("schedule", "schedule"),
        Column("time_us", "us", ",.1f"),
        Column("over_default", "winner/default", ".2f", "speedup", is_speedup=True),
        Column("objective", "objective"),
        Column("state", "state"),
    )
    return Table("tuned", columns, rows)


def newest_winners(store: RecordStore, fingerprints: Fingerprints) -> list[tuple[TuningRecord, Winner]]:
    """For a shape, regime, thread count, ISA level, CPU and compiler: what a build takes, else the newest."""
    found: dict[tuple[object, ...], tuple[TuningRecord, Winner]] = {}
    for record in store.tunings:
        for winner in record.winners:
            if winner.spec.layout != record.layout:
                continue
            use, made = (record.shape, winner.regime, winner.threads), winner.fingerprint
            which = (winner.spec.isa, record.layout.kind)
            key = (*use, *which, made.cpu, made.compiler)
            taken = store.best(*use, fingerprints, *which) if key in found else None
            if taken is None or found[key][1] != taken:
                found[key] = record, winner
    return list(found.values())


def _bundles_table() -> Table:
    from bitgen.bundle import all_bundles, choose_bundle, refused_features
    from bitgen.bundle.measured import recall
    from bitgen.cpu import detect_cpu

    (bundles, errors), cpu = all_bundles(), detect_cpu()
    chosen, decisions = choose_bundle(bundles, cpu, refused_features(cpu), recall(cpu))
    rows: list[tuple[str, str, str]] = [
        (
            str(d.bundle.path),
            "chosen" if d.bundle == chosen else "accepted" if d.accepted else "rejected",
            d.reason,
        )
        for d in decisions
    ]
    rows += [("-", "damaged", error.message) for error in errors]
    return Table(
        "libraries", (Column("path", "library"), Column("state", "state"), Column("reason", "why")), rows
    )
