"""Compare the machine code of all that two revisions render: proof that a change of templates costs nothing.

    python tools/compare_text.py main                     # against the files here
    python tools/compare_text.py main --points 3          # three more points of every space
    python tools/compare_text.py main --only i2s --isa avx2 --isa sve256
    python tools/compare_text.py main --keep FOLDER       # leave the objects that differ there

Every text of `tools/digests.py --write` is compiled with every compiler that makes code for its ISA level
(gcc and clang, native and cross), with the flags that bitgen gives it. Compared are the bytes of the sections
.text and .rodata and their relocations. What was compiled once is remembered by its content, so a run that
was stopped goes on. Both revisions must have tools/digests.py with --points.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bitgen.cpu import ANY_ARCH, Isa, load_isas
from bitgen.toolchain import find_compilers, find_cross_compilers
from bitgen.toolchain.compiler import Compiler

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("gcc", "clang")
ARCHS = ("x86_64", "aarch64")
SECTIONS = re.compile(r"\.(text|rodata)\b")


@dataclass(frozen=True)
class Revision:
    """The files of a revision and the texts it renders."""

    root: Path
    texts: Path

    def text(self, name: str) -> str | None:
        file = self.texts / f"{name}.c"
        return file.read_text(encoding="utf-8") if file.is_file() else None

    @property
    def includes(self) -> list[str]:
        return [f"-I{folder}" for folder in (self.texts, self.root / "csrc") if folder.is_dir()]

    @property
    def headers(self) -> bytes:
        """What an #include may find: part of what an object is made from."""
        files = [*self.texts.glob("*.h"), *(self.root / "csrc").glob("*.h")]
        return b"".join(file.read_bytes() for file in sorted(files))

    def names(self) -> list[str]:
        return sorted(
            path.relative_to(self.texts).with_suffix("").as_posix() for path in self.texts.rglob("*.c")
        )


def render(root: Path, texts: Path, points: int) -> Revision:
    """Everything that the revision in ``root`` renders, by its own copy of tools/digests.py."""
    command = [
        sys.executable,
        str(root / "tools" / "digests.py"),
        "--write",
        str(texts),
        "--points",
        str(points),
    ]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(root)})
    return Revision(root, texts)


def checkout(revision: str, folder: Path) -> Path:
    """The files of a git revision, unpacked in ``folder``."""
    command = ["git", "-C", str(ROOT), "archive", revision]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def isa_of(name: str, isas: dict[str, Isa]) -> Isa:
    """The ISA level that a text's name ends with or holds: default/i2s/avx2/n1, example/i2s_direct__avx2."""
    return next(isas[part] for part in reversed(re.split(r"/|__", name)) if part in isas)


def compilers() -> dict[str, list[Compiler]]:
    """The compilers, gcc and clang, for each architecture, as far as they are here."""
    here = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return {
        arch: [
            compiler
            for compiler in (find_compilers() if arch == here else find_cross_compilers(arch, "Linux"))
            if compiler.kind in KINDS
        ]
        for arch in ARCHS
    }


def objdump(compiler: Compiler) -> str:
    """A program that reads the objects of a compiler."""
    for name in (f"{compiler.target}-objdump", "llvm-objdump", "objdump"):
        if shutil.which(name):
            return name
    raise SystemExit("compare_text: there is no objdump here")


def machine_code(dump: str) -> str:
    """Of `objdump -s -r`: the parts about code and constants, without the names of kernels."""
    parts = re.split(r"^(?=Contents of section |RELOCATION RECORDS FOR )", dump, flags=re.MULTILINE)
    wanted = [part for part in parts[1:] if SECTIONS.search(part.partition("\n")[0])]
    return re.sub(r"bitgen_\w+", "kernel", "".join(wanted))


class Cache:
    """Digests of machine code by what it is made from, one file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def code(
        self, compiler: Compiler, isa: Isa, revision: Revision, name: str, keep: Path | None = None
    ) -> str:
        """The digest of the machine code of one text, or the compiler's first complaint."""
        text = revision.text(name)
        if text is None:
            return "there is no such text"
        flags = compiler.flags(isa)
        made_from = "\0".join((*compiler.command, compiler.version, *flags, text)).encode() + revision.headers
        file = self.folder / hashlib.sha256(made_from).hexdigest()
        if file.is_file() and keep is None:
            return file.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            target = keep or Path(folder, "kernel.o")
            command = [*compiler.command, *flags, *revision.includes, "-xc", "-c", "-", "-o", str(target)]
            made = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
            if made.returncode:
                return next((line for line in made.stderr.splitlines() if "error" in line), "it fails")
            dump = [objdump(compiler), "-s", "-r", str(target)]
            shown = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        code = hashlib.sha256(machine_code(shown).encode()).hexdigest()
        with tempfile.NamedTemporaryFile("w", dir=self.folder, delete=False) as part:
            part.write(code)
        Path(part.name).replace(file)
        return code


def compare(
    before: Revision, after: Revision, cache: Cache, only: Sequence[str], levels: Sequence[str]
) -> tuple[list[tuple[Compiler, Isa, str]], int]:
    """The (compiler, ISA level, name) whose machine code differs, and how many were compared."""
    isas = {isa.name: isa for isa in load_isas()}
    found = compilers()
    jobs = []
    for name in sorted({*before.names(), *after.names()}):
        isa = isa_of(name, isas)
        if (levels and isa.name not in levels) or not all(word in name for word in only):
            continue
        archs = ARCHS[:1] if isa.arch == ANY_ARCH else (isa.arch,)
        jobs += [(compiler, isa, name) for arch in archs for compiler in found[arch]]
    with ThreadPoolExecutor(max_workers=2) as pool:

        def differs(job: tuple[Compiler, Isa, str]) -> bool:
            compiler, isa, name = job
            if before.text(name) == after.text(name) and before.headers == after.headers:
                return False
            return cache.code(compiler, isa, before, name) != cache.code(compiler, isa, after, name)

        return [job for job, different in zip(jobs, pool.map(differs, jobs), strict=True) if different], len(
            jobs
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", metavar="REVISION", help="a git revision")
    parser.add_argument("after", metavar="REVISION", nargs="?", help="another; default: the files here")
    parser.add_argument("--points", type=int, default=0, help="kernels of every space besides its default")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="texts with WORD in the name"
    )
    parser.add_argument("--isa", action="append", default=[], metavar="LEVEL", help="texts of an ISA level")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where objects that differ are left")
    default = Path(tempfile.gettempdir(), "bitgen-compare-text")
    parser.add_argument("--cache", type=Path, default=default, metavar="FOLDER", help=f"default {default}")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        roots = [
            checkout(revision, Path(folder, side)) if revision else ROOT
            for side, revision in (("before", args.before), ("after", args.after))
        ]
        before, after = (
            render(root, Path(folder, f"{side}-texts"), args.points)
            for root, side in zip(roots, ("before", "after"), strict=True)
        )
        cache = Cache(args.cache)
        changed, count = compare(before, after, cache, args.only, args.isa)
        for compiler, isa, name in changed:
            print(f"differs: {compiler.name} {name}")
            for side, revision in (("before", before), ("after", after)) if args.keep else ():
                args.keep.mkdir(parents=True, exist_ok=True)
                stem = f"{compiler.kind}-{name.replace('/', '-')}-{side}"
                (args.keep / f"{stem}.c").write_text(revision.text(name) or "", encoding="utf-8")
                cache.code(compiler, isa, revision, name, args.keep / f"{stem}.o")
    print(f"{count} objects compared, {len(changed)} differ")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
