"""Where records are found and the page is written."""

from __future__ import annotations

from pathlib import Path

from bitgen.cpu import detect_cpu
from bitgen.errors import FileError
from bitgen.fingerprints import cpu_text
from bitgen.formats.config import ModelPreset
from bitgen.formats.open import preset_of
from bitgen.paths import tune_logs_dir
from bitgen.report.page import render_report
from bitgen.report.tune import tune_of
from bitgen.store import RecordStore


def write_report(
    records: Path | None = None,
    *,
    model: str | ModelPreset | None = None,
    against: Path | None = None,
    logs: Path | None = None,
    out: Path = Path("report.html"),
) -> Path:
    """Write one HTML file about the newest tune in ``records``, or the newest of ``model``; returns its path.

    ``records`` and ``against``, the tune to compare with, are files of records, or folders with those of this
    machine's microarchitecture or of one only; None: this machine's, in ``logs``.
    BitgenError when there is no finished tune, FileError when a file cannot be read or written.
    """
    cpu = detect_cpu()
    preset = None if model is None else preset_of(model)
    files = [records_file(records or tune_logs_dir(logs), cpu.family)]
    files += [] if against is None else [records_file(against, cpu.family)]
    page = render_report(*(tune_of(RecordStore(file), preset, cpu, cpu_text(cpu)) for file in files))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write {out}: {error.strerror or error}") from error
    return out


def records_file(path: Path, family: str) -> Path:
    """The file of records that ``path`` means: itself, or of a folder this machine's or the only one."""
    if not path.is_dir():
        if not path.exists():
            raise FileError(f"there are no records at {path}: run bitgen tune --model NAME first")
        return path
    own, every = path / f"{family}.jsonl", sorted(path.glob("*.jsonl"))
    if own in every or len(every) == 1:
        return own if own in every else every[0]
    if not every:
        raise FileError(f"there are no records in {path}: run bitgen tune --model NAME first")
    names = ", ".join(file.name for file in every)
    raise FileError(f"{path} has records of several microarchitectures: give one file of {names}")
