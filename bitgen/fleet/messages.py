"""What travels between a coordinator and its workers: requests, answers, and the names of their queues.

A request is known by its key, a digest of all it says: whoever asks the same asks for the same answer, and an
answer that was given once counts for everybody, whatever became of the job that carried it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from bitgen import __version__
from bitgen.cpu import Cpu, Isa, accepted_isas, target_cpu, target_names
from bitgen.errors import BitgenError, FileError
from bitgen.measure import Job, MachinePeak, Race, RaceJob
from bitgen.paths import configs_dir, csrc_dir, templates_dir
from bitgen.records import dump, load
from bitgen.store import RaceRecord, TrialRecord

PROTOCOL = 1
MAX_REQUEST_BYTES = 1 << 20
TASK = "bitgen.fleet"
# What is urgent comes first: everybody waits for a peak, a race ends a search, a second opinion can wait.
PRIORITIES = {"peak": 40, "race": 30, "measure": 20}


@dataclass(frozen=True)
class Request:
    """One job of a worker.

    ``label`` is the kind of CPU that may answer, ``code`` the digest of what renders, verifies and times
    (`code_digest`). ``threads`` and ``isas`` are those of the machine's peak, which every answer carries.
    ``jobs`` are timed in the given order; ``race`` is one block. ``occasion``: the same asked once more.
    """

    kind: Literal["peak", "measure", "race"]
    label: str
    code: str
    threads: int
    isas: tuple[str, ...]
    jobs: tuple[Job, ...] = ()
    race: RaceJob | None = None
    occasion: int = 0

    def __post_init__(self) -> None:
        asked = {
            "peak": self.race is None and not self.jobs,
            "measure": bool(self.jobs) and self.race is None,
        }
        if not asked.get(self.kind, self.race is not None and not self.jobs):
            raise BitgenError(f"a {self.kind} request with the parts of another kind")
        if not self.isas or self.threads < 1:
            raise BitgenError("a request names ISA levels and a number of threads")

    @cached_property
    def text(self) -> str:
        """As JSON; a text, because the database's jsonb forgets the order of a schedule's knobs."""
        return json.dumps(dump(self), separators=(",", ":"), allow_nan=False)

    @cached_property
    def key(self) -> str:
        """64 hex digits: the same for the same question on every machine."""
        text = json.dumps([PROTOCOL, dump(self)], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def priority(self) -> int:
        return PRIORITIES[self.kind] - (20 if self.occasion else 0)


@dataclass(frozen=True)
class Answer:
    """What a worker found.

    ``unit`` is the peak of the machine that answers, in the same conditions: times are told in units of it.
    ``trials`` answer the request's jobs in their order, ``race`` its race, both as records keep them, with
    the fingerprints of that machine. ``seconds`` is how long the job took.
    """

    key: str
    machine: str
    unit: MachinePeak
    trials: tuple[TrialRecord, ...] = ()
    race: RaceRecord | None = None
    seconds: float = 0.0

    def check(self, request: Request) -> None:
        """BitgenError unless this answers ``request``: what comes over a network is not believed."""
        if self.key != request.key:
            raise BitgenError(f"{self.machine} answered another request")
        if self.unit.threads != request.threads or not set(request.isas) <= set(self.unit.peak_gops):
            raise BitgenError(f"{self.machine} answered with the peak of other threads or ISA levels")
        peaks = (*self.unit.dram_gbs.values(), *self.unit.peak_gops.values())
        if not all(0 < peak < 1e12 for peak in peaks):
            raise BitgenError(f"{self.machine} answered with a peak that no machine has")
        measured = [trial.measurement.job for trial in self.trials]
        same = len(measured) == len(request.jobs) and all(
            found.key == asked.key and found.against in (None, asked.against)
            for found, asked in zip(measured, request.jobs, strict=False)
        )
        if not same or (self.race and self.race.job) != request.race:
            raise BitgenError(f"{self.machine} answered for other kernels than it was asked for")
        if self.race:
            _check_race(self.machine, self.race)


def _check_race(machine: str, race: RaceRecord) -> None:
    """Times of every round, positive and finite, of each kernel that was not dropped."""
    for times, dropped in zip(race.times_ns, race.dropped, strict=True):
        good = all(0 < time < 1e18 for time in times)
        if not good or (len(times) != race.job.rounds if not dropped else times):
            raise BitgenError(f"{machine} answered a race with times that no race has")
    if not all(0 < ns < 1e9 for ns in race.read_ns_a_byte):
        raise BitgenError(f"{machine} answered a race with times that no race has")


def read_request(text: object) -> Request:
    """FileError when ``text`` is no JSON of a request."""
    if not isinstance(text, str) or len(text) > MAX_REQUEST_BYTES:
        raise FileError(f"the request is no text of at most {MAX_REQUEST_BYTES:,} characters")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"the request is no JSON: {error}") from error
    return load(Request, data, "the request")


def read_answer(data: object) -> Answer:
    """FileError when ``data`` (plain data of JSON) is no answer."""
    return load(Answer, data, "the answer")


def scaled_race(race: Race, factor: float) -> Race:
    """A race in another unit of time; its ratios are the same."""
    return Race(
        {spec: tuple(factor * time for time in times) for spec, times in race.items()},
        race.dropped,
        tuple(factor * time for time in race.read_ns_a_byte),
        {isa: gops / factor for isa, gops in race.peak_gops.items()},
    )


# ---- who may answer ----


def label_of(cpu: Cpu, isas: Iterable[Isa]) -> str:
    """The kind of CPU: its microarchitecture; where its best ISA level is hidden, also the one it runs.

    zen4, or zen4.avx2 for one that may not use AVX-512.
    """
    levels = tuple(isas)
    best = accepted_isas(cpu, levels)[0].name
    known = target_cpu(cpu.family, cpu.os) if cpu.family in target_names() else None
    usual = accepted_isas(known, levels)[0].name if known else best
    return cpu.family if best == usual else f"{cpu.family}.{best}"


@functools.cache
def code_digest() -> str:
    """16 hex digits for everything that decides what a request means: C texts, legal schedules, timing.

    Workers and coordinators with another one do not work together.
    """
    package = Path(__file__).parents[1]
    files = [
        *(file for folder in ("isa", "kernels", "probes") for file in _files(templates_dir() / folder)),
        *_files(csrc_dir()),
        *(configs_dir() / name for name in ("isas.yaml", "cpu_features.yaml")),
        *(file for room in ("families", "measure") for file in _files(package / room)),
        *(package / name for name in ("space.py", "spec.py", "shapes.py", "render.py")),
    ]
    digest = hashlib.sha256(f"{__version__} {PROTOCOL}".encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    wanted = (".py", ".c", ".h", ".j2")
    return sorted(file for file in folder.rglob("*") if file.suffix in wanted)


def queue_name(label: str, code: str, threads: int, machine: str = "") -> str:
    """The queue of jobs for a kind of CPU, a version and a number of threads, or of one ``machine`` of these.

    At most 40 characters: PostgreSQL cuts the names of its channels at 63, and 23 are procrastinate's.
    """
    digest = hashlib.sha256("\0".join((label, code, str(threads), machine)).encode()).hexdigest()[:12]
    return f"{label[:16]}-t{threads}-{digest}"
