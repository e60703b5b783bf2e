"""Which kernels the exactness tests run."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from bitgen.cpu import Cpu, Isa, load_isas
from bitgen.render import inherits
from bitgen.space import Space, int16_sums, space_for
from bitgen.spec import EVERY_FAMILY, REGIMES, KernelSpec, Regime, Shape

SHAPE = Shape(3200, 8640)
DEEP_VARIABLE = "BITGEN_TEST_DEEP"  # set by .ci/deep: nothing is left to a sample


def edges(space: Space) -> Iterator[KernelSpec]:
    """Schedules with as many int16 additions as are legal, one for each way to accumulate.

    A way is an algorithm, a number of accumulators, and few or many tokens in registers. The widths that the
    axes offer are not enough: what is legal may be asked for with ``--knob``.
    """
    for algorithm in space.algorithms:
        axes = space.knobs(algorithm)
        if "widen_every" not in axes:
            continue  # tiles add to int32 at once
        values = {name: min(choices) for name, choices in axes.items()}
        if algorithm == "panel":
            values |= {"mr": 16, "mc": space.layouts[0].row_block}
        for accumulators in (1, 2, 3, 4) if "accumulators" in axes else (None,):
            # The scalar level has no registers, and its unrolled arrays take long to compile.
            for nr in sorted(
                {min(axes["nr"]), max(axes["nr"]) if space.isa.name != "scalar" else min(axes["nr"])}
            ):
                yield from _widest(
                    space,
                    algorithm,
                    {**values, "nr": nr, **({"accumulators": accumulators} if accumulators else {})},
                )


def _widest(space: Space, algorithm: str, values: dict[str, int]) -> Iterator[KernelSpec]:
    for widen_every in range(70, 0, -1):
        spec = space.make(algorithm, space.layouts[0], {**values, "widen_every": widen_every})
        if not space.broken(spec):
            sums = int16_sums(spec)
            assert sums is not None
            more = replace(sums, additions=sums.additions // widen_every * (widen_every + 1))
            assert not more.exact, f"{spec.name} is not at the edge"
            yield spec
            return


def chosen(
    family: str, isa: Isa, regime: Regime, cpu: Cpu, sample: int, seed: int, group: int = 0
) -> list[KernelSpec]:
    """Of a space the default and a preset, an edge of int16 sums or a sample; `.ci/deep`: all of them.

    Which one goes around: a family has each in one regime of an ISA level, and with weights in groups, which
    have no edges, a preset or a sample in one regime. Of scalar kernels neither presets nor a sample; of
    kernels that have the text of their level's parent the default alone.
    """
    space = space_for(family, isa, regime, SHAPE, cpu, group)
    draw = random.Random(f"{seed} {family} {isa.name} {regime.name}" + (f" {group}" if group else ""))
    scalar, deep = isa.name == "scalar", bool(os.environ.get(DEEP_VARIABLE))
    presets: Sequence[KernelSpec] = () if scalar else tuple(space.known_good)  # seconds each to compile
    widest = [] if group else list(edges(space))  # int16 sums end with a group, below the edge
    others: Sequence[KernelSpec]
    if deep:
        others = (*presets, *widest, *draw.sample(space.points, sample))
    else:
        places = ([r.name for r in REGIMES], [i.name for i in load_isas()], list(EVERY_FAMILY))
        turn = sum(map(list.index, places, (regime.name, isa.name, family)))
        of_space: Sequence[KernelSpec] = () if scalar else space.points
        some = (presets, widest, ())[turn % 3] or of_space
        if group:
            some = () if turn % 3 else (presets, ())[turn % 2] or of_space
        others = draw.sample(some, min(1, len(some)))
    points = (space.default, *others)
    return [spec for spec in dict.fromkeys(points) if spec == space.default or not inherits(spec)]


def in_turn(isa: Isa, regime: Regime, number: int) -> bool:
    """Whether the ``number``-th variant is verified: on each level in one regime, elsewhere in the others.

    `.ci/deep`: in all of them.
    """
    levels = [one.name for one in load_isas()]
    at = number + levels.index(isa.name) + [one.name for one in REGIMES].index(regime.name)
    return bool(os.environ.get(DEEP_VARIABLE)) or at % len(REGIMES) == 0


def for_one_shape(isa: Isa, families: Iterable[str], cpu: Cpu) -> list[KernelSpec]:
    """Kernels of every family with the shape in the text: tiny, ragged, cut along k.

    Each family in one regime, every regime in some family; `.ci/deep`: all of them.
    """
    shapes = (Shape(1, 1), Shape(33, 100), Shape(70, 2113))
    pairs = tuple(zip(REGIMES, shapes, strict=True))
    return [
        replace(space_for(family, isa, regime, SHAPE, cpu).default, shape=shape)
        for i, family in enumerate(families)
        for regime, shape in (pairs if os.environ.get(DEEP_VARIABLE) else (pairs[i % 3],))
    ]
