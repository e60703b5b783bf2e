"""An aarch64 Linux with Python, this package and nothing else, in a folder, run by qemu's user emulation.

::

    python tests/support/aarch64_root.py --core neoverse-n1 FOLDER detect     # `bitgen detect` there

The folder is made when it is new: Debian's Python and C library by apt (with a configuration of its own, so
this machine's packages are not touched), the package and what it depends on by pip. There is no compiler in
it and the search path is empty; programs of this machine start only where a test names one by its path.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import foreign

ROOT = Path(__file__).parents[2]
PACKAGES = ("python3", "libstdc++6")
PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64")
APT_CONFIG = """\
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "";
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
"""


class UnavailableError(Exception):
    """A piece of the system cannot be had here; the text says which."""


def why_not() -> str | None:
    """What this machine lacks to make and run the system; None when nothing is."""
    if foreign.QEMU is None:
        return "no emulator: apt-get install qemu-user"
    tools = [name for name in ("apt-get", "dpkg-deb") if shutil.which(name) is None]
    return f"no {' and no '.join(tools)}: only on Debian" if tools else None


@dataclass(frozen=True)
class Aarch64Root:
    """The system in ``folder``; `made` makes it."""

    folder: Path

    @property
    def python(self) -> Path:
        """A program of this machine that runs the Python of the system; sys.executable of the latter."""
        return self.folder / "python"

    def run(
        self, *argv: str | Path, core: str = "max", text: str | None = None, timeout_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """``python argv`` on a ``core`` of qemu's, in an empty home folder."""
        home = self.folder / "home"
        environment = {"QEMU_CPU": core, "HOME": str(home), "LANG": "C.UTF-8"}
        return subprocess.run(
            [self.python, *argv],
            input=text,
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def made(folder: Path) -> Aarch64Root:
    """The system in ``folder``, made now unless it is there. UnavailableError when a piece cannot be had."""
    reason = why_not()
    if reason:
        raise UnavailableError(reason)
    system = Aarch64Root(folder.absolute())
    if not system.python.exists():
        system.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=system.folder.parent) as scratch:
            new = Path(scratch) / "new"
            (new / "home").mkdir(parents=True)
            _unpack_debian(new)
            _install_package(new)
            _write_launcher(system, new / "python")
            new.rename(system.folder)
    return system


def _unpack_debian(folder: Path) -> None:
    apt = folder / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True)
    (apt / "state/status").touch()
    config = apt / "apt.conf"
    config.write_text(APT_CONFIG.format(folder=apt), encoding="utf-8")
    environment = {**os.environ, "APT_CONFIG": str(config), "DEBIAN_FRONTEND": "noninteractive"}
    _get(["apt-get", "-qq", "update"], environment)
    download = ["apt-get", "-qq", "install", "-y", "--no-install-recommends", "--download-only"]
    _get([*download, *PACKAGES], environment)
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _get(["dpkg-deb", "-x", str(package), str(folder / "system")])
    shutil.rmtree(apt)


def _install_package(folder: Path) -> None:
    """pip of this machine, told for which one it installs: nothing of what it unpacks is executed."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    wheels = folder / "wheels"
    _get([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(ROOT)])
    (wheel,) = wheels.glob("*.whl")
    (program,) = (folder / "system/usr/bin").glob("python3.[0-9]*[0-9]")
    machine = [word for name in PLATFORMS for word in ("--platform", name)]
    machine += ["--implementation", "cp", "--python-version", program.name.removeprefix("python")]
    target = ["--target", str(folder / "site"), "--only-binary=:all:", "--no-compile"]
    _get([*pip, "install", *target, *machine, str(wheel)])


def _write_launcher(system: Aarch64Root, file: Path) -> None:
    """A script, so that Python can start itself again; `-0` tells it the script's name as its own."""
    root = system.folder / "system"
    words = [f'exec "{foreign.QEMU}" -L "{root}" -0 "{system.python}"']
    words += [f'-E PYTHONHOME="{root}/usr" -E PYTHONPATH="{system.folder}/site" -E PATH=/nonexistent']
    # Emulated, compiling the package takes many times as long as running it: once is enough.
    words += [f'-E PYTHONPYCACHEPREFIX="{system.folder}/compiled"', f'"{root}/usr/bin/python3" "$@"']
    file.write_text(f"#!/bin/sh\n{' '.join(words)}\n", encoding="utf-8")
    file.chmod(0o755)


def _get(command: Sequence[str], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UnavailableError(f"{' '.join(command[:3])} ...: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run bitgen in an aarch64 Linux without a compiler.")
    parser.add_argument("folder", type=Path, help="folder of the system; made when it is new")
    parser.add_argument("--core", default="max", help="qemu's core: cortex-a72, neoverse-n1, max, ...")
    parser.add_argument("ops", nargs=argparse.REMAINDER, help="bitgen's command line")
    args = parser.parse_args()
    try:
        system = made(args.folder)
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    done = system.run("-m", "bitgen", *args.words, core=args.core, timeout_s=3600)
    print(done.stdout, end="")
    print(done.stderr, end="", file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
