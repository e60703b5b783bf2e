"""Many machines tune together: prepare the database, tune kinds of CPU, direct the machines."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.cli.arguments import PRESET_HELP, add_logs, add_spaces
from bitgen.cli.options import add_actions
from bitgen.cli.tables import Column, Table, add_output, render_tables
from bitgen.cli.worker import add_dsn, fleet_of, say
from bitgen.errors import UsageError

if TYPE_CHECKING:
    from bitgen.fleet.database import Database
    from bitgen.fleet.tune import Contest, FleetTune

_EVERY_S = 5.0  # between lines about the progress of one kind of CPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = add_actions(parser)
    init = action("init", "make the schema and the roles, or bring an older schema up to date")
    init.add_argument(
        "--stalled",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="a worker without a sign of life for so long loses its job to another (180)",
    )
    _add_tune(action("tune", "search for each kind of CPU on all its machines, and commit the winners"))
    status = action("status", "kinds of CPU, their jobs, their machines")
    status.add_argument("--watch", type=float, metavar="SECONDS", help="again and again, until Ctrl-C")
    add_output(status)
    pull = action("pull", "append what the fleet measured to the records of its microarchitectures")
    add_logs(pull)
    pause = action("pause", "give machines, or all of a kind of CPU, no jobs until --resume")
    pause.add_argument("names", nargs="+", metavar="NAME", help="machines; kinds of CPU with --cpu")
    pause.add_argument("--cpu", action="store_true", help="the names are kinds of CPU, such as zen4")
    pause.add_argument("--resume", action="store_true", help="let them work again")
    pause.add_argument("--reason", default="by hand", help="shown by status")
    quarantine = action("quarantine", "give a machine no jobs and do not pull what it measured")
    quarantine.add_argument("names", nargs="+", metavar="NAME")
    quarantine.add_argument("--release", action="store_true", help="believe it again, after a calibration")
    quarantine.add_argument("--reason", default="by hand", help="shown by status")
    prune = action("prune", "delete old results, jobs, refusals, and machines that are gone")
    prune.add_argument("--days", type=float, default=90.0, help="older than this (90)")
    for sub in (init, status, pull, pause, quarantine, prune):
        add_dsn(sub)


def _add_tune(tune: argparse.ArgumentParser) -> None:
    tune.add_argument("-m", "--model", required=True, help=PRESET_HELP)
    tune.add_argument(
        "--families", required=True, metavar="LIST", help="kinds of CPU: zen3,zen4 (see status)"
    )
    tune.add_argument("--quick", action="store_true", help="few candidates, n = 1 and large n")
    tune.add_argument("--objective", help="decode, prefill, balanced or serve (configs/search.yaml)")
    add_spaces(tune, "the best", regimes="all; of --quick n1 and large")
    tune.add_argument("-t", "--threads", type=int, help="of every job (default: all of the first machine)")
    tune.add_argument("--trials", type=int, help="candidates of each family and regime")
    tune.add_argument("--seed", type=int, default=0, help="seed of the search (0)")
    tune.add_argument("--out", type=Path, help="folder of the winners (winners/ in the folder of records)")
    add_logs(tune)
    add_output(tune)
    add_dsn(tune)


def run(args: argparse.Namespace) -> None:
    fleet_of("bitgen fleet")
    from bitgen.fleet.database import find_database

    commands = {"init": _init, "tune": _tune, "status": _status, "pull": _pull, "prune": _prune}
    commands |= {"pause": _pause, "quarantine": _quarantine}
    commands[args.action](find_database(args.dsn), args)


def _init(database: Database, args: argparse.Namespace) -> None:
    from bitgen.fleet.schema import initialise

    if not 1 <= args.stalled <= 86400:
        raise UsageError("--stalled must be 1 to 86400 seconds")
    for line in initialise(database, args.stalled):
        print(line)


# ---- tune ----


def _tune(database: Database, args: argparse.Namespace) -> None:
    from bitgen.fleet.tune import tune_fleet
    from bitgen.formats.open import preset_of
    from bitgen.search import TuneOptions

    labels = list(dict.fromkeys(name.strip() for name in args.families.split(",") if name.strip()))
    if not labels:
        raise UsageError("--families names no kind of CPU")
    options = TuneOptions(
        isas=tuple(args.isa),
        families=tuple(args.family),
        regimes=tuple(args.regime),
        threads=() if args.threads is None else (args.threads,),
        objective=args.objective,
        seed=args.seed,
        trials=args.trials,
        quick=args.quick,
        logs=args.logs,
    )
    tunes = tune_fleet(database, preset_of(args.model), labels, options, _Lines().show, args.out)
    print(render_tables([_contests(tunes), _summary(tunes)], args.output))


class _Lines:
    """Progress of several searches in lines; of each kind of CPU no more than one every `_EVERY_S`.

    What is no progress ("label: search ...") is told at once.
    """

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def show(self, text: str) -> None:
        label, _, rest = text.partition(": ")
        now = time.monotonic()
        with self._lock:
            if rest.startswith(("search ", "race ", "peaks ")):
                if now - self._last.get(label, -_EVERY_S) < _EVERY_S:
                    return
                self._last[label] = now
            say(text)


def _contests(tunes: list[FleetTune]) -> Table:
    columns = (
        Column("label", "family"),
        Column("shape", "m x k"),
        Column("n", "n", "d"),
        Column("new", "new"),
        Column("old", "old"),
        Column("gain", "new/old", ".3f"),
        Column("high", "95 %", ".3f"),
        Column("machines", "machines"),
        Column("verdict", "verdict"),
    )
    rows = [_row(t.label, c, d.replaced) for t in tunes for d in t.decisions for c in d.contests]
    return Table("contests", columns, rows, "new winners against what was committed, or the default")


def _row(label: str, contest: Contest, replaced: bool) -> tuple[object, ...]:
    from math import exp

    found = contest.pooled
    machines = ", ".join(dict.fromkeys(effect.machine for effect in contest.effects))
    same = contest.new == contest.old
    names = [f"{spec.layout.name} {spec.schedule.name}" for spec in (contest.new, contest.old)]
    gain = (exp(found.mean), exp(found.high)) if contest.effects else (None, None)
    verdict = "committed" if replaced else "the same" if same else "kept as it was"
    return (
        label,
        contest.shape.name,
        contest.n,
        names[0],
        "" if same else names[1],
        *gain,
        machines,
        verdict,
    )


def _summary(tunes: list[FleetTune]) -> Table:
    columns = (
        Column("label", "family"),
        Column("seconds", "seconds", ",.0f"),
        Column("candidates", "candidates", ",d"),
        Column("recorded", "timed", ",d"),
        Column("recalled", "from records", ",d"),
        Column("file", "winners"),
    )
    rows = [
        (
            *(
                t.label,
                t.result.seconds,
                sum(t.result.outcomes.values()),
                t.result.recorded,
                t.result.recalled,
            ),
            str(t.file or "unchanged"),
        )
        for t in tunes
    ]
    return Table("families", columns, rows)


# ---- looking and directing ----


def _status(database: Database, args: argparse.Namespace) -> None:
    if args.watch is not None and not args.watch >= 0.1:
        raise UsageError("--watch must be at least 0.1 seconds")
    while True:
        text = render_tables(_status_tables(database), args.output)
        if args.watch is None:
            print(text)
            return
        clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
        print(f"{clear}{text}", flush=True)
        time.sleep(args.watch)


def _status_tables(database: Database) -> list[Table]:
    from bitgen.fleet.admin import status

    families, machines = status(database)
    of_family = (
        Column("label", "family"),
        Column("machines", "machines", "d"),
        Column("waiting", "waiting", ",d"),
        Column("running", "running", ",d"),
        Column("done", "done", ",d"),
        Column("failed", "failed", ",d"),
        Column("hold", "held"),
    )
    of_machine = (
        Column("name", "machine"),
        Column("label", "family"),
        Column("state", "state"),
        Column("seen_s", "seen s ago", ",.0f"),
        Column("done", "done", ",d"),
        Column("threads", "threads", "d"),
        Column("dram_gbs", "GB/s", ",.1f"),
        Column("peak_gops", "GOP/s", ",.0f"),
        Column("version", "version"),
        Column("code", "code"),
    )
    return [
        Table("families", of_family, [tuple(vars(row).values()) for row in families]),
        Table("machines", of_machine, [tuple(vars(row).values()) for row in machines]),
    ]


def _pull(database: Database, args: argparse.Namespace) -> None:
    from bitgen.fleet.admin import pull

    added = pull(database, args.logs, say)
    for path, count in sorted(added.items()):
        print(f"{count:,} records were added to {path}")
    if not added:
        print("nothing new")


def _pause(database: Database, args: argparse.Namespace) -> None:
    from bitgen.fleet.admin import hold, release

    kind = "family" if args.cpu else "machine"
    if args.resume:
        release(database, kind, args.names)
    else:
        hold(database, kind, args.names, "paused", args.reason)
    print(f"{', '.join(args.names)}: {'may work again' if args.resume else 'paused'}")


def _quarantine(database: Database, args: argparse.Namespace) -> None:
    from bitgen.fleet.admin import hold, release

    if args.release:
        release(database, "machine", args.names)
    else:
        hold(database, "machine", args.names, "quarantined", args.reason)
    print(f"{', '.join(args.names)}: {'may work again' if args.release else 'quarantined'}")


def _prune(database: Database, args: argparse.Namespace) -> None:
    from bitgen.fleet.admin import prune

    if not args.days >= 1 / 24:
        raise UsageError("--days must be at least an hour, 0.0417")
    for what, gone in prune(database, args.days).items():
        print(f"{gone:,} {what} deleted")
