"""Joules a token: which sensor this machine has, and what each phase of its work took.

A `Source` counts joules; `open_source` finds one. A `Meter` reads it where the work changes, and adds up
joules and seconds by phase. Nothing is estimated: without a sensor, after one failed, or for work that is too
short for it, there is a reason and no number.
"""

from __future__ import annotations

import re
import shlex
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

from bitgen.errors import BitgenError, UsageError

IDLE = "idle"
_IDLE_S = 2.0
_REREAD_S = 5.0  # a counter is read so often at least, or a wrap could be missed
_MOST_WATTS = 1000.0  # of a package: what tells how soon its counter may wrap
_COUNTER_LEAST_S = 0.1  # the counter moves once a millisecond: a hundredth
_POWER_LEAST_S = 3.0
_HWMON_S, _COMMAND_S = 0.1, 1.0  # between two readings of a power
_COMMAND_MOST_S = 10.0
_UNITS = {"J": 1.0, "mJ": 1e-3, "W": 1.0, "mW": 1e-3}
# Chips of hwmon whose numbers are known to be of this: (attribute, pattern of its label, what it covers).
_HWMON = {
    "amd_energy": ("energy*_input", r"Esocket\d+", "CPU socket, without DRAM"),
    "fam15h_power": ("power*_input", "", "CPU package, without DRAM"),
    "power_meter": ("power*_average", "", "whole machine (ACPI power meter)"),
    "macsmc_hwmon": ("power*_input", "Total System Power", "whole machine"),
}


class NoSensorError(BitgenError):
    """Why there are no joules."""


class Source(Protocol):
    """Counts joules from when it was opened.

    ``scope`` says of what; work shorter than ``least_s`` is too short for it, and readings more than
    ``most_s`` apart may have missed a wrap.
    """

    scope: str
    least_s: float
    most_s: float

    def joules(self) -> float: ...

    def close(self) -> None: ...


# ---- Sources ----


class Counters:
    """Files of the kernel that count microjoules, added up; each starts over at its range (0: never)."""

    least_s = _COUNTER_LEAST_S

    def __init__(self, scope: str, files: Sequence[tuple[Path, int]]) -> None:
        self.scope = scope
        self.most_s = min((span / 1e6 / _MOST_WATTS for _, span in files if span), default=float("inf"))
        self._files = [(path, span) for path, span in files]
        self._last = [_number(path) for path, _ in files]
        self._total = 0

    def joules(self) -> float:
        for index, (path, span) in enumerate(self._files):
            now, last = _number(path), self._last[index]
            if now < last and not span:
                raise NoSensorError(f"{path} went back from {last} to {now}")
            self._total += now - last + (span if now < last else 0)
            self._last[index] = now
        return self._total / 1e6

    def close(self) -> None:
        pass


class Power:
    """Integrates watts that a thread reads every ``every_s`` seconds, each with the one before."""

    least_s = _POWER_LEAST_S
    most_s = float("inf")

    def __init__(
        self,
        scope: str,
        watts: Callable[[], float],
        every_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scope = scope
        self._watts, self._clock, self._every_s = watts, clock, every_s
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._error: BitgenError | None = None
        self._total, self._last = 0.0, watts()
        self._at = clock()
        self._thread = threading.Thread(target=self._run, name="bitgen-energy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.sample()
            except BitgenError as error:
                self._error = error
                return

    def sample(self) -> None:
        """Read the power now."""
        watts = self._watts()
        with self._lock:
            now = self._clock()
            self._total += (self._last + watts) / 2 * (now - self._at)
            self._last, self._at = watts, now

    def joules(self) -> float:
        if self._error is not None:
            raise self._error
        with self._lock:
            return self._total + self._last * (self._clock() - self._at)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class Command:
    """A program that prints one number with its unit, as "1234.5 J" or "35.2 W"; no shell reads its line."""

    def __init__(self, line: str) -> None:
        try:
            self.argv = shlex.split(line)
        except ValueError as error:
            raise UsageError(f"--energy-command {line!r}: {error}") from None
        if not self.argv:
            raise UsageError("--energy-command is empty: give a program and its arguments")

    def read(self) -> tuple[float, str]:
        """Joules or watts, and which of them. NoSensorError when it fails or prints anything else."""
        name = self.argv[0]
        try:
            done = subprocess.run(
                self.argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_MOST_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise NoSensorError(f"{name} took longer than {_COMMAND_MOST_S:g} s") from None
        except OSError as error:
            raise NoSensorError(f"cannot run {name}: {error.strerror or error}") from None
        if done.returncode:
            raise NoSensorError(f"{name} ended with exit code {done.returncode}")
        text = done.stdout.decode("utf-8", "replace").strip()
        found = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?) ?(J|mJ|W|mW)", text)
        if not found:
            raise NoSensorError(f"{name} must print a number with J, mJ, W or mW, not {text[:40]!r}")
        return float(found[1]) * _UNITS[found[2]], found[2][-1]

    def number(self, unit: str) -> float:
        value, found = self.read()
        if found != unit:
            raise NoSensorError(f"{self.argv[0]} printed {unit} before and {found} now")
        return value


class CommandJoules:
    """A command that prints joules, a number that only grows; it is run for each reading."""

    least_s = _COUNTER_LEAST_S
    most_s = float("inf")

    def __init__(self, command: Command, first: float) -> None:
        self.scope = f"what {command.argv[0]} counts"
        self._command, self._first, self._last = command, first, first

    def joules(self) -> float:
        now = self._command.number("J")
        if now < self._last:
            raise NoSensorError(f"{self._command.argv[0]} went back from {self._last:g} J to {now:g} J")
        self._last = now
        return now - self._first

    def close(self) -> None:
        pass


def open_source(command: str | None = None, root: Path = Path("/")) -> Source:
    """The sensor of this machine, or a ``command`` that reads one.

    powercap's packages come first (Intel, AMD), then hwmon. NoSensorError says why there is none; a command
    that cannot be used is a UsageError.
    """
    if command is not None:
        return _command_source(Command(command))
    source = _powercap(root / "sys/class/powercap") or _hwmon(root / "sys/class/hwmon")
    if source is None:
        raise NoSensorError("neither powercap nor a known hwmon sensor here: a virtual machine?")
    return source


def _command_source(command: Command) -> Source:
    try:
        value, unit = command.read()
    except NoSensorError as error:
        raise UsageError(f"--energy-command: {error.message}") from None
    if unit == "J":
        return CommandJoules(command, value)
    return Power(f"what {command.argv[0]} measures", lambda: command.number("W"), _COMMAND_S)


def _powercap(folder: Path) -> Source | None:
    """The packages, and no zone that is inside another or counts the same again (psys, mmio)."""
    zones = sorted(folder.glob("intel-rapl:*")) or sorted(folder.glob("intel-rapl-mmio:*"))
    packages = [
        zone
        for zone in zones
        if re.fullmatch(r"intel-rapl(-mmio)?:\d+", zone.name) and _text(zone / "name").startswith("package")
    ]
    if not packages:
        return None
    files = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in packages]
    count = f", {len(packages)} packages" if len(packages) > 1 else ""
    return Counters(f"CPU package{count}, without DRAM", files)


def _hwmon(folder: Path) -> Source | None:
    for chip in sorted(folder.glob("hwmon*")):
        known = _HWMON.get(_text(chip / "name") if (chip / "name").exists() else "")
        if known is None:
            continue
        pattern, label, scope = known
        found = [file for file in sorted(chip.glob(pattern)) if _has_label(file, label)]
        if found and pattern.startswith("energy"):
            return Counters(scope, [(file, 0) for file in found])
        if found:
            _number(found[0])
            return Power(scope, partial(_watts, found), _HWMON_S)
    return None


def _watts(files: Sequence[Path]) -> float:
    return sum(map(_number, files)) / 1e6


def _has_label(file: Path, pattern: str) -> bool:
    label = file.with_name(f"{file.name.rpartition('_')[0]}_label")
    return not pattern or (label.exists() and re.fullmatch(pattern, _text(label)) is not None)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except PermissionError:
        raise NoSensorError(f"only root may read {path}; docs/guide/energy.md has a udev rule") from None
    except OSError as error:
        raise NoSensorError(f"cannot read {path}: {error.strerror or error}") from None


def _number(path: Path) -> int:
    text = _text(path)
    if not text.isdecimal():
        raise NoSensorError(f"{path} holds {text[:40]!r}, not a number")
    return int(text)


# ---- Who is charged ----


@dataclass(frozen=True)
class Spent:
    """Joules and seconds of some work."""

    joules: float = 0.0
    seconds: float = 0.0

    def a_token(self, tokens: int, idle_watts: float = 0.0) -> float:
        """Joules a token, less what an idle machine would have taken."""
        return (self.joules - idle_watts * self.seconds) / tokens


class Meter:
    """Adds up joules and seconds by phase. `enter` says what is done from now on; it costs one reading.

    ``error`` says why there is nothing more; ``spent`` is empty then. At the end of a ``with`` its source is
    closed.
    """

    def __init__(self, source: Source, clock: Callable[[], float] = time.perf_counter) -> None:
        self.scope = source.scope
        self.error = ""
        self._source, self._clock = source, clock
        self._spent: dict[str, Spent] = {}
        self._phase: str | None = None
        self._at = self._joules = 0.0

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._source.close()

    @property
    def spent(self) -> Mapping[str, Spent]:
        """What each phase took until it last changed."""
        return {} if self.error else self._spent

    def enter(self, phase: str | None) -> None:
        """Charge what follows to ``phase``; None: to nobody."""
        if self.error or (phase == self._phase and (phase is None or self._recent())):
            return
        try:
            joules, now = self._source.joules(), self._clock()
        except BitgenError as error:
            self.error = error.message
            return
        seconds = now - self._at
        if self._phase is not None and seconds <= self._source.most_s:
            before = self._spent.get(self._phase, Spent())
            total = Spent(before.joules + joules - self._joules, before.seconds + seconds)
            self._spent = {**self._spent, self._phase: total}
        elif self._phase not in (None, IDLE):
            self.error = f"no reading for {seconds:.0f} s: the counter may have started over meanwhile"
        self._phase, self._at, self._joules = phase, now, joules

    def _recent(self) -> bool:
        return self._clock() - self._at < min(_REREAD_S, self._source.most_s / 2)

    def measure_idle(self, sleep: Callable[[float], object] = time.sleep) -> None:
        """What the machine takes while nothing runs, over two seconds, or as long as its sensor needs."""
        self.enter(IDLE)
        sleep(max(_IDLE_S, self._source.least_s))
        self.enter(None)

    @property
    def idle_watts(self) -> float | None:
        """None where no idleness was long enough to be measured."""
        idle = self.spent.get(IDLE, Spent())
        return idle.joules / idle.seconds if idle.seconds >= max(1.0, self._source.least_s) else None

    def enough(self, phase: str) -> bool:
        """Whether a phase was long enough for its joules to mean something."""
        return self.spent.get(phase, Spent()).seconds >= self._source.least_s

    def take(self, phase: str) -> Spent | None:
        """What a phase took, which starts over; None when that is not known."""
        known = self.enough(phase)
        spent = self._spent.pop(phase, None)
        return spent if known else None


def median_a_token(spans: Sequence[Spent], tokens: Sequence[int], idle_watts: float | None) -> float | None:
    """The median of joules a token over spans of work; None without any, or without the idle power."""
    if not spans or idle_watts is None:
        return None
    pairs = zip(spans, tokens, strict=True)
    return statistics.median(span.a_token(count, idle_watts) for span, count in pairs)
