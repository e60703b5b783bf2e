"""The database: made, migrated, and refused in one line where it is of another version."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
from procrastinate.schema import SchemaManager
from psycopg import sql

from bitgen.errors import BitgenError
from bitgen.fleet.database import SCHEMA_NAME, Database, raised

SCHEMA = 1
WORKER, COORDINATOR = "bitgen_worker", "bitgen_coordinator"

# Functions by role. They run as their owner and are nobody else's.
_BOTH = ("fleet_reap()", "fleet_known(text)")
_OF_WORKER = (
    "fleet_register(text, text, text, text, integer, text, jsonb)",
    f"fleet_calibrated(text, integer{5 * ', double precision'})",
    "fleet_seen(text, text)",
    "fleet_result(text, text, text, integer, double precision, json)",
    "fleet_refuse(text, text, text)",
    "fleet_finish(bigint, bigint, integer, procrastinate_job_status)",
    "fleet_retry(bigint, bigint, integer, double precision)",
    "procrastinate_fetch_job_v2(character varying[], bigint)",
    "procrastinate_register_worker_v1()",
    "procrastinate_unregister_worker_v1(bigint)",
    "procrastinate_update_heartbeat_v1(bigint)",
    "procrastinate_prune_stalled_workers_v1(double precision)",
)
_OF_COORDINATOR = (
    "fleet_prune(interval)",
    "fleet_reject(text, text)",
    "procrastinate_defer_jobs_v1(procrastinate_job_to_defer_v1[])",
    "procrastinate_cancel_job_v1(bigint, boolean, boolean)",
)


def initialise(database: Database, stalled_s: float) -> list[str]:
    """Make the schema, or bring an older one up to date, and give the roles their rights; says what was done.

    The user needs CREATE on the database, and CREATEROLE where the roles do not exist yet.
    """
    done: list[str] = []
    with raised("the schema was not made"), database.connect() as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtext('bitgen fleet init'))")
        known = _recorded(connection)
        if known is None:
            connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(SCHEMA_NAME)))
            connection.execute(_text(SchemaManager.get_schema()))
            connection.execute(_text((Path(__file__).parent / "schema.sql").read_text(encoding="utf-8")))
            values = (SCHEMA, _procrastinate(), stalled_s)
            connection.execute(
                "INSERT INTO fleet (schema, procrastinate, stalled_s) VALUES (%s, %s, %s)", values
            )
            done.append(f"the schema {SCHEMA_NAME} was made, version {SCHEMA}")
        else:
            _check(known[0], known[1], older_is_fine=True)
            done += _migrate(connection, known[1])
            connection.execute("UPDATE fleet SET stalled_s = %s", (stalled_s,))
        done += [
            f"the role {role} was made" for role in (WORKER, COORDINATOR) if _make_role(connection, role)
        ]
        _grant(connection)
    done.append(f"a worker without a sign of life for {stalled_s:g} s loses its job to another")
    return done


def require(connection: psycopg.Connection[Any]) -> float:
    """The seconds after which a worker counts as stalled.

    BitgenError unless the schema is this version's, AwayError where the connection is lost meanwhile.
    """
    with raised("the schema was not read"):
        known = _recorded(connection)
    if known is None:
        raise BitgenError("this database holds no fleet: run bitgen fleet init")
    _check(known[0], known[1])
    return known[2]


def _recorded(connection: psycopg.Connection[Any]) -> tuple[int, str, float] | None:
    found = connection.execute("SELECT to_regclass(%s)", (f"{SCHEMA_NAME}.fleet",)).fetchone()
    if found is None or found[0] is None:
        return None
    row = connection.execute("SELECT schema, procrastinate, stalled_s FROM fleet").fetchone()
    return row and (row[0], row[1], row[2])


def _check(schema: int, procrastinate: str, older_is_fine: bool = False) -> None:
    own = _procrastinate()
    if schema > SCHEMA or _parts(procrastinate) > _parts(own):
        what = f"schema {schema}, procrastinate {procrastinate}"
        raise BitgenError(f"the fleet's database is newer ({what}) than this bitgen ({SCHEMA}, {own})")
    if not older_is_fine and (schema < SCHEMA or _parts(procrastinate) < _parts(own)):
        raise BitgenError("the fleet's database is of an older version: run bitgen fleet init to migrate it")


def _migrate(connection: psycopg.Connection[Any], procrastinate: str) -> list[str]:
    """Apply procrastinate's migrations since ``procrastinate``; this schema is the first, so it has none."""
    done = []
    for file in sorted(Path(SchemaManager.get_migrations_path()).glob("*.sql")):
        if _parts(procrastinate) < _parts(file.name.partition("_")[0]) <= _parts(_procrastinate()):
            connection.execute(_text(file.read_text(encoding="utf-8")))
            done.append(f"procrastinate's migration {file.stem} was applied")
    connection.execute("UPDATE fleet SET schema = %s, procrastinate = %s", (SCHEMA, _procrastinate()))
    return done or ["the schema is up to date"]


def _procrastinate() -> str:
    """Major and minor: patches change no schema."""
    return ".".join(version("procrastinate").split(".")[:2])


def _parts(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _make_role(connection: psycopg.Connection[Any], role: str) -> bool:
    if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (role,)).fetchone() is not None:
        return False
    try:
        connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(role)))
    except psycopg.errors.InsufficientPrivilege as error:
        message = (
            f"this user may not make the role {role}: make it (CREATE ROLE {role} NOLOGIN), or be one who may"
        )
        raise BitgenError(message) from error
    return True


def _grant(connection: psycopg.Connection[Any]) -> None:
    schema, path = sql.Identifier(SCHEMA_NAME), sql.SQL("{}, pg_temp").format(sql.Identifier(SCHEMA_NAME))
    connection.execute(sql.SQL("REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {} FROM PUBLIC").format(schema))
    for role, functions in ((WORKER, (*_BOTH, *_OF_WORKER)), (COORDINATOR, (*_BOTH, *_OF_COORDINATOR))):
        name = sql.Identifier(role)
        connection.execute(sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, name))
        connection.execute(sql.SQL("GRANT SELECT ON fleet TO {}").format(name))
        for function in functions:
            signature = _text(function)
            alter = sql.SQL("ALTER FUNCTION {} SECURITY DEFINER SET search_path = {}")
            connection.execute(alter.format(signature, path))
            connection.execute(sql.SQL("GRANT EXECUTE ON FUNCTION {} TO {}").format(signature, name))
    # What a worker of procrastinate asks by itself: which of its jobs shall end early.
    columns = sql.SQL("GRANT SELECT (id, status, abort_requested, queue_name) ON procrastinate_jobs TO {}")
    connection.execute(columns.format(sql.Identifier(WORKER)))
    coordinator = sql.Identifier(COORDINATOR)
    connection.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(schema, coordinator))
    connection.execute(sql.SQL("GRANT INSERT, UPDATE, DELETE ON holds TO {}").format(coordinator))
    connection.execute(sql.SQL("GRANT UPDATE (calibration) ON machines TO {}").format(coordinator))


def _text(text: str) -> sql.SQL:
    """SQL that ships with bitgen or procrastinate."""
    return sql.SQL(text)
