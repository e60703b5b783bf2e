"""This machine as a worker: its name, its kind, and the runner that measures on it."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
from pathlib import Path

from bitgen.environment import Environment, check_threads
from bitgen.errors import UsageError
from bitgen.fleet.bounds import Machine
from bitgen.fleet.database import Database
from bitgen.fleet.messages import code_digest, label_of
from bitgen.fleet.outbox import Outbox
from bitgen.fleet.worker import Settings, Worker
from bitgen.measure.runner import LocalRunner
from bitgen.paths import tune_logs_dir

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def local_worker(
    database: Database,
    name: str | None,
    threads: int | None,
    cc: str | None,
    logs: Path | None,
    settings: Settings,
    report: Callable[[str], None],
) -> Worker:
    """The worker of this machine. UsageError for a wrong name, number of threads or share of load."""
    env = Environment(cc, logs)
    called = platform.node() if name is None else name
    if not _NAME.fullmatch(called):
        raise UsageError(f"--name {called!r}: 1 to 63 letters, digits, dots and dashes")
    if threads is not None:
        check_threads([threads], env.cpu)
    if not 0 < settings.max_load <= 1:
        raise UsageError("--max-load is a share, above 0 and at most 1")
    if settings.idle_s is not None and not settings.idle_s > 0:
        raise UsageError("--idle must be above 0 seconds")
    machine = Machine(
        name=called,
        label=label_of(env.cpu, env.isas),
        code=code_digest(),
        threads=threads or env.cpu.usable_threads,
        cpu=env.cpu,
        isas=env.isas,
    )
    report(f"{called}: {machine.label}, {machine.threads} threads, code {machine.code}, {database.place}")
    return Worker(
        database,
        machine,
        lambda: LocalRunner(env.toolchain, env.cpu),
        env.fingerprints,
        Outbox(tune_logs_dir(logs) / "outbox" / called),
        env.toolchain.compiler.version.splitlines()[0],
        settings,
        report,
    )
