"""What a race of bundles found on a CPU, remembered: `bitgen bundle pick --measure` writes it.

::

    CACHE/races/FINGERPRINT.json     of the CPU and its threads: nanoseconds by the sha256 of a library
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bitgen.bundle.manifest import Bundle
from bitgen.cpu import Cpu, cpu_key
from bitgen.errors import BitgenError
from bitgen.paths import cache_dir, ensure_dir
from bitgen.records import dump, load, load_json
from bitgen.trust import write_private, writing_to


@dataclass(frozen=True)
class Measured:
    """Nanoseconds of one and the same work by the sha256 of each library that was raced on ``cpu``."""

    cpu: str
    times_ns: Mapping[str, float] = field(default_factory=dict)

    def of(self, bundle: Bundle) -> float | None:
        """What the library of a bundle took; None when it was not among those."""
        return self.times_ns.get(bundle.manifest.files.get(bundle.manifest.library, ""))


def recall(cpu: Cpu) -> Measured:
    """The last race on this CPU; without times where there was none, or its file is damaged."""
    try:
        return load(Measured, load_json(_file(cpu)), str(_file(cpu)))
    except BitgenError:
        return Measured(cpu.model_name)


def remember(cpu: Cpu, measured: Measured) -> Path:
    """Write what a race found; returns the file. FileError when it cannot be written."""
    file = _file(cpu)
    ensure_dir(file.parent)
    with writing_to(file):
        write_private(file, (json.dumps(dump(measured), indent=1) + "\n").encode())
    return file


def _file(cpu: Cpu) -> Path:
    return cache_dir() / "races" / f"{cpu_key(cpu)}.json"
