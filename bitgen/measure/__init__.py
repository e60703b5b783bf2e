"""One kernel in a process of its own: is it right, and then how fast is it.

`LocalRunner` compiles candidates and asks its worker to verify and time them; `exact_sweep` verifies whole
spaces.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from bitgen.measure.jobs import (
    Job,
    MachinePeak,
    Measurement,
    Missing,
    Race,
    RaceJob,
    Rates,
    Runner,
    Status,
    Timed,
)
from bitgen.measure.stats import EarlyStopping

if TYPE_CHECKING:
    from bitgen.measure.runner import LocalRunner, TimingPolicy, Verification
    from bitgen.measure.verify import SweepCounts, exact_sweep, sweep

__all__ = [
    "EarlyStopping",
    "Job",
    "LocalRunner",
    "MachinePeak",
    "Measurement",
    "Missing",
    "Race",
    "RaceJob",
    "Rates",
    "Runner",
    "Status",
    "SweepCounts",
    "Timed",
    "TimingPolicy",
    "Verification",
    "exact_sweep",
    "sweep",
]

# The renderer and the toolchain: who reads records or replays them does not pay for these.
_LAZY = {
    **dict.fromkeys(("LocalRunner", "TimingPolicy", "Verification"), "runner"),
    **dict.fromkeys(("SweepCounts", "exact_sweep", "sweep"), "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
