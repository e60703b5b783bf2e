"""Libraries that several test modules call, compiled once a test session.

What is compiled is addressed by its content, so all processes of a test run share one folder of it: that in
BITGEN_TEST_CACHE, else one that goes away with the run. Runs that have it in common compile a text once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compiled import QuickToolchain
from exact_specs import DEEP_VARIABLE
from filelock import FileLock

from bitgen.bundle import KernelEntry
from bitgen.bundle.contents import Target
from bitgen.bundle.write import write_library
from bitgen.cpu import Cpu, detect_cpu
from bitgen.space import space_for
from bitgen.spec import LARGE, N1, SMALL, KernelSpec, Layout, Regime, Shape, StepSizes
from bitgen.toolchain import find_compiler

CACHE_VARIABLE = "BITGEN_TEST_CACHE"

# Levels that commands do not compile here, all but this CPU's best and the scalar one, are compiled quickly:
# with gcc 12 the library of a level takes 44 s of processor time at -O3 and 10 s at -Og. CI and `.ci/deep`
# compile everything as commands do.
OPTIMIZED_VARIABLE = "BITGEN_TEST_OPTIMIZED"
QUICK = () if os.environ.get(OPTIMIZED_VARIABLE) or os.environ.get(DEEP_VARIABLE) else ("-Og",)

# Shapes the library is "tuned" for: a layout with two 16-row sub-blocks and signs, and one with tables.
TL2_SHAPE, TL1_SHAPE = Shape(100, 500), Shape(64, 640)
TL2_LAYOUT, TL1_LAYOUT, DEFAULT_LAYOUT = Layout("tl2", 32), Layout("tl1", 16), Layout("i2s", 16)


# Models of these sizes have a forward step of their own, seconds to compile: with remainders everywhere,
# and those of the tiny model, without any.
RAGGED = StepSizes(hidden=100, q_rows=500, ffn=150, head_dim=100)
WHOLE = StepSizes(hidden=256, q_rows=256, ffn=512, head_dim=64)

# Values of templates/table.c.j2 for host code without any kernel.
EMPTY_TABLE: dict[str, Any] = {
    "tuned": {"threads": 0, "cores": 0},
    "version": "",
    "prototypes": (),
    "required": 0,
    "layouts": (),
    "isas": (),
    "isa_caps": (),
    "kernels": (),
    "entries": (),
    "steps": (),
}


def layout_of(shape: Shape) -> Layout:
    """The layout the library packs a shape in: of one that nobody tuned the layout that won most weights."""
    return {TL2_SHAPE: TL2_LAYOUT, TL1_SHAPE: TL1_LAYOUT}.get(shape, TL2_LAYOUT)


def spec_for(layout: Layout, regime: Regime, shape: Shape, cpu: Cpu, nth: int = 0) -> KernelSpec:
    """The nth legal kernel of a space that reads a layout, at this CPU's best ISA level."""
    space = space_for(layout.family, Target.of(cpu).isa, regime, shape, cpu)
    legal: Iterator[KernelSpec] = (replace(spec, layout=layout) for spec in (*space.known_good, *space))
    legal = (spec for spec in dict.fromkeys(legal) if not space.broken(spec))
    return next(spec for i, spec in enumerate(legal) if i == nth)


def choices(cpu: Cpu) -> list[KernelEntry]:
    """Winners of an invented tune: for one and for two threads, and not for every regime."""
    return [
        KernelEntry(spec_for(TL2_LAYOUT, N1, TL2_SHAPE, cpu), TL2_SHAPE, 1),
        KernelEntry(spec_for(TL2_LAYOUT, N1, TL2_SHAPE, cpu, 1), TL2_SHAPE, 2),
        KernelEntry(spec_for(TL2_LAYOUT, LARGE, TL2_SHAPE, cpu), TL2_SHAPE, 2),
        KernelEntry(spec_for(TL1_LAYOUT, SMALL, TL1_SHAPE, cpu), TL1_SHAPE, 2),
    ]


def session_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a parallel test run share, and later runs do not see."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bitgen"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, write: Callable[[Path], object]) -> Path:
    """``name`` in the session's folder, which ``write(folder)`` makes in one of the workers of a run."""
    folder = session_folder(factory)
    with FileLock(folder / f".{name}.lock"):
        if not (folder / name).exists():
            write(folder)
    return folder / name


def shared_cache() -> Path:
    """The folder of everything that this test run compiled."""
    return Path(os.environ[CACHE_VARIABLE])


def share_cache(home: Path) -> Path:
    """Let ``home``, a BITGEN_HOME to be, find what other tests compiled; the rest it keeps to itself."""
    (home / "cache").mkdir(parents=True)
    for kind in ("objects", "modules", "libraries"):
        (shared_cache() / kind).mkdir(parents=True, exist_ok=True)
        (home / "cache" / kind).symlink_to(shared_cache() / kind, target_is_directory=True)
    return home


def toolchain_of(*extra_flags: str, strict: bool = True) -> QuickToolchain:
    """A toolchain of the shared folder, with the flags that commands use; every warning is an error."""
    # Patient: the limit is there for compilers that hang, and a loaded machine is no such thing.
    return QuickToolchain(
        find_compiler(), cache_dir=shared_cache(), timeout_s=900, extra_flags=extra_flags, strict=strict
    )


def flags_for(level: str) -> tuple[str, ...]:
    """What to compile an ISA level with, beside the flags of commands: `QUICK`, or nothing."""
    return () if level in ("scalar", Target.of(detect_cpu()).isa.name) else QUICK


def built_library(factory: pytest.TempPathFactory) -> Path:
    """The bundle of a library with `choices` for this CPU, verified by its self-test."""

    def write(folder: Path) -> None:
        cpu = detect_cpu()
        write_library(choices(cpu), toolchain_of(), folder, "tests", Target.of(cpu), model="tests")

    return made_once(factory, "tests", write)
