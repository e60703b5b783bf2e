"""The steps of bitgen as functions: render, tune, build, load. The command line calls these and nothing else.

::

    import bitgen

    result = bitgen.tune("3B")                 # records go to tune_logs/, winners are in result.winners
    bundle = bitgen.build("3B")                # generated/3B-<cpu family>/: library, header, manifest
    table = bitgen.load(bundle)                # or bitgen.load(): the best library for this CPU
    linear = table.linear(w, scale)            # w int8 (m, k) in {-1, 0, 1}
    y = linear(x)                              # x float32 (n, k) -> float32 (n, m)
"""

from __future__ import annotations

from bitgen.api.libraries import build, choices_for, load
from bitgen.api.models import preset_of
from bitgen.api.sources import ANY_SHAPE, legal_space, render_source
from bitgen.api.timing import KernelTiming, bench_kernels, check
from bitgen.api.tuning import export, tune, tune_with
from bitgen.api.workshop import Workshop, check_threads

__all__ = [
    "ANY_SHAPE",
    "KernelTiming",
    "Workshop",
    "bench_kernels",
    "build",
    "check",
    "check_threads",
    "choices_for",
    "export",
    "legal_space",
    "load",
    "preset_of",
    "render_source",
    "tune",
    "tune_with",
]
