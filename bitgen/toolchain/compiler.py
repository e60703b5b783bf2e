"""Which C compilers are here, what they call themselves and which flags they get."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from bitgen.errors import ToolchainError, UnsupportedError
from bitgen.toolchain.process import Finished, TimedOutError, run

if TYPE_CHECKING:
    from bitgen.cpu import Isa

NO_COMPILER = "no C compiler found: install gcc or clang, or pip install ziglang; or name one in CC"
PROBE_TIMEOUT_S = 10.0

# c11 and no more: generated text must not lean on GNU dialect. Contraction off: (float)acc * scale has one
# defined rounding on every ISA. math-errno off lets rintf be one instruction and changes no value.
# Functions start on cache lines, so that a kernel's speed does not depend on its neighbours in the module.
COMMON_FLAGS = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-falign-functions=64",
)

_KIND_FLAGS = {
    # no-semantic-interposition: else gcc inlines no function that is also exported; clang does by itself.
    # no-tree-ter, no-tree-reassoc: gcc 12 otherwise evaluates a whole unrolled step first, adds later, with
    # more values alive than there are registers: 74 spills in a loop of AVX2 I2_S instead of 10 (TL2: 37, 0).
    "gcc": (
        "-pipe",
        "-fmax-errors=20",
        "-fno-semantic-interposition",
        "-fno-tree-ter",
        "-fno-tree-reassoc",
    ),
    "clang": (),
    # zig turns UBSan traps and debug information, which names folders, on by itself.
    "zig": ("-fno-sanitize=undefined", "-g0"),
}

# zig cc compiles for the CPU it runs on unless told otherwise; gcc and clang start from the baseline.
_BASELINE_FLAGS = {"gcc": (), "clang": (), "zig": ("-mcpu=baseline",)}

_FORBIDDEN = ("-march=native", "-mcpu=native", "-mtune=native", "-ffast-math", "-Ofast")
_FORBIDDEN_WHY = "results must be exact and flags come from the ISA level"


def refuse_forbidden(flags: Sequence[str]) -> None:
    """BitgenError when ``flags`` would change results or compile for whatever CPU is here."""
    for flag in flags:
        if flag in _FORBIDDEN:
            raise ToolchainError(f"the compiler flag {flag} is not allowed: {_FORBIDDEN_WHY}")


@dataclass(frozen=True)
class Compiler:
    """A C compiler: ``kind`` is gcc, clang or zig, ``command`` the words that start a command line.

    ``version`` and ``target`` are asked for on first use and may raise BitgenError: a compiler that hangs
    (longer than ``probe_timeout_s``) or fails is named there.
    """

    kind: str
    command: tuple[str, ...]
    probe_timeout_s: float = field(default=PROBE_TIMEOUT_S, compare=False)

    def __post_init__(self) -> None:
        refuse_forbidden(self.command)

    @property
    def name(self) -> str:
        """The command as a person would type it."""
        return shlex.join(self.command)

    @property
    def path(self) -> str:
        """Where the program lies, for `bitgen detect`; not part of any record."""
        return shutil.which(self.command[0]) or self.command[0]

    @cached_property
    def version(self) -> str:
        """One line, for example "gcc (Debian 12.2.0-14) 12.2.0"; the same under every alias of a compiler."""
        if self.kind == "zig":
            program = self.command[: self.command.index("cc")]
            return "zig " + self._probe((*program, "version")).strip()
        first = self._version_text.strip().partition("\n")[0].strip()
        # gcc prints the name it was called by: cc, gcc, x86_64-linux-gnu-gcc-12.
        return re.sub(r"^\S+", "gcc", first) if self.kind == "gcc" else first

    @cached_property
    def target(self) -> str:
        """The target triple, for example "x86_64-linux-gnu"."""
        if self.kind == "gcc":
            return self._probe((*self.command, "-dumpmachine")).strip()
        match = re.search(r"^Target: (\S+)", self._version_text, re.MULTILINE)
        if match is None:
            raise ToolchainError(f"{self.name} --version does not tell its target")
        # zig appends the running kernel's version; an update of it must not make records stale.
        return re.sub(r"(?<=-linux)[0-9.]+", "", match[1])

    def flags(self, isa: Isa | None) -> tuple[str, ...]:
        """The flags of a translation unit of ``isa``; None means the architecture's baseline."""
        if isa is None:
            special = _BASELINE_FLAGS[self.kind]
        else:
            special = tuple(isa.zig_flags if self.kind == "zig" else isa.cc_flags)
        return (*COMMON_FLAGS, *_KIND_FLAGS[self.kind], *special)

    @cached_property
    def _version_text(self) -> str:
        return self._probe((*self.command, "--version"))

    def _probe(self, command: tuple[str, ...]) -> str:
        finished = _probe(command, self.probe_timeout_s)
        if finished.status != 0:
            said = (finished.stderr or finished.stdout).strip().partition("\n")[0]
            message = f"the C compiler is broken: {shlex.join(command)} failed ({finished.status}): {said}"
            raise ToolchainError(message)
        return finished.stdout


def find_compilers(probe_timeout_s: float = PROBE_TIMEOUT_S) -> list[Compiler]:
    """The compilers of this machine in order of preference: gcc, clang, zig. Runs none of them."""
    found = [Compiler(kind, (kind,), probe_timeout_s) for kind in ("gcc", "clang") if shutil.which(kind)]
    zig = _zig_command()
    return [*found, Compiler("zig", zig, probe_timeout_s)] if zig else found


def find_compiler(name: str | None = None, probe_timeout_s: float = PROBE_TIMEOUT_S) -> Compiler:
    """The compiler to use: ``name`` (--cc), else the environment's CC, else the first that is found.

    ``name`` is a command line: "clang", "/opt/gcc-14/bin/gcc", "ccache gcc", "zig". BitgenError when it does
    not exist, hangs or is none of gcc, clang and zig, and when there is no compiler at all.
    """
    for words, origin in ((name, "--cc"), (os.environ.get("CC"), "CC")):
        if words and words.strip():
            return _named(words, origin, probe_timeout_s)
    found = find_compilers(probe_timeout_s)
    if not found:
        raise ToolchainError(NO_COMPILER)
    return found[0]


# (architecture, system) -> what gcc and clang, and what zig call it. zig links against any version of the C
# library, so that what it makes runs on every Linux of the last twelve years.
_TRIPLES: dict[tuple[str, str], tuple[str | None, str]] = {
    ("aarch64", "Linux"): ("aarch64-linux-gnu", "aarch64-linux-gnu.2.17"),
    ("x86_64", "Linux"): ("x86_64-linux-gnu", "x86_64-linux-gnu.2.17"),
    ("aarch64", "Darwin"): (None, "aarch64-macos"),
    ("x86_64", "Darwin"): (None, "x86_64-macos"),
    # gcc puts wide registers on the stack of Windows, aligned to 16 bytes, as if it were aligned to theirs.
    ("x86_64", "Windows"): (None, "x86_64-windows-gnu"),
}


def find_cross_compilers(
    arch: str, system: str, probe_timeout_s: float = PROBE_TIMEOUT_S, *, libc: str = "gnu"
) -> list[Compiler]:
    """The compilers of this machine that make code for another, in order of preference; runs none of them.

    clang is one where gcc's cross compiler is, whose linker and C library it uses; for this machine itself
    what compiles for it does, whatever its name. ``libc`` musl: of Linux with that C library, which zig has.
    """
    triple, zig_triple = _triples_of(arch, system)
    if libc == "musl":
        triple, zig_triple = None, f"{arch}-linux-musl"
    found = []
    if triple and shutil.which(f"{triple}-gcc"):
        found.append(Compiler("gcc", (f"{triple}-gcc",), probe_timeout_s))
        if shutil.which("clang"):
            found.append(Compiler("clang", ("clang", f"--target={triple}"), probe_timeout_s))
    elif libc == "gnu" and _is_here(arch, system):
        found += [each for each in find_compilers(probe_timeout_s) if each.kind != "zig"]
    zig = _zig_command()
    return [*found, Compiler("zig", (*zig, "-target", zig_triple), probe_timeout_s)] if zig else found


def find_cross_compiler(
    arch: str, system: str, name: str | None = None, probe_timeout_s: float = PROBE_TIMEOUT_S
) -> Compiler:
    """The compiler for another machine: ``name`` (gcc, clang, zig or a command line), else the first found.

    BitgenError when there is none, or when the one named makes code for another architecture.
    """
    found = find_cross_compilers(arch, system, probe_timeout_s)
    if name is None:
        if not found:
            raise ToolchainError(_no_cross_compiler(arch, system))
        return found[0]
    known = {compiler.kind: compiler for compiler in found}
    if name in known:
        return known[name]
    if name in ("gcc", "clang", "zig"):
        raise ToolchainError(f"no {name} here for {arch} {system}: {_no_cross_compiler(arch, system)}")
    compiler = _named(name, "--cc", probe_timeout_s)
    if normal_machine(compiler.target) != arch:
        message = f"--cc {name!r} makes code for {compiler.target}, not for {arch}"
        raise ToolchainError(message)
    if system == "Windows" and compiler.kind == "gcc":
        raise ToolchainError(f"--cc {name!r}: gcc misaligns wide registers on the stack of Windows; use zig")
    return compiler


def release_compiler(arch: str, system: str, name: str | None = None, *, libc: str = "gnu") -> Compiler:
    """The compiler of released libraries: ``name``, else zig, which pip pins by hash, else the first found.

    BitgenError when there is none.
    """
    if name is not None and libc == "gnu":
        return find_cross_compiler(arch, system, name)
    found = find_cross_compilers(arch, system, libc=libc)
    found.sort(key=lambda compiler: compiler.kind != "zig")
    if not found:
        raise ToolchainError(_no_cross_compiler(arch, system))
    return found[0]


def normal_machine(triple: str) -> str:
    """The architecture of a target triple, as this project calls it."""
    machine = triple.partition("-")[0]
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)


def _triples_of(arch: str, system: str) -> tuple[str | None, str]:
    if (arch, system) not in _TRIPLES:
        known = ", ".join(f"{system} on {arch}" for arch, system in _TRIPLES)
        raise UnsupportedError(f"no libraries are built for {system} on {arch}; they are for {known}")
    return _TRIPLES[arch, system]


def _is_here(arch: str, system: str) -> bool:
    """Whether what compiles for this machine makes such libraries: those of Linux, with glibc."""
    here = normal_machine(platform.machine()), platform.system()
    return here == (arch, system) and system == "Linux" and platform.libc_ver()[0] == "glibc"


def _no_cross_compiler(arch: str, system: str) -> str:
    triple, _ = _triples_of(arch, system)
    if _is_here(arch, system):
        return f"no compiler for {arch} {system} found: install gcc or clang, or pip install ziglang"
    gcc = f"install {triple}-gcc (Debian: gcc-{triple.replace('_', '-')}), or " if triple else ""
    return f"no compiler for {arch} {system} found: {gcc}pip install ziglang"


def _named(words: str, origin: str, probe_timeout_s: float) -> Compiler:
    try:
        command = tuple(shlex.split(words))
    except ValueError as error:
        raise ToolchainError(f"{origin} {words!r}: {error}") from error
    if command == ("zig",):
        command = _zig_command() or command
    if shutil.which(command[0]) is None:
        message = f"{origin} {words!r}: there is no such program; name a gcc, clang or zig that is installed"
        raise ToolchainError(message)
    if os.sep in command[0]:
        # Compilers run in a scratch folder, where a relative path would lead elsewhere.
        command = (str(Path(command[0]).absolute()), *command[1:])
    if Path(command[0]).name == "zig" or "ziglang" in command:  # `zig`, `python -m ziglang`
        return Compiler("zig", command if command[-1] == "cc" else (*command, "cc"), probe_timeout_s)
    kind = _kind_of(command, probe_timeout_s)
    if kind is None:
        raise ToolchainError(f"{origin} {words!r} is neither gcc nor clang nor zig")
    return Compiler(kind, command, probe_timeout_s)


def _zig_command() -> tuple[str, ...] | None:
    if shutil.which("zig"):
        return ("zig", "cc")
    package = importlib.util.find_spec("ziglang")
    if package is None or not package.submodule_search_locations:
        return None
    # Not by `python -m ziglang`: in the locale C, which compilers run in, Python does not start where a .pth
    # file of its environment (pip install -e) names a folder with letters beyond ASCII.
    return (str(Path(package.submodule_search_locations[0], "zig")), "cc")


def _kind_of(command: tuple[str, ...], probe_timeout_s: float) -> str | None:
    # By its predefined macros: cc may be either, gcc is clang on some systems, and --version is prose.
    macros = _probe((*command, "-dM", "-E", "-x", "c", os.devnull), probe_timeout_s).stdout
    kinds = (("__clang__", "clang"), ("__GNUC__", "gcc"))  # clang defines both
    return next((kind for macro, kind in kinds if f"#define {macro} " in macros), None)


def _probe(command: tuple[str, ...], timeout_s: float) -> Finished:
    try:
        return run(command, timeout_s=timeout_s)
    except TimedOutError as error:
        message = f"the C compiler hangs: {shlex.join(command)} did not answer within {timeout_s:g} s"
        raise ToolchainError(f"{message}; choose another with --cc") from error
