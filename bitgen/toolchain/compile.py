"""C text to objects and shared libraries, compiled once for each content."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitgen.errors import FileError, ToolchainError
from bitgen.paths import HOME_VARIABLE, cache_dir, ensure_dir
from bitgen.toolchain.cache import ContentCache, key_of, writing
from bitgen.toolchain.compiler import Compiler, refuse_forbidden
from bitgen.toolchain.linker import (
    default_libs,
    exports_file,
    exports_text,
    import_library,
    library_suffix,
    shared_flags,
)
from bitgen.toolchain.process import Finished, LiveProcesses, TimedOutError, run
from bitgen.toolchain.unit import Unit

if TYPE_CHECKING:
    from bitgen.cpu import Isa

# What C99 took out of the language is an error everywhere: as a warning it would come back as a crash.
_WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror=implicit-function-declaration",
    "-Werror=implicit-int",
    "-Werror=incompatible-pointer-types",
    "-Werror=int-conversion",
    "-Werror=return-type",
)

# Variables by which gcc, clang and their wrappers take flags and headers from outside the command line.
_ENVIRONMENT = ("CPATH", "C_INCLUDE_PATH", "COMPILER_PATH", "GCC_EXEC_PREFIX", "NIX_CFLAGS_COMPILE")

_CAUSE = re.compile(r"error:|undefined (reference|symbol)|multiple definition|cannot (find|open)")
_ECHO = re.compile(r"^collect2:|linker command failed")  # that the linker failed, not why
_SHOWN_LINES, _SHOWN_COLUMNS = 40, 300


class CompileError(ToolchainError):
    """A compiler or linker that failed or hung on one unit.

    ``message`` is one line; ``str()`` adds the ``command`` and the compiler's words, the first 40 lines of
    ``stderr``.
    """

    def __init__(self, summary: str, command: Sequence[str], stderr: str) -> None:
        self.summary = summary
        self.command = tuple(command)
        self.stderr = stderr
        cause = _first_cause(stderr)
        super().__init__(f"{summary}: {cause}" if cause else summary)

    def __str__(self) -> str:
        lines = self.stderr.strip().splitlines()
        shown = [line[:_SHOWN_COLUMNS] for line in lines[:_SHOWN_LINES]]
        if len(lines) > _SHOWN_LINES:
            shown.append(f"... ({len(lines) - _SHOWN_LINES} more lines)")
        return "\n".join((self.summary, f"  command: {shlex.join(self.command)}", *(f"  {s}" for s in shown)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.summary, self.command, self.stderr)


def _first_cause(stderr: str) -> str:
    """The line that says most, for a message of one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = (line for line in lines if _CAUSE.search(line) and not _ECHO.search(line))
    return next(telling, lines[0] if lines else "")


@dataclass(frozen=True)
class Toolchain:
    """A compiler with its cache. Safe to use from several threads and processes at once.

    ``timeout_s`` is the limit of one run of the compiler, ``jobs`` how many run at once. ``werror`` makes
    every warning an error (for tests: a user's newer compiler has warnings nobody has seen yet).
    ``kernels``: the compiler of units of an ISA level, which use no C library; None: ``compiler``, which
    always compiles host code and links. ``strip``: libraries that `link_shared` makes have no names besides
    the exported ones.
    ``extra_flags`` go to compiler and linker alike, last, for example ``-fsanitize=address``.
    """

    compiler: Compiler
    cache_dir: Path = field(default_factory=cache_dir)
    timeout_s: float = 120.0
    jobs: int = 2
    werror: bool = False
    strip: bool = False
    kernels: Compiler | None = None
    extra_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        refuse_forbidden(self.extra_flags)

    def compiler_of(self, isa: Isa | None) -> Compiler:
        """What compiles units of ``isa``; None: host code."""
        return self.kernels if self.kernels is not None and isa is not None else self.compiler

    def flags(self, isa: Isa | None) -> tuple[str, ...]:
        """All flags of a translation unit of ``isa``."""
        warnings = (*_WARNINGS, "-Werror") if self.werror else _WARNINGS
        return (*self.compiler_of(isa).flags(isa), *warnings, *self.extra_flags)

    def fingerprint(self, isa: Isa | None = None) -> dict[str, Any]:
        """What decides the machine code besides the C text; JSON-able, without paths of this machine."""
        compiler = self.compiler_of(isa)
        return {
            "compiler": compiler.kind,
            "version": compiler.version,
            "target": compiler.target,
            "flags": list(self.flags(isa)),
        }

    def compile_object(self, unit: Unit) -> Path:
        """The object file of ``unit``. CompileError when the compiler fails or exceeds its time."""
        return self._object(unit, LiveProcesses())

    def compile_objects(self, units: Sequence[Unit], jobs: int | None = None) -> list[Path | CompileError]:
        """For each unit, in order, its object file or why there is none, compiled ``jobs`` at a time.

        An interrupt ends the compilers that run. BitgenError for what is not a unit's fault (a full disk).
        """
        live = LiveProcesses()

        def one(unit: Unit) -> Path | CompileError:
            try:
                return self._object(unit, live)
            except CompileError as error:
                return error

        pool = ThreadPoolExecutor(max_workers=max(1, self.jobs if jobs is None else jobs))
        try:
            return list(pool.map(one, units))
        except BaseException:
            live.kill_all()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def objects(self, units: Sequence[Unit]) -> list[Path]:
        """The object files of ``units``, in order. CompileError of the first one that does not compile."""
        made = []
        for result in self.compile_objects(units):
            if isinstance(result, CompileError):
                raise result
            made.append(result)
        return made

    def link_shared(
        self,
        objects: Sequence[Path],
        out: Path,
        *,
        libs: Sequence[str] | None = None,
        soname: str | None = None,
        exports: Sequence[str] | None = None,
    ) -> Path:
        """Link ``objects`` to the shared library ``out``, which appears whole or not at all.

        ``exports`` are the only symbols that stay visible (None: all); ``libs``: None, the C library's. A DLL
        gets its import library beside it. CompileError when the linker fails, an undefined symbol included;
        BitgenError when ``out`` cannot be written.
        """
        target = self.compiler.target
        shared = self.shared_flags(soname, exports=exports is not None)
        ensure_dir(out.parent)
        advice = f"choose another folder with --out or {HOME_VARIABLE}"
        with (
            writing(out, advice),
            tempfile.TemporaryDirectory(prefix=".linking-", dir=out.parent) as folder,
        ):
            if exports is not None:
                (Path(folder) / exports_file(target)).write_text(exports_text(target, exports))
            flags = (*self._link_base, *shared, *(default_libs(target) if libs is None else libs))
            made = self.link_into(Path(folder), out.stem, objects, flags)
            imports = made.with_name(import_library(made.name))
            if imports.exists():
                imports.replace(out.with_name(imports.name))
            return made.replace(out)

    def shared_flags(self, soname: str | None, *, exports: bool) -> tuple[str, ...]:
        """What makes a shared library of objects, without compiler flags; see `linker.shared_flags`."""
        target, undefined = self.compiler.target, self._sanitized
        return shared_flags(target, undefined=undefined, soname=soname, exports=exports, strip=self.strip)

    def link_flags(self, *, undefined: bool) -> tuple[str, ...]:
        """All flags of a library for this process; ``undefined``: it may use symbols of Python."""
        shared = shared_flags(self.compiler.target, undefined=undefined or self._sanitized)
        return (*self._link_base, *shared, *default_libs(self.compiler.target))

    def link_into(self, folder: Path, name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
        """Run the linker in ``folder``: NAME.so (.dll) there, of ``objects``. ``flags`` come last."""
        made = f"{name}{library_suffix(self.compiler.target)}"
        inputs = [str(path.absolute()) for path in objects]
        self._run(self.compiler, ("-o", made, *inputs, *flags), f"link {name}", folder, LiveProcesses())
        return folder / made

    @property
    def _link_base(self) -> tuple[str, ...]:
        # The baseline matters to the linker too: zig compiles a runtime of its own into the library.
        return (*self.compiler.flags(None), *self.extra_flags)

    @cached_property
    def cache(self) -> ContentCache:
        """Everything compiled so far; waits a little longer for another process than a compiler may take."""
        return ContentCache(self.cache_dir.absolute(), lock_timeout_s=self.timeout_s + 10)

    @property
    def _sanitized(self) -> bool:
        # A sanitizer's runtime comes with the program, not with the library.
        return any(flag.startswith("-fsanitize=") for flag in self.extra_flags)

    def _object(self, unit: Unit, live: LiveProcesses) -> Path:
        refuse_forbidden(unit.flags)
        flags = (*self.flags(unit.isa), *unit.flags)
        source = f"{unit.stem}.c"
        parts = {
            **self.fingerprint(unit.isa),
            "command": self.compiler_of(unit.isa).command[1:],
            "flags": flags,
            "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            "source": source,
            "text": unit.text,
            "headers": unit.headers,
        }

        def produce(folder: Path) -> Path:
            for name, content in (*unit.headers, (source, unit.text)):
                (folder / name).write_text(content, encoding="utf-8")
            # Names without a folder: neither messages nor the object's symbols tell where it was made.
            made = f"{unit.stem}.o"
            words = (*flags, "-c", source, "-o", made)
            self._run(self.compiler_of(unit.isa), words, f"compile {unit.name}", folder, live)
            return folder / made

        return self.cache.make("objects", key_of(parts), ".o", produce)

    def _run(
        self, compiler: Compiler, arguments: Sequence[str], task: str, folder: Path, live: LiveProcesses
    ) -> Finished:
        command, name = (*compiler.command, *arguments), compiler.name
        try:
            finished = run(command, timeout_s=self.timeout_s, cwd=folder, live=live)
        except TimedOutError as error:
            summary = f"{name} did not {task} within {self.timeout_s:g} s and was stopped"
            raise CompileError(summary, command, error.stderr) from error
        if finished.status == 0:
            return finished
        if "No space left on device" in finished.stderr:  # no fault of the C text
            raise FileError(f"{name} could not {task}: the disk is full ({folder})")
        ended = f"signal {-finished.status}" if finished.status < 0 else f"exit status {finished.status}"
        raise CompileError(f"{name} could not {task} ({ended})", command, finished.stderr)
