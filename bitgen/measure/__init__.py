"""One kernel in a child process: is it right, and then how fast is it.

`LocalRunner` compiles candidates, proves each one exact in a forked child and times it there; `exact_sweep`
proves whole spaces.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitgen.measure.jobs import (
    Job,
    Limits,
    Load,
    Measurement,
    Missing,
    Race,
    Runner,
    Status,
    TileState,
)
from bitgen.measure.stats import DropRule

if TYPE_CHECKING:
    from bitgen.measure.runner import LocalRunner, Proof, TimingPolicy, measure_limits
    from bitgen.measure.verify import SweepCounts, exact_sweep, sweep

__all__ = [
    "DropRule",
    "Job",
    "Limits",
    "Load",
    "LocalRunner",
    "Measurement",
    "Missing",
    "Proof",
    "Race",
    "Runner",
    "Status",
    "SweepCounts",
    "TileState",
    "TimingPolicy",
    "exact_sweep",
    "measure_limits",
    "sweep",
]

# numpy, the renderer and the toolchain: who reads records or replays them does not pay for these.
_LAZY = {
    "LocalRunner": "runner",
    "Proof": "runner",
    "TimingPolicy": "runner",
    "measure_limits": "runner",
    "SweepCounts": "verify",
    "exact_sweep": "verify",
    "sweep": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
