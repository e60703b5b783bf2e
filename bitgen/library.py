"""Chosen kernels -> a library that works without Python: rendered, compiled, proven by running it, written.

What is written is a bundle (see `bitgen.bundle`)::

    NAME/libbitgen-NAME.so      the library;  libbitgen-NAME.so.1 is a link to it, for programs that load it
    NAME/bitgen.h               its public header
    NAME/bitgen.pc              for pkg-config; the folder may be moved
    NAME/manifest.json          what is inside, with digests
    NAME/src/                   the C text it was made from, and a Makefile

Beside the chosen kernels a library always holds, for each layout that occurs and for I2_S, kernels of the
target's ISA level with default schedules and portable ones: every shape is served, tuned or not. SVE leaves
the length of registers to the system: a library with kernels for one length holds others for the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bitgen import __version__
from bitgen.bundle import (
    ABI_VERSION,
    DEFAULT,
    MANIFEST_NAME,
    PORTABLE,
    TUNED,
    KernelEntry,
    Manifest,
    is_bundle,
    sha256_of,
)
from bitgen.errors import EXIT_FAILURE, EXIT_FILE, EXIT_USAGE, BitgenError
from bitgen.host import SYSTEMS, host_headers, library_units, row_grain
from bitgen.paths import HOME_VARIABLE, ensure_dir
from bitgen.render import (
    Source,
    render_kernel,
    render_quantize,
    render_step,
    render_step_header,
    render_tables,
)
from bitgen.space import space_for
from bitgen.spec import (
    FAMILIES,
    MATMUL_STRUCT,
    REGIMES,
    KernelSpec,
    Layout,
    Shape,
    regime_named,
)
from bitgen.target import Cpu, Isa, accepted_isas, find_isa, load_isas
from bitgen.toolchain import (
    DEFAULT_LIBS,
    EXPORTS_FILE,
    CompileError,
    Prototype,
    Toolchain,
    Unit,
    exports_text,
    shared_flags,
)
from bitgen.toolchain.cache import writing

DEFAULT_LAYOUT = Layout("i2s", 16)  # of shapes nobody tuned
_ANY_SHAPE = Shape(4096, 4096)  # default schedules of kernels for every shape come from this one's space
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CHECK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class KernelChoice:
    """A kernel that was chosen for a shape on a number of threads; its spec says for which regime.

    ``shape`` None and ``threads`` 0: it serves every shape, in the place of the default of its layout.
    """

    shape: Shape | None
    spec: KernelSpec
    threads: int

    def __post_init__(self) -> None:
        if (self.shape is None) != (self.threads == 0) or self.threads < 0:
            raise BitgenError(
                f"{self.spec.name}: a kernel for a shape needs threads >= 1, one for all needs 0"
            )
        if self.spec.shape not in (None, self.shape):
            raise BitgenError(f"{self.spec.name} was made for another shape than {self.shape}")


@dataclass(frozen=True)
class Target:
    """What a library is for: a CPU (its family, features and caches) and the ISA level of default kernels."""

    cpu: Cpu
    isa: Isa
    isas: tuple[Isa, ...]

    @classmethod
    def of(cls, cpu: Cpu, isa: str | None = None, isas: Sequence[Isa] | None = None) -> Target:
        """The target ``cpu`` at ISA level ``isa`` (None: the best it runs), out of ``isas`` (None: all)."""
        known = tuple(load_isas() if isas is None else isas)
        best = accepted_isas(cpu, known)
        return cls(cpu, find_isa(isa, known) if isa else best[0], known)

    @cached_property
    def other_lengths(self) -> tuple[Isa, ...]:
        """Where `isa` is for one length of registers: what serves the others, best first.

        The levels with its words that are better than the best level for any length, and that one.
        """
        if not self.isa.exact_vector:
            return ()
        any_length = next(isa for isa in accepted_isas(self.cpu, self.isas) if not isa.exact_vector)
        better = self.isas[self.isas.index(any_length) + 1 :]
        alike = [isa for isa in better if isa.vocabulary == self.isa.vocabulary and isa != self.isa]
        return (*reversed(alike), any_length)

    @property
    def scalar(self) -> Isa:
        """The level that runs on every CPU."""
        return find_isa("scalar", self.isas)


@dataclass(frozen=True)
class Contents:
    """What a library holds: entries in order of preference, and everything those need."""

    target: Target
    entries: tuple[KernelEntry, ...]
    threads: int = 0

    @property
    def cores(self) -> int:
        """On how many usable cores ``threads`` is the default; 0: on none."""
        return self.target.cpu.usable_threads if self.threads else 0

    @cached_property
    def specs(self) -> tuple[KernelSpec, ...]:
        return tuple(dict.fromkeys(entry.spec for entry in self.entries))

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        return tuple(dict.fromkeys(spec.layout for spec in self.specs))

    @cached_property
    def isas(self) -> tuple[Isa, ...]:
        names = dict.fromkeys(spec.isa for spec in self.specs)
        return tuple(find_isa(name, self.target.isas) for name in names)

    @cached_property
    def steps(self) -> tuple[Source, ...]:
        """The forward step at the target's ISA level, for registers of other lengths, and a portable one."""
        target = self.target
        levels = dict.fromkeys(isa.name for isa in (target.isa, *target.other_lengths, target.scalar))
        return tuple(render_step(name) for name in levels)

    @cached_property
    def features(self) -> tuple[str, ...]:
        return tuple(sorted({feature for isa in self.isas for feature in isa.requires}))

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """Kernels, then the quantiser of each ISA level, then the table builders."""
        tables = dict.fromkeys(
            (spec.family, spec.isa, spec.schedule.algorithm) for spec in self.specs if spec.table_bytes
        )
        return (
            *(render_kernel(spec) for spec in self.specs),
            *(render_quantize(isa.name) for isa in self.isas),
            *(render_tables(*which) for which in tables),
        )


def choose_contents(choices: Sequence[KernelChoice], target: Target) -> Contents:
    """The entries of a library with these ``choices``: tuned, then defaults, then portable ones.

    BitgenError when the choices for one shape and thread count read different layouts: its weights are packed
    once and serve every n.
    """
    layout_of: dict[tuple[Shape, int], Layout] = {}
    for choice in choices:
        if choice.shape is not None:
            layout = layout_of.setdefault((choice.shape, choice.threads), choice.spec.layout)
            if layout != choice.spec.layout:
                names = f"{layout.name} and {choice.spec.layout.name}"
                raise BitgenError(f"kernels for {choice.shape.name} read two layouts, {names}")
    generic = [choice.spec for choice in choices if choice.shape is None]
    layouts = dict.fromkeys([*(spec.layout for spec in generic), DEFAULT_LAYOUT])
    layouts |= dict.fromkeys(choice.spec.layout for choice in choices)
    entries = [_entry(choice.spec, TUNED, choice.shape, choice.threads) for choice in choices if choice.shape]
    entries += [_entry(spec, DEFAULT) for spec in generic]
    levels = [(isa, DEFAULT) for isa in (target.isa, *target.other_lengths)]
    for isa, role in (*levels, (target.scalar, PORTABLE)):
        entries += [
            _entry(_default_spec(layout, regime.name, isa, target, choices), role)
            for layout in layouts
            for regime in REGIMES
        ]
    return Contents(target, tuple(dict.fromkeys(entries)))


def _entry(spec: KernelSpec, role: str, shape: Shape | None = None, threads: int = 0) -> KernelEntry:
    return KernelEntry(spec, role, shape, threads, render_kernel(spec).digest)


def _default_spec(
    layout: Layout, regime: str, isa: Isa, target: Target, choices: Sequence[KernelChoice]
) -> KernelSpec:
    """A kernel for every shape of a layout: the space's default, else the first legal point that reads it."""
    space = space_for(layout.family, isa, regime_named(regime), _ANY_SHAPE, target.cpu)
    default = replace(space.default, layout=layout)
    if not space.broken(default):
        return default
    chosen = (choice.spec for choice in choices)
    points: Iterator[KernelSpec] = (
        spec
        for specs in (chosen, space.known_good, space)
        for spec in specs
        if (spec.layout, spec.regime, spec.isa, spec.shape) == (layout, regime, isa.name, None)
    )
    spec = next(points, None)
    if spec is None:
        raise BitgenError(f"no {isa.name} kernel for {regime} reads the layout {layout.name}")
    return spec


def write_library(
    choices: Sequence[KernelChoice],
    toolchain: Toolchain,
    out_dir: Path | str,
    name: str,
    target: Target,
    *,
    model: str | None = None,
    fingerprint: str | None = None,
    threads: int = 0,
    check: bool = True,
) -> Path:
    """Write the bundle ``out_dir/name`` and return its path; it appears whole or not at all.

    ``threads``: the fastest number on the cores of ``target``, the default wherever as many are usable; 0: no
    such number is known.
    ``check`` executes the library in a child process before it is kept: features that a hypervisor only
    advertises show there. An older bundle of this name is replaced. BitgenError: a name that cannot be a
    file's, a folder of this name that is no bundle, a read-only or full disk, a kernel that does not compile
    (CompileError), a library that computes something wrong.
    """
    if not _NAME.fullmatch(name):
        message = f"{name!r} cannot name files; use letters, digits, dot, dash, underscore"
        raise BitgenError(message, EXIT_USAGE)
    contents = replace(choose_contents(choices, target), threads=threads)
    parent = ensure_dir(out_dir).absolute()  # the self-test runs in another folder
    folder = parent / name
    if folder.exists() and not is_bundle(folder):
        raise BitgenError(f"{folder} exists and is not a bundle; choose another name or folder", EXIT_FILE)
    advice = f"choose another folder with --out or {HOME_VARIABLE}"
    with (
        writing(folder, advice),
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=parent, ignore_cleanup_errors=True) as scratch,
    ):
        made = Path(scratch) / name
        _write(made, contents, toolchain, name, model, fingerprint)
        if check:
            _execute(made)
        _move(made, folder, Path(scratch) / "replaced")
    return folder


def _write(
    folder: Path,
    contents: Contents,
    toolchain: Toolchain,
    name: str,
    model: str | None,
    fingerprint: str | None,
) -> None:
    """The files of the bundle, below the new folder ``folder``."""
    folder.mkdir()
    target, library = contents.target, library_name(name, contents.target.cpu.os)
    units = library_units_of(contents)
    soname = f"{library}.{ABI_VERSION}"
    public = dict(host_headers(target.cpu.arch))["bitgen.h"]
    exports = tuple(re.findall(r"^BITGEN_API [^(]*?\b(bitgen_\w+)\(", public, flags=re.MULTILINE))
    toolchain.link_shared(_objects(toolchain, units), folder / library, soname=soname, exports=exports)
    (folder / soname).symlink_to(library)
    (folder / "bitgen.h").write_text(public, encoding="utf-8")
    (folder / "bitgen.pc").write_text(pkg_config(name), encoding="utf-8")
    _write_sources(folder / "src", units, toolchain, library, exports)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    manifest = Manifest(
        name=name,
        library=library,
        arch=target.cpu.arch,
        system=target.cpu.os,
        cpu_family=target.cpu.family,
        model=model,
        isas={isa.name: tuple(sorted(isa.requires)) for isa in contents.isas},
        kernels=contents.entries,
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in files},
        compiler={isa.name: toolchain.fingerprint(isa) for isa in contents.isas},
        fingerprint=fingerprint,
        threads=contents.threads,
        cores=contents.cores,
        bitgen_version=__version__,
    )
    text = json.dumps(manifest.to_dict(), indent=1) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8")


def library_name(name: str, system: str) -> str:
    """The file name of a library: libbitgen-NAME.so, or .dylib."""
    if system not in SYSTEMS:
        raise BitgenError(f"bitgen builds libraries for {' and '.join(SYSTEMS)}, not for {system}")
    return f"libbitgen-{name}.{'dylib' if system == 'Darwin' else 'so'}"


def pkg_config(name: str) -> str:
    """The text of bitgen.pc; its paths are relative to wherever the file lies."""
    return "\n".join(
        (
            "libdir=${pcfiledir}",
            "includedir=${pcfiledir}",
            "",
            "Name: bitgen",
            f"Description: exact matrix kernels for ternary weights ({name})",
            f"Version: {__version__}",
            f"Libs: -L${{libdir}} -lbitgen-{name}",
            f"Libs.private: {' '.join(DEFAULT_LIBS)}",
            "Cflags: -I${includedir}",
            "",
        )
    )


def library_units_of(contents: Contents) -> tuple[Unit, ...]:
    """All translation units of the library: kernels each with the flags of their ISA level, and host code."""
    isas = {isa.name: isa for isa in contents.isas}
    kernels = tuple(
        Unit(
            source.name,
            source.text,
            isas[source.isa],
            tuple(Prototype.parse(text) for text in source.prototypes),
            MATMUL_STRUCT,
        )
        for source in contents.sources
    )
    headers = (("step.h", render_step_header()),)
    steps = tuple(
        Unit(source.name, source.text, isas[source.isa], headers=headers) for source in contents.steps
    )
    cpu = contents.target.cpu
    return (*kernels, *steps, *library_units(cpu.arch, cpu.os, contents.features, table_values(contents)))


def table_values(contents: Contents) -> dict[str, Any]:
    """The values of templates/host/table.c.j2."""
    specs, layouts = contents.specs, contents.layouts
    isa_names = [isa.name for isa in contents.isas]
    bit = {feature: 1 << i for i, feature in enumerate(contents.features)}
    return {
        "version": __version__,
        "tuned": {"threads": contents.threads, "cores": contents.cores},
        "prototypes": [prototype for source in contents.sources for prototype in source.prototypes],
        "layouts": [{"family": FAMILIES[lay.family], "row_block": lay.row_block} for lay in layouts],
        "isas": [
            {
                "name": isa.name,
                "requires": sorted(isa.requires),
                "mask": sum(bit[f] for f in isa.requires),
                "tiles": sum(bit[f] for f in isa.tile_registers),
                "sve_bytes": isa.vector_bytes if isa.exact_vector else 0,
            }
            for isa in contents.isas
        ],
        "kernels": [_kernel_values(spec, isa_names) for spec in specs],
        "steps": [{"isa": step.isa, "isa_id": isa_names.index(step.isa)} for step in contents.steps],
        "entries": [
            {
                "kernel": specs.index(entry.spec),
                "layout": layouts.index(entry.spec.layout),
                "m": entry.shape.m if entry.shape else 0,
                "k": entry.shape.k if entry.shape else 0,
                "threads": entry.threads,
            }
            for entry in contents.entries
        ],
    }


def _kernel_values(spec: KernelSpec, isa_names: Sequence[str]) -> dict[str, Any]:
    tables = spec.tables_prototype
    regime = regime_named(spec.regime)
    return {
        "spec": spec,
        "family": FAMILIES[spec.family],
        "isa_id": isa_names.index(spec.isa),
        "regime": regime,
        "regime_id": REGIMES.index(regime),
        "table_bytes": spec.table_bytes,
        "row_grain": row_grain(spec),
        "tables": Prototype.parse(tables).name if tables else "0",
    }


def _objects(toolchain: Toolchain, units: Sequence[Unit]) -> list[Path]:
    objects = []
    for result in toolchain.compile_objects(units):
        if isinstance(result, CompileError):
            raise result
        objects.append(result)
    return objects


def _write_sources(
    folder: Path, units: Sequence[Unit], toolchain: Toolchain, library: str, exports: Sequence[str]
) -> None:
    """The C text, and a Makefile that makes the library of it without bitgen."""
    folder.mkdir()
    headers = dict(header for unit in units for header in unit.headers)
    texts: Mapping[str, str] = {**headers, **{f"{unit.stem}.c": unit.text for unit in units}}
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    system = toolchain.compiler.target
    (folder / EXPORTS_FILE).write_text(exports_text(system, exports), encoding="utf-8")
    shared = shared_flags(system, soname=f"{library}.{ABI_VERSION}", exports=True)
    lines = [
        "# Makes the library again from the C text beside this file.",
        f"OBJECTS = {' '.join(f'{unit.stem}.o' for unit in units)}",
        "",
        f"{library}: $(OBJECTS)",
        f"\t$(CC) {' '.join(shared)} -o $@ $(OBJECTS) {' '.join(DEFAULT_LIBS)}",
        "",
    ]
    for unit in units:
        flags = " ".join((*toolchain.flags(unit.isa), *unit.flags))
        lines += [f"{unit.stem}.o: {unit.stem}.c", f"\t$(CC) {flags} -c {unit.stem}.c -o $@", ""]
    lines += ["clean:", f"\trm -f $(OBJECTS) {library}", "", ".PHONY: clean", ""]
    (folder / "Makefile").write_text("\n".join(lines), encoding="utf-8")


def _execute(folder: Path) -> None:
    """Run the library's self-test in a child process. BitgenError when it fails or dies."""
    command = [sys.executable, "-m", "bitgen.runtime", str(folder)]
    package = str(Path(__file__).resolve().parent.parent)
    try:
        done = subprocess.run(
            command, cwd=package, capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise BitgenError(f"the new library hung in its self-test ({_CHECK_TIMEOUT_S:g} s)") from None
    if done.returncode < 0:
        raise BitgenError(
            f"the new library died in its self-test (signal {-done.returncode}): this CPU may advertise "
            "features it does not have; build for a lower level with --isa"
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BitgenError(f"the new library failed its self-test: {said}", EXIT_FAILURE)


def _move(made: Path, folder: Path, replaced: Path) -> None:
    """Put the finished folder in its place; programs that have the old library open keep it."""
    with _one_at_a_time(folder.parent):
        if folder.exists():
            folder.rename(replaced)
        try:
            made.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes that put bundles into ``folder`` take turns. The lock is on the folder: no file is left."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


__all__ = ["Contents", "KernelChoice", "Target", "choose_contents", "write_library"]
