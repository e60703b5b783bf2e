"""The command line on a machine with a sensor, with one that only root may read, and with none.

The program is as it ships: its /sys/class is a folder of the test, in a mount namespace of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WATTS = 30.0
ROOT = Path(__file__).parents[2]
UNSHARE = shutil.which("unshare") or ""
NO_SENSOR = (
    "bitgen: energy: not available (neither powercap nor a known hwmon sensor here: a virtual machine?)"
)
COUNTER = "/sys/class/powercap/intel-rapl:0/energy_uj"
NO_PERMISSION = (
    f"bitgen: energy: not available (only root may read {COUNTER}; docs/guide/energy.md has a udev rule)"
)


def _missing() -> str:
    """Why a program cannot be given another /sys/class; empty where it can."""
    if not sys.platform.startswith("linux") or os.getuid() != 0:
        return "only root of a Linux may mount a folder over /sys/class"
    for name in ("unshare", "setpriv"):
        if not shutil.which(name):
            return f"{name} is not installed (util-linux)"
    words = [UNSHARE, "--mount", "mount", "--bind", "/tmp", "/sys/class"]  # noqa: S108 - any folder
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"no mount namespace: {done.stderr.strip()}" if done.returncode else ""


@pytest.fixture(scope="module", autouse=True)
def _namespace() -> None:
    if missing := _missing():
        pytest.skip(missing)


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    folder = tmp_path / "class"
    folder.mkdir()
    return folder


@pytest.fixture
def sensor(sysfs: Path) -> Iterator[Path]:
    """A package that takes `WATTS` from now on."""
    zone = sysfs / "powercap" / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    began, ended = time.monotonic(), threading.Event()

    def count() -> None:
        part = zone / "part"
        part.write_text(f"{int(1e6 * WATTS * (time.monotonic() - began))}\n")
        part.chmod(0o400)
        os.chown(part, 65534, -1)  # as root without the right to read everything sees root's files
        part.replace(zone / "energy_uj")

    def run() -> None:
        while not ended.wait(0.005):
            count()

    count()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield zone
    ended.set()
    thread.join()


def said(sysfs: Path, *words: str, reads_all: bool = True) -> tuple[str, str]:
    """Standard output and error of `bitgen`, whose /sys/class is ``sysfs``."""
    rights = [] if reads_all else ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--"]
    script = 'mount --bind "$1" /sys/class && shift && exec "$@"'
    command = [*rights, sys.executable, "-m", "bitgen", *words]
    done = subprocess.run(
        [UNSHARE, "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(sysfs), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def bench(bundle: Path) -> list[str]:
    model = ["-m", "tiny", "--library", str(bundle), "-t", "1"]
    return ["bench", *model, "-p", "0", "-n", "8", "-r", "1", "--energy"]


@pytest.fixture
def run(bundle: Path) -> list[str]:
    model = ["-m", "tiny", "--library", str(bundle), "-t", "1"]
    return ["run", *model, "-p", "And", "-n", "4", "--temp", "0", "--energy"]


@pytest.mark.usefixtures("sensor")
def test_a_sensor_gives_joules_a_token(bench: list[str], sysfs: Path) -> None:
    out, err = said(sysfs, *bench, "-o", "json")
    found = json.loads(out)
    assert "energy" not in err
    assert found["energy"]["scope"] == "CPU package, without DRAM"
    assert 0 < found["energy"]["idle_watts"] < 2 * WATTS
    (row,) = found["bench"]
    assert row["net_joules_token"] < row["joules_token"]
    assert row["joules_token"] > 0


@pytest.mark.usefixtures("sensor")
def test_a_text_ends_with_what_it_took(run: list[str], sysfs: Path) -> None:
    _, err = said(sysfs, *run)
    assert "           energy = CPU package, without DRAM" in err
    assert "idle" in err


@pytest.mark.parametrize(
    ("permitted", "line"), [pytest.param(True, NO_SENSOR, id="none"), pytest.param(False, NO_PERMISSION)]
)
def test_without_numbers_there_is_one_line(
    permitted: bool, line: str, bench: list[str], run: list[str], sysfs: Path, request: pytest.FixtureRequest
) -> None:
    if not permitted:
        request.getfixturevalue("sensor")
    for words in (bench, run):
        out, err = said(sysfs, *words, reads_all=permitted)
        assert [text for text in err.splitlines() if "energy" in text] == [line]
        assert "J/token" not in out
    out, _ = said(sysfs, *bench, "-o", "json", reads_all=permitted)
    found = json.loads(out)
    assert found["energy"] is None
    assert [row["joules_token"] for row in found["bench"]] == [None]
    out, _ = said(sysfs, *bench, "-o", "csv", reads_all=permitted)
    head, values = (line.split(",") for line in out.splitlines())
    assert values[head.index("joules_token")] == ""
