"""What was learnt: append-only records of trials, races, peaks and winners, and "the best for this?".

One JSON object a line. A line is written by a single ``write`` to a file opened for appending, under a lock,
so the file survives what can happen to a long run:

- Ctrl-C and ``kill -9`` lose at most the record in flight. What the kernel has accepted it keeps, so trials
  are not fsynced; winners are, because a power cut would take hours with it instead of one trial.
- A torn last line is skipped on reading, and the next append starts on a fresh line.
- A full disk cuts the file back to the last whole record and is a BitgenError.
- Lines that do not read back as a record are skipped and counted, never an error and never deleted.

Every time carries the `Fingerprint` of what it depends on. Under another fingerprint it is never used, and
its schedule is only a starting point. Fingerprints are of single kernels: what still holds of a record counts
on, whatever became of the other kernels in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from bitgen.errors import BitgenError, FileError
from bitgen.fingerprints import Fingerprint, Fingerprints
from bitgen.measure import Job, MachinePeak, Measurement, Race, RaceJob, Status, Timed
from bitgen.paths import ensure_dir
from bitgen.records import dump, load
from bitgen.spec import LARGE, TERNARY_ROWS, KernelSpec, Layout, Shape, WeightKind, regime_named

SCHEMA = 2
_POLL_S = 0.01  # an append takes some microseconds


def now() -> float:
    """Unix time in seconds, to the millisecond."""
    return round(time.time(), 3)


@dataclass(frozen=True)
class TrialRecord:
    """One measurement as it came: all repeats, and the seed of the search that asked."""

    kind: ClassVar[str] = "trial"
    fingerprint: Fingerprint
    measurement: Measurement
    seed: int
    time: float = field(default_factory=now)


@dataclass(frozen=True)
class RaceRecord:
    """One block of a race, as the runner answered it.

    For each kernel of ``job`` the digest of its fingerprint, its times (none where it was dropped) and why it
    was dropped (empty where it was not).
    """

    kind: ClassVar[str] = "race"
    fingerprints: tuple[str, ...]
    job: RaceJob
    times_ns: tuple[tuple[float, ...], ...]
    dropped: tuple[str, ...]
    read_ns_a_byte: tuple[float, ...]
    peak_gops: dict[str, float] = field(default_factory=dict)
    time: float = field(default_factory=now)

    def __post_init__(self) -> None:
        if {len(self.fingerprints), len(self.times_ns), len(self.dropped)} != {len(self.job.specs)}:
            raise BitgenError("a race has a fingerprint, times and a reason for each of its kernels")

    @classmethod
    def of(cls, fingerprints: Iterable[Fingerprint], job: RaceJob, race: Race) -> RaceRecord:
        return cls(
            fingerprints=tuple(fingerprint.digest for fingerprint in fingerprints),
            job=job,
            times_ns=tuple(tuple(race.get(spec, ())) for spec in job.specs),
            dropped=tuple(race.dropped.get(spec, "") for spec in job.specs),
            read_ns_a_byte=tuple(race.read_ns_a_byte),
            peak_gops=dict(race.peak_gops),
        )

    @property
    def race(self) -> Race:
        times = zip(self.job.specs, self.times_ns, strict=True)
        dropped = zip(self.job.specs, self.dropped, strict=True)
        return Race(
            {spec: row for spec, row in times if row},
            {spec: reason for spec, reason in dropped if reason},
            self.read_ns_a_byte,
            self.peak_gops,
        )


@dataclass(frozen=True)
class Winner(Timed):
    """The fastest kernel of one layout for a shape, a regime and a thread count.

    ``measurement`` are its times in a race, ``baseline`` those of the family's untuned default in the same
    rounds: None where the default failed.
    """

    measurement: Measurement
    baseline: Measurement | None
    fingerprint: Fingerprint

    @property
    def regime(self) -> str:
        return self.spec.regime

    @property
    def default_ns(self) -> float | None:
        return self.baseline.median_ns if self.baseline else None


@dataclass(frozen=True)
class TuningRecord:
    """What a tune decided for one shape: its layout, and the winners of every layout that was searched.

    ``best_threads``: the number of threads on which the whole model was fastest; 0 where only one was tried.
    One record a shape, so the layout and the kernels that read it cannot be torn apart.
    """

    kind: ClassVar[str] = "tuning"
    shape: Shape
    objective: str
    layout: Layout
    winners: tuple[Winner, ...]
    seed: int
    best_threads: int = 0
    time: float = field(default_factory=now)

    def __post_init__(self) -> None:
        if not any(winner.spec.layout == self.layout for winner in self.winners):
            raise BitgenError(f"no winner for {self.shape.name} reads the layout {self.layout.name}")

    def current(self, fingerprints: Fingerprints) -> list[Winner]:
        """The winners whose times still hold."""
        return [winner for winner in self.winners if winner.fingerprint == fingerprints(winner.spec)]


@dataclass(frozen=True)
class PeakRecord:
    """What a tune's probes found the machine to reach; ``cpu`` as in a `Fingerprint`. No search reads it."""

    kind: ClassVar[str] = "peak"
    cpu: str
    peak: MachinePeak
    time: float = field(default_factory=now)


@dataclass(frozen=True)
class LoadRecord:
    """What others took of the machine up to ``time``, as shares of all its CPUs. No search reads it.

    ``busy`` with anything but the tune; ``steal``: taken by a hypervisor for others.
    """

    kind: ClassVar[str] = "load"
    busy: float
    steal: float
    time: float = field(default_factory=now)


@dataclass(frozen=True)
class JobRecord:
    """One job of a fleet: who did ``what`` (measure, race, peak) and how long it took. No search reads it.

    ``time`` is when it ended; ``attempt``: how often it had been given to somebody before.
    """

    kind: ClassVar[str] = "job"
    machine: str
    what: str
    seconds: float
    attempt: int
    time: float


@dataclass(frozen=True)
class StartRecord:
    """What a fleet's tune tries ``first``, as it was when it began; ``tune`` is a digest of what it is asked.

    A tune commits winners, and the next one starts from these. So that a tune which is killed and goes on
    starts from where it began, whatever it committed meanwhile, that is kept.
    """

    kind: ClassVar[str] = "start"
    tune: str
    first: tuple[KernelSpec, ...]
    time: float = field(default_factory=now)


Record = TrialRecord | RaceRecord | TuningRecord | PeakRecord | LoadRecord | JobRecord | StartRecord
_KINDS: dict[str, type[Record]] = {
    c.kind: c for c in (TrialRecord, RaceRecord, TuningRecord, PeakRecord, LoadRecord, JobRecord, StartRecord)
}


class RecordStore:
    """The records of one file, all in memory; `append` writes them through.

    FileError when the file cannot be read. A missing file is an empty store. ``skipped`` counts the lines
    that could not be used, ``outdated`` the timings of versions whose fingerprints say too little.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.reload()

    def reload(self) -> None:
        """Read the file again: another process may have appended to it."""
        self.skipped = self.outdated = 0
        self.tunings: list[TuningRecord] = []
        self.peaks: list[PeakRecord] = []
        self.loads: list[LoadRecord] = []
        self.jobs: list[JobRecord] = []
        self.starts: dict[str, StartRecord] = {}  # the first of each tune
        self._trials: dict[tuple[Fingerprint, tuple[Any, ...]], TrialRecord] = {}
        self._races: dict[tuple[tuple[str, ...], tuple[Any, ...]], RaceRecord] = {}
        for record in self._read():
            self._remember(record)

    # ---- questions ----

    def known(self, job: Job, fingerprints: Fingerprints) -> Measurement | None:
        """The newest measurement of exactly this job that still holds."""
        record = self._trials.get((fingerprints(job.spec), job.key))
        return record.measurement if record else None

    def known_race(self, job: RaceJob, fingerprints: Fingerprints) -> Race | None:
        """The newest block of a race between exactly these kernels with this seed."""
        own = tuple(fingerprints(spec).digest for spec in job.specs)
        record = self._races.get((own, job.key))
        return record.race if record else None

    def trials(self) -> Iterator[TrialRecord]:
        """The newest trial of every job under every fingerprint."""
        yield from self._trials.values()

    def races(self) -> Iterator[RaceRecord]:
        """The newest record of every block of every race."""
        yield from self._races.values()

    def layout(
        self,
        shape: Shape,
        fingerprints: Fingerprints,
        isa: str | None = None,
        kind: WeightKind = TERNARY_ROWS,
    ) -> Layout | None:
        """The layout the newest tune chose for ``shape``; one that saw less overrules none that saw more.

        A tune of n = 1 alone, or of one family, knows nothing of what its layout costs a prompt, or of what
        another family would have cost. Of a tune that holds in part the part counts. ``isa``: only winners
        of this ISA level count. Tunes of another ``kind`` are other tunes.
        """
        newest = self._newest(shape, fingerprints, isa, kind)
        records = [(r, winners) for r, winners in newest if _serves(r, winners)]
        seen = [frozenset((w.regime, w.spec.family) for w in winners) for _, winners in records]
        widest = (r for (r, _), own in zip(records, seen, strict=True) if not any(own < o for o in seen))
        return next((record.layout for record in widest), None)

    def best(
        self,
        shape: Shape,
        regime: str,
        threads: int,
        fingerprints: Fingerprints,
        isa: str | None = None,
        kind: WeightKind = TERNARY_ROWS,
    ) -> Winner | None:
        """The winner for ``shape`` in the layout chosen last, or None where nothing valid is recorded.

        Keyed by thread count: the nearest one that is not higher than ``threads`` serves, the newest first.
        An older tune fills in for a regime that the newest one left out, as long as it reads that layout.
        ``isa``: only winners of this ISA level count; ``kind`` as in `layout`.
        """
        regime_named(regime)
        layout = self.layout(shape, fingerprints, isa, kind)
        found: Winner | None = None
        for _, winners in self._newest(shape, fingerprints, isa, kind):
            for winner in winners:
                fits = winner.spec.layout == layout and winner.regime == regime and winner.threads <= threads
                if fits and (found is None or winner.threads > found.threads):
                    found = winner
        return found

    def best_threads(
        self, shapes: Iterable[Shape], fingerprints: Fingerprints, kind: WeightKind = TERNARY_ROWS
    ) -> int:
        """The number of threads on which a model of these shapes was fastest; 0 where that is not known.

        Known when the newest tune that compared some says the same for all shapes, and a later one did not
        choose other layouts.
        """
        found = {self._best_threads(shape, fingerprints, kind) for shape in shapes}
        return found.pop() if len(found) == 1 else 0

    def _best_threads(self, shape: Shape, fingerprints: Fingerprints, kind: WeightKind) -> int:
        newest = self._newest(shape, fingerprints, kind=kind)
        compared = next((r for r, _ in newest if r.best_threads), None)
        valid = compared is not None and compared.layout == self.layout(shape, fingerprints, kind=kind)
        return compared.best_threads if compared and valid else 0

    def current(
        self, shape: Shape, fingerprints: Fingerprints, kind: WeightKind = TERNARY_ROWS
    ) -> list[KernelSpec]:
        """The kernels the newest tune of ``shape`` selected, whatever their layout, of one ``kind``."""
        newest = next((winners for _, winners in self._newest(shape, fingerprints, kind=kind)), [])
        return [winner.spec for winner in newest]

    def stale(self, fingerprints: Fingerprints) -> list[KernelSpec]:
        """Winners under other fingerprints, newest first: their schedules are worth a try, no more."""
        winners = (winner for record in reversed(self.tunings) for winner in record.winners)
        return list(dict.fromkeys(w.spec for w in winners if w.fingerprint != fingerprints(w.spec)))

    def _newest(
        self,
        shape: Shape,
        fingerprints: Fingerprints,
        isa: str | None = None,
        kind: WeightKind = TERNARY_ROWS,
    ) -> Iterator[tuple[TuningRecord, list[Winner]]]:
        """The tunes of ``shape`` of which something still holds (on ``isa``), and what, the newest first."""
        for record in reversed(self.tunings):
            if (record.shape, record.layout.kind) == (shape, kind):
                winners = [w for w in record.current(fingerprints) if isa in (None, w.spec.isa)]
                if winners:
                    yield record, winners

    # ---- writing ----

    def append(self, record: Record) -> None:
        """Write ``record`` at the end of the file and remember it. BitgenError when it cannot be written."""
        data = {"schema": SCHEMA, "kind": record.kind, **dump(record)}
        line = json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        ensure_dir(self.path.parent)
        try:
            _append_line(self.path, line, sync=isinstance(record, TuningRecord))
        except OSError as error:
            raise FileError(
                f"cannot write to {self.path}: {error.strerror or error}; the records before this one are "
                "kept, so the same command continues from them",
            ) from error
        self._remember(record)

    def _remember(self, record: Record) -> None:
        if isinstance(record, TrialRecord):
            self._trials[record.fingerprint, record.measurement.job.key] = record
        elif isinstance(record, RaceRecord):
            self._races[record.fingerprints, record.job.key] = record
        elif isinstance(record, PeakRecord):
            self.peaks.append(record)
        elif isinstance(record, LoadRecord):
            self.loads.append(record)
        elif isinstance(record, JobRecord):
            self.jobs.append(record)
        elif isinstance(record, StartRecord):
            self.starts.setdefault(record.tune, record)
        else:
            self.tunings.append(record)

    # ---- reading ----

    @property
    def damage(self) -> str:
        """What people should know of lines that could not be used; empty: there are none."""
        if not self.skipped:
            return ""
        lines = "1 line" if self.skipped == 1 else f"{self.skipped} lines"
        return f"{lines} of {self.path} cannot be read (torn, damaged, or of a newer bitgen) and do not count"

    def _read(self) -> Iterator[Record]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror or error}") from error
        for line in filter(bytes.strip, data.split(b"\n")):
            try:
                record = self._parse(msgspec.json.decode(line))
            except (ValueError, LookupError, TypeError, AttributeError, BitgenError, RecursionError):
                self.skipped += 1  # a torn line, a newer version's, or anything else that is no record
                continue
            if record is not None:
                yield record

    def _parse(self, data: dict[str, Any]) -> Record | None:
        """The record a line holds; None for timings that nothing can be said about any more."""
        schema, cls = data.pop("schema"), _KINDS[data.pop("kind")]
        if schema == 1:
            if cls is not TuningRecord:
                self.outdated += 1
                return None
            data = migrated(data)
        elif schema != SCHEMA:
            raise BitgenError(f"schema {schema}")
        record: Record = load(cls, data, "record")
        return record


def migrated(tuning: dict[str, Any]) -> dict[str, Any]:
    """A tuning record of schema 1 in today's form.

    Its fingerprint was of all templates together, so none of its times holds; its winners are tried first.
    """
    old = tuning.pop("fingerprint")
    fingerprint = {"cpu": old["cpu"], "compiler": old["compiler"], "kernel": "", "harness": old["templates"]}
    winners = []
    for winner in tuning["winners"]:
        n = winner["n"]
        job = {"spec": winner["spec"], "shape": tuning["shape"], "n": n, "threads": winner["threads"]}
        job["cold"] = n < LARGE.n_min
        measurement = {"job": job, "status": Status.OK.value, "times_ns": [winner["time_ns"]]}
        winners.append({"measurement": measurement, "baseline": None, "fingerprint": fingerprint})
    return tuning | {"winners": winners}


def _serves(record: TuningRecord, winners: Sequence[Winner]) -> bool:
    return any(winner.spec.layout == record.layout for winner in winners)


def _append_line(path: Path, line: bytes, sync: bool) -> None:
    """Append ``line`` whole or not at all. OSError when it does not fit."""
    from filelock import FileLock  # 35 ms that a reader does not pay

    # The lock is a file of its own: FileLock truncates what it locks.
    with FileLock(f"{path}.lock", poll_interval=_POLL_S):
        _append(path, line, sync)


def _append(path: Path, line: bytes, sync: bool) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        end = os.lseek(fd, 0, os.SEEK_END)
        torn = end > 0 and os.pread(fd, 1, end - 1) != b"\n"
        text = b"\n" + line if torn else line
        try:
            written = os.write(fd, text)
            while written < len(text):  # a disk that fills up takes a part first and says so the next time
                written += os.write(fd, text[written:])
            if sync:
                os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):  # a torn tail is harmless too, and this error is not the news
                os.ftruncate(fd, end)
            raise
    finally:
        os.close(fd)
