"""What was learnt: append-only records of trials, races and winners, and "the best for this?".

One JSON object a line. A line is written by a single ``write`` to a file opened for appending, under a lock,
so the file survives what can happen to a long run:

- Ctrl-C and ``kill -9`` lose at most the record in flight. What the kernel has accepted it keeps, so trials
  are not fsynced; winners are, because a power cut would take hours with it instead of one trial.
- A torn last line is skipped on reading, and the next append starts on a fresh line.
- A full disk cuts the file back to the last whole record and is a BitgenError.
- Lines of another schema, or that do not read back as a record, are skipped and counted, never an error.

Every record carries the `Fingerprint` of what it depends on. Under another fingerprint its timing is never
used, and its schedule is only a starting point.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from bitgen.errors import BitgenError, FileError
from bitgen.measure import Measurement, Race
from bitgen.paths import ensure_dir
from bitgen.spec import KernelSpec, Layout, Shape, regime_named

SCHEMA = 1

JobKey = tuple[KernelSpec, Shape, int, int, bool]  # Job.key: spec, shape, n, threads, cold
RaceKey = tuple[Shape, int, int, bool, int, int, tuple[KernelSpec, ...]]  # RaceRecord.key


@dataclass(frozen=True)
class Fingerprint:
    """Everything a timing depends on besides the kernel's spec; each part is a short text or a digest."""

    cpu: str  # family, model and features
    compiler: str  # its version and the flags of every ISA level
    templates: str  # kernels, host code and ISA vocabularies
    version: str  # of this package

    @cached_property
    def digest(self) -> str:
        """16 hex digits that stand for all parts."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        return cls(**{f.name: str(data[f.name]) for f in fields(cls)})


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

    def to_dict(self) -> dict[str, Any]:
        return {"measurement": self.measurement.to_dict(), "seed": self.seed}

    @classmethod
    def from_dict(cls, fingerprint: Fingerprint, data: Mapping[str, Any]) -> TrialRecord:
        measurement = Measurement.from_dict(data["measurement"])
        return cls(fingerprint, measurement, int(data["seed"]), float(data["time"]))


@dataclass(frozen=True)
class RaceRecord:
    """One block of a race between ``specs``, as the runner answered it."""

    kind: ClassVar[str] = "race"
    fingerprint: Fingerprint
    shape: Shape
    n: int
    threads: int
    cold: bool
    rounds: int
    seed: int
    specs: tuple[KernelSpec, ...]
    race: Race
    time: float = field(default_factory=now)

    @property
    def key(self) -> RaceKey:
        return (self.shape, self.n, self.threads, self.cold, self.rounds, self.seed, self.specs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": self.shape.name,
            "n": self.n,
            "threads": self.threads,
            "cold": self.cold,
            "rounds": self.rounds,
            "seed": self.seed,
            "specs": [spec.to_dict() for spec in self.specs],
            "times_ns": [list(self.race.get(spec, ())) for spec in self.specs],
            "dropped": [self.race.dropped.get(spec, "") for spec in self.specs],
            "read_ns_a_byte": list(self.race.read_ns_a_byte),
        }

    @classmethod
    def from_dict(cls, fingerprint: Fingerprint, data: Mapping[str, Any]) -> RaceRecord:
        specs = tuple(KernelSpec.from_dict(spec) for spec in data["specs"])
        times = zip(specs, data["times_ns"], strict=True)
        dropped = zip(specs, data["dropped"], strict=True)
        return cls(
            fingerprint=fingerprint,
            shape=Shape.parse(data["shape"]),
            n=int(data["n"]),
            threads=int(data["threads"]),
            cold=bool(data["cold"]),
            rounds=int(data["rounds"]),
            seed=int(data["seed"]),
            specs=specs,
            race=Race(
                times_ns={spec: tuple(float(t) for t in row) for spec, row in times if row},
                dropped={spec: str(reason) for spec, reason in dropped if reason},
                read_ns_a_byte=tuple(float(t) for t in data["read_ns_a_byte"]),
            ),
            time=float(data["time"]),
        )


@dataclass(frozen=True)
class Winner:
    """The fastest kernel of one layout for a shape, a regime and a thread count.

    ``time_ns`` and ``default_ns`` are medians of one interleaved race at ``n`` tokens; ``default_ns`` is that
    of the family's untuned default, None where the default failed.
    """

    spec: KernelSpec
    n: int
    threads: int
    time_ns: float
    default_ns: float | None

    @property
    def regime(self) -> str:
        return self.spec.regime

    def to_dict(self) -> dict[str, Any]:
        return {
            "spec": self.spec.to_dict(),
            "n": self.n,
            "threads": self.threads,
            "time_ns": self.time_ns,
            "default_ns": self.default_ns,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Winner:
        default_ns = data["default_ns"]
        return cls(
            spec=KernelSpec.from_dict(data["spec"]),
            n=int(data["n"]),
            threads=int(data["threads"]),
            time_ns=float(data["time_ns"]),
            default_ns=None if default_ns is None else float(default_ns),
        )


@dataclass(frozen=True)
class TuningRecord:
    """What a tune decided for one shape: its layout, and the winners of every layout that was searched.

    ``best_threads``: the number of threads on which the whole model was fastest; 0 where only one was tried.
    One record a shape, so the layout and the kernels that read it cannot be torn apart.
    """

    kind: ClassVar[str] = "tuning"
    fingerprint: Fingerprint
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

    def to_dict(self) -> dict[str, Any]:
        return {
            "shape": self.shape.name,
            "objective": self.objective,
            "layout": self.layout.to_dict(),
            "winners": [winner.to_dict() for winner in self.winners],
            "seed": self.seed,
            "best_threads": self.best_threads,
        }

    @classmethod
    def from_dict(cls, fingerprint: Fingerprint, data: Mapping[str, Any]) -> TuningRecord:
        return cls(
            fingerprint=fingerprint,
            shape=Shape.parse(data["shape"]),
            objective=str(data["objective"]),
            layout=Layout.from_dict(data["layout"]),
            winners=tuple(Winner.from_dict(winner) for winner in data["winners"]),
            seed=int(data["seed"]),
            best_threads=int(data.get("best_threads", 0)),
            time=float(data["time"]),
        )


Record = TrialRecord | RaceRecord | TuningRecord
_KINDS: dict[str, type[Record]] = {c.kind: c for c in (TrialRecord, RaceRecord, TuningRecord)}


class RecordStore:
    """The records of one file, all in memory; `append` writes them through.

    FileError when the file cannot be read. A missing file is an empty store.
    ``skipped`` counts the lines that could not be used.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.reload()

    def reload(self) -> None:
        """Read the file again: another process may have appended to it."""
        self.skipped = 0
        self.tunings: list[TuningRecord] = []
        self._trials: dict[tuple[str, JobKey], TrialRecord] = {}
        self._races: dict[tuple[str, RaceKey], RaceRecord] = {}
        self._fingerprints: dict[tuple[Any, ...], Fingerprint] = {}
        for record in self._read():
            self._remember(record)

    # ---- questions ----

    def known(self, job: JobKey, fingerprint: Fingerprint) -> Measurement | None:
        """The newest measurement of exactly this job under exactly this fingerprint."""
        record = self._trials.get((fingerprint.digest, job))
        return record.measurement if record else None

    def known_race(self, race: RaceKey, fingerprint: Fingerprint) -> Race | None:
        """The newest block of a race between exactly these kernels with this seed."""
        record = self._races.get((fingerprint.digest, race))
        return record.race if record else None

    def trials(self, fingerprint: Fingerprint | None = None) -> Iterator[TrialRecord]:
        """The newest trial of every job, of one fingerprint or of all."""
        for key, record in self._trials.items():
            if fingerprint is None or key[0] == fingerprint.digest:
                yield record

    def layout(self, shape: Shape, fingerprint: Fingerprint) -> Layout | None:
        """The layout the newest tune chose for ``shape``; one that saw less overrules none that saw more.

        A tune of n = 1 alone, or of one family, knows nothing of what its layout costs a prompt, or of what
        another family would have cost.
        """
        records = list(self._newest(shape, fingerprint))
        seen = [frozenset((w.regime, w.spec.family) for w in record.winners) for record in records]
        newest = (r for r, mine in zip(records, seen, strict=True) if not any(mine < other for other in seen))
        return next((record.layout for record in newest), None)

    def best(self, shape: Shape, regime: str, threads: int, fingerprint: Fingerprint) -> Winner | None:
        """The winner for ``shape`` in the layout chosen last, or None where nothing valid is recorded.

        Keyed by thread count: the nearest one that is not higher than ``threads`` serves, the newest first.
        An older tune fills in for a regime that the newest one left out, as long as it reads that layout.
        """
        regime_named(regime)
        layout = self.layout(shape, fingerprint)
        found: Winner | None = None
        for record in self._newest(shape, fingerprint):
            for winner in record.winners:
                fits = winner.spec.layout == layout and winner.regime == regime and winner.threads <= threads
                if fits and (found is None or winner.threads > found.threads):
                    found = winner
        return found

    def best_threads(self, shapes: Iterable[Shape], fingerprint: Fingerprint) -> int:
        """The number of threads on which a model of these shapes was fastest; 0 where that is not known.

        Known when the newest tune that compared some says the same for all shapes, and a later one did not
        choose other layouts.
        """
        found = {self._best_threads(shape, fingerprint) for shape in shapes}
        return found.pop() if len(found) == 1 else 0

    def _best_threads(self, shape: Shape, fingerprint: Fingerprint) -> int:
        compared = next((r for r in self._newest(shape, fingerprint) if r.best_threads), None)
        valid = compared is not None and compared.layout == self.layout(shape, fingerprint)
        return compared.best_threads if compared and valid else 0

    def current(self, shape: Shape, fingerprint: Fingerprint) -> list[KernelSpec]:
        """The kernels the newest tune of ``shape`` crowned, whatever their layout."""
        newest = next(self._newest(shape, fingerprint), None)
        return [winner.spec for winner in newest.winners] if newest else []

    def stale(self, fingerprint: Fingerprint) -> list[KernelSpec]:
        """Winners under other fingerprints, newest first: their schedules are worth a try, no more."""
        old = [r for r in self.tunings if r.fingerprint.digest != fingerprint.digest]
        return list(dict.fromkeys(w.spec for record in reversed(old) for w in record.winners))

    def _newest(self, shape: Shape, fingerprint: Fingerprint) -> Iterator[TuningRecord]:
        digest = fingerprint.digest
        return (r for r in reversed(self.tunings) if r.shape == shape and r.fingerprint.digest == digest)

    # ---- writing ----

    def append(self, record: Record) -> None:
        """Write ``record`` at the end of the file and remember it. BitgenError when it cannot be written."""
        data = {
            "schema": SCHEMA,
            "kind": record.kind,
            "time": record.time,
            "fingerprint": asdict(record.fingerprint),
            **record.to_dict(),
        }
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
        digest = record.fingerprint.digest
        if isinstance(record, TrialRecord):
            self._trials[digest, record.measurement.job.key] = record
        elif isinstance(record, RaceRecord):
            self._races[digest, record.key] = record
        else:
            self.tunings.append(record)

    # ---- reading ----

    def _read(self) -> Iterator[Record]:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise FileError(f"cannot read {self.path}: {error.strerror or error}") from error
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            record = self._parse(line)
            if record is None:
                self.skipped += 1
            else:
                yield record

    def _parse(self, line: bytes) -> Record | None:
        """The record a line holds; None for a torn line, another schema, or anything else that is not one."""
        try:
            data = json.loads(line)
            if data["schema"] != SCHEMA:
                return None
            cls = _KINDS[data["kind"]]
            return cls.from_dict(self._fingerprint(data["fingerprint"]), data)
        except (ValueError, LookupError, TypeError, AttributeError, BitgenError, RecursionError):
            return None

    def _fingerprint(self, data: Mapping[str, Any]) -> Fingerprint:
        """One object for equal fingerprints: thousands of records share a few."""
        key = tuple(data.values())
        if key not in self._fingerprints:
            self._fingerprints[key] = Fingerprint.from_dict(data)
        return self._fingerprints[key]


def _append_line(path: Path, line: bytes, sync: bool) -> None:
    """Append ``line`` whole or not at all. OSError when it does not fit."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # given back by close, and by the death of the process
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
