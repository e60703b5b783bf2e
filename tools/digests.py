"""Digests of everything that bitgen renders: proof that a change of Python or templates changed no C.

    python tools/digests.py --check            # compare with tests/golden
    python tools/digests.py --update           # write tests/golden anew
    python tools/digests.py --diff main        # the unified diff of every text that changed since a commit

A line `text NAME SHA` is one file of C below its banner; `space NAME COUNT ORDER SOME TEXTS` are all legal
kernels of a family, ISA level and regime for 3200x8640: how many, their names in order, and the texts of
every eighth, which the tests render, and of all, which --check and `.ci/deep` do. The few texts of GOLDENS
are for reading: tests/golden/NAME.c is what a template makes, without ops and struct.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

from bitgen.cpu import Cpu, Isa, load_isas, target_cpu
from bitgen.errors import BitgenError
from bitgen.hostcode import step_headers
from bitgen.measure.probes import DEFAULT_PATTERN, Dot4, Fma, Pairs, Tiles
from bitgen.render import matmul_struct, render_kernel, render_quantize, render_step, render_tables
from bitgen.space import Space, space_for
from bitgen.spec import EVERY_FAMILY, FAMILIES, REGIMES, KernelSpec, Layout, Shape, StepSizes

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILE = GOLDEN / "digests.txt"
EIGHTH = 8  # of all texts of spaces 26 s of the processor, of these 4
WIDTH = 16  # hexadecimal digits of a sha256 that are kept: 64 bits
# One CPU for each architecture, whatever machine this runs on: rules that know caches must not depend on it.
CPUS = {"x86_64": "zen4", "aarch64": "neoverse-v2"}

SIZES = StepSizes(hidden=2560, q_rows=2560, ffn=6912, head_dim=128)  # of step_sized/

# Kernels by their knobs, one or more of each algorithm, so that they do not depend on what is the default:
# family, ISA level, regime, algorithm, rows of a block (and /group), knobs. A name with 3200x8640 has that
# shape fixed.
EXAMPLES = {
    "i2s_direct_n1__avx2": "i2s avx2 n1 direct 16 "
    "streams=2 nr=1 accumulators=2 widen_every=8 unroll=1 prefetch=1024 prefetch_hint=1",
    "i2s_direct_3200x8640__avx512_vnni": "i2s avx512_vnni n1 direct 16 "
    "streams=2 nr=1 accumulators=4 widen_every=0 unroll=1 prefetch=0 prefetch_hint=0",
    "i2s_direct_n1_g128__avx512_vnni": "i2s avx512_vnni n1 direct 32/128 "
    "streams=1 nr=1 accumulators=4 widen_every=0 unroll=1 prefetch=4096 prefetch_hint=0",
    "q1_direct_n1_g128__avx512_vnni": "q1 avx512_vnni n1 direct 32/128 "
    "streams=1 nr=1 accumulators=4 widen_every=0 unroll=1 prefetch=4096 prefetch_hint=0",
    "t5_direct_small__neon_dotprod": "t5 neon_dotprod small direct 16 "
    "streams=1 nr=2 accumulators=3 widen_every=0 unroll=2 prefetch=0",
    "tl1_lookup_blocked__avx2": "tl1 avx2 small direct 16 "
    "streams=1 nr=2 mc=128 kc=960 widen_every=63 unroll=1 prefetch=0",
    "tl2_lookup_n1__neon": "tl2 neon n1 direct 16 "
    "streams=1 nr=1 mc=0 kc=0 widen_every=21 unroll=1 prefetch=0",
    "tl5_wide_small__avx512_vbmi": "tl5 avx512_vbmi small wide 64 "
    "streams=2 nr=1 widen_every=12 prefetch=4096",
    "tl5_split_n1__neon": "tl5 neon n1 split 64 streams=2 nr=1 widen_every=12 prefetch=0 prefetch_hint=0",
    "i2s_panel_small__avx2": "i2s avx2 small panel 16 mr=16 nr=4 mc=64 kc=0 widen_every=64 unroll=1",
    "tl2_panel_large__avx512_vnni": "tl2 avx512_vnni large panel 32 "
    "mr=32 nr=4 mc=64 kc=960 widen_every=0 unroll=2",
    "i2s_tiles_small__amx_int8": "i2s amx_int8 small tiles 16 streams=4 ahead=1 prefetch=4096",
    "t5_tiles_large__amx_int8": "t5 amx_int8 large tiles 32 mr=32 nr=32 mc=256 kc=960 pack=1",
    "tl2_tiles_large__scalar": "tl2 scalar large tiles 16 mr=32 nr=16 mc=64 kc=0 pack=0",
    "i2s_mmla_large__neon_i8mm": "i2s neon_i8mm large mmla 16 nr=6 mc=64 kc=960",
    "tl2_mmla_small__sve256_i8mm": "tl2 sve256_i8mm small mmla 16 nr=8 mc=64 kc=0",
    "t5_mmla_small__scalar": "t5 scalar small mmla 32 nr=4 mc=64 kc=0",
}
# The texts for reading: file under tests/golden -> name of the text.
GOLDENS = {
    name: f"example/{name}"
    for name in EXAMPLES.keys()
    - {"tl2_tiles_large__scalar", "tl2_mmla_small__sve256_i8mm", "t5_mmla_small__scalar"}
} | {"quantize__neon": "quantize/neon", "tl5_split_tables__neon": "tables/tl5/split/neon"}


def body(text: str) -> str:
    """C without its banner, which names the command and the files it was made from."""
    return text.partition(" */\n")[2]


def core(text: str) -> str:
    """What a template makes: C without its banner, the vector ops and the struct before it."""
    before, mark, after = text.partition(matmul_struct())
    if not mark:
        raise ValueError(f"there is no struct bitgen_matmul in {before[:99]}")
    return after.lstrip("\n")


def digest(*texts: str) -> str:
    """The first WIDTH digits of the sha256 of the texts, each ended by a NUL."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()[:WIDTH]


@cache
def single_texts() -> dict[str, str]:
    """By name: the default kernel of every space, the examples, and all that is no kernel."""
    texts = {f"default/{name}": render_kernel(space.default) for name, space in spaces().items()}
    grouped = grouped_spaces().items()
    texts |= {f"group128/{name}": render_kernel(space.default) for name, space in grouped}
    texts |= {f"group32/{name}": render_kernel(space.default) for name, space in coded_spaces().items()}
    texts |= {f"example/{name}": render_kernel(example(name)) for name in EXAMPLES}
    for level in load_isas():
        isa = level.name
        texts[f"quantize/{isa}"] = render_quantize(isa)
        texts[f"step/{isa}"] = render_step(isa)
        texts[f"step_sized/{isa}"] = render_step(isa, SIZES)
        probes: dict[str, Dot4 | Fma | Pairs | Tiles]
        probes = {"dot4": Dot4(isa), "fma": Fma(isa), "pairs": Pairs(isa)}
        if level.tile_registers:
            probes["tiles"] = Tiles(isa)
        texts |= {f"probe/{name}/{isa}": probe.source() for name, probe in probes.items()}
        texts[f"probe/read/{isa}"] = DEFAULT_PATTERN.source(isa)
        for family in FAMILIES.values():
            for algorithm, _ in family.tables:
                texts[f"tables/{family.name}/{algorithm}/{isa}"] = render_tables(family.name, isa, algorithm)
    return {name: source.text for name, source in texts.items()}


def samples(count: int) -> dict[str, str]:
    """``count`` kernels of every space, the same ones as long as the space is the same."""
    texts = {}
    for name, space in spaces().items() if count else ():
        points = list(space)
        for spec in random.Random(name).sample(points, min(count, len(points))):  # noqa: S311 - no secret
            texts[f"point/{name}/{spec.name}"] = render_kernel(spec).text
    return texts


def example(name: str) -> KernelSpec:
    """The spec of an example. UsageError when its space does not hold it."""
    family, isa, regime, algorithm, row_block, *settings = EXAMPLES[name].split()
    knobs = {knob: int(value) for knob, _, value in (setting.partition("=") for setting in settings)}
    rows, _, group = row_block.partition("/")
    space = (grouped_spaces() if group else spaces())[f"{family}/{isa}/{regime}"]
    spec = space.make(algorithm, Layout(family, int(rows), int(group or 0)), knobs)
    space.check(spec, local=False)
    return replace(spec, shape=space.shape) if space.shape.name in name else spec


def cpu_of(isa: Isa) -> Cpu:
    return target_cpu(CPUS.get(isa.arch, CPUS["x86_64"]))


@cache
def spaces() -> dict[str, Space]:
    """Every space for 3200x8640, by family, ISA level and regime."""
    return {
        f"{family}/{isa.name}/{regime.name}": space_for(
            *(family, isa, regime, Shape(3200, 8640)), cpu_of(isa)
        )
        for family, facts in EVERY_FAMILY.items()
        if facts.in_rows
        for isa in load_isas()
        for regime in REGIMES
    }


@cache
def grouped_spaces() -> dict[str, Space]:
    """The same of weights in groups of 128."""
    return {
        name: space_for(space.family, space.isa, space.regime, space.shape, cpu_of(space.isa), 128)
        for name, space in spaces().items()
        if 128 in EVERY_FAMILY[space.family].groups
    }


@cache
def coded_spaces() -> dict[str, Space]:
    """Those of weights that are codes, in groups of 32."""
    return {
        f"{name}/{isa.name}/{regime.name}": space_for(name, isa, regime, Shape(3200, 8640), cpu_of(isa), 32)
        for name, family in EVERY_FAMILY.items()
        if not family.is_ternary
        for isa in load_isas()
        for regime in REGIMES
    }


def text_lines() -> Iterator[str]:
    """The `text` lines: seconds."""
    for name, text in single_texts().items():
        yield f"text {name} {digest(body(text))}"


def space_lines(*, whole: bool = True) -> Iterator[str]:
    """The `space` lines: half a minute, seconds without ``whole``, where they lack the texts of all."""
    for name, space in spaces().items():
        points = list(space)
        names = digest(*(spec.name for spec in points))
        texts = [body(render_kernel(spec).text) for spec in (points if whole else points[::EIGHTH])]
        some = digest(*(texts[::EIGHTH] if whole else texts))
        yield f"space {name} {len(points)} {names} {some}" + (f" {digest(*texts)}" if whole else "")


def recorded(kind: str) -> list[str]:
    """The lines of one kind in tests/golden/digests.txt."""
    return [line for line in FILE.read_text(encoding="utf-8").splitlines() if line.startswith(f"{kind} ")]


def changes(kind: str, *, whole: bool = True) -> list[str]:
    """What differs from the recorded lines, as lines with - and +; empty when nothing does.

    ``whole`` as in `space_lines`.
    """
    before, now = recorded(kind), list(text_lines() if kind == "text" else space_lines(whole=whole))
    if not whole:
        before = [line.rpartition(" ")[0] for line in before]
    return [line for line in difflib.ndiff(before, now) if line[0] in "-+"]


def golden_changes() -> Iterator[str]:
    """Unified diffs of the files for reading; a file without a text, too."""
    files = {path.stem for path in GOLDEN.glob("*.c")}
    for name in sorted(files | GOLDENS.keys()):
        file = GOLDEN / f"{name}.c"
        old = file.read_text(encoding="utf-8") if name in files else ""
        new = core(single_texts()[GOLDENS[name]]) if name in GOLDENS else ""
        yield from difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), file.name, "now"
        )


def update() -> None:
    """Write tests/golden anew."""
    FILE.write_text("\n".join([*text_lines(), *space_lines()]) + "\n", encoding="utf-8")
    for file in GOLDEN.glob("*.c"):
        file.unlink()
    for name, text in GOLDENS.items():
        (GOLDEN / f"{name}.c").write_text(core(single_texts()[text]), encoding="utf-8")


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
    """The single texts that the bitgen of another folder renders, by that folder's own copy of this tool."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / "tools" / "digests.py"), "--write", folder]
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
    action.add_argument("--check", action="store_true", help="compare with tests/golden")
    action.add_argument("--update", action="store_true", help="write tests/golden anew")
    action.add_argument("--diff", metavar="REVISION", help="print how the texts changed since a commit")
    action.add_argument("--write", metavar="FOLDER", help="write every single text, without its banner")
    parser.add_argument(
        "--points", type=int, default=0, metavar="N", help="with --write: N kernels of every space besides"
    )
    args = parser.parse_args()
    try:
        return _run(args)
    except BitgenError as error:  # a template or a space that does not hold together
        sys.exit(f"digests: {error}")


def _run(args: argparse.Namespace) -> int:
    """0, or 1 when --check found a change."""
    if args.update:
        update()
    elif args.diff:
        sys.stdout.writelines(diff(args.diff))
    elif args.write:
        for name, text in {**single_texts(), **samples(args.points)}.items():
            file = Path(args.write, f"{name}.c")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(body(text), encoding="utf-8")
        for name, text in step_headers():
            Path(args.write, name).write_text(text, encoding="utf-8")
    else:
        found = [*changes("text"), *changes("space"), *(line.rstrip() for line in golden_changes())]
        print("\n".join(found) or "every text and every space is as recorded")
        return 1 if found else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
