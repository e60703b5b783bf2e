"""What people do with a fleet: look at it, take its records, set machines aside, tidy up."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg

from bitgen.errors import BitgenError, UsageError
from bitgen.fleet.database import Database, raised
from bitgen.fleet.messages import Answer, read_answer
from bitgen.fleet.schema import require
from bitgen.fleet.statistics import Calibration, judge
from bitgen.paths import ensure_dir, tune_logs_dir
from bitgen.records import load
from bitgen.store import JobRecord, RecordStore

_CHUNK = 200  # answers at once, 10 kB each
PULLED = "pulled.txt"


@dataclass(frozen=True)
class MachineRow:
    """A machine as `bitgen fleet status` shows it; ``seen_s`` ago, ``done`` answers."""

    name: str
    label: str
    state: str
    seen_s: float
    done: int
    threads: int
    dram_gbs: float | None
    peak_gops: float | None
    version: str
    code: str


@dataclass(frozen=True)
class FamilyRow:
    """A kind of CPU: machines alive, and its jobs by state."""

    label: str
    machines: int
    waiting: int
    running: int
    done: int
    failed: int
    hold: str


def status(database: Database) -> tuple[list[FamilyRow], list[MachineRow]]:
    """All kinds of CPU and all machines."""
    with database.connect() as connection, raised("the status is not known"):
        require(connection)
        machines = connection.execute("SELECT * FROM machine_status ORDER BY label, name").fetchall()
        families = connection.execute("SELECT * FROM family_status ORDER BY label").fetchall()
    return [FamilyRow(*row) for row in families], [MachineRow(*row) for row in machines]


def hold(database: Database, kind: str, names: Sequence[str], state: str, reason: str) -> None:
    """Give machines or families no more jobs. UsageError for a name that the fleet does not know."""
    with database.connect() as connection, raised("nothing was set aside"):
        require(connection)
        _known(connection, kind, names)
        for name in names:
            connection.execute(
                "INSERT INTO holds (kind, name, state, reason) VALUES (%s, %s, %s, %s) "
                "ON CONFLICT (kind, name) DO UPDATE SET state = excluded.state, "
                "reason = excluded.reason, by_calibration = false",
                (kind, name, state, reason),
            )


def release(database: Database, kind: str, names: Sequence[str]) -> None:
    """Let them work again; a machine is calibrated anew first."""
    with database.connect() as connection, raised("nothing was released"):
        require(connection)
        _known(connection, kind, names)
        for name in names:
            connection.execute("DELETE FROM holds WHERE kind = %s AND name = %s", (kind, name))
            if kind == "machine":
                connection.execute("UPDATE machines SET calibration = NULL WHERE name = %s", (name,))


def _known(connection: psycopg.Connection[Any], kind: str, names: Sequence[str]) -> None:
    query = "SELECT name FROM machines" if kind == "machine" else "SELECT label FROM families"
    known = {row[0] for row in connection.execute(query).fetchall()}
    for name in names:
        if name not in known:
            raise UsageError(f"the fleet has no {kind} {name}; it has {', '.join(sorted(known)) or 'none'}")


def set_aside(connection: psycopg.Connection[Any]) -> list[str]:
    """Set aside machines whose calibration says so, take back those that are well again; a line each."""
    rows = connection.execute(
        "SELECT name, label, calibration, by_calibration, held FROM calibrations"
    ).fetchall()
    found = []
    for label in {row[1] for row in rows}:
        mine = {name: (data, own, held) for name, of, data, own, held in rows if of == label}
        verdicts = judge({name: _calibration(data) for name, (data, _, _) in mine.items()})
        for name, (_, own, held) in mine.items():
            if name in verdicts and not held:
                connection.execute(
                    "INSERT INTO holds (kind, name, state, reason, by_calibration) "
                    "VALUES ('machine', %s, 'quarantined', %s, true) ON CONFLICT DO NOTHING",
                    (name, verdicts[name]),
                )
                found.append(f"{name} is set aside: {verdicts[name]}")
            elif name not in verdicts and own:
                connection.execute(
                    "DELETE FROM holds WHERE kind = 'machine' AND name = %s AND by_calibration", (name,)
                )
                found.append(f"{name} is well again")
    return found


def _calibration(data: object) -> Calibration:
    """What a machine said of itself; nonsense has no threads."""
    try:
        found = load(Calibration, data, "a calibration")
        good = all(0 < value < math.inf for value in (found.dram_gbs, found.peak_gops, found.ratio))
        return found if good else Calibration(0, 0.0, 0.0, 1.0)
    except BitgenError:
        return Calibration(0, 0.0, 0.0, 1.0)


def pull(database: Database, logs: Path | None, report: Callable[[str], None]) -> dict[Path, int]:
    """Append the answers of the fleet to the records of their microarchitectures; how many went where.

    Each answer once. Those of machines that are quarantined stay where they are.
    """
    folder = ensure_dir(tune_logs_dir(logs))
    known_file = ensure_dir(folder / "fleet") / PULLED
    known = set(known_file.read_text(encoding="ascii").split()) if known_file.exists() else set()
    added: dict[Path, int] = {}
    stores: dict[str, RecordStore] = {}
    with database.connect() as connection, raised("not everything was pulled"):
        require(connection)
        rows = connection.execute(
            "SELECT r.job_key FROM results r WHERE NOT EXISTS (SELECT FROM holds h WHERE h.kind = 'machine' "
            "AND h.name = r.machine AND h.state = 'quarantined') ORDER BY r.created"
        ).fetchall()
        new = [row[0] for row in rows if row[0] not in known]
        for start in range(0, len(new), _CHUNK):
            chunk = connection.execute(
                "SELECT r.job_key, f.cpu ->> 'family', r.payload, r.created FROM results r JOIN families f "
                "ON f.label = r.label WHERE r.job_key = ANY(%s) ORDER BY r.created",
                (new[start : start + _CHUNK],),
            ).fetchall()
            for key, family, payload, created in chunk:
                try:
                    answer = read_answer(payload)
                except BitgenError as error:
                    report(f"an answer is left out: {error.message}")
                    continue
                safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in family or "unknown")
                store = stores.setdefault(safe, RecordStore(folder / f"{safe}.jsonl"))
                added[store.path] = added.get(store.path, 0) + _append(store, answer, created)
                with known_file.open("a", encoding="ascii") as file:
                    file.write(f"{key}\n")
    return {path: count for path, count in added.items() if count}


def _append(store: RecordStore, answer: Answer, created: datetime.datetime) -> int:
    """The records of one answer, at the time when the database got it."""
    records: Iterable[Any] = (*answer.trials, *([answer.race] if answer.race else []))
    count = 0
    for record in records:
        store.append(replace(record, time=round(created.timestamp(), 3)))
        count += 1
    return count


def append_jobs(database: Database, label: str, store: RecordStore) -> None:
    """Who did which job when, into the coordinator's records: the timeline of a report."""
    since = max((job.time for job in store.jobs), default=0.0)
    with database.connect() as connection, raised("the timeline is not known"):
        rows = connection.execute(
            "SELECT machine, CASE WHEN payload ->> 'race' IS NOT NULL THEN 'race' "
            "WHEN payload ->> 'trials' = '[]' THEN 'peak' ELSE 'measure' END, seconds, attempt, "
            "extract(epoch FROM created)::float8 FROM results "
            "WHERE label = %s AND created > to_timestamp(%s) ORDER BY created",
            (label, since),
        ).fetchall()
    for machine, what, seconds, attempt, ended in rows:
        store.append(JobRecord(machine, what, seconds, attempt, round(ended, 3)))


def prune(database: Database, days: float) -> dict[str, int]:
    """Delete what is older than ``days``; counts by what it was."""
    with database.connect() as connection, raised("nothing was deleted"):
        require(connection)
        rows = connection.execute(
            "SELECT what, gone FROM fleet_prune(make_interval(secs => %s))", (86400 * days,)
        )
        return dict(rows.fetchall())
