"""What tests compile with: flags and objects of a user, in less time, and no warning passes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bitgen.toolchain import CompileError, Compiler, Toolchain
from bitgen.toolchain.cache import key_of
from bitgen.toolchain.process import Finished, LiveProcesses

_INCLUDES = re.compile(r"^(?:#include <[\w/]+\.h>\n)+", re.MULTILINE)
# Not arm_sve.h, which is short and on which gcc 12 fails when it was read before.
_INTRINSICS = ("immintrin.h", "arm_neon.h")


def need_sanitizers(command: Sequence[str], flags: Sequence[str]) -> None:
    """Skip where a compiler has not the runtime of the sanitizers that ``flags`` ask for.

    It is a package of its own: with Debian 13 and clang, libclang-rt-dev.
    """
    with TemporaryDirectory() as folder:
        probe = Path(folder, "probe.c")
        probe.write_text("int main(void) { return 0; }\n", encoding="utf-8")
        linked = [*command, *flags, str(probe), "-o", str(probe.with_suffix(""))]
        if subprocess.run(linked, capture_output=True, check=False).returncode:
            asked = next(flag for flag in flags if flag.startswith("-fsanitize="))
            pytest.skip(f"{Path(command[0]).name} has no runtime for {asked} here (libasan, libclang-rt-dev)")


@dataclass(frozen=True)
class QuickToolchain(Toolchain):
    """A toolchain whose objects are, by their keys and to the byte, those of `Toolchain` with its fields.

    gcc reads the header of intrinsics once for each set of flags: that is 0.14 s of the 0.33 s of processor
    time in which it compiles a kernel. ``strict``: a warning is an error; unlike ``werror`` it is no flag, so
    that tests and commands share what they compile.
    """

    strict: bool = False

    def _run(
        self, compiler: Compiler, arguments: Sequence[str], task: str, folder: Path, live: LiveProcesses
    ) -> Finished:
        compiles = "-c" in arguments
        read = self._read_before(compiler, arguments, folder, live) if compiles else ()
        finished = super()._run(compiler, (*read, *arguments), task, folder, live)
        if compiles and self.strict and "warning:" in finished.stderr:
            raise CompileError(f"{compiler.name} warns: {task}", arguments, finished.stderr)
        return finished

    def _read_before(
        self, compiler: Compiler, arguments: Sequence[str], folder: Path, live: LiveProcesses
    ) -> tuple[str, ...]:
        """The options that replace the includes with which a kernel begins by what gcc read before."""
        split = arguments.index("-c")
        text, flags = (folder / arguments[split + 1]).read_text(encoding="utf-8"), arguments[:split]
        includes = _INCLUDES.search(text)
        if compiler.kind != "gcc" or includes is None or "arm_sve.h" in includes[0]:
            return ()
        if not any(header in includes[0] for header in _INTRINSICS):
            return ()

        def produce(scratch: Path) -> Path:
            (scratch / "before.h").write_text(includes[0], encoding="utf-8")
            words = (*flags, "-x", "c-header", "before.h", "-o", "before.h.gch")
            super(QuickToolchain, self)._run(compiler, words, "read intrinsics", scratch, live)
            return scratch / "before.h.gch"

        parts = {"version": compiler.version, "command": compiler.command, "flags": flags}
        key = key_of({**parts, "includes": includes[0]})
        made = self.cache.make("headers", key, ".h.gch", produce)
        return ("-include", str(made).removesuffix(".gch"))
