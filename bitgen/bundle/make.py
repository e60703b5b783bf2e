"""Make the libraries of a release: from committed winners, stripped, with the release compiler.

Nothing that was tuned on this machine goes in: (winners, templates, compiler) decide the bytes. Families that
run the same ISA level share what is compiled, by its content.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bitgen import __version__
from bitgen.bundle.contents import Target
from bitgen.bundle.manifest import Bundle, KernelEntry, read_bundle
from bitgen.bundle.pack import Packed, Signer, pack
from bitgen.bundle.transfer import Chosen, committed_kernels
from bitgen.bundle.wheel import slim, write_wheel
from bitgen.bundle.write import write_library
from bitgen.cpu import Cpu, accepted_isas, detect_cpu, load_isas, target_cpu
from bitgen.errors import FileError, UsageError
from bitgen.formats.config import ModelPreset
from bitgen.progress import Progress, Report
from bitgen.toolchain import Toolchain, find_cross_compilers, release_compiler
from bitgen.winners import committed_shapes

UNIVERSAL = "universal"  # a family's name in lists of them: one library for every CPU of an architecture
_SYSTEMS = {"windows": "Windows", "macos": "Darwin"}  # behind a family's name: for that system, not for Linux
_RUN_BY_NOBODY = {
    "Darwin": "built, never run: no test has a Mac",
    "Windows": "run under Wine alone: no test has Windows",
}


@dataclass(frozen=True)
class Release:
    """What is made: kernels of ``model`` for ``families``.

    Those are names of configs/targets.yaml and universal-ARCH, for another system than Linux with -windows or
    -macos behind them; apple-m1 is for macOS by itself.
    """

    model: ModelPreset
    families: tuple[str, ...]
    version: str = __version__
    cc: str | None = None

    @property
    def name(self) -> str:
        """What its folder, zips and wheels are called."""
        return f"bitgen-kernels-{self.model.alias}-{self.version}"


@dataclass(frozen=True)
class Released:
    """What was written: the whole folder, and for each system and architecture a zip and (Linux) a wheel."""

    folder: Packed
    bundles: tuple[Bundle, ...]
    containers: tuple[Path, ...]


def make_release(
    release: Release, out: Path, *, signer: Signer | None = None, progress: Report | None = None
) -> Released:
    """Write the release to ``out``; FileError when its folder is there already.

    UsageError for an unknown family or one that is named twice; ToolchainError where a compiler is missing.
    """
    cpus = [(name, *_named(name)) for name in dict.fromkeys(release.families)]
    if len(cpus) < len(release.families) or not cpus:
        raise UsageError("name each CPU family once, and at least one")
    if (out / release.name).exists():
        raise FileError(f"{out / release.name} exists; remove it or give another -o or --release")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".making-", dir=out) as scratch:
        built: dict[tuple[str, str], list[Path]] = {}
        for count, (name, cpu, universal) in enumerate(cpus):
            if progress:
                progress(Progress(name, count, len(cpus), "bundles"))
            folder = Path(scratch) / f"{cpu.os}-{cpu.arch}".lower()
            target = Target.every(cpu.arch, cpu.os) if universal else Target.of(cpu)
            built.setdefault((cpu.os, cpu.arch), []).append(_family_library(release, name, target, folder))
        whole = [path for paths in built.values() for path in paths]
        packed = _pack(release, whole, out / release.name, signer)
        containers: list[Path] = []
        for (system, arch), paths in built.items():
            archive = out / f"{release.name}-{system}-{arch}.zip".lower()
            containers.append(_pack(release, paths, archive, signer).path)
            if system == "Linux":
                slims = [slim(path, Path(scratch) / "slim" / arch / path.name) for path in paths]
                thin = _pack(release, slims, Path(scratch) / f"wheel-{arch}", signer)
                containers.append(write_wheel(thin, out))
        names = [path.name for path in whole]
    return Released(packed, tuple(read_bundle(packed.path / name) for name in names), tuple(containers))


def make_universal(
    arch: str,
    out: Path,
    *,
    system: str = "Linux",
    libc: str = "gnu",
    cc: str | None = None,
) -> Path:
    """Write the bundle ``out/universal-ARCH`` with all ISA levels of an architecture; returns its folder.

    It has kernels for the shapes of all committed winners. ``libc``: gnu or musl, of Linux. It is executed at
    each level that this machine runs. Errors: as of `bitgen.bundle.write.write_library`.
    """
    target = Target.every(arch, system)
    chosen = committed_kernels(target, committed_shapes(arch))
    return write_library(
        chosen.entries,
        release_toolchain(arch, system, cc, libc=libc),
        out,
        f"{UNIVERSAL}-{arch}",
        target,
        label=chosen.label,
        origin=_origin(chosen, system),
        check=_runs_here(target) and (libc == "gnu") == (platform.libc_ver()[0] == "glibc"),
        release=True,
    )


def release_toolchain(arch: str, system: str, cc: str | None = None, *, libc: str = "gnu") -> Toolchain:
    """The toolchain of releases: zig for host code and linking, gcc for ISA levels, where both are here.

    zig links against old C libraries and musl; gcc's kernels are faster (docs/decisions/0071) and use no C
    library. ``cc``: that compiler for all of it.
    """
    compiler = release_compiler(arch, system, cc, libc=libc)
    kernels = None
    if cc is None and compiler.kind == "zig" and system == "Linux":
        here = (found for found in find_cross_compilers(arch, system) if found.kind == "gcc")
        kernels = next(here, None)
    return Toolchain(compiler, strip=True, kernels=kernels)


def _named(name: str) -> tuple[Cpu, bool]:
    """The CPU of a family's name, and whether all CPUs of its architecture are meant."""
    family, _, last = name.rpartition("-")
    if last not in _SYSTEMS:
        family = name
    system = _SYSTEMS.get(last, "Darwin" if family.startswith("apple") else "Linux")
    if family.startswith(f"{UNIVERSAL}-"):
        arch = family.removeprefix(f"{UNIVERSAL}-")
        return Target.every(arch, system).cpu, True
    return target_cpu(family, system), False


def _origin(chosen: Chosen, system: str) -> str:
    """How its kernels were found, and for some systems that nobody has run them there."""
    return "; ".join(filter(None, (chosen.origin, _RUN_BY_NOBODY.get(system))))


def _family_library(release: Release, name: str, target: Target, folder: Path) -> Path:
    chosen = committed_kernels(target, release.model.shapes, group=release.model.group)
    cpu = target.cpu
    return write_library(
        chosen.entries,
        release_toolchain(cpu.arch, cpu.os, release.cc),
        folder,
        f"{release.model.alias}-{name}",
        target,
        model=release.model.alias,
        sizes=None if target.universal else release.model.step_sizes,  # it would serve the best level alone
        fingerprint=_winners_digest(chosen.entries),
        label=chosen.label,
        origin=_origin(chosen, cpu.os),
        check=_runs_here(target),
        release=True,
    )


def _winners_digest(entries: Sequence[KernelEntry]) -> str | None:
    """Stands for the winners that a library was made from; None without any."""
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16] if entries else None


def _runs_here(target: Target) -> bool:
    here = detect_cpu()
    if (here.arch, here.os) != (target.cpu.arch, target.cpu.os):
        return False
    return target.universal or target.isa in accepted_isas(here, load_isas())


def _pack(release: Release, folders: Sequence[Path], out: Path, signer: Signer | None) -> Packed:
    out.unlink(missing_ok=True) if out.suffix == ".zip" else shutil.rmtree(out, ignore_errors=True)
    return pack(folders, out, name=release.model.alias, version=release.version, signer=signer)
