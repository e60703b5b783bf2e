"""The C text of one kernel, and the space it comes from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bitgen.api.models import preset_of, step_sizes
from bitgen.api.workshop import Workshop
from bitgen.cpu import find_isa
from bitgen.errors import UsageError
from bitgen.render import Source, render_kernel, render_quantize, render_step, render_tables
from bitgen.space import Space
from bitgen.spec import FAMILIES, KernelSpec, Layout, Shape, family_named

# Schedules depend on the shape only through cache blocks; where no shape is given, this one stands for it.
ANY_SHAPE = Shape(4096, 4096)


def legal_space(
    family: str, *, isa: str | None = None, shape: str | None = None, regime: str = "n1"
) -> Space:
    """The legal schedules of a family; ``isa`` may be a level that this CPU cannot run."""
    workshop = Workshop()
    level = find_isa(isa, workshop.isas) if isa else workshop.isa(None)
    at = Shape.parse(shape) if shape else ANY_SHAPE
    return workshop.space(family_named(family).name, level, regime, at)


def render_source(
    family: str,
    *,
    shape: str | None = None,
    isa: str | None = None,
    regime: str = "n1",
    row_block: int | None = None,
    algorithm: str | None = None,
    knobs: Sequence[str] = (),
    model: str | None = None,
) -> Source:
    """The C text of one kernel: the default schedule of its space, with ``knobs`` ("name=value") set.

    ``family`` may also be quantize, tables such as tl1_tables or tl5_wide_tables, or step: the forward step
    for every model, or for the sizes of ``model``. BitgenError quotes the rules that a schedule breaks.
    """
    if model is not None and family != "step":
        raise UsageError("only the forward step is made for a model: bitgen render step --model NAME")
    level = isa or Workshop().isa(None).name
    if family == "step":
        return render_step(level, step_sizes(preset_of(model)) if model else None)
    if family == "quantize":
        return render_quantize(level)
    if family.endswith("_tables"):
        stem = family.removesuffix("_tables")
        kinds = (kind for known in FAMILIES.values() for kind, _ in known.tables)
        kind = next((kind for kind in kinds if stem.endswith(f"_{kind}")), None)
        return render_tables(stem.removesuffix(f"_{kind}"), level, kind or algorithm)
    space = legal_space(family, isa=level, shape=shape, regime=regime)
    start = next(
        (s for s in (space.default, *space) if algorithm in (None, s.schedule.algorithm)),
        None,
    )
    if start is None:
        space.knobs(algorithm or "")  # raises, naming the algorithms there are
        raise UsageError(f"no legal schedule uses {algorithm}")
    layout = Layout(space.family, row_block) if row_block else start.layout
    spec = space.make(start.schedule.algorithm, layout, {**dict(start.schedule), **_parse_knobs(knobs)})
    space.check(spec, local=False)
    fixed = Shape.parse(shape) if shape else None
    return render_kernel(KernelSpec(spec.family, spec.isa, spec.regime, layout, spec.schedule, fixed))


def _parse_knobs(knobs: Sequence[str]) -> dict[str, int]:
    values = {}
    for knob in knobs:
        name, sep, value = knob.partition("=")
        if not sep or not re.fullmatch(r"-?[0-9]+", value.strip()):
            raise UsageError(f"knob {knob!r}: write it as name=integer, for example streams=4")
        values[name.strip()] = int(value)
    return values
