"""Digests of everything that bitgen renders: proof that a change of Python or templates changed no C.

    python tools/digests.py --check            # compare with tests/golden/digests.txt
    python tools/digests.py --update           # write it anew
    python tools/digests.py --diff main        # the unified diff of every text that changed since a commit

A line `text NAME SHA` is one file of C below its banner. A line `space NAME COUNT ORDER TEXTS` is all legal
kernels of a family, ISA level and regime for 3200x8640: how many, their names in order, the texts of all.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitgen.space import Space

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "tests" / "golden" / "digests.txt"
WIDTH = 16  # hexadecimal digits of a sha256 that are kept: 64 bits
# One CPU for each architecture, whatever machine this runs on: rules that know caches must not depend on it.
CPUS = {"x86_64": "zen4", "aarch64": "neoverse-v2"}


def body(text: str) -> str:
    """C without its banner, which names the command and the files it was made from."""
    return text.partition(" */\n")[2]


def digest(*texts: str) -> str:
    """The first WIDTH digits of the sha256 of the texts, each ended by a NUL."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()[:WIDTH]


def single_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of the default kernel of every space, and of all that is rendered beside kernels."""
    from bitgen.cpu import load_isas
    from bitgen.render import render_kernel, render_quantize, render_step, render_tables
    from bitgen.spec import FAMILIES

    for name, space in spaces():
        yield f"default/{name}", render_kernel(space.default).text
    for isa in (isa.name for isa in load_isas()):
        yield f"quantize/{isa}", render_quantize(isa).text
        yield f"step/{isa}", render_step(isa).text
        for family in FAMILIES.values():
            for algorithm, _ in family.tables:
                yield (
                    f"tables/{family.name}/{algorithm}/{isa}",
                    render_tables(family.name, isa, algorithm).text,
                )


def spaces() -> Iterator[tuple[str, Space]]:
    """(name, space) of every family, ISA level and regime."""
    from bitgen.cpu import load_isas, target_cpu
    from bitgen.space import space_for
    from bitgen.spec import FAMILIES, REGIMES, Shape

    for family in FAMILIES:
        for isa in load_isas():
            cpu = target_cpu(CPUS.get(isa.arch, CPUS["x86_64"]))
            for regime in REGIMES:
                space = space_for(family, isa, regime, Shape(3200, 8640), cpu)
                yield f"{family}/{isa.name}/{regime.name}", space


def text_lines() -> Iterator[str]:
    """The `text` lines: seconds."""
    for name, text in single_texts():
        yield f"text {name} {digest(body(text))}"


def space_lines() -> Iterator[str]:
    """The `space` lines: about a minute."""
    from bitgen.render import render_kernel

    for name, space in spaces():
        points = list(space)
        names = digest(*(spec.name for spec in points))
        texts = digest(*(body(render_kernel(spec).text) for spec in points))
        yield f"space {name} {len(points)} {names} {texts}"


def recorded(kind: str) -> list[str]:
    """The lines of one kind in tests/golden/digests.txt."""
    return [line for line in FILE.read_text(encoding="utf-8").splitlines() if line.startswith(f"{kind} ")]


def changes(kind: str) -> list[str]:
    """What differs from the recorded lines, as lines with - and +; empty when nothing does."""
    now = list(text_lines() if kind == "text" else space_lines())
    return [line for line in difflib.ndiff(recorded(kind), now) if line[0] in "-+"]


def diff(revision: str) -> Iterator[str]:
    """Unified diffs of the single texts between ``revision`` and the files here."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["git", "-C", str(ROOT), "archive", revision]
        archive = subprocess.run(command, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        before, after = _texts_of(Path(folder)), _texts_of(ROOT)
    for name in sorted(before.keys() | after.keys()):
        old, new = (texts.get(name, "").splitlines(keepends=True) for texts in (before, after))
        yield from difflib.unified_diff(old, new, f"{revision}/{name}", name)


def _texts_of(root: Path) -> dict[str, str]:
    """The single texts that the bitgen of another folder renders."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--write", folder]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(root)}, cwd=folder)
        files = list(Path(folder).rglob("*.c"))
        return {
            path.relative_to(folder).with_suffix("").as_posix(): path.read_text("utf-8") for path in files
        }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the recorded digests")
    action.add_argument("--update", action="store_true", help="record the digests of now")
    action.add_argument("--diff", metavar="REVISION", help="print how the texts changed since a commit")
    action.add_argument("--write", metavar="FOLDER", help="write every single text, without its banner")
    args = parser.parse_args()
    if args.update:
        FILE.write_text("\n".join([*text_lines(), *space_lines()]) + "\n", encoding="utf-8")
    elif args.diff:
        sys.stdout.writelines(diff(args.diff))
    elif args.write:
        for name, text in single_texts():
            file = Path(args.write, f"{name}.c")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body(text), encoding="utf-8")
    else:
        found = [*changes("text"), *changes("space")]
        print("\n".join(found) or "every text and every space is as recorded")
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
