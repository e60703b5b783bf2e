"""Where the fleet's database is, how it is reached, and what is refused.

The words of a connection come from --dsn, else BITGEN_FLEET_DSN, else the service bitgen_fleet of
~/.pg_service.conf. Only what never leaves the machine (a socket, loopback) goes without TLS; everywhere else
the certificate and the name of the server are checked (sslmode=verify-full).
"""

from __future__ import annotations

import configparser
import contextlib
import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo

from bitgen.errors import BitgenError, UsageError

VARIABLE = "BITGEN_FLEET_DSN"
SERVICE = "bitgen_fleet"
SCHEMA_NAME = "bitgen_fleet"
_CONNECT_S = 10


class AwayError(BitgenError):
    """The database does not answer now; it may answer later."""


@dataclass(frozen=True)
class Database:
    """A checked address. ``words`` are libpq's, and may hold a password: it is shown by ``place`` alone."""

    words: Mapping[str, str]

    def __repr__(self) -> str:
        return f"Database({self.place!r})"

    @property
    def place(self) -> str:
        """For people: user, host, port and name, no secret."""
        words = self.words
        host = words.get("host") or words.get("hostaddr") or os.environ.get("PGHOST") or "a local socket"
        user = words.get("user") or os.environ.get("PGUSER") or "the default user"
        return f"{words.get('dbname', 'the default database')} on {host} as {user}"

    @property
    def text(self) -> str:
        """What libpq takes; never printed."""
        return conninfo.make_conninfo(**self.words)

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """AwayError where it does not answer."""
        with raised("no connection"):
            return psycopg.connect(self.text, autocommit=True, **options)


def find_database(dsn: str | None = None, environ: Mapping[str, str] | None = None) -> Database:
    """The database that was named. UsageError where none was, or in a way that is not safe."""
    env = os.environ if environ is None else environ
    if dsn is not None and {"password", "sslpassword"} & _words(dsn).keys():
        raise UsageError(
            f"--dsn with a password: every user of this machine can read it; put it into {VARIABLE}, "
            "~/.pgpass or ~/.pg_service.conf"
        )
    given = dsn if dsn is not None else env.get(VARIABLE)
    if given is None and not _service(SERVICE, env):
        raise UsageError(
            f"no database is named: set {VARIABLE}, write the service [{SERVICE}] into ~/.pg_service.conf, "
            "or give --dsn without a password"
        )
    words = _words(given if given is not None else f"service={SERVICE}")
    if name := words.get("service") or (env.get("PGSERVICE") if not words else None):
        found = _service(name, env)
        if not found:
            raise UsageError(f"there is no service {name} in {' or '.join(map(str, _service_files(env)))}")
        words = {**found, **{key: value for key, value in words.items() if key != "service"}}
    return Database(_checked(words, env))


def _checked(words: dict[str, str], env: Mapping[str, str]) -> dict[str, str]:
    hosts = [
        host
        for key, variable in (("host", "PGHOST"), ("hostaddr", "PGHOSTADDR"))
        for host in (words.get(key) or env.get(variable) or "").split(",")
        if host
    ]
    mode = words.get("sslmode") or env.get("PGSSLMODE")
    if not all(map(_stays_here, hosts)):
        if mode not in (None, "verify-full"):
            raise UsageError(
                f"sslmode={mode} to another machine: whoever is in between could read and answer; only "
                "verify-full is taken"
            )
        words["sslmode"] = "verify-full"
        root = Path("~/.postgresql/root.crt").expanduser()
        if not words.get("sslrootcert") and not env.get("PGSSLROOTCERT") and not root.exists():
            words["sslrootcert"] = "system"
        # A server must not ask for a password in a form that it could use elsewhere.
        words.setdefault("require_auth", "scram-sha-256,none")
    words.setdefault("connect_timeout", str(_CONNECT_S))
    words.setdefault("application_name", "bitgen fleet")
    # Who vanished is noticed after a minute, by both ends: a server would keep its locks for two hours.
    alive = {"keepalives_idle": "30", "keepalives_interval": "10", "keepalives_count": "3"}
    settings = {f"tcp_{name}": value for name, value in alive.items()} | {"search_path": SCHEMA_NAME}
    words.update(alive)
    options = (words.get("options", ""), *(f"-c {name}={value}" for name, value in settings.items()))
    words["options"] = " ".join(options).strip()
    return words


def _stays_here(host: str) -> bool:
    """Whether what goes to ``host`` stays on this machine: a socket, or loopback."""
    if host.startswith(("/", "@")) or host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    return False


def _words(dsn: str) -> dict[str, str]:
    """A DSN or a URL in parts. UsageError, without what it says, for one that is neither."""
    try:
        return {key: str(value) for key, value in conninfo.conninfo_to_dict(dsn).items() if value is not None}
    except psycopg.Error:
        message = "the database is named by neither a DSN (host=... dbname=...) nor a URL (postgresql://...)"
        raise UsageError(message) from None  # its text may quote a password


def _service_files(env: Mapping[str, str]) -> list[Path]:
    """Where libpq looks for services."""
    own = env.get("PGSERVICEFILE") or "~/.pg_service.conf"
    shared = env.get("PGSYSCONFDIR")
    return [Path(own).expanduser(), *([Path(shared) / "pg_service.conf"] if shared else [])]


def _service(name: str, env: Mapping[str, str]) -> dict[str, str]:
    """The words of a service; empty where there is none."""
    for file in _service_files(env):
        parser = configparser.RawConfigParser(delimiters=("=",), comment_prefixes=("#",), strict=False)
        try:
            parser.read_string(file.read_text(encoding="utf-8"), str(file))
        except OSError:
            continue
        except (configparser.Error, UnicodeDecodeError):
            raise UsageError(f"{file} is not a file of services ([name], then key=value lines)") from None
        if parser.has_section(name):
            return dict(parser.items(name))
    return {}


@contextlib.contextmanager
def raised(what: str) -> Iterator[None]:
    """Errors of the database as one line, which quotes no query and no parameter.

    AwayError for those of the connection, BitgenError for the others.
    """
    try:
        yield
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise AwayError(f"{what}: {_line(error)}") from error
    except psycopg.Error as error:
        raise BitgenError(f"{what}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Libpq's first line; where several addresses failed, each has one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
