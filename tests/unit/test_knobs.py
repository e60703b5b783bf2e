"""A knob that is added to an algorithm: its values, the one that is off, and what is said without it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from synthetic import SCALAR

from bitgen.cpu import Isa, detect_cpu
from bitgen.errors import BitgenError, UsageError
from bitgen.families.algorithms import Multiply
from bitgen.families.base import Axes, Family
from bitgen.render import render_kernel
from bitgen.search.propose import TpeProposer
from bitgen.shapes import N1, Regime
from bitgen.space import Space, space_for
from bitgen.spec import Schedule, Shape

CPU = detect_cpu()
AXES = Multiply.axes


def with_load_ahead(self: Multiply, family: Family, isa: Isa, regime: Regime) -> Axes:
    axes = AXES(self, family, isa, regime)
    return {**axes, "load_ahead": (0, 1)} if regime is N1 else axes


def space() -> Space:
    return space_for("i2s", SCALAR, N1, Shape(320, 640), CPU)


def test_a_knob_that_is_off_leaves_every_kernel_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = space()
    monkeypatch.setattr(Multiply, "axes", with_load_ahead)
    monkeypatch.setattr(Multiply, "off", {"load_ahead": 0})
    after = space()
    assert after.default == before.default
    assert set(before.points) < set(after.points)
    added = set(after.points) - set(before.points)
    assert {spec.knobs["load_ahead"] for spec in added} == {1}
    assert all(re.search("_load_ahead1__scalar$", spec.name) for spec in added)
    assert render_kernel(after.default) == render_kernel(before.default)
    assert after.default.knobs["load_ahead"] == 0

    values = dict(after.default.schedule)
    assert after.make("direct", after.default.layout, {**values, "load_ahead": 0}) == after.default
    with pytest.raises(UsageError, match="load_ahead of direct must be 0 or 1"):
        after.check(after.make("direct", after.default.layout, {**values, "load_ahead": 2}))
    named = replace(after.default, schedule=Schedule("direct", (*after.default.schedule, ("load_ahead", 0))))
    assert after.broken(named), "one kernel has one name"


def test_a_search_walks_along_a_knob_that_is_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Multiply, "axes", with_load_ahead)
    monkeypatch.setattr(Multiply, "off", {"load_ahead": 0})
    points = space().points
    proposer = TpeProposer(points, [], 7)
    asked = proposer.ask(8)
    assert {spec.knobs["load_ahead"] for spec in asked} == {0, 1}
    for spec in asked:
        proposer.tell(spec, 1.0 + spec.knobs["load_ahead"])
    assert not set(proposer.ask(8)) & set(asked)


def test_a_knob_that_no_preset_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Multiply, "axes", with_load_ahead)
    with pytest.raises(BitgenError, match=r"i2s on scalar for n1 has no legal preset; the first, direct_"):
        _ = space().default
    with pytest.raises(BitgenError, match=r"all knobs of its algorithm.*prefetch_hint, load_ahead"):
        _ = space().default
