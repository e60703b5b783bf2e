"""Which kernel next, and which one wins: candidates are proposed, measured, raced and chosen.

``tune(plan, runner, store, ...)`` runs the whole search and returns a `TuningResult`; `plan_for` makes the
plan of a model. The only package that imports optuna, and only when a space is too large to enumerate.
"""

from __future__ import annotations

from bitgen.search.dry import DRY_POLICY, dry
from bitgen.search.group import roofline_ns
from bitgen.search.plan import (
    Plan,
    SearchConfig,
    SpaceFactory,
    Target,
    load_search_config,
    plan_for,
    targets_of,
)
from bitgen.search.result import FormatCost, GroupReport, Row, TuningResult
from bitgen.search.tuner import Progress, Step, tune

__all__ = [
    "DRY_POLICY",
    "FormatCost",
    "GroupReport",
    "Plan",
    "Progress",
    "Row",
    "SearchConfig",
    "SpaceFactory",
    "Step",
    "Target",
    "TuningResult",
    "dry",
    "load_search_config",
    "plan_for",
    "roofline_ns",
    "targets_of",
    "tune",
]
