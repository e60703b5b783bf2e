"""Which kernel next, and which one wins: candidates are proposed, measured, raced and chosen.

``tune(plan, runner, store, ...)`` runs the whole search and returns a `TuningResult`; `plan_for` makes the
plan of a model. The only package that imports optuna, and only when a space is too large to enumerate.
"""

from __future__ import annotations

from bitgen.search.group import roofline_ns
from bitgen.search.plan import (
    Plan,
    SearchConfig,
    SpaceFactory,
    Target,
    TuneOptions,
    load_search_config,
    plan_for,
    targets_of,
    thread_candidates,
)
from bitgen.search.result import FormatCost, GroupReport, Row, TuningResult
from bitgen.search.tuner import Session, tune

__all__ = [
    "FormatCost",
    "GroupReport",
    "Plan",
    "Row",
    "SearchConfig",
    "Session",
    "SpaceFactory",
    "Target",
    "TuneOptions",
    "TuningResult",
    "load_search_config",
    "plan_for",
    "roofline_ns",
    "targets_of",
    "thread_candidates",
    "tune",
]
