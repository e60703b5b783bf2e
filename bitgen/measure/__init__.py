"""One kernel in a child process: right? then how fast?

`LocalRunner` compiles candidates, proves each one exact in a forked child and times it there; `ReplayRunner`
answers the same questions from records. `check_kernel` and `sweep` hold kernels against the numpy reference
for the tests and for `bitgen check`.
"""

from __future__ import annotations

from bitgen.measure.records import (
    Job,
    Limits,
    Load,
    Measurement,
    Missing,
    Race,
    Runner,
    Status,
)
from bitgen.measure.replay import ReplayRunner

__all__ = [
    "Job",
    "Limits",
    "Load",
    "Measurement",
    "Missing",
    "Race",
    "ReplayRunner",
    "Runner",
    "Status",
]
