"""A tune that goes the whole way and learns nothing: for emulators, and to see that tuning works."""

from __future__ import annotations

from dataclasses import replace

from bitgen.measure.runner import TimingPolicy
from bitgen.search.plan import Plan, SearchConfig
from bitgen.spec import regime_named

DRY_TRIALS = 2
# One repeat each, and patience: an emulator takes far longer than the CPU it plays.
DRY_POLICY = TimingPolicy(
    repeats=1, min_repeat_ms=0.0, race_min_ms=0.0, peak_rounds=1, check_timeout_s=300.0, timeout_s=600.0
)


def dry(plan: Plan, config: SearchConfig) -> tuple[Plan, SearchConfig]:
    """``plan`` and ``config`` with the same steps and as little work as the steps allow.

    Two kernels of each family and regime, the least number of tokens of each regime, no time limit, and one
    block of one round of the race, after which every default keeps its place: one round is beyond no noise.
    """
    regimes = {
        name: replace(regime, n=regime_named(name).n_min, finalists=1, drop_ratio=None)
        for name, regime in config.regimes.items()
    }
    return (
        replace(plan, trials=min(plan.trials, DRY_TRIALS), timeout_s=None, race_blocks=1),
        replace(config, regimes=regimes, race_block=1),
    )
